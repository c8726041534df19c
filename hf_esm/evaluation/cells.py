"""Cells of a comparison: each is one method with one seed, merged and measured once, and then read from a cache."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from math import inf, isnan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import psutil

from ..checkpoints import CALIBRATION_FOLDER, Access, ModelSpec, model_identity, resolve_source
from ..data import DataSpec, SampleOptions
from ..errors import HfEsmError
from ..merging import MergeResult, merge_models, statistics_of_experts
from ..methods import EssentialMerge, Mean, MergeMethod, describe_method
from ..metrics import Metric, Outcome, normalised
from ..planning import BASE, MergeData, MergeOptions
from ..utils import atomic_file, code_identity, data_identity, fingerprint, processor_identity
from ..version import __version__
from .evaluator import Measurement
from .interference import Interference, measure_interference


CACHE = "cache"


CELL_VERSION = 7  # of the cached files and of what their names depend on


# Options of `merge_models` that `compare` does not take: it sets them itself.
NOT_COMPARED = {
    "method",
    "alpha",
    "refine",
    "output",
    "rank",
    "seed",
    "overwrite",
    "statistics_dir",
    "resume_dir",
    "max_shard_size",
}


# Arguments of a merge that a cell does not depend on, or that its key holds in another form.
_NO_PART = {"method", "processor", "token", "cache_dir"}


@dataclass
class Cell:
    """One method with one choice of samples, merged and measured.

    Attributes:
        alpha, alpha_default: scale of the merged update, and the method's default; None for a method without α.
        alpha_scores: mean validation score by α, if α was searched.
        outcomes: by task, outcomes of the merged model on the test rows.
        oracle_outcomes: by task, outcomes with the task's expert, for a method whose router decides.
        seconds: time by stage of the merge.
        memory: growth of the process's resident memory while merging, in bytes.
        size: size of the written weights (static model, experts, heads), in bytes.
        alpha_errors: standard error of each of `alpha_scores`; empty if they are not scores of rows.
        evaluations: number of merged models that were scored to choose α.
        chosen: name of the method that was chosen, or `"base"`, if the merge chose one.
        choice: what chose it, and how far the next one is behind, as one line; empty where there was one candidate.
    """

    alpha: float
    alpha_scores: dict[float, float]
    outcomes: dict[str, Outcome]
    oracle_outcomes: dict[str, Outcome]
    seconds: dict[str, float]
    memory: int
    size: int
    alpha_errors: dict[float, float] = field(default_factory=dict)
    chosen: str = ""
    choice: str = ""
    alpha_default: Optional[float] = None
    evaluations: int = 0

    def as_dict(self) -> dict[str, Any]:
        outcomes = {name: _plain_outcomes(getattr(self, name)) for name in ("outcomes", "oracle_outcomes")}
        others = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in outcomes}
        return {**others, **outcomes}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], metric: Metric) -> "Cell":
        """Cell from what `as_dict` returned, read back from JSON."""
        outcomes = {name: _outcomes_from(stored[name], metric) for name in ("outcomes", "oracle_outcomes")}
        by_alpha = {
            name: {float(alpha): value for alpha, value in stored[name].items()}
            for name in ("alpha_scores", "alpha_errors")
        }
        return cls(**{**stored, **outcomes, **by_alpha})


def _plain_outcomes(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {task: outcome.as_dict() for task, outcome in outcomes.items()}


def _outcomes_from(stored: Mapping[str, Any], metric: Metric) -> dict[str, Outcome]:
    return {task: Outcome.from_dict(outcome, metric) for task, outcome in stored.items()}


@dataclass(frozen=True)
class Inputs:
    """Models, data and options that all methods of a comparison share.

    Attributes:
        base, experts, test, calibration, validation, num_test, processor, token: see `compare`.
        options: options of every merge.
        metric: what scores the test rows and the validation rows.
        accelerator: what merges run under: an `Accelerator`, or `Alone` where several processes share the cells.
        keep: whether the best merged model is kept.
    """

    base: ModelSpec
    experts: Mapping[str, ModelSpec]
    test: Mapping[str, DataSpec]
    calibration: Any
    validation: Optional[Mapping[str, DataSpec]]
    num_test: int
    processor: Any
    token: Optional[str | bool]
    options: MergeOptions
    metric: Metric
    accelerator: Any = None
    keep: bool = False

    @property
    def access(self) -> Access:
        return Access(self.token, self.options.allow_pickle, self.options.trust_remote_code)

    @property
    def measurement(self) -> Measurement:
        """The test rows, which all models answer."""
        options = SampleOptions(self.num_test, 0, self.options.max_length, self.options.columns)
        return Measurement(self.test, self.metric, options, self.access, self.processor)

    def merge_arguments(self, method: MergeMethod, seed: int) -> dict[str, Any]:
        """Arguments of `merge_models` for one cell, except the models and the output."""
        shared = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        tuned = method.tunable and self.validation is not None
        uses_data = method.needs_statistics or method.needs_samples or method.counts_embeddings
        # By other methods, which are named or chosen; those that are chosen from need samples for agreement, too.
        uses_data = uses_data or bool(self.options.overrides) or method.chooses
        return {
            **{name: value for name, value in shared.items() if name not in {*NOT_COMPARED, "output_dir"}},
            "method": method,
            "seed": seed,
            "progress": False,
            "alpha": "auto" if tuned else None,
            "lines": self.options.lines if method.tunable else None,
            "calibration": self.calibration if uses_data else None,
            "validation": self.validation if tuned else None,
            "processor": self.processor,
            "token": self.token,
        }

    def of_first_tasks(self, count: int) -> "Inputs":
        """The same of the first experts alone."""
        tasks = list(self.experts)[:count]

        def chosen(by_task: Any) -> Any:
            return (
                {task: by_task[task] for task in tasks if task in by_task} if isinstance(by_task, Mapping) else by_task
            )

        names = ("experts", "test", "calibration", "validation")
        options = replace(self.options, weights=chosen(self.options.weights))
        return replace(self, **{name: chosen(getattr(self, name)) for name in names}, options=options, keep=False)

    @property
    def names_tasks(self) -> bool:
        """Whether options name some of the tasks, so that a merge of fewer tasks would be another one."""
        options = self.options
        named = {options.chat_template, None if isinstance(options.tokenizer, Mapping) else options.tokenizer}
        weighted = any(entry.get("weights") for entry in options.overrides or ())
        return weighted or isinstance(options.tokenizer, Mapping) or bool(named & self.experts.keys())

    def uses_samples(self, method: MergeMethod) -> bool:
        """Whether a merge by this method depends on the choice of samples."""
        return self.merge_arguments(method, 0)["calibration"] is not None


class CellStore:
    """Cells and everything else that a comparison measures, each computed once.

    A result is a JSON file, whose name is a fingerprint of all that the result depends on.

    Attributes:
        inputs: what the methods share.
        cache: folder of the results, and of the statistics and answers that the merges share.
        scratch: folder for merged models.
        kept: folder of the best model that this process has merged and kept.
    """

    def __init__(self, inputs: Inputs, cache: Path, scratch: Path):
        self.inputs, self.cache, self.scratch = inputs, cache, scratch
        self.kept, self._best = scratch / f"kept-{os.getpid()}", -inf
        models = {"base": inputs.base, **inputs.experts}
        self._identity = [
            {name: model_identity(resolve_source(spec, name, inputs.access)) for name, spec in models.items()},
            processor_identity(inputs.processor),
        ]
        metric = inputs.options.metric
        self._test_identity = [
            {task: data_identity(rows) for task, rows in inputs.test.items()},
            inputs.num_test,
            inputs.options.max_length,
            inputs.options.columns,
            metric if isinstance(metric, str) else code_identity(metric),
        ]

    def expert_outcomes(self) -> dict[str, Outcome]:
        """Outcome of each task's expert on the test rows."""
        inputs = self.inputs
        stored = self.cached(
            "experts",
            self._test_identity,
            lambda: _plain_outcomes(inputs.measurement.expert_outcomes(inputs.experts, inputs.base)),
        )
        return _outcomes_from(stored, inputs.metric)

    def base_outcomes(self) -> dict[str, Outcome]:
        """Outcome of the base on each task's test rows, with the task's head; see `Measurement.base_outcomes`."""
        inputs = self.inputs

        def measure() -> dict[str, Any]:
            with TemporaryDirectory(dir=self.scratch) as scratch:
                target = Path(scratch) / "model"  # any merged model has the heads
                self.merge(Mean(), 0, target, overrides=None, calibration=None)
                return _plain_outcomes(inputs.measurement.base_outcomes(inputs.base, target))

        key = [self._test_identity, inputs.options.heads]
        return _outcomes_from(self.cached("base", key, measure), inputs.metric)

    def cell(self, method: MergeMethod, seed: int) -> Cell:
        """The cell of a method and a seed."""
        key = self.cell_key(method, self.inputs.merge_arguments(method, seed))
        stored = self.cached("cell", key, lambda: self._merge_and_measure(method, seed).as_dict())
        return Cell.from_dict(stored, self.inputs.metric)

    def cell_key(self, method: MergeMethod, arguments: Mapping[str, Any]) -> list[Any]:
        """What a merge by a method depends on, with the test rows."""
        known = {name: value for name, value in arguments.items() if name not in _NO_PART}
        known |= {name: data_identity(arguments[name]) for name in ("calibration", "validation")}
        known["metric"] = self.inputs.metric.name  # the test identity holds its code
        code = code_identity(type(method))  # a method of another package changes without a version of hf_esm
        return [describe_method(method), code, known, self._test_identity]

    def interference(self, methods: Iterable[MergeMethod], seed: int) -> Interference:
        """Interference between the experts, with statistics on the samples of a seed if any method needs them."""
        inputs, needed = self.inputs, any(method.needs_statistics for method in methods)
        method = EssentialMerge() if needed else Mean()
        data = MergeData(inputs.calibration if needed else None, processor=inputs.processor)
        plain = {"refine": False, "overrides": None, "lines": None}
        options = replace(inputs.options, **plain, seed=seed, cache_dir=str(self.cache), progress=False)

        def measure() -> dict[str, Any]:
            models = (inputs.base, inputs.experts)
            plan, statistics = statistics_of_experts(*models, method, data, options, inputs.access, inputs.accelerator)
            return measure_interference(plan, statistics).as_dict()

        samples = {f.name: getattr(options, f.name) for f in fields(SampleOptions)} if needed else {}
        key = [data_identity(data.calibration), samples, inputs.options.heads]
        return Interference.from_dict(self.cached("interference", key, measure))

    def search_score(self, method: MergeMethod, seed: int) -> float:
        """Score that settings are searched by, higher is better: mean of the validation rows' scores by task, or,
        without such rows, mean agreement with the experts.
        """
        inputs = self.inputs
        by_agreement = {"alpha": "auto", "calibration": inputs.calibration} if inputs.validation is None else {}
        arguments = {**inputs.merge_arguments(method, seed), **by_agreement}

        def measure() -> dict[str, Any]:
            with TemporaryDirectory(dir=self.scratch) as scratch:
                target = Path(scratch) / "model"
                merged = self.merge(method, seed, target, **by_agreement)
                if inputs.validation is None:
                    if not merged.agreement:
                        raise HfEsmError(
                            "`search`: all samples are taken for statistics, and none are left for agreement. Pass "
                            "more as `calibration`, or `validation` rows."
                        )
                    return {"score": sum(found.merged for found in merged.agreement.values()) / len(merged.agreement)}
                measurement = replace(inputs.measurement, data=inputs.validation, options=self._all_rows)
                scores = [outcome.score for outcome in measurement.merged_outcomes(target, str(target)).values()]
                return {"score": (1 if inputs.metric.higher_is_better else -1) * sum(scores) / len(scores)}

        key = [*self.cell_key(method, arguments), "search"]
        return self.cached("trial", key, measure)["score"]

    @property
    def _all_rows(self) -> SampleOptions:
        return SampleOptions(0, 0, self.inputs.options.max_length, self.inputs.options.columns)

    def search_identity(self, seed: int) -> list[Any]:
        """What the scores of a search depend on, besides the method."""
        arguments = self.inputs.merge_arguments(Mean(), seed)
        data = [data_identity(part) for part in (self.inputs.calibration, self.inputs.validation)]
        shared = {n: v for n, v in arguments.items() if n not in {*_NO_PART, "calibration", "validation", "alpha"}}
        return [CELL_VERSION, __version__, self._identity, data, shared | {"metric": self.inputs.metric.name}]

    def merge(self, method: MergeMethod, seed: int, target: Path, **changes: Any) -> MergeResult:
        """Merge as a cell does, into a folder."""
        arguments = {**self.inputs.merge_arguments(method, seed), "cache_dir": str(self.cache), **changes}
        models = (self.inputs.base, self.inputs.experts)
        return merge_models(*models, output_dir=str(target), accelerator=self.inputs.accelerator, **arguments)

    def cached(self, kind: str, key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result as plain data, from its file, or computed and written if the file is missing or damaged."""
        name = fingerprint(CELL_VERSION, __version__, self._identity, key)
        path = self.cache / f"{kind}-{name}.json"
        if (known := _read(path)) is not None:
            return known
        try:
            result = json.loads(json.dumps(compute()))
        except TypeError as error:
            raise HfEsmError(
                f"What the metric {self.inputs.metric.name!r} reads of outputs, or a label, cannot be cached as JSON "
                f"({error}). Let `read` return numbers, texts, lists and dictionaries."
            ) from error
        with atomic_file(path) as partial:
            partial.write_text(json.dumps({"sha256": _digest(result), "result": result}), encoding="utf-8")
        return result

    def _merge_and_measure(self, method: MergeMethod, seed: int) -> Cell:
        inputs = self.inputs
        with TemporaryDirectory(dir=self.scratch) as scratch:
            target = Path(scratch) / "model"
            with _peak_memory() as memory:
                merged = self.merge(method, seed, target)
            weights = [path for path in target.rglob("*.safetensors") if CALIBRATION_FOLDER not in path.parts]
            measure = inputs.measurement.merged_outcomes
            cell = Cell(
                alpha=merged.alpha,
                alpha_default=merged.alpha_default,
                evaluations=merged.evaluations,
                alpha_scores=merged.alpha_scores if merged.chosen_by == "labels" else {},
                alpha_errors=merged.alpha_errors if merged.chosen_by == "labels" else {},
                outcomes=measure(target, str(target)),
                oracle_outcomes=measure(target, str(target), "oracle") if method.decides else {},
                seconds=merged.seconds,
                memory=memory[0],
                size=sum(path.stat().st_size for path in weights),
                chosen=_chosen_by(merged) if method.chooses else "",
                choice=merged.choice,
            )
            if inputs.keep:
                self._keep(method, seed, target, cell)
            return cell

    def _keep(self, method: MergeMethod, seed: int, target: Path, cell: Cell) -> None:
        """Keep a merged model if it is the best so far that this process has merged."""
        score = standing(cell.outcomes, self.expert_outcomes())
        if score > self._best:
            self._best = score
            shutil.rmtree(self.kept, ignore_errors=True)
            self.kept.mkdir()
            target.rename(self.kept / self.name_of(method, seed))

    def name_of(self, method: MergeMethod, seed: int) -> str:
        """Name of a kept model's folder."""
        return f"model-{fingerprint(describe_method(method), seed)}"


def _chosen_by(merged: MergeResult) -> str:
    """Name of the method that a merge chose; `"base"` if no method was better than the base."""
    first = merged.standings[0].method if merged.standings else merged.plan.method.name
    return first if first == BASE else merged.plan.method.name


def standing(outcomes: Mapping[str, Outcome], experts: Mapping[str, Outcome]) -> float:
    """The number that models are ordered by: their share of the experts' scores, or else their mean score."""
    scores = {task: outcome.score for task, outcome in outcomes.items()}
    higher = next(iter(outcomes.values())).metric.higher_is_better
    share = normalised(scores, {task: outcome.score for task, outcome in experts.items()}, higher)
    value = share if share is not None else (1 if higher else -1) * sum(scores.values()) / len(scores)
    return -inf if isnan(value) else value


def _read(path: Path) -> Optional[dict[str, Any]]:
    """The result in a file; None if it is not there as it was written."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["result"] if stored["sha256"] == _digest(stored["result"]) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _digest(result: Any) -> str:
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """List whose one number, after the block, is the largest growth of resident memory meanwhile, in bytes."""
    process, over, peak = psutil.Process(), threading.Event(), [0]
    start = process.memory_info().rss

    def watch() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], process.memory_info().rss - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        peak[0] = max(peak[0], process.memory_info().rss - start)
