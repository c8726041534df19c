"""ESM: merging in the essential subspace (arXiv 2602.20208, 2606.19164)."""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import HfEsmError
from ..linalg import essential_subspace, norm, polar_factor, truncated_svd, working_dtype
from .singular_vectors import TOLERANCE, check_tolerance, merge_singular_vectors
from .stack import InputStatistics, Merged, MergeMethod, Stack, mean_update


@dataclass
class EssentialMerge(MergeMethod):
    """ESM: every linear map by the orthogonalised principal directions of the experts' output shifts.

    Weights without activation statistics go through TSV-M where they are matrices and are averaged where not.

    `roberta()` and `vit()` are the settings of the published code. The defaults keep the essential subspaces and the
    orthogonalisation of the papers and differ in five points, chosen on the validation rows of eight text tasks:
    the inputs' second moments are shrunk three quarters of the way to the identity, so that the mean input does not
    decide alone which directions are essential; the coordinates keep their singular values, where the published polar
    factor makes all equal; each task has three quarters of its share of the directions; the fused update gets 1.2
    times the norm that the experts' updates would have together if they were orthogonal, so that α = 1 is a sound
    choice without labels; and 0.13 of the updates' sum (at most of that norm) is taken off again, since what all
    experts have in common lies in every task's subspace, and is in the way of all.
    """

    name: ClassVar[str] = "esm"
    needs_statistics: ClassVar[bool] = True

    gamma: float = field(
        default=0.0,
        metadata={"help": "exponent of the eigenvalue weighting inside one task (2606.19164); published: 0.15"},
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
    shrinkage: float = field(
        default=3.0, metadata={"help": "weight of the identity in the inputs' second moments; published: 0"}
    )
    keep_singular_values: bool = field(
        default=True,
        metadata={"help": "keep the singular values of the coordinates instead of making them equal, as published"},
    )
    match_norm: bool = field(
        default=True, metadata={"help": "scale to the root of the experts' summed squared norms; published: no"}
    )
    factor: float = field(
        default=1.2, metadata={"help": "constant factor on fused linear maps; published: 1, in the vit preset 2"}
    )
    rank_share: float = field(
        default=0.75, metadata={"help": "share of each task's directions, ⌊min(d)/T⌋, that is kept; published: 1"}
    )
    sum_subtracted: float = field(
        default=0.13,
        metadata={"help": "multiple of the updates' sum, at most of the matched norm, taken off; published: 0"},
    )
    tolerance: float = field(default=0.0, metadata={"help": TOLERANCE})
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rank_share <= 1:
            raise HfEsmError(f"{self.name}: rank_share must be above 0 and at most 1, not {self.rank_share}.")
        check_tolerance(self)

    @classmethod
    def roberta(cls) -> "EssentialMerge":
        """The settings of the published RoBERTa code."""
        return cls(**_PUBLISHED, keep_fallback_scale=True)

    @classmethod
    def vit(cls) -> "EssentialMerge":
        """The settings of the published ViT code, which calibrates the stacked q, k, v and both MLP matrices."""
        return cls(
            **_PUBLISHED | {"factor": 2.0},
            task_exponent=2.0,
            dimension_exponent=2.0,
            uncalibrated=(r"(^|\.)(o_proj|out_proj|attention\.output\.dense|attn\.c_proj|attention\.dense)\.weight$",),
            stack_shared_inputs=True,
        )

    @property
    def stacks_shared_inputs(self) -> bool:
        """Whether separate q, k and v projections are merged as one stacked weight."""
        return self.stack_shared_inputs

    def merge(self, stack: Stack) -> Merged:
        if not stack.is_matrix:
            return mean_update(stack, scaled=self.scale_all)
        scaled = self.scale_all or stack.is_linear
        if not stack.is_calibrated or any(re.search(pattern, stack.name) for pattern in self.uncalibrated):
            merged = merge_singular_vectors(stack.deltas, self.keep_fallback_scale, self.tolerance)
            return Merged(merged.float(), "tsv-m", scaled)
        merged, energy_kept = self.merge_calibrated(stack.deltas, stack.statistics)
        return Merged(merged.float(), "esm", scaled, {"energy_kept": energy_kept})

    def merge_calibrated(self, deltas: list[Tensor], statistics: list[InputStatistics]) -> tuple[Tensor, list[float]]:
        """One calibrated weight: the merged update `[d_out, d_in]`, float64, or float32 with a tolerance, and the
        energy kept per task.
        """
        side = min(deltas[0].shape) if self.keep_singular_values else deltas[0].shape[0]
        rank = max(int(side * self.rank_share) // len(deltas), 1)
        norms, dtype = torch.stack([norm(delta) for delta in deltas]), working_dtype(self.tolerance)
        task_scales = _relative(norms, self.task_exponent)
        directions, coordinates, energy_kept = [], [], []
        for delta, inputs, task_scale in zip(deltas, statistics, task_scales, strict=True):
            subspace = essential_subspace(inputs.factor, delta, rank, self.shrinkage, self.tolerance)
            energy_kept.append(subspace.energy_kept)
            weights = _relative(_relative(subspace.squares, self.gamma), 1.0)
            directions.append((subspace.directions * weights).to(dtype))
            coordinates.append((directions[-1] * task_scale).T @ delta.to(dtype))
        columns = torch.cat(coordinates).norm(dim=0)
        coordinates = [found * _relative(columns, self.dimension_exponent) for found in coordinates]
        if not sum(found.shape[1] for found in directions):  # no expert changes what this map puts out
            return torch.zeros_like(deltas[0], dtype=dtype), energy_kept
        fuse = _fuse_with_singular_values if self.keep_singular_values else _fuse
        merged = fuse(directions, coordinates, self.tolerance)
        if self.match_norm and merged.any():
            merged = merged * (norms.norm() / norm(merged))
        merged = merged * self.factor
        if self.sum_subtracted:
            total = sum(deltas[1:], start=deltas[0])
            part = part_taken_off(self.sum_subtracted, norm(total), norms.norm())
            merged = torch.sub(merged, total, alpha=float(part))
        return merged, energy_kept


@dataclass
class RoutedMerge(EssentialMerge):
    """ESM++: the static ESM model, beside it an expert per task and linear map, and a router (arXiv 2606.19164).

    Settings are those of ESM, for the static model, and the following. Beside the published router there is one that
    decides once per sample and adds the experts of the likeliest tasks, each by how likely its task is. For it, an
    expert's directions are those of the expert's own update: within them the routed model answers as the expert does,
    outside of them as the merged model, so that an expert of the wrong task does a quarter of the harm. The published
    directions, of what the merged model lacks (`residual`), are as good or better where the task is known.
    """

    name: ClassVar[str] = "esm++"

    rank: int = field(default=32, metadata={"help": "rank of each expert, per linear map; published: 8 and 32"})
    router: str = field(
        default="discriminant",
        metadata={
            "help": "how experts are chosen: discriminant, once per sample; prototype, per layer, as published; "
            "oracle, by the caller alone; static, by the caller if at all"
        },
    )
    depth: float = field(
        default=1 / 3, metadata={"help": "share of the blocks that run before the discriminant router decides"}
    )
    top_k: int = field(
        default=2,
        metadata={"help": "experts that the discriminant router adds to a sample at most"},
    )
    mixing_temperature: float = field(
        default=2.0,
        metadata={"help": "temperature of the weights that they are added with, over that of the probabilities"},
    )
    confidence: float = field(
        default=0.85, metadata={"help": "probability from which on a sample's task counts as found"}
    )
    expert_directions: str = field(
        default="",
        metadata={
            "help": "what an expert's directions are taken of: update, of the expert's own; residual, of what the "
            "merged model lacks, as published; by default, update for the discriminant router, else residual"
        },
    )
    router_features: str = field(
        default="merged",
        metadata={"help": "whose features the router is made from: merged (one more pass), or base (no data needed)"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        routers = ("discriminant", "prototype", "oracle", "static")
        for setting, allowed in (
            ("router", routers),
            ("router_features", ("merged", "base")),
            ("expert_directions", ("update", "residual", "")),
        ):
            if getattr(self, setting) not in allowed:
                listed = ", ".join(filter(None, allowed))
                raise HfEsmError(f"esm++: {setting} is {listed}, not {getattr(self, setting)!r}.")
        for setting in ("rank", "top_k"):
            if getattr(self, setting) < 1:
                raise HfEsmError(f"esm++: {setting} must be 1 or more, not {getattr(self, setting)}.")
        if not self.mixing_temperature > 0:
            raise HfEsmError(f"esm++: mixing_temperature must be above 0, not {self.mixing_temperature}.")
        for setting in ("depth", "confidence"):
            if not 0 <= getattr(self, setting) <= 1:
                raise HfEsmError(f"esm++: {setting} must be between 0 and 1, not {getattr(self, setting)}.")

    @property
    def needs_merged_features(self) -> bool:
        """Whether the router reads features of the merged model, not those of the base."""
        return self.router_features == "merged"

    @property
    def router_settings(self) -> dict[str, Any]:
        """`top_k`, `mixing_temperature` and `confidence` of the discriminant router."""
        return {name: getattr(self, name) for name in ("top_k", "mixing_temperature", "confidence")}

    @property
    def directions(self) -> str:
        """`expert_directions`, or what they are by default."""
        return self.expert_directions or ("update" if self.router == "discriminant" else "residual")

    def expert_rank(self, shape: torch.Size, tasks: int) -> int:
        """Rank of one expert of a map `[d_out, d_in]`."""
        return min(self.rank, *shape)


# What both published codes have in common.
_PUBLISHED = {
    "gamma": 0.15,
    "layer_exponent": 2.0,
    "factor": 1.0,
    "rank_share": 1.0,
    "sum_subtracted": 0.0,
    "shrinkage": 0.0,
    "keep_singular_values": False,
    "match_norm": False,
    "scale_all": True,
}


def _fuse(directions: list[Tensor], coordinates: list[Tensor], tolerance: float) -> Tensor:
    """The published fusion: `polar(E) polar(C)`, times the means of both stacks' singular values."""
    (left, left_mean), (right, right_mean) = (
        polar_factor(torch.cat(directions, dim=1), tolerance),
        polar_factor(torch.cat(coordinates), tolerance),
    )
    return (left @ right) * (left_mean * right_mean)


def _fuse_with_singular_values(directions: list[Tensor], coordinates: list[Tensor], tolerance: float) -> Tensor:
    left, right = fuse_with_singular_values(directions, coordinates, tolerance)
    return left @ right


def fuse_with_singular_values(
    directions: list[Tensor], coordinates: list[Tensor], tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`polar(E P) S` and `polar(Q)` with the SVD `P_t S_t Q_t` of each task's coordinates: as in TSV-M, each direction
    keeps its strength. Their product is the merged update.
    """
    dtype = working_dtype(tolerance)
    turned = [truncated_svd(found, found.shape[0]) for found in coordinates if found.any()]
    kept = [found for found, c in zip(directions, coordinates, strict=True) if c.any()]
    stacked = torch.cat([e.to(dtype) @ p.to(dtype) for e, (p, _, _) in zip(kept, turned, strict=True)], dim=1)
    left, _ = polar_factor(stacked, tolerance)
    right, _ = polar_factor(torch.cat([q for _, _, q in turned]), tolerance)
    return left * torch.cat([s for _, s, _ in turned]).to(dtype), right


def part_taken_off(multiple: float, total: Tensor, norm: Tensor) -> Tensor:
    """What the updates' sum is multiplied by before it is taken off: `multiple`, or less where the sum is longer than
    `norm`, so that it stays below the fused update however many experts there are and however alike they are.
    """
    return multiple * (norm / total.clamp_min(torch.finfo(total.dtype).tiny)).clamp_max(1)


def _relative(values: Tensor, exponent: float) -> Tensor:
    """`(values / mean values)^exponent`; ones where there is nothing to compare."""
    if exponent == 0 or not len(values) or values.sum() == 0:
        return torch.ones_like(values)
    return (values / values.mean()) ** exponent
