"""The first steps of a merge, for what is measured of experts and of merged updates without a merged model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

from ..calibration import ActivationStatistics
from ..checkpoints import Access, ModelSpec
from ..methods import MergeMethod
from ..planning import MergeData, MergeOptions, MergePlan
from .expert_statistics import Inputs
from .run import MergeRun
from .updates import MergedUpdates


def statistics_of_experts(
    base: ModelSpec,
    experts: Mapping[str, ModelSpec],
    method: MergeMethod,
    data: MergeData,
    options: MergeOptions,
    access: Access,
    accelerator: Any,
) -> tuple[MergePlan, Mapping[str, Optional[ActivationStatistics]]]:
    """Return the plan of a merge, and the statistics that its method needs: those in `options.cache_dir`, as far as an
    earlier merge has left them there.
    """
    run = MergeRun(options, method, data, accelerator)
    with _calibrated(run, base, experts, access) as inputs:
        return run.plan, inputs.statistics


@contextmanager
def updates_merged_by(
    method: MergeMethod,
    base: ModelSpec,
    experts: Mapping[str, ModelSpec],
    data: MergeData,
    options: MergeOptions,
    access: Access,
    accelerator: Any,
) -> Iterator[MergedUpdates]:
    """Provide the updates of a merge by one method, before any scale. They are on disk inside the block alone."""
    run = MergeRun(options, method, data, accelerator)
    with _calibrated(run, base, experts, access) as inputs:
        yield run.merge_weights(inputs)[0].updates


@contextmanager
def _calibrated(run: MergeRun, base: ModelSpec, experts: Mapping[str, ModelSpec], access: Access) -> Iterator[Inputs]:
    run.open_models(base, experts, access, headers_only=False)
    run.one_pass = False  # which keeps no updates
    inputs = run.read_inputs()
    run.find_work(inputs)
    with run.workspace():
        yield run.calibrate(inputs)
