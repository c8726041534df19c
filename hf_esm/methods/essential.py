"""ESM: merging in the essential subspace (arXiv 2602.20208, 2606.19164)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Optional

import torch
from torch import Tensor

from ..linalg import essential_subspace, norm, polar_factor, truncated_svd, working_dtype
from .published import ROBERTA, VIT
from .singular_vectors import TOLERANCE, merge_singular_vectors
from .stack import InputStatistics, Merged, MergeMethod, Stack, mean_update


@dataclass
class EssentialMerge(MergeMethod):
    """ESM: every linear map by the orthogonalised principal directions of the experts' output shifts.

    A matrix without activation statistics is merged by TSV-M; any other parameter is averaged.

    `roberta()` and `vit()` are the settings of the published code. The defaults keep the essential subspaces and the
    orthogonalisation of the papers and differ in five points, chosen on the validation rows of eight text tasks:

    - The inputs' second moments are shrunk three quarters of the way to the identity, so that the mean input alone
      does not decide which directions are essential.
    - The coordinates keep their singular values; the published polar factor makes them equal.
    - Each task has three quarters of its share of the directions.
    - The fused update gets 1.2 times the norm of the sum of the updates if they were orthogonal, so that α = 1 is a
      sound choice without labels.
    - 0.13 of the updates' sum (at most of that norm) is subtracted: what all experts have in common lies in every
      task's subspace, and disturbs all tasks.

    Example:
        >>> import torch
        >>> from hf_esm import EssentialMerge, InputStatistics, Stack
        >>> updates = [torch.randn(6, 4) for _ in range(2)]  # of two experts, [d_out, d_in]
        >>> inputs = [InputStatistics(torch.randn(10, 4), torch.zeros(4), 10) for _ in range(2)]
        >>> stack = Stack("dense.weight", "dense.weight", updates, is_linear=True, statistics=inputs)
        >>> merged = EssentialMerge(rank_share=0.5).merge(stack)
        >>> merged.how, tuple(merged.update.shape)
        ('esm', (6, 4))

        In a merge, `merge_models(…, method="esm")`, `{"name": "esm", "rank_share": 0.5}` or an instance select it.
    """

    name: ClassVar[str] = "esm"
    papers: ClassVar[tuple[str, ...]] = ("2602.20208", "2606.19164")
    decomposes: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = True
    keeps_span: ClassVar[bool] = True

    gamma: float = field(
        default=0.0,
        metadata={
            "help": "exponent of the eigenvalue weighting inside one task (2606.19164); published: 0.15",
            "search": (0.0, 0.5, "linear"),
        },
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
        default=3.0,
        metadata={
            "help": "weight of the identity in the inputs' second moments; published: 0",
            "search": (0.03, 10.0, "log"),
        },
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
        default=0.75,
        metadata={
            "help": "share of each task's directions, ⌊min(d)/T⌋, that is kept; published: 1",
            "above": 0,
            "most": 1,
            "search": (0.3, 1.0, "linear"),
        },
    )
    sum_subtracted: float = field(
        default=0.13,
        metadata={
            "help": "multiple of the updates' sum, at most of the matched norm, subtracted; published: 0",
            "search": (0.0, 0.3, "linear"),
        },
    )
    tolerance: float = field(default=0.001, metadata=TOLERANCE)
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
    published_embeddings: bool = field(
        default=False, metadata={"help": "merge embeddings by TSV-M, as published, instead of by token counts"}
    )
    scale_all: bool = field(
        default=False, metadata={"help": "let alpha multiply every parameter's update, not only linear maps"}
    )
    scale_fallback: bool = field(
        default=True,
        metadata={"help": "let alpha multiply linear maps that are merged by TSV-M, which the ViT code does not"},
    )
    base_biases: bool = field(
        default=False, metadata={"help": "leave biases at the base's, as the RoBERTa code does, instead of the mean"}
    )
    all_columns: bool = field(
        default=False,
        metadata={
            "help": "take the means of the weighting and the orthogonalisation over all ⌊d_out/T⌋ directions of a "
            "task, those without energy included, as published, instead of over those that there are"
        },
    )
    largest_alpha: float = field(
        default=3.0, metadata={"help": "how far alpha: auto searches; published: RoBERTa 5, ViT 3", "least": 0.1}
    )

    @classmethod
    def roberta(cls) -> "EssentialMerge":
        """Return the settings of the published RoBERTa code.

        Biases are the base's: the published evaluation on GLUE runs the merged weights with the biases of each expert.
        """
        return cls(**ROBERTA)

    @classmethod
    def vit(cls) -> "EssentialMerge":
        """Return the settings of the published ViT code: the stacked q, k, v and both MLP matrices are calibrated.

        α multiplies these alone.
        """
        return cls(**VIT)

    @property
    def stacks_shared_inputs(self) -> bool:
        """Whether separate q, k and v projections are merged as one stacked weight."""
        return self.stack_shared_inputs

    @property
    def counts_embeddings(self) -> bool:
        """Whether embeddings are merged by token counts."""
        return not self.published_embeddings

    def merge(self, stack: Stack) -> Merged:
        if self.base_biases and stack.name.endswith("bias") and not stack.is_linear:
            return Merged(torch.zeros_like(stack.updates[0]), "base", scaled=False)
        if not stack.is_matrix:
            return mean_update(stack, scaled=self.scale_all)
        if not stack.is_calibrated or any(re.search(pattern, stack.name) for pattern in self.uncalibrated):
            merged = merge_singular_vectors(
                stack.updates, self.keep_fallback_scale, self.tolerance, stack.weights, stack.num_outputs
            )
            return Merged(merged.float(), "tsv-m", self.scale_all or (stack.is_linear and self.scale_fallback))
        merged, energy_kept = self.merge_calibrated(stack.updates, stack.statistics, stack.weights, stack.num_outputs)
        return Merged(merged.float(), "esm", info={"energy_kept": energy_kept})

    def merge_calibrated(
        self,
        updates: list[Tensor],
        statistics: list[InputStatistics],
        weights: Optional[Sequence[float]] = None,
        num_outputs: Optional[int] = None,
    ) -> tuple[Tensor, list[float]]:
        """Merge one calibrated weight.

        A task's weight multiplies its rows of the orthogonalised coordinates, and its update in the sum that is
        subtracted; both norms that the result is matched to are those without weights. `num_outputs`: see `Stack`.

        Returns the merged update `[d_out, d_in]`, float64, or float32 with a tolerance; and the energy kept per task.
        """
        norms, dtype = torch.stack([norm(update) for update in updates]), working_dtype(self.tolerance)
        weights = weights or [1.0] * len(updates)
        rows = num_outputs or len(updates[0])
        rank = self._rank(rows, updates[0].shape[1], len(updates))
        directions, coordinates, energy_kept = self._essential_components(updates, statistics, norms, rank)
        if not sum(basis.shape[1] for basis in directions):  # no expert changes the outputs of this map
            return torch.zeros_like(updates[0], dtype=dtype), energy_kept
        if self.keep_singular_values:
            left, right, ranks = _fuse_keeping_values(directions, coordinates, self.tolerance)
        else:
            columns = len(updates) * rank if self.all_columns else 0
            left, right, ranks = _fuse(directions, coordinates, self.tolerance, rows, columns)
        merged, matched = left @ right, torch.tensor(1.0)
        if self.match_norm and merged.any():
            matched = norms.norm() / norm(merged)
        if any(weight != 1 for weight in weights):
            of_rows = torch.tensor(weights, dtype=right.dtype).repeat_interleave(torch.tensor(ranks))
            merged = left @ (of_rows.to(right.device)[:, None] * right)
        merged = merged * matched * self.factor
        if self.sum_subtracted:
            total = sum(weight * update for weight, update in zip(weights, updates, strict=True))
            share = share_subtracted(self.sum_subtracted, norm(total), norms.norm())
            merged = torch.sub(merged, total, alpha=float(share))
        return merged, energy_kept

    def _rank(self, outputs: int, inputs: int, tasks: int) -> int:
        """Return the number of directions that each task may have."""
        side = min(outputs, inputs) if self.keep_singular_values else outputs
        return max(int(side * self.rank_share) // tasks, 1)

    def _essential_components(
        self, updates: list[Tensor], statistics: list[InputStatistics], norms: Tensor, rank: int
    ) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """Return per task `E [d_out, r]`, `C [r, d_in]`, weighted and scaled, and the share of energy they keep.

        Args:
            rank: largest `r`.
        """
        dtype = working_dtype(self.tolerance)
        task_scales = _relative(norms, self.task_exponent)
        directions, coordinates, energy_kept = [], [], []
        for update, inputs, task_scale in zip(updates, statistics, task_scales, strict=True):
            subspace = essential_subspace(inputs.factor, update, rank, self.shrinkage, self.tolerance)
            energy_kept.append(subspace.energy_kept)
            squares, count = subspace.squares, len(subspace.squares)
            if self.all_columns:
                squares = torch.cat([squares, squares.new_zeros(rank - count)])
            weights = _relative(_relative(squares, self.gamma), 1.0)[:count]
            directions.append((subspace.directions * weights).to(dtype))
            coordinates.append((directions[-1] * task_scale).T @ update.to(dtype))
        column_scales = _relative(torch.cat(coordinates).norm(dim=0), self.dimension_exponent)
        return directions, [rows * column_scales for rows in coordinates], energy_kept


def _fuse(
    directions: list[Tensor], coordinates: list[Tensor], tolerance: float, rows: int, columns: int
) -> tuple[Tensor, Tensor, list[int]]:
    """The published fusion: `polar(E)` and `polar(C)`, times the means of both stacks' singular values.

    Args:
        rows: `d_out`, if `E` stands in a basis of fewer rows.
        columns: number of columns of `E`, if it is more than there are: the others count as zeros in the means.

    Returns both factors, whose product is the merged update, and how many rows of the second belong to each task.
    """
    e, c = torch.cat(directions, dim=1), torch.cat(coordinates)
    columns = max(columns, len(c))
    (left, left_mean), (right, right_mean) = polar_factor(e, tolerance), polar_factor(c, tolerance)
    left_mean *= min(e.shape) / min(rows, columns)
    right_mean *= min(c.shape) / min(columns, c.shape[1])
    return left * (left_mean * right_mean), right, [len(rows) for rows in coordinates]


def _fuse_keeping_values(
    directions: list[Tensor], coordinates: list[Tensor], tolerance: float
) -> tuple[Tensor, Tensor, list[int]]:
    """Return the factors of `fuse_with_singular_values`, and how many rows of the second belong to each task."""
    dtype = working_dtype(tolerance)
    none = coordinates[0].new_zeros
    decomposed = [
        truncated_svd(rows, rows.shape[0]) if rows.any() else (none(0, 0), none(0), none(0, rows.shape[1]))
        for rows in coordinates
    ]
    turned = [
        basis.to(dtype)[:, : len(p)] @ p.to(dtype) for basis, (p, _, _) in zip(directions, decomposed, strict=True)
    ]
    left, _ = polar_factor(torch.cat(turned, dim=1), tolerance)
    right, _ = polar_factor(torch.cat([q for _, _, q in decomposed]), tolerance)
    left = left * torch.cat([s for _, s, _ in decomposed]).to(dtype)
    return left, right, [len(s) for _, s, _ in decomposed]


def fuse_with_singular_values(
    directions: list[Tensor], coordinates: list[Tensor], tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return `polar(E P) S` and `polar(Q)`, with the SVD `P_t S_t Q_t` of each task's coordinates.

    Their product is the merged update. As in TSV-M, each direction keeps its singular value.
    """
    left, right, _ = _fuse_keeping_values(directions, coordinates, tolerance)
    return left, right


def share_subtracted(multiple: float, total: Tensor, norm: Tensor) -> Tensor:
    """Return the factor of the updates' sum before it is subtracted: `multiple`, or less if the sum exceeds `norm`.

    So what is subtracted stays below the fused update, however many experts there are and however alike they are.

    Args:
        total: norm of the sum of the updates.
        norm: norm of the sum if the updates were orthogonal.
    """
    return multiple * (norm / total.clamp_min(torch.finfo(total.dtype).tiny)).clamp_max(1)


def _relative(values: Tensor, exponent: float) -> Tensor:
    """`(values / mean values)^exponent`; ones if all values are zero."""
    if exponent == 0 or not len(values) or values.sum() == 0:
        return torch.ones_like(values)
    return (values / values.mean()) ** exponent
