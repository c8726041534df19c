"""ESM++ on a folder of real tasks: accuracy by router, rank and number of proxies, and how good the routes are.

    python benchmarks/routing.py FOLDER [--proxies 32 128] [--ranks 8 32] [--json results.json]

FOLDER is the one that benchmarks/suite.py describes. Rows, proxies and α are chosen as there, from the validation
split (α for the static model, once per number of proxies); the test rows (400 per task, one fixed sample; all of them
with `--num-test 0`) are read after every choice. Accuracies are normalised by the experts, mean over tasks:

    heads given       the router picks the expert, the head is the task's
    found             the router picks expert and head; a sample of a task that was not found counts as wrong
    against static    the difference to the static model the experts stand on, heads given, with a 95 % interval from
                      a paired bootstrap over the test rows
    task found        share of samples whose likeliest task is theirs
    sure              share of samples whose task counts as found
    right if sure     share of those whose task it is
    foreign           with each task's expert taken out in turn: share of that task's rows that count as of no task,
                      and the accuracy with its own head, against the static model's
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
from hf_esm.checkpoints.heads import attach_head
from hf_esm.data.options import SampleOptions
from hf_esm.metrics import LabelledSamples, load_labelled
from hf_esm.metrics.outputs import classes_of


# Name, features, and what the experts' directions are of.
ROUTERS = (
    ("discriminant", "merged", "update"),
    ("discriminant", "merged", "residual"),
    ("discriminant", "base", "update"),
    ("prototype", "merged", "residual"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--proxies", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--num-test", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    logging.getLogger("hf_esm").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    tasks = sorted(path.name for path in (given.folder / "experts").iterdir() if path.is_dir())
    experts = {task: given.folder / "experts" / task for task in tasks}
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.folder / "base")
    options = SampleOptions(num_samples=given.num_test, seed=7, max_length=96)
    proxies, validation, test, own = {}, {}, {}, {}
    for task in tasks:
        rows = json.loads(gzip.decompress((given.folder / "data" / f"{task}.json.gz").read_bytes()))
        shuffled = random.Random(given.seed).sample(rows["validation"], len(rows["validation"]))
        validation[task] = shuffled[:60]
        proxies[task] = [{k: v for k, v in row.items() if k != "label"} for row in shuffled[60:]]
        expert = transformers.AutoModelForSequenceClassification.from_pretrained(experts[task]).eval()
        test[task] = load_labelled(rows["test"], tokenizer, expert.config, task, options)
        own[task] = float(hits(expert, test[task]).mean())

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in given.proxies:
            alpha, statistics = None, Path(scratch) / f"statistics-{count}"
            for rank in given.ranks:
                for router, features, directions in ROUTERS:
                    known = statistics.is_dir()
                    merged = merge_models(
                        given.folder / "base",
                        experts,
                        method={
                            "name": "esm++",
                            "router": router,
                            "router_features": features,
                            "expert_directions": directions,
                        },
                        rank=rank,
                        # Statistics hold no samples: the router's features on the merged model need them again.
                        calibration=statistics if known and features == "base" else proxies,
                        statistics_dir=None if known else str(statistics),
                        validation=validation if alpha is None else None,
                        alpha="auto" if alpha is None else alpha,
                        num_samples=count,
                        seed=given.seed,
                        max_length=96,
                        output_dir=str(Path(scratch) / f"{count}-{rank}-{router}-{features}-{directions}"),
                        progress=False,
                    )
                    alpha = merged.alpha
                    model = merged.load_routed()
                    title = f"{router}, {features}, {directions}"
                    if router == "discriminant" and features == "merged":
                        if directions == "update":
                            static = score(model, test, "static")
                            if rank == given.ranks[0]:
                                report(results, count, alpha, 0, "static", static, static, own)
                        given_task = score(model, test, "oracle")
                        report(results, count, alpha, rank, f"oracle, {directions}", given_task, static, own)
                    row = report(results, count, alpha, rank, title, score(model, test), static, own)
                    row |= routes(model, test, own)
                    if (router, features, rank) == ("discriminant", "merged", given.ranks[0]):
                        row["foreign"] = foreign(model, test, Path(scratch) / f"without-{title}-{count}", static)
                    print(row, flush=True)
    print("\n" + markdown(results))
    if given.json:
        given.json.write_text(json.dumps({"seed": given.seed, "rows": results}, indent=1) + "\n")


def hits(model: Any, data: LabelledSamples) -> Tensor:
    return (classes_of(model, data.samples, batch_size=50) == data.labels).double()


def score(model: RoutedModel, test: dict[str, LabelledSamples], mode: str = "") -> dict[str, Tensor]:
    found = {}
    for task, data in test.items():
        with model.route(task if mode == "oracle" else mode) if mode else nullcontext():
            found[task] = hits(model.task_model(task), data)
    return found


def report(
    results: list, proxies: int, alpha: float, rank: int, router: str, found: dict, static: dict, own: dict
) -> dict[str, Any]:
    def normalised(rows: dict[str, Tensor]) -> float:
        return sum(float(rows[task].mean()) / own[task] for task in own) / len(own)

    generator = torch.Generator().manual_seed(0)
    differences = []
    for _ in range(1000):
        drawn = {t: torch.randint(len(h), (len(h),), generator=generator) for t, h in found.items()}
        again = {t: found[t][drawn[t]] - static[t][drawn[t]] for t in found}
        differences.append(normalised(again))
    low, high = torch.tensor(differences).quantile(torch.tensor([0.025, 0.975])).tolist()
    results.append(
        {
            "proxies": proxies,
            "alpha": alpha,
            "rank": rank,
            "router": router,
            "heads given": normalised(found),
            "against static": (normalised(found) - normalised(static), low, high),
            "by task": {task: float(rows.mean()) for task, rows in found.items()},
        }
    )
    return results[-1]


def routes(model: RoutedModel, test: dict[str, LabelledSamples], own: dict[str, float]) -> dict[str, Any]:
    """How good the routes are, and accuracy with nothing given."""
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
        "found": sum(end[task] / own[task] for task in own) / len(own),
        "task found": sum(found) / len(found),
        "sure": sum(sure) / len(sure),
        "right if sure": sum(right) / max(len(right), 1),
        "calibration error": sum(map(abs, sums)) / len(found),
    }


def foreign(
    model: RoutedModel, test: dict[str, LabelledSamples], folder: Path, static: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """With each task taken out in turn: the share of its rows that count as of no task, and how much more of them are
    right than by the static model, with the task's own head.
    """
    found = {}
    for task, data in test.items():
        smaller = model.remove_expert(task, output_dir=folder / task)
        unsure = sum(not e.sure for e in smaller.explain(data.samples, 50)) / len(data.samples)
        head = attach_head(smaller.model.get_base_model(), model.folder, task)
        found[task] = unsure, float(hits(head, data).mean() - static[task].mean())
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    columns = ("heads given", "against static", "found", "task found", "sure", "right if sure", "calibration error")
    lines = ["| proxies | α | rank | router | " + " | ".join(columns) + " |", "|---" * (len(columns) + 4) + "|"]
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column)
            if isinstance(value, tuple):
                cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * part for part in value)))
            else:
                cells.append("" if value is None else f"{100 * value:.1f}")
        rank = row["rank"] or ""
        lines.append(f"| {row['proxies']} | {row['alpha']:g} | {rank} | {row['router']} | " + " | ".join(cells) + " |")
    for row in rows:
        if "foreign" in row:
            by_task = ", ".join(f"{task} {100 * n:.0f} and {100 * d:+.1f}" for task, (n, d) in row["foreign"].items())
            none, difference = (100 * sum(found) / len(found) for found in zip(*row["foreign"].values(), strict=True))
            lines.append(
                f"\nForeign rows, {row['proxies']} proxies, {row['router']}: {none:.0f} % count as of no task; "
                f"accuracy {difference:+.1f} against the static model ({by_task})."
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
