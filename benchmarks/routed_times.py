"""Time a routed model with two versions of the package, in one run: forward passes, and decoding where it writes.

    git worktree add /elsewhere COMMIT
    python benchmarks/routed_times.py ROUTED_MODEL --before /elsewhere [--rounds 9] [--prompts FILE]

ROUTED_MODEL is a folder that `merge_models(…, method="esm++")` wrote, which both versions can load. A process of each
version loads it. They take turns: in every round each runs the same batch by the static model, which is loaded without
the adapter, by the routed model with the router deciding, and with a task named; as one forward pass, and, of a model
that writes, over generated tokens, at batch 1 and 8. Every time is divided by that of the static model of the same
version in the same round; the table has the minimum, median and maximum of the ratios, and the median time itself of
the static model, in milliseconds.

Under "floor" the table has the same ratio, from what the routed model computes or reads: for a forward pass the
multiplications of its linear maps, for decoding their bytes, and those of the experts that the samples get. Experts
that all samples share may be added to private weights, which are then all that is read.

`--peft` adds PEFT's mixed batches (`adapter_names`) over the same static model, with the experts exported as LoRA
adapters, beside ours; both are given a task per sample, in turn over the tasks.

`--prompts` names a text file with a prompt a line; short ones are repeated. Without it the tokens are random.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--before", type=Path, help="checkout of the version to compare with")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--length", type=int, default=64, help="tokens of each sample")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--prompts", type=Path, help="text file with a prompt a line")
    parser.add_argument("--peft", action="store_true", help="also PEFT's mixed batches")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    versions = {"before": args.before, "after": HERE} if args.before else {"now": HERE}
    workers = {name: start(args, path.resolve()) for name, path in versions.items()}
    least = {name: json.loads(worker.stdout.readline()) for name, worker in workers.items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            rounds[name].append(ask(worker))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    print("\n".join(table(rounds, next(iter(least.values())))))


def start(args: argparse.Namespace, code: Path) -> subprocess.Popen:
    """A process that runs one round for every line that it reads, with the package at `code`."""
    command = [sys.executable, __file__, str(args.model), "--worker", *("--length", str(args.length))]
    command += ["--tokens", str(args.tokens), *(["--prompts", str(args.prompts)] if args.prompts else [])]
    command += ["--peft"] if args.peft else []
    environment = {**os.environ, "PYTHONPATH": str(code)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(worker: subprocess.Popen) -> dict[str, float]:
    """The seconds of one round, by what was run."""
    worker.stdin.write("\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def work(args: argparse.Namespace) -> None:
    """Load the model, run everything once, then a round per line of the input."""
    import torch
    import transformers

    from hf_esm import RoutedModel

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = RoutedModel.from_pretrained(args.model)
    static = type(model.model.get_base_model()).from_pretrained(args.model).eval()
    ids = torch.randint(5, static.config.vocab_size, (8, args.length))
    if args.prompts:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        lines = [tokenizer(line)["input_ids"] for line in args.prompts.read_text().splitlines() if line.strip()]
        ids = torch.tensor([(lines[i % len(lines)] * args.length)[: args.length] for i in range(8)])

    def run(kind: str, batch: int, model: Any, **options: Any) -> float:
        inputs = {"input_ids": ids[:batch], "attention_mask": torch.ones_like(ids[:batch]), **options}
        settings = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
        began = time.perf_counter()
        model(**inputs) if kind == "forward" else model.generate(**inputs, **settings)
        return time.perf_counter() - began

    def routed(kind: str, batch: int, tasks: Any = None) -> float:
        began = time.perf_counter()
        with nullcontext() if tasks is None else model.route(tasks):
            run(kind, batch, model.model if kind == "forward" else model)
        return time.perf_counter() - began

    each = [model.tasks[i % len(model.tasks)] for i in range(len(ids))]
    ways: dict[str, Callable[[str, int], float]] = {
        "static": lambda kind, batch: run(kind, batch, static),
        "decided": routed,
        "named": lambda kind, batch: routed(kind, batch, model.tasks[0]),
    }
    if args.peft:
        mixed = mixed_adapters(model, args.model)
        ways["each named"] = lambda kind, batch: routed(kind, batch, each[:batch])
        ways["PEFT, each named"] = lambda kind, batch: run(kind, batch, mixed, adapter_names=each[:batch])
    kinds = ["forward", *(["decoding"] if static.can_generate() else [])]

    @torch.no_grad()
    def turn() -> dict[str, float]:
        return {f"{k}, batch {b}/{way}": ways[way](k, b) for k in kinds for b in (1, 8) for way in ways}

    turn()
    print(json.dumps({f"{k}, batch {b}": floors(model.model, ids[:b], k) for k in kinds for b in (1, 8)}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)


def mixed_adapters(model: Any, folder: Path) -> Any:
    """The static model in `folder` with the experts as LoRA adapters."""
    from peft import PeftModel

    static = type(model.model.get_base_model()).from_pretrained(folder).eval()
    with tempfile.TemporaryDirectory() as scratch:
        files = {task: str(path) for task, path in model.export_lora(Path(scratch) / "lora", heads=False).items()}
        first, *others = files
        mixed = PeftModel.from_pretrained(static, files[first], adapter_name=first)
        for task in others:
            mixed.load_adapter(files[task], adapter_name=task)
    return mixed.eval()


def floors(model: Any, ids: Any, kind: str) -> list[float]:
    """What the routed model computes or reads at least, over the same of the static model: decided, and named."""
    from torch import nn

    from hf_esm.tuners.routed.layer import RoutedExpertsLinear
    from hf_esm.tuners.routed.model import decide

    routed = [module for module in model.modules() if isinstance(module, RoutedExpertsLinear)]
    body = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    expert = sum(a[0].numel() for module in routed for a in module.routed_experts_A.values())
    expert += sum(b[0].numel() for module in routed for b in module.routed_experts_B.values())
    found = next(decision for *_, decision in decide(model, {"input_ids": ids}))
    experts, weights = found.route
    shared = bool((experts == experts[0]).all() and (weights == weights[0]).all())
    rank = max(a.shape[1] for module in routed for a in module.routed_experts_A.values())
    if kind == "forward":
        counts = [float((weights > 0).sum(1).double().mean()), 1.0]
        folding = sum(module.base_layer.weight.numel() for module in routed) * rank / ids.numel()
        costs = [min(expert, folding) if shared else expert, min(expert, folding)]
        return [1 + count * cost / body for count, cost in zip(counts, costs, strict=True)]
    return [1.0 if shared else 1 + expert / body * len(experts[weights > 0].unique()), 1.0]


def table(rounds: dict[str, list[dict[str, float]]], least: dict[str, list[float]]) -> list[str]:
    """Markdown rows: by what was run and version, the ratios to the static model."""
    first = next(iter(rounds.values()))[0]
    ways = dict.fromkeys(key.partition("/")[2] for key in first)
    columns = [f"{way} / static" + (" | floor" if way in ("decided", "named") else "") for way in list(ways)[1:]]
    lines = [f"| | version | static, ms | {' | '.join(columns)} |"]
    lines.append("|---|---|" + "--:|" * (lines[0].count("|") - 3))
    for run in dict.fromkeys(key.partition("/")[0] for key in first):
        for name, turns in rounds.items():
            cells = [f"{1000 * statistics.median(turn[f'{run}/static'] for turn in turns):.1f}"]
            floor = dict(zip(("decided", "named"), least[run], strict=True))
            for way in list(ways)[1:]:
                ratios = sorted(turn[f"{run}/{way}"] / turn[f"{run}/static"] for turn in turns)
                cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
                cells += [f"{floor[way]:.2f}"] if way in floor else []
            lines.append(f"| {run} | {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
