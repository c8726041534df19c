"""Compare methods on a folder of language experts: the share of the experts' gain over the base that is kept.

    python benchmarks/language.py FOLDER [--methods default mean "{name: esm, gamma: 0.15}"] [--split test]
    python benchmarks/language.py FOLDER --subsets --methods default regmean tsv-m
    python benchmarks/language.py FOLDER --methods default esm++ "{name: esm++, rank: 128}" --generate

FOLDER holds
    base/             the causal language model that all experts were tuned from, with its tokenizer
    experts/TASK/     one full fine-tune per task, as `save_pretrained` writes it
    data/TASK.json.gz {"train": [{"text", "label"?}, …], "validation": […], "test": […]}, gzipped JSON

Rows with a `label` are scored on the label, as the answer to `text`; other rows on the text. An end-of-text token is
added to both, and the text is cut to `--max-length` tokens. The samples of a task are `--num-samples` of its train
rows, text and label joined, another draw for every seed.

Kept share of a task: (log base - log model) / (log base - log expert) of the perplexities, in %. 0 is as good as the
base, 100 as good as the expert. Nats per token: mean over the tasks of the loss. Seconds: of the merge, with
calibration.

Methods with routed experts get a second table. Their row in the first table is with the experts that the router adds:
it reads the `text` of rows with a `label`, and the whole text of other rows. The second table adds the same with the
task's expert named, and without experts, and how good the routes are, in % of the rows:

    task found         the likeliest task is their own
    sure               the router is sure of a task
    right if sure      share of these whose task is their own
    calibration error  expected calibration error of the likeliest task's probability, over ten bins
    sure if foreign    with each task's expert removed in turn: the router is sure of another task

`--generate` adds a table of exact matches: the share of rows with a `label`, in %, whose greedy answer to `text` is
the label and ends there.

A method is a name, `default` (`merge_models` without `method`), or settings as YAML. `alpha`, `refine` and `lines`
among the settings are arguments of `merge_models`: "{name: regmean, alpha: 0.7}". The output folder holds `table.md`,
`results.json` and a cache, so that a second run computes only what is new. After a change of the package's
code, all merges are new. `--subsets` compares on all subsets of 2 and of 3 tasks, and writes `subsets.md` and
`subsets.json`.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import logging
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hf_esm
from hf_esm import METHODS, RoutedModel, merge_models
from hf_esm.checkpoints import ROUTED_FOLDER
from hf_esm.methods import resolve_method
from hf_esm.utils import files_identity, fingerprint, markdown_table


# Methods that learn take hours, methods that route write no single model, and some merge two experts alone.
_METHODS = {name: resolve_method(name) for name in METHODS}
STATIC = [name for name, m in _METHODS.items() if not (m.needs_samples or m.routes or m.chooses or m.most_experts)]
DEFAULT = "default"
IGNORED = -100
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=[DEFAULT, *STATIC], help="names, or settings as YAML")
    parser.add_argument("--tasks", nargs="+", help="default: every folder in experts/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws other samples")
    parser.add_argument("--num-samples", type=int, default=64, help="samples per task")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--rows", type=int, default=150, help="rows per task, the first of the split; 0 for all")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--alpha", choices=["default", "auto"], default="default")
    parser.add_argument("--generate", action="store_true", help="also write answers, and count exact matches")
    parser.add_argument("--subsets", action="store_true", help="on all subsets of 2 and of 3 tasks")
    parser.add_argument(
        "--output", type=Path, default=Path("language_report"), help="folder of the table and its cache"
    )
    args = parser.parse_args()
    logging.getLogger("hf_esm").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tasks = args.tasks or sorted(path.name for path in (args.folder / "experts").iterdir() if path.is_dir())
    suite = Suite(args, tasks)
    if args.subsets:
        chosen = [subset for size in (2, 3) for subset in itertools.combinations(tasks, size)]
        results = {subset: suite.results(subset) for subset in chosen}
        lines = subset_table(results)
        written = [{"tasks": subset, **result} for subset, result in results.items()]
        suite.write("subsets", lines, written)
        return
    result = suite.results(tuple(tasks))
    suite.write("table", [*task_table(result, tasks), *routed_table(result, tasks), *match_table(result)], result)


class Suite:
    """The folder's rows and perplexities, which every table reads; the cache of what was computed."""

    def __init__(self, args: argparse.Namespace, tasks: list[str]):
        self.args = args
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder / "base")
        self.train: dict[str, list[Row]] = {}
        self.rows: dict[str, list[Row]] = {}
        for task in tasks:
            data = json.loads(gzip.decompress((args.folder / "data" / f"{task}.json.gz").read_bytes()))
            self.train[task], self.rows[task] = data["train"], data[args.split][: args.rows or None]
        sources = sorted(Path(hf_esm.__file__).parent.rglob("*.py"))
        code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
        files = [files_identity(args.folder / part) for part in ("base", "experts", "data")]
        self.identity = [files, args.split, args.rows, args.max_length]
        self.merge_identity = [code, args.num_samples, *(["generate"] if args.generate else [])]
        self.scored: dict[str, dict[str, Any]] = {}

    def results(self, tasks: tuple[str, ...]) -> dict[str, Any]:
        """Losses in nats per token of base, experts and every merged model: by method, one entry per seed."""
        folder = self.args.folder
        base = {task: self.loss(folder / "base", task) for task in tasks}
        expert = {task: self.loss(folder / "experts" / task, task) for task in tasks}
        methods = {}
        for label in self.args.methods:
            arguments = merge_arguments(label, self.args.alpha)
            methods[label] = []
            for seed in self.args.seeds:
                key = ["merged", self.merge_identity, arguments, seed, tasks]
                entry = self.cached(key, lambda a=arguments, s=seed: self.merge_and_score(a, s, tasks))
                shares = kept_shares(entry["losses"], base, expert)
                methods[label].append({"seed": seed, **entry, "kept": shares, "mean": mean(shares.values())})
                print(f"{', '.join(tasks)}: {label}, seed {seed}: {mean(shares.values()):.1f}", file=sys.stderr)
        result = {"base": base, "experts": expert, "methods": methods}
        if self.args.generate:
            answered = [task for task in tasks if any("label" in row for row in self.rows[task])]
            experts = {task: self.match(folder / "experts" / task, task) for task in answered}
            result["matches"] = {"base": {t: self.match(folder / "base", t) for t in answered}, "experts": experts}
        return result

    def merge_and_score(self, arguments: dict[str, Any], seed: int, tasks: tuple[str, ...]) -> dict[str, Any]:
        """Merge on one draw of samples; losses by task, and the seconds that the merge took."""
        args, samples = self.args, {}
        for task in tasks:
            train = self.train[task]
            drawn = random.Random(seed).sample(train, min(args.num_samples or len(train), len(train)))
            samples[task] = [row["text"] + row.get("label", "") for row in drawn]
        with tempfile.TemporaryDirectory() as scratch:
            merged, start = Path(scratch) / "merged", time.perf_counter()
            merge_models(
                args.folder / "base",
                {task: args.folder / "experts" / task for task in tasks},
                calibration=samples,
                num_samples=args.num_samples,
                max_length=args.max_length,
                seed=seed,
                output_dir=merged,
                progress=False,
                **arguments,
            )
            seconds = time.perf_counter() - start
            if (merged / ROUTED_FOLDER).is_dir():
                return {**self.score_routed(RoutedModel.from_pretrained(merged), tasks), "seconds": seconds}
            # Most methods that read no samples give one model for all seeds, which is scored once.
            weights = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(merged.glob("*.safetensors"))]
            key = fingerprint(weights, tasks)
            if key not in self.scored:
                model = load(merged)
                self.scored[key] = {"losses": self.losses(model, tasks)}
                if args.generate:
                    self.scored[key]["matches"] = {"losses": self.matches(model, tasks)}
        return {**self.scored[key], "seconds": seconds}

    def score_routed(self, model: RoutedModel, tasks: tuple[str, ...]) -> dict[str, Any]:
        """Losses by task: as the router decides, with the task named, without experts; and how good the routes are."""
        ways = {"named": model.route, "static": lambda _: model.route("static")}
        ways["losses"] = nullcontext if model.config.decides else model.route
        scores: dict[str, Any] = {way: self.losses(model.model, tasks, route) for way, route in ways.items()}
        if self.args.generate:
            scores["matches"] = {way: self.matches(model.model, tasks, route) for way, route in ways.items()}
        return {**scores, "routes": self.routes(model, tasks)} if model.config.decides else scores

    def routes(self, model: RoutedModel, tasks: tuple[str, ...]) -> dict[str, float]:
        """How good the routes are; see the script's docstring."""
        found, sure, probabilities, foreign = [], [], [], []
        for task in tasks:
            encoded = [encode(self.tokenizer, row, self.args.max_length) for row in self.rows[task]]
            # Labels tell where the prompt ends.
            samples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)} for ids, labels in encoded]
            explained = model.explain(samples)
            found += [why.likeliest == task for why in explained]
            sure += [why.sure for why in explained]
            probabilities += [why.probabilities[why.likeliest] for why in explained]
            with tempfile.TemporaryDirectory() as scratch:
                smaller = model.remove_expert(task, output_dir=Path(scratch) / "smaller")
                foreign += [why.sure for why in smaller.explain(samples)]
        return {
            "task found": mean(found),
            "sure": mean(sure),
            "right if sure": sum(map(min, found, sure)) / max(sum(sure), 1),
            "calibration error": calibration_error(probabilities, found),
            "sure if foreign": mean(foreign),
        }

    def losses(
        self,
        model: PreTrainedModel,
        tasks: tuple[str, ...],
        route: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> dict[str, float]:
        """Mean loss per scored token of a model, by task, in the route of the task."""
        losses = {}
        for task in tasks:
            with route(task):
                losses[task] = loss_per_token(model, self.tokenizer, self.rows[task], self.args.max_length)
        return losses

    def matches(
        self,
        model: PreTrainedModel,
        tasks: tuple[str, ...],
        route: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> dict[str, float]:
        """Share of exact matches of a model's answers, by task with labels, in the route of the task."""
        shares = {}
        for task in tasks:
            if rows := [row for row in self.rows[task] if "label" in row]:
                with route(task):
                    shares[task] = exact_match(model, self.tokenizer, rows, self.args.max_length)
        return shares

    def match(self, model_folder: Path, task: str) -> float:
        """The same of one task, from the cache if it is there."""
        compute = lambda: self.matches(load(model_folder), (task,))[task]  # noqa: E731
        return self.cached(["exact match", str(model_folder), task], compute)

    def loss(self, model_folder: Path, task: str) -> float:
        """The same of one task, from the cache if it is there."""
        return self.cached([str(model_folder), task], lambda: self.losses(load(model_folder), (task,))[task])

    def cached(self, key: list[Any], compute: Callable[[], Any]) -> Any:
        """The value that an earlier run computed under this key, or else a new one."""
        file = self.args.output / "cache" / f"{fingerprint(self.identity, key)}.json"
        if not file.is_file():
            value = compute()
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(value))
            partial.replace(file)
        return json.loads(file.read_text())

    def write(self, name: str, lines: list[str], results: Any) -> None:
        """Print a table, and write it beside what it was made from."""
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items()}
        text = "\n".join(lines)
        (self.args.output / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        raw = json.dumps({"settings": settings, "results": results}, indent=1)
        (self.args.output / ("results.json" if name == "table" else f"{name}.json")).write_text(raw, encoding="utf-8")
        print(text)


def merge_arguments(label: str, alpha: str) -> dict[str, Any]:
    """Arguments of `merge_models` for one entry of `--methods`."""
    read = yaml.safe_load(label)
    settings = dict(read) if isinstance(read, dict) else {"name": read}
    arguments = {key: settings.pop(key) for key in ("alpha", "refine", "lines") if key in settings}
    if settings != {"name": DEFAULT}:
        arguments["method"] = settings
    tunable = "method" not in arguments or resolve_method(settings).tunable
    return {"alpha": "auto", **arguments} if alpha == "auto" and tunable else arguments


def load(model_folder: Path) -> PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


def kept_shares(losses: dict[str, float], base: dict[str, float], expert: dict[str, float]) -> dict[str, float]:
    """Kept share by task, in %."""
    return {task: 100 * (base[task] - loss) / (base[task] - expert[task]) for task, loss in losses.items()}


def calibration_error(probabilities: list[float], right: list[bool]) -> float:
    """Expected calibration error over ten bins."""
    sums = [0.0] * 10
    for probability, good in zip(probabilities, right, strict=True):
        sums[min(int(10 * probability), 9)] += good - probability
    return sum(map(abs, sums)) / len(right)


@torch.no_grad()
def loss_per_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    max_length: int = 256,
    batch_size: int = 8,
) -> float:
    """Mean loss per scored token over all rows, in nats; the perplexity is its exponential.

    Rows of similar length share a batch, padded on the right. Rows of fewer than three tokens are left out.
    """
    encoded = [encode(tokenizer, row, max_length) for row in rows]
    encoded = sorted((pair for pair in encoded if len(pair[0]) > 2), key=lambda pair: len(pair[0]))
    total, count = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        inputs = padded(encoded[start : start + batch_size])
        scored = int((inputs["labels"][:, 1:] != IGNORED).sum())
        total, count = total + float(model(**inputs).loss) * scored, count + scored
    return total / count


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    max_length: int = 256,
    batch_size: int = 16,
) -> float:
    """Share of the rows whose greedy answer to `text` is `label` and then ends.

    Rows of similar length share a batch, padded on the left.
    """
    rows, matches, end = sorted(rows, key=lambda row: len(row["text"])), 0, tokenizer.eos_token_id
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompts = [tokenizer(row["text"], add_special_tokens=False).input_ids[:max_length] for row in batch]
        labels = [[*tokenizer(row["label"], add_special_tokens=False).input_ids, end] for row in batch]
        width = max(map(len, prompts))
        ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        given = {"max_new_tokens": max(map(len, labels)), "do_sample": False, "pad_token_id": end}
        answers = model.generate(input_ids=ids, attention_mask=mask, **given)[:, width:].tolist()
        matches += sum(answer[: len(label)] == label for answer, label in zip(answers, labels, strict=True))
    return matches / len(rows)


