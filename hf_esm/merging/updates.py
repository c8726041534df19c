"""The outcome of pass one: unscaled merged updates on disk, and the report of each weight."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Optional

import torch
from safetensors import safe_open
from torch import Tensor

from ..architecture import from_matrices, to_matrices
from ..checkpoints import Checkpoint
from ..linalg import piecewise
from ..planning import MergePlan
from .spans import span_of


@dataclass
class WeightReport:
    """How one weight was merged.

    Attributes:
        name: its name in the base model.
        how: the rule that merged the weight (`"esm"`, `"tsv-m"`, `"mean"`, `"sum"`, …; for the experts of a mixture,
            maybe several: `"esm and tsv-m"`); `"unchanged"` if no expert differs from the base.
        norm: Frobenius norm of the merged update, before α and the scale between layers.
        scaled: whether α multiplies the update.
        kind: what the weight is (see `architecture.KINDS`); empty for none of them.
        alpha: scale of the update that an override sets, in place of α.
        method_alpha: default scale of the method that an override names, in place of α unless that is of the kind.
        layer_scale: scale between layers of one type; 1 if the method has none.
        depth_scale: what is added to the scale, and a factor of it, by depth (LiNeS): 0 and 1 without.
        magnitudes: sums of the absolute entries of the merged update, and of the sum of the experts' updates; empty
            unless the scale by depth depends on them.
        update_norms: Frobenius norm of each expert's update, by task.
        energy_kept: share of each expert's output shift that the kept directions carry, by task (ESM); of a mixture,
            the mean over its experts.
        rank: rank of the update in the LoRA adapter that is written, if one is.
        rank_error: what that rank leaves out of the merged update Δ: `‖R (Δ − B A)ᵀ‖ / ‖R Δᵀ‖`, with the factors `R`
            of all experts' inputs stacked; without statistics, `‖Δ − B A‖ / ‖Δ‖`.
    """

    name: str
    how: str
    norm: float
    scaled: bool
    kind: str = ""
    alpha: Optional[float] = None
    method_alpha: Optional[float] = None
    layer_scale: float = 1.0
    depth_scale: tuple[float, float] = (0.0, 1.0)
    magnitudes: tuple[float, ...] = ()
    update_norms: dict[str, float] = field(default_factory=dict)
    energy_kept: dict[str, float] = field(default_factory=dict)
    rank: Optional[int] = None
    rank_error: Optional[float] = None

    def scale(self, alpha: float, by_kind: Mapping[str, float]) -> float:
        """Return what multiplies the merged update, where α is a number, and another for some kinds of weights."""
        usual = alpha if self.method_alpha is None else self.method_alpha
        scale = by_kind.get(self.kind, usual if self.scaled else 1.0) if self.alpha is None else self.alpha
        added, factor = self.depth_scale
        return self.layer_scale * (added + factor * scale)


def updated(weight: Tensor, update: Tensor, scale: float, out: Optional[Tensor] = None) -> Tensor:
    """Return a weight of the base with its scaled update, float32, in `out` if that is given."""
    return piecewise(lambda start, change: torch.add(start.float(), change, alpha=scale), weight, update, out=out)


class MergedUpdates:
    """The unscaled merged updates on disk, and the reports of all weights.

    Attributes:
        base: the base model.
        reports: by the weight's canonical name.
    """

    def __init__(self, base: Checkpoint, reports: dict[str, WeightReport], files: list[Path]):
        self.base, self.reports = base, reports
        self._files = {}
        for path in files:
            file = safe_open(path, "pt")
            self._files.update(dict.fromkeys(file.keys(), file))

    def weight(self, name: str, alpha: float, by_kind: Mapping[str, float] = MappingProxyType({})) -> Tensor:
        """Return `W0 + α β Δ_M`, float32; the base's weight, as stored, if nothing was merged.

        Args:
            alpha: scale of the updates.
            by_kind: another scale for some kinds of weights.
        """
        weight, update = self.base.tensor(name), self.update(name)
        return weight if update is None else updated(weight, update, self.reports[name].scale(alpha, by_kind))

    def scaled_by(self, alpha: float) -> "MergedUpdates":
        """Return the same updates with one α for every weight, whatever α is asked for later."""
        other = copy(self)
        other.reports = {name: replace(report, alpha=alpha) for name, report in self.reports.items()}
        return other

    def update(self, name: str) -> Optional[Tensor]:
        """Return the unscaled merged update, float32, as the weight is stored; None if nothing was merged."""
        return self._files[name].get_tensor(name) if name in self._files else None


class WrittenUpdates(MergedUpdates):
    """The reports of a merge in one pass. Its updates are not kept, as its weights are in the output already."""

    def __init__(self, base: Checkpoint, reports: dict[str, WeightReport]):
        super().__init__(base, reports, [])

    def update(self, name: str) -> Optional[Tensor]:
        raise RuntimeError(f"{name} was merged in one pass, so that its update is not kept")


class FactoredUpdates(MergedUpdates):
    """Merged updates on disk as `K [s, d_in]` in the bases of the experts' factors."""

    def __init__(self, plan: MergePlan, reports: dict[str, WeightReport], files: list[Path]):
        super().__init__(plan.base, reports, files)
        self._plan = plan

    def update(self, name: str) -> Optional[Tensor]:
        core = super().update(name)
        if core is None:
            return None
        linear, span = self.base.linear[name], span_of(self._plan.experts, name)
        (core,) = to_matrices(core, linear)
        return from_matrices([(span.basis @ core.double()).float()], linear)

    def core(self, name: str) -> Tensor:
        """Return the unscaled merged update in the basis of the experts' factors, `[s, d_in]` float64."""
        (core,) = to_matrices(super().update(name), self.base.linear[name])
        return core.double()
