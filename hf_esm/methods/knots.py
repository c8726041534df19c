"""KnOTS (arXiv 2410.19735): updates merged in the basis that they share, for experts of low rank (LoRA)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor

from ..errors import HfEsmError
from ..linalg import truncated_svd
from .stack import Merged, MergeMethod, Stack, WholeUpdates


def joint_coordinates(updates: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the basis that updates share, and the coordinates of each: `Δ_t = U K_t`.

    The joint SVD is `[Δ_1 … Δ_T] = U S [V_1 … V_T]`, and `K_t = S V_t`. Directions that are numerically zero are left
    out (published: singular values up to 1e-5).

    Args:
        updates: `T` updates `[d_out, d_in]`.

    Returns `U [d_out, k]`, and `T` coordinates `[k, d_in]`, float64.
    """
    joint = torch.cat(updates, dim=1)
    left, values, right = truncated_svd(joint, min(joint.shape))
    return left, list((values[:, None] * right).split(updates[0].shape[1], dim=1))


@dataclass
class KnOTS(MergeMethod):
    """KnOTS: every matrix by another method, in the basis that the experts' updates share.

    The updates of LoRA experts lie in different spaces, so that entries of theirs have little to do with each other.
    In the basis of their joint SVD they do. What the other method needs of the whole model (the entries that TIES
    trims) is taken from the coordinates of the matrices in that basis. Other parameters are merged by that method as
    they are; the published code leaves them at the base's.
    """

    name: ClassVar[str] = "knots"
    papers: ClassVar[tuple[str, ...]] = ("2410.19735",)
    decomposes: ClassVar[bool] = True
    keeps_span: ClassVar[bool] = True

    method: str | Mapping[str, Any] = field(
        default="ties",
        metadata={"help": "method that merges the coordinates, by name or with settings: {name: ties, density: 0.5}"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.inner
        if inner.routes or inner.needs_samples or inner.chooses or inner.name == self.name:
            raise HfEsmError(f"{self.name}: '{inner.name}' does not merge one weight alone. Name 'ties' or another.")

    @cached_property
    def inner(self) -> MergeMethod:
        """The method that merges the coordinates."""
        from .registry import resolve_method  # which imports this module

        return resolve_method(self.method)

    @property
    def default_alpha(self) -> float:
        """α of the method that merges the coordinates."""
        return self.inner.default_alpha

    @property
    def tunable(self) -> bool:
        """Whether α changes the merged model."""
        return self.inner.tunable

    @property
    def needs_statistics(self) -> bool:
        """Whether linear maps are merged with activation statistics."""
        return self.inner.needs_statistics

    @property
    def reads_whole(self) -> bool:
        """Whether the other method needs something of all coordinates."""
        return self.inner.reads_whole

    def check_weights(self, weights: Iterable[float]) -> None:
        """Raise an error if the other method cannot merge with these weights of the tasks, or so many of them."""
        self.inner.check_weights(weights)

    def prepare(self, whole: WholeUpdates) -> list[Any]:
        """Let the other method compute what it needs of all coordinates."""

        def read(task: str) -> Iterator[Tensor]:
            place = whole.tasks.index(task)
            return (self._coordinates(stack)[1].updates[place] for stack in whole.stacks())

        return self.inner.prepare(replace(whole, read=read))

    def merge(self, stack: Stack) -> Merged:
        basis, coordinates = self._coordinates(stack)
        merged = self.inner.merge(coordinates)
        update = merged.update if basis is None else (basis @ merged.update.double()).float()
        return replace(merged, update=update, how=f"{self.name} with {merged.how}")

    def _coordinates(self, stack: Stack) -> tuple[Optional[Tensor], Stack]:
        """Return the basis of a matrix, and the stack of its coordinates, float32; None and the stack of the rest."""
        if not stack.is_matrix:
            return None, stack
        basis, coordinates = joint_coordinates(stack.updates)
        updates, outputs = [part.float() for part in coordinates], stack.num_outputs or len(basis)
        return basis, replace(stack, updates=updates, num_outputs=outputs, read_base=self._no_base)

    def _no_base(self) -> Tensor:
        raise HfEsmError(
            f"{self.name}: '{self.inner.name}' reads the base's weight, which is not in the basis of the updates. "
            "Name 'ties' or another method."
        )