def encode(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> tuple[list[int], list[int]]:
    """Token ids of a row, and its labels: those of the answer if it has one, else of the whole text."""
    text = tokenizer(row["text"], add_special_tokens=False).input_ids[:max_length]
    answer = [tokenizer.eos_token_id]
    if "label" not in row:
        return text + answer, text + answer
    answer = tokenizer(row["label"], add_special_tokens=False).input_ids + answer
    return text + answer, [IGNORED] * len(text) + answer


def padded(batch: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Model inputs of rows of differing length: `[rows, tokens]` each."""
    ids, labels = ([torch.tensor(part) for part in column] for column in zip(*batch, strict=True))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
    }


def task_table(result: dict[str, Any], tasks: list[str]) -> list[str]:
    """Markdown rows: base, experts and every method, with the perplexities of the first two."""
    rows = [["method", *tasks, "mean (range over seeds)", "nats per token", "seconds"]]
    for name in ("base", "experts"):
        losses = result[name]
        perplexities = [f"perplexity {math.exp(losses[task]):.3g}" for task in tasks]
        rows.append([name, *perplexities, "0" if name == "base" else "100", f"{mean(losses.values()):.3f}", ""])
    for label, entries in result["methods"].items():
        kept = [f"{mean(entry['kept'][task] for entry in entries):.1f}" for task in tasks]
        nats = mean(mean(entry["losses"].values()) for entry in entries)
        seconds = mean(entry["seconds"] for entry in entries)
        rows.append([f"`{label}`", *kept, with_range(entries), f"{nats:.3f}", f"{seconds:.1f}"])
    return markdown_table(rows)


def routed_table(result: dict[str, Any], tasks: list[str]) -> list[str]:
    """Markdown rows of the methods with routed experts, after an empty line; nothing if there are none."""
    measures = ["task found", "sure", "right if sure", "calibration error", "sure if foreign"]
    rows = [["experts", *tasks, "mean (range over seeds)", "nats per token", *measures]]
    for label, entries in result["methods"].items():
        parts = {"losses": "", "named": ", task named", "static": ", none added"}
        for part, title in parts.items() if "named" in entries[0] else ():
            kept = [kept_shares(entry[part], result["base"], result["experts"]) for entry in entries]
            means = with_range([{"mean": mean(shares.values())} for shares in kept])
            routes = [entry.get("routes", {}) if part == "losses" else {} for entry in entries]
            quality = [f"{100 * mean(r[name] for r in routes):.1f}" if routes[0] else "" for name in measures]
            nats = f"{mean(mean(entry[part].values()) for entry in entries):.3f}"
            rows.append(
                [f"`{label}`{title}", *(f"{mean(s[t] for s in kept):.1f}" for t in tasks), means, nats, *quality]
            )
    return ["", *markdown_table(rows)] if len(rows) > 1 else []


def match_table(result: dict[str, Any]) -> list[str]:
    """Markdown rows of exact matches in %, after an empty line; nothing if none were counted."""
    if "matches" not in result:
        return []
    shares = {name: [matches] for name, matches in result["matches"].items()}
    for label, entries in result["methods"].items():
        for way, title in {"losses": "", "named": ", task named", "static": ", none added"}.items():
            if way in entries[0]["matches"]:
                shares[f"`{label}`{title}"] = [entry["matches"][way] for entry in entries]
    tasks = list(result["matches"]["base"])
    rows = [["exact match", *tasks, "mean (range over seeds)"]]
    for name, seeds in shares.items():
        means = with_range([{"mean": 100 * mean(seed.values())} for seed in seeds])
        rows.append([name, *(f"{100 * mean(seed[task] for seed in seeds):.1f}" for task in tasks), means])
    return ["", *markdown_table(rows)]


def subset_table(results: dict[tuple[str, ...], dict[str, Any]]) -> list[str]:
    """Markdown rows: the mean kept share of every method, by subset, then the mean over the subsets of a size."""
    labels = list(next(iter(results.values()))["methods"])
    rows = [["tasks", *(f"`{label}`" for label in labels)]]
    for subset, result in results.items():
        rows.append([", ".join(subset), *(with_range(result["methods"][label]) for label in labels)])
    for size in sorted({len(subset) for subset in results}):
        of_size = [result["methods"] for subset, result in results.items() if len(subset) == size]
        means = [mean(mean(e["mean"] for e in methods[label]) for methods in of_size) for label in labels]
        rows.append([f"mean, {size} tasks", *(f"{value:.1f}" for value in means)])
    return markdown_table(rows)


def with_range(entries: list[dict[str, Any]]) -> str:
    """Mean over seeds, and the lowest and highest seed where they differ."""
    values = [entry["mean"] for entry in entries]
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{mean(values):.1f}" + (f" ({low} to {high})" if low != high else "")


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
