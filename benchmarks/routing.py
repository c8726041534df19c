"""Measure ESM++ on real tasks: accuracy by router, rank and number of samples, and how good the routes are.

    python benchmarks/routing.py FOLDER [--samples 32 128] [--ranks 8 32] [--json results.json]

benchmarks/suite.py describes FOLDER. As there, rows, samples and α are chosen from the validation split (α for each
static model, once per number of samples). The routed models of the published code, over that code's static models, are
`esm++-roberta` and `esm++-vit`. The test rows (400 per task, one fixed draw; all with `--num-test 0`) are
read after every choice. Accuracies are normalised by the experts', mean over tasks:

    heads named       the router chooses the expert, the caller names the head
    nothing named     the router chooses expert and head; a sample whose task is not found counts as wrong
    against static    the difference to the static model of the same merge, heads named, with a 95 % interval from a
                      paired bootstrap over the test rows
    task found        share of samples whose likeliest task is their task
    sure              share of samples for which the router is sure of a task
    right if sure     share of these whose task it is
    foreign           with each task's expert removed in turn: share of that task's rows that belong to none of the
                      tasks by the router, and the accuracy with the task's head, against the static model's
"""

import argparse
import gzip
import json
import logging
import random
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_esm import RoutedModel, merge_models
from hf_esm.checkpoints import attach_head
from hf_esm.data import SampleOptions
from hf_esm.metrics import LabelledSamples, load_labelled
from hf_esm.metrics.outputs import classes_of


# By title: of the router, the model that features are of, and what the experts' directions are of, or as published.
ROUTERS = {
    f"{router}, {features}, {directions}": {
        "name": "esm++",
        "router": router,
        "router_features": features,
        "expert_directions": directions,
    }
    for router, features, directions in (
        ("discriminant", "merged", "update"),
        ("discriminant", "merged", "residual"),
        ("discriminant", "base", "update"),
        ("prototype", "merged", "residual"),
    )
} | {f"{name}, as published": {"name": name} for name in ("esm++-roberta", "esm++-vit")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--num-test", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.getLogger("hf_esm").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    tasks = sorted(path.name for path in (args.folder / "experts").iterdir() if path.is_dir())
    experts = {task: args.folder / "experts" / task for task in tasks}
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder / "base")
    options = SampleOptions(num_samples=args.num_test, seed=7, max_length=96)
    samples, validation, test, expert_accuracy = {}, {}, {}, {}
    for task in tasks:
        rows = json.loads(gzip.decompress((args.folder / "data" / f"{task}.json.gz").read_bytes()))
        shuffled = random.Random(args.seed).sample(rows["validation"], len(rows["validation"]))
        validation[task] = shuffled[:60]
        samples[task] = [{k: v for k, v in row.items() if k != "label"} for row in shuffled[60:]]
        expert = transformers.AutoModelForSequenceClassification.from_pretrained(experts[task]).eval()
        test[task] = load_labelled(rows["test"], tokenizer, expert.config, task, options)
        expert_accuracy[task] = float(hits(expert, test[task]).mean())

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in args.samples:
            statistics = Path(scratch) / f"statistics-{count}"
            alphas: dict[str, float] = {}  # by the method of the static model
            for rank in args.ranks:
                for title, method in ROUTERS.items():
                    known, alpha = statistics.is_dir(), alphas.get(method["name"])
                    merged = merge_models(
                        args.folder / "base",
                        experts,
                        method=method,
                        rank=rank,
                        # Statistics hold no samples: the router's features on the merged model need them again.
                        calibration=statistics if known and "discriminant, merged" not in title else samples,
                        statistics_dir=None if known else str(statistics),
                        validation=validation if alpha is None else None,
                        alpha="auto" if alpha is None else alpha,
                        num_samples=count,
                        seed=args.seed,
                        max_length=96,
                        output_dir=str(Path(scratch) / f"{count}-{rank}-{title.replace(', ', '-')}"),
                        progress=False,
                    )
                    alpha = alphas[method["name"]] = merged.alpha
                    model = merged.load_routed()
                    if "prototype" not in title and "base" not in title:
                        if "update" in title or "published" in title:
                            static = score(model, test, "static")
                            if rank == args.ranks[0]:
                                of = f"static of {method['name']}"
                                report(results, (count, alpha, 0, of), static, static, expert_accuracy)
                        oracle = score(model, test, "oracle")
                        setting = (count, alpha, rank, f"oracle, {title}")
                        report(results, setting, oracle, static, expert_accuracy)
                    setting = (count, alpha, rank, title)
                    row = report(results, setting, score(model, test), static, expert_accuracy)
                    row |= routes(model, test, expert_accuracy)
                    if title.startswith("discriminant, merged") and rank == args.ranks[0]:
                        row["foreign"] = foreign(model, test, Path(scratch) / f"without-{title}-{count}", static)
                    print(row, flush=True)
    print("\n" + markdown(results))
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "rows": results}, indent=1) + "\n")


