"""What pass one leaves: the unscaled merged updates on disk, and their reports."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoints import Checkpoint


@dataclass
class WeightReport:
    """What became of one weight.

    Attributes:
        name: its name in the base model.
        how: the rule that merged it (`"esm"`, `"tsv-m"`, `"mean"`, `"sum"`, …; of a mixture's experts, several:
            `"esm and tsv-m"`); `"unchanged"` where no expert differs from the base.
        norm: Frobenius norm of the merged update, before α and the scale between layers.
        scaled: whether α multiplies it.
        layer_scale: its scale between layers of one type; 1 where the method has none.
        update_norms: Frobenius norm of each expert's update, by task.
        energy_kept: share of each expert's output shift that its kept directions carry, by task (ESM); of a mixture,
            the mean over its experts.
    """

    name: str
    how: str
    norm: float
    scaled: bool
    layer_scale: float = 1.0
    update_norms: dict[str, float] = field(default_factory=dict)
    energy_kept: dict[str, float] = field(default_factory=dict)


class MergedUpdates:
    """Pass one's outcome: the unscaled merged updates on disk, and their reports."""

    def __init__(self, base: Checkpoint, reports: dict[str, WeightReport], files: list[Path]):
        self.base, self.reports = base, reports
        self._owner = {}
        for path in files:
            file = safe_open(path, "pt")
            self._owner.update(dict.fromkeys(file.keys(), file))

    def weight(self, name: str, alpha: float) -> Tensor:
        """`W0 + α β Δ_M` in float32; the base's own weight, as stored, where nothing was merged."""
        weight = self.base.tensor(name)
        if name not in self._owner:
            return weight
        report = self.reports[name]
        scale = alpha * report.layer_scale if report.scaled else report.layer_scale
        return torch.add(weight.float(), self._owner[name].get_tensor(name), alpha=scale)
