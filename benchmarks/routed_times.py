"""Time a routed model with two versions of the package, in one run: forward passes, and decoding where it writes.

    git worktree add /elsewhere COMMIT
    python benchmarks/routed_times.py ROUTED_MODEL --before /elsewhere [--rounds 9]

ROUTED_MODEL is a folder that `merge_models(…, method="esm++")` wrote, which both versions can load. A process of each
version loads it. They take turns: in every round each runs the same batch by the static model, which is loaded without
the adapter, by the routed model with the router deciding, and with a task named; as one forward pass, and, of a model
that writes, over 32 generated tokens at batch 1 and 8. Every time is divided by that of the static model of the same
version in the same round; the table has the minimum, median and maximum of the ratios, and the median time itself of
the static model, in milliseconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parents[1]
TOKENS = 32
ROUTES = ("static", "decided", "named")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--before", type=Path, help="checkout of the version to compare with")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--length", type=int, default=64, help="tokens of each sample")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    versions = {"before": args.before, "after": HERE} if args.before else {"now": HERE}
    workers = {name: start(args, path.resolve()) for name, path in versions.items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            rounds[name].append(ask(worker))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    print("\n".join(table(rounds)))


def start(args: argparse.Namespace, code: Path) -> subprocess.Popen:
    """A process that runs one round for every line that it reads, with the package at `code`."""
    command = [sys.executable, __file__, str(args.model), "--length", str(args.length), "--worker"]
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

    def run(kind: str, batch: int, way: str) -> Any:
        inputs = {"input_ids": ids[:batch], "attention_mask": torch.ones_like(ids[:batch])}
        if kind == "forward":
            return (static if way == "static" else model.model)(**inputs)
        settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        return (static if way == "static" else model).generate(**inputs, **settings)

    def timed(kind: str, batch: int, way: str) -> float:
        began = time.perf_counter()
        with model.route(model.tasks[0]) if way == "named" else nullcontext():
            run(kind, batch, way)
        return time.perf_counter() - began

    kinds = ["forward", *(["decoding"] if static.can_generate() else [])]

    @torch.no_grad()
    def turn() -> dict[str, float]:
        return {f"{k}, batch {b}/{way}": timed(k, b, way) for k in kinds for b in (1, 8) for way in ROUTES}

    turn()
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)


def table(rounds: dict[str, list[dict[str, float]]]) -> list[str]:
    """Markdown rows: by what was run and version, the ratios to the static model."""
    lines = ["| | version | static, ms | decided / static | named / static |", "|---|---|--:|--:|--:|"]
    for run in dict.fromkeys(key.partition("/")[0] for key in next(iter(rounds.values()))[0]):
        for name, turns in rounds.items():
            cells = [f"{1000 * statistics.median(turn[f'{run}/static'] for turn in turns):.1f}"]
            for way in ROUTES[1:]:
                ratios = sorted(turn[f"{run}/{way}"] / turn[f"{run}/static"] for turn in turns)
                cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            lines.append(f"| {run} | {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
