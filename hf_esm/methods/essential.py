"""ESM: merging in the essential subspace (arXiv 2602.20208, 2606.19164)."""

import re
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg import essential_subspace, polar_factor
from ..statistics import InputStatistics
from .singular_vectors import merge_singular_vectors
from .stack import Merged, Stack, mean_update


@dataclass
class EssentialMerge:
    """ESM. Each expert's update of a linear map is cut down to the principal directions of its output shift; the
    experts' directions and coordinates are then orthogonalised and multiplied back together.

    Weights without activation statistics go through TSV-M where they are matrices and are averaged where not.
    The defaults are the product's; `roberta()` and `vit()` are the settings of the published code.
    """

    name: ClassVar[str] = "esm"
    default_alpha: ClassVar[float] = 1.0
    tunable: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = True

    gamma: float = field(
        default=0.15,
        metadata={"help": "exponent of the eigenvalue weighting inside one task (2606.19164, step 3); 0 turns it off"},
    )
    task_exponent: float = field(
        default=0.0, metadata={"help": "polarized scaling between tasks (2602.20208); published: 2; 0 turns it off"}
    )
    dimension_exponent: float = field(
        default=0.0,
        metadata={"help": "polarized scaling between input dimensions (2602.20208); published: 2; 0 turns it off"},
    )
    layer_exponent: float = field(
        default=0.0, metadata={"help": "scaling between layers of one type; published: 2; 0 turns it off"}
    )
    factor: float = field(default=1.0, metadata={"help": "constant factor on calibrated linear maps; vit preset: 2"})
    uncalibrated: tuple[str, ...] = field(
        default=(),
        metadata={"help": "regular expressions of weight names to merge by TSV-M although statistics exist"},
    )
    stack_shared_inputs: bool = field(
        default=False,
        metadata={"help": "treat separate q, k and v projections as one stacked weight, as the ViT code does"},
    )
    keep_fallback_scale: bool = field(
        default=False,
        metadata={"help": "keep the mean singular values in the TSV-M fallback, as the RoBERTa code does"},
    )
    scale_all: bool = field(
        default=False, metadata={"help": "let alpha multiply every parameter's update, not only linear maps"}
    )

    @classmethod
    def roberta(cls) -> "EssentialMerge":
        """The settings of the published RoBERTa code."""
        return cls(layer_exponent=2.0, keep_fallback_scale=True, scale_all=True)

    @classmethod
    def vit(cls) -> "EssentialMerge":
        """The settings of the published ViT code, which calibrates the stacked q, k, v and both MLP matrices."""
        return cls(
            task_exponent=2.0,
            dimension_exponent=2.0,
            layer_exponent=2.0,
            factor=2.0,
            uncalibrated=(r"(^|\.)(o_proj|out_proj|attention\.output\.dense|attn\.c_proj|attention\.dense)\.weight$",),
            stack_shared_inputs=True,
            scale_all=True,
        )

    def merge(self, stack: Stack) -> Merged:
        if not stack.is_matrix:
            return mean_update(stack, scaled=self.scale_all)
        scaled = self.scale_all or stack.is_linear
        if not stack.is_calibrated or any(re.search(pattern, stack.name) for pattern in self.uncalibrated):
            merged = merge_singular_vectors(stack.deltas, self.keep_fallback_scale)
            return Merged(merged.float(), "tsv-m", scaled)
        merged, energy_kept = self.merge_calibrated(stack.deltas, stack.statistics)
        return Merged(merged.float(), self.name, scaled, {"energy_kept": energy_kept})

    def merge_calibrated(self, deltas: list[Tensor], statistics: list[InputStatistics]) -> tuple[Tensor, list[float]]:
        """One calibrated weight: the merged update `[d_out, d_in]` in float64, and the energy kept per task."""
        rank = max(deltas[0].shape[0] // len(deltas), 1)
        norms = torch.stack([delta.double().norm() for delta in deltas])
        task_scales = _relative(norms, self.task_exponent)
        directions, coordinates, energy_kept = [], [], []
        for delta, inputs, task_scale in zip(deltas, statistics, task_scales, strict=True):
            subspace = essential_subspace(inputs.factor, delta, rank)
            energy_kept.append(subspace.energy_kept)
            weights = _relative(_relative(subspace.squares, self.gamma), 1.0)
            directions.append(subspace.directions * weights)
            coordinates.append((subspace.directions * weights * task_scale).T @ delta.double())
        left, right = torch.cat(directions, dim=1), torch.cat(coordinates)
        if not left.shape[1]:  # no expert changes what this map puts out
            return torch.zeros_like(deltas[0], dtype=torch.float64), energy_kept
        right = right * _relative(right.norm(dim=0), self.dimension_exponent)
        (left, left_mean), (right, right_mean) = polar_factor(left), polar_factor(right)
        return (left @ right) * (left_mean * right_mean * self.factor), energy_kept


def _relative(values: Tensor, exponent: float) -> Tensor:
    """`(values / mean values)^exponent`; ones where there is nothing to compare."""
    if exponent == 0 or not len(values) or values.sum() == 0:
        return torch.ones_like(values)
    return (values / values.mean()) ** exponent
