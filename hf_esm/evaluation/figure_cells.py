"""Measures what `pictures="all"` shows besides the rows, each once, in the cache of the comparison's cells."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..architecture import reads_prompts, writes
from ..checkpoints import open_checkpoint, resolve_source
from ..merging import statistics_of_experts, updates_merged_by
from ..methods import TSVC, EssentialMerge, MergeMethod
from ..metrics import HarnessMetric, Outcome
from ..planning import MergeData
from ..routing import blocks_before
from .cells import CellStore
from .figures import RANKS, Figures, RoutesByBlock, measure_spectra
from .interference import Interference
from .summary import summarise


@dataclass
class FigureCells:
    """The measurements for `pictures="all"`.

    Attributes:
        store: the cells of the comparison.
        methods: methods by the labels of their rows.
        seed: of the choice of samples; the first one of the comparison.
        interference: interference between the experts.
    """

    store: CellStore
    methods: Mapping[str, MergeMethod]
    seed: int
    interference: Interference

    def jobs(self) -> list[Callable[[], Any]]:
        """Return what fills the cache; the jobs do not depend on each other."""
        jobs: list[Callable[[], Any]] = [partial(self._spectra, method) for method in self._spectral.values()]
        jobs += [partial(self.store.cell, method, self.seed) for method in self._compressed.values()]
        jobs += [partial(self._blocks, method) for method in self._deciding.values()]
        for store in self._fewer.values():
            jobs += [partial(store.cell, method, self.seed) for method in self._static.values()]
        return jobs

    def figures(self, experts: Mapping[str, Outcome]) -> Figures:
        """Return everything, as far as it is measured, from the cache.

        Args:
            experts: outcomes of the experts on the test rows.
        """
        seed = self.seed
        cells = {str(rank): {seed: self.store.cell(method, seed)} for rank, method in self._compressed.items()}
        methods = {str(rank): method for rank, method in self._compressed.items()}
        figures = Figures(
            experts={task: outcome.score for task, outcome in experts.items()},
            higher_is_better=self.store.inputs.metric.higher_is_better,
            spectra={label: self._spectra(method) for label, method in self._spectral.items()},
            ranks={int(row.label): row for row in summarise(methods, cells, experts)},
            blocks={label: self._blocks(method) for label, method in self._deciding.items()},
        )
        stores = {**self._fewer, len(experts): self.store} if self._fewer else {}
        for count, store in stores.items():
            first = dict(list(experts.items())[:count])
            of_methods = {label: {seed: store.cell(method, seed)} for label, method in self._static.items()}
            for row in summarise(self._static, of_methods, first):
                figures.counts.setdefault(row.label, {})[count] = row
        return figures

    @property
    def _static(self) -> dict[str, MergeMethod]:
        return {label: method for label, method in self.methods.items() if not method.routes}

    @property
    def _spectral(self) -> dict[str, MergeMethod]:
        """The methods whose merged updates are decomposed: where there are statistics, and nothing is learned."""
        measured = any(layer.essential_energy for layer in self.interference.layers)
        plain = {label: m for label, m in self._static.items() if not m.chooses and not m.needs_samples}
        return plain if measured else {}

    @property
    def _compressed(self) -> dict[int, MergeMethod]:
        widest = max((layer.ranks[-1] for layer in self.interference.layers), default=0)
        return {rank: TSVC(rank=rank) for rank in RANKS if rank <= widest}

    @property
    def _deciding(self) -> dict[str, MergeMethod]:
        """The methods whose router decides, with rows that it can read."""
        if isinstance(self.store.inputs.metric, HarnessMetric):
            return {}
        return {label: method for label, method in self.methods.items() if method.decides}

    @cached_property
    def _fewer(self) -> dict[int, CellStore]:
        """The cells of merges of the first tasks, by their number."""
        inputs = self.store.inputs
        if inputs.names_tasks or not self._static:
            return {}
        return {
            count: CellStore(inputs.of_first_tasks(count), self.store.cache, self.store.scratch)
            for count in range(2, len(inputs.experts))
        }

    def _spectra(self, method: MergeMethod) -> dict[str, list[float]]:
        inputs = self.store.inputs
        options = replace(
            inputs.options, seed=self.seed, cache_dir=str(self.store.cache), refine=False, lines=None, progress=False
        )
        data = MergeData(inputs.calibration, processor=inputs.processor)
        models, shared = (inputs.base, inputs.experts), (data, options, inputs.access, inputs.accelerator)

        def measure() -> dict[str, Any]:
            plan, statistics = statistics_of_experts(*models, EssentialMerge(), *shared)
            with updates_merged_by(method, *models, *shared) as updates:
                return measure_spectra(plan, statistics, updates)

        return self.store.cached("spectra", self._key(method), measure)

    def _blocks(self, method: MergeMethod) -> RoutesByBlock:
        """Merge once more, with a router that reads all blocks, and measure where it could decide."""
        inputs, decides_after = self.store.inputs, {}
        can_read_all = method.needs_features and "depth" in {setting.name for setting in fields(method)}
        reading = replace(method, depth=1.0) if can_read_all else method

        def measure() -> dict[str, Any]:
            with TemporaryDirectory(dir=self.store.scratch) as scratch:
                target = Path(scratch) / "model"
                self.store.merge(reading, self.seed, target)
                return inputs.measurement.routes_by_block(target)

        shares = self.store.cached("blocks", self._key(reading), measure)
        if can_read_all:
            base = open_checkpoint(resolve_source(inputs.base, "base", inputs.access)).skeleton
            depth = method.for_model(reads_prompts(base), writes(base)).depth
            decides_after = {t: blocks_before(depth, len(next(iter(s.values())))) for t, s in shares.items()}
        rows = {task: len(outcome.labels) for task, outcome in self.store.expert_outcomes().items()}
        return RoutesByBlock(shares, decides_after, rows)

    def _key(self, method: MergeMethod) -> list[Any]:
        return self.store.cell_key(method, self.store.inputs.merge_arguments(method, self.seed))
