"""Time an ESM merge against the literal formulas, in the same run.

    python benchmarks/merge_speed.py                        single layers from 384 to 4096 x 11008; see layer_speed.py
    python benchmarks/merge_speed.py FOLDER [--rounds 3]    a whole merge of the suite, calibration included

benchmarks/suite.py describes FOLDER. The literal side of a whole merge writes the formulas down plainly. Each expert
is loaded and run over the same samples, with hooks that keep every layer's input `X`. Then, in float32 and with the
same threads, follow LAPACK's thin SVD of `ΔO = X Δᵀ` for every task and layer, thin SVDs for both polar factors, and
TSV-M by thin SVDs for the other matrices, embeddings among them. Both sides read the same checkpoints and end with the
merged weights on disk. They run in turn, hf_esm also with `tolerance` 0.001, `--rounds` times; ratios are taken round
by round.
"""

import argparse
import gzip
import json
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from layer_speed import measure_layers
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_esm import merge_models
from hf_esm.data import SampleOptions, collate, encode, read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of the suite; without it, single layers are measured")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.getLogger("hf_esm").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.folder is None:
        measure_layers()
        return
    tasks = sorted(path.name for path in (args.folder / "experts").iterdir() if path.is_dir())
    samples = {}
    for task in tasks:
        rows = json.loads(gzip.decompress((args.folder / "data" / f"{task}.json.gz").read_bytes()))["validation"]
        samples[task] = [{k: v for k, v in row.items() if k != "label"} for row in rows]

    sides = {
        "hf_esm": partial(merge, "esm"),
        "with a tolerance": partial(merge, {"name": "esm", "tolerance": 0.001}),
        "literal formulas": merge_literally,
    }
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, run in sides.items():
            parts, seconds = timed(run, args.folder, tasks, samples)
            taken[side].append(seconds)
            print(f"{side} {seconds:.1f} s {parts}", flush=True)
    print(f"\n{len(tasks)} experts, {torch.get_num_threads()} threads, medians, and ratios of the literal side")
    for side, seconds in taken.items():
        ratios = [literal / took for literal, took in zip(taken["literal formulas"], seconds, strict=True)]
        spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        print(f"{side:18}{statistics.median(seconds):6.1f} s  {spread}")


def timed(run: Any, *arguments: Any) -> tuple[dict[str, float], float]:
    start = time.perf_counter()
    parts = run(*arguments)
    return {name: round(seconds, 1) for name, seconds in parts.items()}, time.perf_counter() - start


def merge(method: Any, folder: Path, tasks: list[str], samples: dict[str, list]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        experts = {task: folder / "experts" / task for task in tasks}
        output = str(Path(scratch) / "merged")
        result = merge_models(
            folder / "base",
            experts,
            method=method,
            calibration=samples,
            output_dir=output,
            max_length=96,
            progress=False,
        )
    return result.seconds


def merge_literally(folder: Path, tasks: list[str], samples: dict[str, list]) -> dict[str, float]:
    """Merge by the formulas of ESM and, for matrices without inputs, of TSV-M, by one thin SVD after the other."""
    seconds: dict[str, float] = defaultdict(float)
    start = time.perf_counter()
    base = transformers.AutoModel.from_pretrained(folder / "base").state_dict()
    processor = transformers.AutoTokenizer.from_pretrained(folder / "base")
    updates: dict[str, list[Tensor]] = defaultdict(list)
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    for task in tasks:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "experts" / task).eval()
        options = SampleOptions(max_length=96)
        encoded = encode(read_rows(samples[task], task, options), processor, model.config, task, options)
        for name, rows in layer_inputs(model.base_model, model, encoded).items():
            inputs[f"{name}.weight"].append(rows)
        for name, weight in model.base_model.state_dict().items():
            if not name.startswith("pooler") and weight.is_floating_point():
                updates[name].append(weight - base[name])
    seconds["calibrating"] = time.perf_counter() - start
    merged = {}
    for name, stack in updates.items():
        start = time.perf_counter()
        if stack[0].dim() < 2:
            merged[name], kind = torch.stack(stack).mean(0), "averaging"
        elif name in inputs:
            merged[name], kind = essential_merge(stack, inputs[name], seconds), "esm"
        else:
            merged[name], kind = task_singular_vectors(stack), "tsv-m"
        seconds[kind] += time.perf_counter() - start
    with tempfile.TemporaryDirectory() as scratch:
        save_file({name: base[name] + update for name, update in merged.items()}, Path(scratch) / "merged.safetensors")
    return seconds


@torch.no_grad()
def layer_inputs(body: nn.Module, model: nn.Module, samples: list) -> dict[str, Tensor]:
    """Record every real token that each linear map of the body's encoder reads, `[n, d_in]`."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    mask: list[Tensor] = []

    def keeper(name: str) -> Any:
        return lambda module, arguments: found[name].append(arguments[0][mask[-1]])

    maps = {name: m for name, m in body.encoder.named_modules(prefix="encoder") if isinstance(m, nn.Linear)}
    hooks = [module.register_forward_pre_hook(keeper(name)) for name, module in maps.items()]
    for start in range(0, len(samples), 8):
        batch = collate(samples[start : start + 8], model.config)
        mask.append(batch["attention_mask"].bool())
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def polar(matrix: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right * values.mean()


def essential_merge(updates: list[Tensor], inputs: list[Tensor], seconds: dict[str, float]) -> Tensor:
    rank = max(updates[0].shape[0] // len(updates), 1)
    directions, coordinates = [], []
    for update, rows in zip(updates, inputs, strict=True):
        start = time.perf_counter()
        _, values, right = torch.linalg.svd(rows @ update.T, full_matrices=False)
        seconds["of which SVD of the output shifts"] += time.perf_counter() - start
        weights = values[:rank].square() ** 0.15
        essential = right[:rank].T * (weights / weights.mean())
        directions.append(essential)
        coordinates.append(essential.T @ update)
    start = time.perf_counter()
    merged = polar(torch.cat(directions, dim=1)) @ polar(torch.cat(coordinates))
    seconds["of which polar factors"] += time.perf_counter() - start
    return merged


def task_singular_vectors(updates: list[Tensor]) -> Tensor:
    rank = max(min(updates[0].shape) // len(updates), 1)
    triplets = [torch.linalg.svd(update, full_matrices=False) for update in updates]
    values = torch.cat([s[:rank] for _, s, _ in triplets])
    left, _, left_turn = torch.linalg.svd(torch.cat([u[:, :rank] for u, _, _ in triplets], dim=1), full_matrices=False)
    right, _, right_turn = torch.linalg.svd(torch.cat([v[:rank] for _, _, v in triplets]), full_matrices=False)
    return (left @ left_turn * values) @ (right @ right_turn)


if __name__ == "__main__":
    main()
