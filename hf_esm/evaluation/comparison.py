"""`compare`: several methods on one user's own experts and rows, with what is needed to choose between them."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import psutil
from accelerate import PartialState
from accelerate.utils import tqdm

from ..calibration import ActivationStatistics
from ..checkpoints import CALIBRATION_FOLDER, Access, model_identity, open_checkpoint, resolve_source
from ..data import SampleOptions
from ..errors import HfEsmError
from ..merging import merge_models
from ..methods import MergeMethod, describe_method, resolve_method
from ..metrics import Metric, Outcome, resolve_metric
from ..planning import MergeOptions, name_experts, plan_merge
from ..utils import atomic_file, code_identity, data_identity, fingerprint, processor_identity
from ..version import __version__
from .evaluator import check_by_task, evaluate, expert_outcomes
from .interference import Interference, measure_interference
from .report import DRAWS, Cell, Comparison, summarise, write_report


CACHE = "cache"


CELL_VERSION = 2


# Options of a merge that are the comparison's own affair.
NOT_COMPARED = {"method", "alpha", "rank", "seed", "overwrite", "statistics_dir", "resume_dir", "max_shard_size"}


METHODS_COMPARED = ("esm", "mean", "task-arithmetic", "ties", "tsv-m", "iso-c", "iso-cts", "esm++")


def compare(
    base: Any,
    experts: Any,
    *,
    test: Mapping[str, Any],
    output_dir: str | os.PathLike,
    methods: Sequence[Any] = METHODS_COMPARED,
    calibration: Any = None,
    validation: Optional[Mapping[str, Any]] = None,
    seeds: int | Sequence[int] = (0,),
    num_test: int = 0,
    processor: Any = None,
    token: Any = None,
    **options: Any,
) -> Comparison:
    """Merge the same experts by several methods, and measure every merged model on every task.

    α is chosen by one rule for all: with validation rows as `alpha="auto"` does, else the method's default. What was
    measured is kept in `output_dir/cache`, so that a second run does only what is new: another method, more seeds.
    The merged models themselves are not kept.

    Args:
        base, experts, calibration, validation, processor, token: as `merge_models` takes them.
        methods: names, or settings as in recipes: `["esm", {"name": "esm", "shrinkage": 0.0}]`. A `label` among the
            settings names the row.
        test: by task, labelled rows to measure on.
        output_dir: folder of the report; it may exist.
        seeds: of the choice of proxies, for methods that need any. Several show how much hangs on it.
        num_test: test rows per task, chosen at random; 0 takes all.
        options: fields of `MergeOptions`, for all methods: `metric`, `heads`, `num_samples`, `max_length`, …

    Raises:
        HfEsmError: on input that cannot be merged or measured, before the first merge as far as headers tell.
    """
    if unknown := options.keys() - {f.name for f in fields(MergeOptions)}:
        raise TypeError(f"compare has no argument {sorted(unknown)[0]!r}")
    if taken := options.keys() & NOT_COMPARED:
        raise HfEsmError(f"compare sets {sorted(taken)[0]} itself: see methods, validation and seeds.")
    run = _Comparing(
        base=base,
        experts=name_experts(experts),
        methods=_named(methods),
        test=test,
        folder=Path(output_dir).expanduser(),
        calibration=calibration,
        validation=validation,
        seeds=(seeds,) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds)),
        num_test=num_test,
        processor=processor,
        token=token,
        given=options,
    )
    run.check()
    own = run.expert_outcomes()
    jobs = [(label, method, seed) for label, method in run.methods for seed in run.seeds_of(method)]
    cells: dict[str, dict[int, Cell]] = {}
    for label, method, seed in tqdm(jobs, desc="Comparing", disable=not run.options.progress):
        cells.setdefault(label, {})[seed] = run.cell(method, seed)
    rows = summarise(dict(run.methods), cells, own)
    scores = {task: found.score for task, found in own.items()}
    found = Comparison(rows, scores, run.metric.name, run.how(), run.interference())
    write_report(found, run.folder)
    return found


@dataclass
class _Comparing:
    """One comparison's arguments, and its cache; `given` are the options as the caller gave them."""

    base: Any
    experts: dict[str, Any]
    methods: list[tuple[str, MergeMethod]]
    test: Mapping[str, Any]
    folder: Path
    calibration: Any
    validation: Optional[Mapping[str, Any]]
    seeds: tuple[int, ...]
    num_test: int
    processor: Any
    token: Any
    given: dict[str, Any]

    def __post_init__(self) -> None:
        self.options = MergeOptions(**self.given)
        self.metric: Metric = resolve_metric(self.options.metric)

    def check(self) -> None:
        """What can be said before any weight is read."""
        if PartialState().num_processes > 1:
            raise HfEsmError("compare runs in one process; start it without `accelerate launch`.")
        check_by_task(self.test, "test")
        if lacking := self.experts.keys() - self.test.keys():
            raise HfEsmError(f"There are no test rows of {sorted(lacking)[0]!r}.")
        if unknown := self.test.keys() - self.experts.keys():
            raise HfEsmError(
                f"test names {sorted(unknown)[0]!r}, which is no expert; there are {', '.join(self.experts)}."
            )
        if not self.seeds:
            raise HfEsmError("seeds must name one seed at least.")
        for _, method in self.methods:
            merge_models(self.base, self.experts, dry_run=True, **self._merge_arguments(method, self.seeds[0]))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HfEsmError(f"{self.folder}: cannot be made ({error.strerror}). Choose another output_dir.") from None
        models = {"base": self.base, **self.experts}
        self.identity = [
            {n: model_identity(resolve_source(spec, n, self._access)) for n, spec in models.items()},
            processor_identity(self.processor),
        ]

    def seeds_of(self, method: MergeMethod) -> tuple[int, ...]:
        """The proxies play no part in a method that needs none."""
        return self.seeds if self._merge_arguments(method, 0)["calibration"] is not None else self.seeds[:1]

    def _merge_arguments(self, method: MergeMethod, seed: int) -> dict[str, Any]:
        tuned = method.tunable and self.validation is not None
        needs_data = method.needs_statistics or method.needs_samples
        return {
            **self.given,
            "method": method,
            "seed": seed,
            "progress": False,
            "alpha": "auto" if tuned else None,
            "calibration": self.calibration if needs_data else None,
            "validation": self.validation if tuned else None,
            "processor": self.processor,
            "token": self.token,
        }

    @property
    def _access(self) -> Access:
        return Access(self.token, self.options.allow_pickle, self.options.trust_remote_code)

    def _test_options(self) -> dict[str, Any]:
        own = {f.name for f in fields(SampleOptions)} - {"num_samples", "seed"}
        return {name: value for name, value in self.given.items() if name in own}

    def _cached(self, kind: str, key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result by all that it depends on, from the cache or made now."""
        path = self.folder / CACHE / f"{kind}-{fingerprint(CELL_VERSION, __version__, self.identity, key)}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        try:
            found = json.dumps(make())
        except TypeError as error:
            raise HfEsmError(
                f"What the metric {self.metric.name!r} reads of a row, or a label, cannot be kept: {error}."
            ) from error
        with atomic_file(path) as partial:
            partial.write_text(found, encoding="utf-8")
        return json.loads(found)

    def _test_key(self) -> list[Any]:
        rows = {task: data_identity(data) for task, data in self.test.items()}
        metric = self.options.metric
        return [
            rows,
            self.num_test,
            self._test_options(),
            metric if isinstance(metric, str) else code_identity(metric),
        ]

    def expert_outcomes(self) -> dict[str, Outcome]:
        def make() -> dict[str, Any]:
            found = expert_outcomes(
                self.experts,
                self.test,
                base=self.base,
                metric=self.metric,
                processor=self.processor,
                access=self._access,
                options=SampleOptions(**{"num_samples": self.num_test, "seed": 0, **self._test_options()}),
            )
            return {task: outcome.as_dict() for task, outcome in found.items()}

        stored = self._cached("experts", self._test_key(), make)
        return {task: Outcome.from_dict(outcome, self.metric) for task, outcome in stored.items()}

    def cell(self, method: MergeMethod, seed: int) -> Cell:
        arguments = self._merge_arguments(method, seed)
        known = {name: value for name, value in arguments.items() if name not in ("method", "processor", "token")}
        known |= {name: data_identity(arguments[name]) for name in ("calibration", "validation")}
        key = [describe_method(method), method.default_alpha, {**known, "metric": self.metric.name}, self._test_key()]
        found = self._cached("cell", key, lambda: self._merge_and_measure(method, seed, arguments))
        return Cell(
            found["alpha"],
            {float(alpha): score for alpha, score in found["alpha_scores"].items()},
            {task: Outcome.from_dict(outcome, self.metric) for task, outcome in found["outcomes"].items()},
            {task: Outcome.from_dict(outcome, self.metric) for task, outcome in found["given"].items()},
            found["seconds"],
            found["memory"],
            found["size"],
        )

    def statistics_folder(self, seed: int) -> Path:
        """Where the statistics of this choice of proxies are kept for all methods."""
        proxies = {f.name: getattr(self.options, f.name) for f in fields(SampleOptions) if f.name != "seed"}
        key = fingerprint(__version__, self.identity, data_identity(self.calibration), proxies, seed)
        return self.folder / CACHE / f"statistics-{key}"

    def _merge_and_measure(self, method: MergeMethod, seed: int, arguments: dict[str, Any]) -> dict[str, Any]:
        # A router of the merged model's features reads the proxies themselves.
        reads_proxies = method.needs_features
        if method.needs_statistics:
            kept = self.statistics_folder(seed)
            if all((kept / f"{task}.safetensors").is_file() for task in self.experts) and not reads_proxies:
                arguments = {**arguments, "calibration": kept}
            elif not isinstance(self.calibration, (str, os.PathLike)) and self.calibration is not None:
                arguments = {**arguments, "statistics_dir": str(kept)}
        with TemporaryDirectory(dir=self.folder, prefix=".merging-") as scratch:
            target = Path(scratch) / "model"
            with _peak_memory() as memory:
                merged = merge_models(self.base, self.experts, output_dir=str(target), **arguments)
            size = sum(
                path.stat().st_size for path in target.rglob("*.safetensors") if CALIBRATION_FOLDER not in path.parts
            )
            rows = {"num_samples": self.num_test, "seed": 0, **self._test_options()}
            measure = {"metric": self.metric, "processor": self.processor, **asdict(self._access), **rows}
            scores = evaluate(target, self.test, **measure)
            given = evaluate(target, self.test, route="oracle", **measure).outcomes if method.decides else {}
        return {
            "alpha": merged.alpha,
            "alpha_scores": merged.alpha_scores,
            "outcomes": {task: found.as_dict() for task, found in scores.outcomes.items()},
            "given": {task: found.as_dict() for task, found in given.items()},
            "seconds": merged.seconds,
            "memory": memory[0],
            "size": size,
        }

    def interference(self) -> Interference:
        """With the statistics that stand in the cache, if any method needed them."""
        folder = self.statistics_folder(self.seeds[0])
        files = {task: folder / f"{task}.safetensors" for task in self.experts}
        whole = all(path.is_file() for path in files.values())
        statistics = {t: ActivationStatistics.load(path) if whole else None for t, path in files.items()}
        key = [whole, str(folder), self.options.heads]
        found = self._cached("interference", key, lambda: self._interference(statistics))
        return Interference.from_dict(found)

    def _interference(self, statistics: Mapping[str, Optional[ActivationStatistics]]) -> dict[str, Any]:
        base = open_checkpoint(resolve_source(self.base, "base", self._access))
        experts = {
            task: open_checkpoint(resolve_source(spec, f"expert '{task}'", self._access), base)
            for task, spec in self.experts.items()
        }
        plan = plan_merge(base, experts, self.methods[0][1], self.options.heads)
        return measure_interference(plan, statistics).as_dict()

    def how(self) -> list[str]:
        """What a reader of the table has to know."""
        rows = "all test rows" if not self.num_test else f"up to {self.num_test} test rows"
        if self.validation is None:
            alpha = "α: every method's default, without labels."
        else:
            chosen = "with the best score on the validation rows"
            if self.metric.is_share:
                chosen = (
                    "nearest to the method's default whose score on the validation rows is within one standard error "
                    "of the best"
                )
            alpha = f"α: of 0.1, 0.2 … 3.0, the one {chosen}; the same rule for every method."
        return [
            alpha,
            f"Measured on {rows} per task; intervals: 95 % of {DRAWS} draws of test rows, the same for all methods.",
            f"Proxies: {self.options.num_samples or 'all'} per task, seeds {', '.join(map(str, self.seeds))}.",
        ]


def _named(methods: Sequence[Any]) -> list[tuple[str, MergeMethod]]:
    """Each method with the label of its row: its name, with the settings that are not its defaults, or its `label`."""
    if isinstance(methods, (str, Mapping)) or not methods:
        raise HfEsmError("methods must be a list of methods, such as [esm, tsv-m].")
    found: dict[str, MergeMethod] = {}
    for entry in methods:
        label = None
        if isinstance(entry, Mapping):
            entry = dict(entry)
            label = entry.pop("label", None)
        method = resolve_method(entry)
        if isinstance(entry, Mapping):
            default = resolve_method(entry["name"])
            own = {n: value for n, value in entry.items() if n != "name" and getattr(method, n) != getattr(default, n)}
            settings = ", ".join(f"{name} {value}" for name, value in own.items())
            label = label or entry["name"] + (f" ({settings})" if settings else "")
        label = str(label or (entry if isinstance(entry, str) else method.name))
        if label in found:
            raise HfEsmError(f"methods names {label!r} twice. Give one of them a `label`.")
        found[label] = method
    return list(found.items())


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """In the list, once it is over: by how many bytes the process's resident memory grew at most meanwhile."""
    process, over, found = psutil.Process(), threading.Event(), [0]
    start = process.memory_info().rss

    def watch() -> None:
        while not over.wait(0.05):
            found[0] = max(found[0], process.memory_info().rss - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found[0] = max(found[0], process.memory_info().rss - start)
