"""The outcome of pass one: unscaled merged updates on disk, and the report of each weight."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoints import Checkpoint


@dataclass
class WeightReport:
    """How one weight was merged.

    Attributes:
        name: its name in the base model.
        how: the rule that merged the weight (`"esm"`, `"tsv-m"`, `"mean"`, `"sum"`, …; for the experts of a mixture,
            maybe several: `"esm and tsv-m"`); `"unchanged"` if no expert differs from the base.
        norm: Frobenius norm of the merged update, before α and the scale between layers.
        scaled: whether α multiplies the update.
        layer_scale: scale between layers of one type; 1 if the method has none.
        update_norms: Frobenius norm of each expert's update, by task.
        energy_kept: share of each expert's output shift that the kept directions carry, by task (ESM); of a mixture,
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

    def weight(self, name: str, alpha: float) -> Tensor:
        """Return `W0 + α β Δ_M`, float32; the base's weight, as stored, if nothing was merged."""
        weight = self.base.tensor(name)
        if name not in self._files:
            return weight
        report = self.reports[name]
        scale = alpha * report.layer_scale if report.scaled else report.layer_scale
        return torch.add(weight.float(), self._files[name].get_tensor(name), alpha=scale)
