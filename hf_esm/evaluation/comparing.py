"""The steps of a comparison, which several processes share."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..errors import HfEsmError
from ..merging import merge_models
from ..methods import MergeMethod
from ..planning import check_replaceable
from ..utils import (
    check_known,
    gather,
    main_first,
    only_user,
    publish_folder,
    recover,
    staging_folder,
    together,
    tracked,
)
from .cells import CACHE, Cell, CellStore, Inputs
from .evaluator import check_by_task
from .figure_cells import FigureCells
from .pictures import ALL, PICTURES
from .report import Comparison, write_report
from .search import Found, check_searchable, ranges_of, search_settings
from .summary import Row, interval_of_share, summarise


BEST = "best"  # the folder of the model that is kept


@dataclass
class ComparisonRun:
    """One comparison. All processes call its steps.

    Attributes:
        inputs: what all methods share.
        methods: methods by the labels of their rows.
        seeds: seeds of the choice of samples.
        folder: folder of the report.
        accelerator: what tells which process this is.
        pictures: `usual`, `all` or `none`.
        search: number of settings to try for each method whose settings declare a range; 0 searches nothing.
    """

    inputs: Inputs
    methods: dict[str, MergeMethod]
    seeds: Sequence[int]
    folder: Path
    accelerator: Accelerator
    pictures: str = "usual"
    search: int = 0

    def check(self) -> None:
        """Raise `HfEsmError` for all that can be seen before any weight is read."""
        inputs = self.inputs
        check_by_task(inputs.test, "`test`")
        check_known(inputs.test, inputs.experts, "expert", "`test`")
        if missing := inputs.experts.keys() - inputs.test.keys():
            raise HfEsmError(
                f"`test`: there are no rows for the expert {min(missing)!r}. Add them, or leave the expert out."
            )
        if self.pictures not in PICTURES:
            raise HfEsmError(f"`pictures` must be one of {', '.join(PICTURES)}, not {self.pictures!r}.")
        if not self.seeds:
            raise HfEsmError("`seeds` must hold at least one seed.")
        if self.search:
            check_searchable(self.methods, self.search, inputs.validation, inputs.calibration)
        if inputs.keep:
            check_replaceable(self.folder / BEST, overwrite=True, name="output_dir")
        main_first(self.accelerator, self._check_merges)

    def _check_merges(self) -> None:
        inputs = self.inputs
        for method in self.methods.values():
            arguments = inputs.merge_arguments(method, self.seeds[0])
            merge_models(inputs.base, inputs.experts, dry_run=True, accelerator=inputs.accelerator, **arguments)

    def run(self, how: list[str]) -> Comparison:
        """Measure what is not measured yet, and write the report.

        Args:
            how: sentences about the comparison for the reader of the report.
        """
        with self._workspace() as scratch:
            cache = Path(self.inputs.options.cache_dir or self.folder / CACHE).expanduser()
            store = CellStore(self.inputs, cache, scratch)
            found = self._search(store, cache, scratch) if self.search else []
            self._measure(store, scratch)
            comparison = self._comparison(store, how)
            comparison.searches = found
            comparison.how += map(str, found)
            with together(self.accelerator):
                if self.accelerator.is_main_process:
                    if self.inputs.keep:
                        self._write_best(store, scratch, comparison)
                    write_report(comparison, self.folder, self.pictures)
        return gather(self.accelerator, comparison)[0]

    @contextmanager
    def _workspace(self) -> Iterator[Path]:
        """Folder for merged models, which all processes work in; the main process keeps other comparisons out."""
        busy = (
            f"Another comparison writes to {self.folder}. Wait until that has ended, or choose another `output_dir`."
        )
        with ExitStack() as held:
            scratch = None
            with together(self.accelerator):
                if self.accelerator.is_main_process:
                    held.enter_context(only_user(_make_folder(self.folder) / ".lock", busy))
                    scratch = held.enter_context(staging_folder(self.folder / "merging"))
            yield gather(self.accelerator, scratch)[0]

    @property
    def cells(self) -> list[tuple[str, int]]:
        """Labels and seeds. A method that uses no samples has a cell for the first seed alone."""
        return [
            (label, seed)
            for label, method in self.methods.items()
            for seed in (self.seeds if self.inputs.uses_samples(method) else self.seeds[:1])
        ]

    def _search(self, store: CellStore, cache: Path, scratch: Path) -> list[Found]:
        """Search the settings of the methods, and add a row for what was found. The processes share the methods."""
        rows = "the validation rows" if self.inputs.validation is not None else "agreement with the experts"
        options = {"trials": self.search, "folder": cache, "identity": store.search_identity(self.seeds[0])}
        searched = [label for label, method in self.methods.items() if ranges_of(method)]

        def search(label: str) -> Found:
            method = self.methods[label]
            score = partial(store.search_score, seed=self.seeds[0])
            return search_settings(label, method, score, scored_on=rows, **options)

        self._share([partial(search, label) for label in searched], scratch, "Searching")
        found = gather(self.accelerator, [search(label) for label in searched] if self._is_main else None)[0]
        for result in found:
            if result.method != self.methods[result.label]:
                self.methods[f"{result.label} (searched)"] = result.method
        return found

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    def _measure(self, store: CellStore, scratch: Path) -> None:
        """Fill the store. Each process takes the next job that no other has taken."""
        jobs: list[Callable[[], Any]] = [store.expert_outcomes, store.base_outcomes]
        jobs += [partial(store.cell, self.methods[label], seed) for label, seed in self.cells]
        self._share(jobs, scratch, "Comparing")
        self._share([partial(store.interference, self.methods.values(), self.seeds[0])], scratch, "Interference")
        if self.pictures == ALL:
            self._share(self._figure_cells(store).jobs(), scratch, "Figures")

    def _figure_cells(self, store: CellStore) -> FigureCells:
        interference = store.interference(self.methods.values(), self.seeds[0])
        return FigureCells(store, self.methods, self.seeds[0], interference)

    def _share(self, jobs: list[Callable[[], Any]], scratch: Path, name: str) -> None:
        """Do jobs that do not depend on each other, all processes together."""
        with together(self.accelerator):
            for i, job in enumerate(tracked(jobs, name, self.inputs.options.progress)):
                if self.accelerator.num_processes == 1 or _take(scratch / f"{name}-{i}"):
                    job()

    def _comparison(self, store: CellStore, how: list[str]) -> Comparison:
        """The comparison as far as it is measured, from the store."""
        experts, base = store.expert_outcomes(), store.base_outcomes()
        cells: dict[str, dict[int, Cell]] = {label: {} for label in self.methods}
        for label, seed in self.cells:
            cells[label][seed] = store.cell(self.methods[label], seed)
        metric = self.inputs.metric
        choices = [
            f"{label}, seed {seed}: chosen {cell.choice}."
            for label, by_seed in cells.items()
            for seed, cell in by_seed.items()
            if cell.chosen and cell.choice
        ]
        return Comparison(
            rows=summarise(self.methods, cells, experts),
            experts={task: outcome.score for task, outcome in experts.items()},
            base={task: outcome.score for task, outcome in base.items()},
            num_rows={task: len(outcome.labels) for task, outcome in experts.items()},
            metric=metric.name,
            higher_is_better=metric.higher_is_better,
            how=[*how, *choices],
            interference=store.interference(self.methods.values(), self.seeds[0]),
            figures=self._figure_cells(store).figures(experts) if self.pictures == ALL else None,
            base_interval=interval_of_share(base, experts) if base else None,
            intervals={
                "experts": {task: outcome.interval for task, outcome in experts.items()},
                "base": {task: outcome.interval for task, outcome in base.items()},
            },
        )

    def _write_best(self, store: CellStore, scratch: Path, comparison: Comparison) -> None:
        """Write the best model: the one that was merged for its cell, or else merged again from the cache."""
        row = best_row([row for row in comparison.rows if row.label in self.methods], comparison.higher_is_better)
        method, seed, target = self.methods[row.label], self.seeds[0], self.folder / BEST
        recover(target)
        merged = next(scratch.glob(f"kept-*/{store.name_of(method, seed)}"), None)
        if merged is not None:
            publish_folder(merged, target, overwrite=True)
        else:
            store.merge(method, seed, target, overwrite=True)
        comparison.kept = target
        of_seed = f", seed {seed}" if len(row.by_seed) > 1 else ""
        comparison.how.append(f"Kept in {BEST}: {row.label}{of_seed}, the best on the test rows.")


def best_row(rows: Sequence[Row], higher_is_better: bool) -> Row:
    """The row with the best normalised score, or with the best average where there are no normalised scores."""
    known = [row for row in rows if row.normalised == row.normalised]
    sign = 1 if higher_is_better else -1
    return max(known, key=lambda row: row.normalised) if known else max(rows, key=lambda row: sign * row.average)


def _take(job: Path) -> bool:
    """Whether this process is the first to take a job."""
    try:
        os.close(os.open(job, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HfEsmError(
            f"{folder}: this folder cannot be made ({error.strerror}). Choose another `output_dir`."
        ) from None
    return folder
