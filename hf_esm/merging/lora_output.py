"""The merged updates written as one LoRA adapter of the base."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from ..calibration import ActivationStatistics
from ..checkpoints import write_lora_adapter
from ..planning import MergeOptions, MergePlan, torch_dtype
from .choice import Chosen
from .spans import best_factors, span_of


def write_lora(
    folder: Path,
    scratch: Path,
    plan: MergePlan,
    chosen: Chosen,
    statistics: Mapping[str, Optional[ActivationStatistics]],
    options: MergeOptions,
    progress: Callable[[Iterable], Iterable],
) -> dict[str, tuple[int, float]]:
    """Write the merged updates as a LoRA adapter of at most `options.rank`, else the sum of the experts' ranks.

    All modules have one rank, as inference servers expect; factors of a lower rank are filled up with zeros.

    Returns the rank and the error of each weight, see `WeightReport`, by its canonical name.
    """
    base, dtype = plan.base, torch_dtype(options.dtype) or torch.float32
    found: dict[str, tuple[Tensor, Tensor]] = {}
    errors: dict[str, tuple[int, float]] = {}
    for name in progress([name for name in plan.heads.shared if name not in plan.unchanged]):
        span = span_of(plan.experts, name)
        known = [inputs[name].factor for inputs in statistics.values() if inputs is not None and name in inputs]
        inputs = known if len(known) == len(statistics) else []
        left, a, error = best_factors(chosen.core(name, span), options.rank or len(span.basis), inputs)
        errors[name] = len(a), error
        found[base.linear[name].module] = a.to(dtype), (span.basis @ left).to(dtype)
    rank = max(len(a) for a, _ in found.values())
    written = scratch / "adapter"
    shutil.rmtree(written, ignore_errors=True)  # of an interrupted run
    write_lora_adapter(
        written,
        {module: _filled_up(a, b, rank) for module, (a, b) in found.items()},
        _name_of(plan),
        fan_in_fan_out=any(linear.transposed for linear in base.linear.values() if linear.module in found),
        base_revision=base.revision,
        base_class=type(base.skeleton),
    )
    for path in written.iterdir():
        shutil.move(path, folder / path.name)
    written.rmdir()
    return errors


def _filled_up(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors with rows and columns of zeros up to a rank."""
    more = rank - len(a)
    return torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), more)], dim=1)


def _name_of(plan: MergePlan) -> Optional[str]:
    """Return the id of the base, or its folder, which is found from everywhere."""
    source = plan.base.source
    folder = Path(source).expanduser()
    return str(folder.absolute()) if source and folder.is_dir() else source or None