def hits(model: Any, data: LabelledSamples) -> Tensor:
    return (classes_of(model, data.samples, batch_size=50) == data.labels).double()


def score(model: RoutedModel, test: dict[str, LabelledSamples], mode: str = "") -> dict[str, Tensor]:
    found = {}
    for task, data in test.items():
        with model.route(task if mode == "oracle" else mode) if mode else nullcontext():
            found[task] = hits(model.task_model(task), data)
    return found


def report(
    results: list, setting: tuple[int, float, int, str], found: dict, static: dict, expert_accuracy: dict
) -> dict[str, Any]:
    """Add a row of scores to the results; the setting is samples, α, rank and router."""

    def normalised(rows: dict[str, Tensor]) -> float:
        return sum(float(rows[task].mean()) / expert_accuracy[task] for task in expert_accuracy) / len(expert_accuracy)

    generator = torch.Generator().manual_seed(0)
    differences = []
    for _ in range(1000):
        drawn = {t: torch.randint(len(h), (len(h),), generator=generator) for t, h in found.items()}
        again = {t: found[t][drawn[t]] - static[t][drawn[t]] for t in found}
        differences.append(normalised(again))
    low, high = torch.tensor(differences).quantile(torch.tensor([0.025, 0.975])).tolist()
    results.append(
        {
            **dict(zip(("samples", "alpha", "rank", "router"), setting, strict=True)),
            "heads named": normalised(found),
            "against static": (normalised(found) - normalised(static), low, high),
            "by task": {task: float(rows.mean()) for task, rows in found.items()},
        }
    )
    return results[-1]


def routes(model: RoutedModel, test: dict[str, LabelledSamples], expert_accuracy: dict[str, float]) -> dict[str, Any]:
    """Measure how good the routes are, and the accuracy where neither head nor task is named."""
    found, sure, right, end = [], [], [], {}
    confidence: list[float] = []
    for task, data in test.items():
        why = model.explain(data.samples, 50)
        found += [e.likeliest == task for e in why]
        sure += [e.sure for e in why]
        right += [e.likeliest == task for e in why if e.sure]
        confidence += [e.probabilities[e.likeliest] for e in why]
        labels = model.task_model(task).config.id2label
        predictions = model.predict(data.samples, batch_size=50)
        good = [
            p.task == task and p.label == labels[y] for p, y in zip(predictions, data.labels.tolist(), strict=True)
        ]
        end[task] = sum(good) / len(good)
    sums = [0.0] * 10  # expected calibration error over ten bins
    for value, good in zip(confidence, found, strict=True):
        sums[min(int(value * 10), 9)] += good - value
    return {
        "nothing named": sum(end[task] / expert_accuracy[task] for task in expert_accuracy) / len(expert_accuracy),
        "task found": sum(found) / len(found),
        "sure": sum(sure) / len(sure),
        "right if sure": sum(right) / max(len(right), 1),
        "calibration error": sum(map(abs, sums)) / len(found),
    }


def foreign(
    model: RoutedModel, test: dict[str, LabelledSamples], folder: Path, static: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Return by task, with its expert removed: the share of its rows that count as belonging to none of the tasks, and
    the accuracy with the task's head, minus the static model's.
    """
    found = {}
    for task, data in test.items():
        smaller = model.remove_expert(task, output_dir=folder / task)
        unsure = sum(not e.sure for e in smaller.explain(data.samples, 50)) / len(data.samples)
        head = attach_head(smaller.model.get_base_model(), model.folder, task)
        found[task] = unsure, float(hits(head, data).mean() - static[task].mean())
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    columns = (
        "heads named",
        "against static",
        "nothing named",
        "task found",
        "sure",
        "right if sure",
        "calibration error",
    )
    lines = ["| samples | α | rank | router | " + " | ".join(columns) + " |", "|---" * (len(columns) + 4) + "|"]
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column)
            if isinstance(value, tuple):
                cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * part for part in value)))
            else:
                cells.append("" if value is None else f"{100 * value:.1f}")
        rank = row["rank"] or ""
        lines.append(f"| {row['samples']} | {row['alpha']:g} | {rank} | {row['router']} | " + " | ".join(cells) + " |")
    for row in rows:
        if "foreign" in row:
            by_task = ", ".join(f"{task} {100 * n:.0f} and {100 * d:+.1f}" for task, (n, d) in row["foreign"].items())
            none, difference = (100 * sum(found) / len(found) for found in zip(*row["foreign"].values(), strict=True))
            lines.append(
                f"\nForeign rows, {row['samples']} samples, {row['router']}: {none:.0f} % belong to none "
                f"of the tasks; accuracy {difference:+.1f} against the static model ({by_task})."
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
