"""Merge models that do not fit into memory: a synthetic Llama of three billion parameters and its experts.

    python benchmarks/large_merge.py FOLDER [--layers 50] [--experts 4] [--tolerance 0] [--max-memory 4GB]

Checks that FOLDER has room, and writes a base and experts into it in bfloat16, sharded, one tensor at a time. Every
weight of an expert is the base's plus an update of rank 16 and a little noise. Then merges them, calibration included,
and prints the time of every stage and its peak memory: what the process allocates (anonymous pages, sampled every
5 ms), minus what it holds after its imports. Pages of mapped files, which the operating system drops when it needs
room, are counted separately. All files are removed at the end. Linux only.
"""

import argparse
import logging
import shutil
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from peak_memory import anonymous_bytes, mapped_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from hf_esm import merge_models
from hf_esm.checkpoints.base import build_skeleton
from hf_esm.checkpoints.shards import ShardedWriter


TOKENS = 32  # of each of the 32 samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--method", default="esm")
    parser.add_argument("--tolerance", type=float, help="of a method that has one")
    parser.add_argument("--max-memory", default="4GB")
    args = parser.parse_args()
    logging.getLogger("hf_esm").setLevel(logging.ERROR)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 256,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    args.folder.mkdir(parents=True, exist_ok=True)
    skeleton = build_skeleton(LlamaForCausalLM, config)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    largest = max(parameter.numel() for parameter in skeleton.parameters())
    needed = parameters * (2 * (args.experts + 1) + 2 + 4)  # the models, the merged one, the unscaled updates
    needed += 4 * args.experts * args.layers * 32 * TOKENS * (3 * args.hidden + args.intermediate)  # statistics
    print(f"{parameters / 1e9:.2f} billion parameters, largest weight {4 * largest / 1e6:.0f} MB in float32")
    free = shutil.disk_usage(args.folder).free
    print(f"{args.experts} experts: {needed / 1e9:.0f} GB on disk wanted, {free / 1e9:.0f} GB free", flush=True)
    if needed > 0.97 * free:
        raise SystemExit("Not enough room on that disk.")
    work = args.folder / "large_merge"
    work.mkdir()
    try:
        start = time.perf_counter()
        names = ["base", *(f"expert{i}" for i in range(args.experts))]
        for seed, name in enumerate(names):
            write_model(work / name, skeleton, seed)
        print(f"written in {time.perf_counter() - start:.0f} s", flush=True)
        method = {"name": args.method} | ({"tolerance": args.tolerance} if args.tolerance else {})
        seconds, peaks = measure(work, names[1:], method, args.max_memory, args.vocabulary)
        for stage, took in seconds.items():
            print(f"  {stage:18} {took:7.1f} s")
        for stage, (allocated, mapped) in peaks.items():
            sizes = f"{allocated / 1e9:5.2f} GB allocated, {mapped / 1e9:5.2f} GB of files mapped"
            print(f"  peak while {stage.lower():18} {sizes}")
        print(f"  {sum(seconds.values()):.0f} s in all")
    finally:
        shutil.rmtree(work)


def write_model(folder: Path, skeleton: LlamaForCausalLM, seed: int) -> None:
    """Write the base (seed 0), or an expert: the base's weights plus an update that the seed determines."""
    folder.mkdir()
    skeleton.config.save_pretrained(folder)
    tied = set(skeleton.all_tied_weights_keys)
    plan = {
        name: torch.empty_like(parameter, dtype=torch.bfloat16, device="meta")
        for name, parameter in skeleton.state_dict().items()
        if name not in tied
    }
    with ShardedWriter(folder, plan, "1GB") as writer:
        for place, (name, planned) in enumerate(plan.items()):
            weight = noise(planned.shape, 0.02, place)
            if planned.dim() == 1:
                weight = 1 + weight
            if seed:
                weight += noise(planned.shape, 1e-4, 10_000 * seed + place)
                if planned.dim() == 2:
                    rows, columns = planned.shape
                    left, right = noise((rows, 16), 1.0, -10_000 * seed - place), noise((16, columns), 5e-4, -place)
                    weight += left @ right
            writer.write(name, weight.to(torch.bfloat16))


def noise(shape: tuple[int, ...], scale: float, seed: int) -> torch.Tensor:
    return torch.empty(shape).normal_(0, scale, generator=torch.Generator().manual_seed(seed + 2**40))


def measure(
    work: Path, experts: list[str], method: dict[str, Any], max_memory: str, vocabulary: int
) -> tuple[dict[str, float], dict[str, tuple[int, int]]]:
    """Return each stage's seconds, and the largest allocated and mapped bytes of each step that the merge reports."""
    stage, running = ["reading headers"], [True]
    peaks: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    before = anonymous_bytes()

    def sample() -> None:
        while running:
            seen = anonymous_bytes() - before, mapped_bytes()
            peaks[stage[0]] = tuple(map(max, peaks[stage[0]], seen))
            time.sleep(0.005)

    watcher = threading.Thread(target=sample)
    watcher.start()
    draw = torch.Generator().manual_seed(0)
    calibration = {
        task: [{"input_ids": torch.randint(0, vocabulary, (TOKENS,), generator=draw)} for _ in range(32)]
        for task in experts
    }
    try:
        result = merge_models(
            work / "base",
            {task: work / task for task in experts},
            calibration=calibration,
            method=method,
            max_memory=max_memory,
            output_dir=work / "merged",
            progress=False,
            callback=lambda description, done, total: stage.__setitem__(0, description),
        )
    finally:
        running.clear()
        watcher.join()
    return result.seconds, dict(peaks)


if __name__ == "__main__":
    main()
