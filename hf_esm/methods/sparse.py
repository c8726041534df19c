"""Methods that drop most entries of the updates before they add them up."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .stack import Merged, MergeMethod, Stack, WholeUpdates


_LOW_BITS = 15  # of the 31 bits of a magnitude, so that both halves index a table of 65,536


def magnitude_threshold(parts: Callable[[], Iterable[Tensor]], density: float) -> float:
    """Return the smallest magnitude among the `⌊density · N⌋` largest (at least one) of the `N` entries of `parts()`.

    Exact, in two passes and 0.5 MB whatever `N` is. The bits of non-negative floats order as the floats do: the first
    pass counts the upper half of the bits, the second the lower half of those in the bin that holds the threshold.
    """
    counts = torch.zeros(2 ** (31 - _LOW_BITS), dtype=torch.long)
    for part in parts():
        counts += torch.bincount(_bits(part) >> _LOW_BITS, minlength=len(counts))
    wanted = max(int(density * int(counts.sum())), 1)
    upper, above = _bin_of(counts, wanted)
    counts = torch.zeros(2**_LOW_BITS, dtype=torch.long)
    for part in parts():
        bits = _bits(part)
        counts += torch.bincount(bits[bits >> _LOW_BITS == upper] & (2**_LOW_BITS - 1), minlength=len(counts))
    lower, _ = _bin_of(counts, wanted - above)
    return float(torch.tensor([upper << _LOW_BITS | lower], dtype=torch.int32).view(torch.float32))


def _bits(part: Tensor) -> Tensor:
    return part.detach().float().abs().flatten().contiguous().view(torch.int32)


def _bin_of(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the bin of the `wanted`-th largest entry, and how many entries lie above that bin."""
    from_above = counts.flip(0).cumsum(0)
    place = int((from_above < wanted).sum())
    return len(counts) - 1 - place, int(from_above[place - 1]) if place else 0


@dataclass
class TIES(MergeMethod):
    """TIES (arXiv 2306.01708): trim, elect signs, merge.

    Of every expert's whole update only the largest entries are kept; of these, the entries that agree with the sign of
    their sum; of these, the mean. A task's weight multiplies what is kept of its update.
    """

    name: ClassVar[str] = "ties"

    density: float = field(
        default=0.2,
        metadata={
            "help": "share of every expert's update that is kept, by magnitude; published: 0.2",
            "above": 0,
            "most": 1,
        },
    )

    def prepare(self, whole: WholeUpdates) -> list[float]:
        """Return, per expert, the smallest magnitude among the entries of the whole update that are kept."""
        return [magnitude_threshold(partial(whole.read, task), self.density) for task in whole.progress(whole.tasks)]

    def merge(self, stack: Stack) -> Merged:
        updates = torch.stack(stack.updates)
        thresholds = torch.tensor(stack.thresholds, device=updates.device).view(-1, *[1] * (updates.dim() - 1))
        updates = updates * (updates.abs() >= thresholds)
        updates = updates * torch.tensor(stack.weights, device=updates.device).view_as(thresholds)
        agreeing = updates * (updates.sign() == updates.sum(0).sign())
        return Merged(agreeing.sum(0) / agreeing.count_nonzero(0).clamp_min(1), self.name)


@dataclass
class DARE(MergeMethod):
    """DARE (*Language Models are Super Mario*, arXiv 2311.03099): random entries of every update are dropped, the
    others scaled up, and the updates summed.
    """

    name: ClassVar[str] = "dare"
    default_alpha: ClassVar[float] = 0.3

    density: float = field(
        default=0.1, metadata={"help": "share of every update that is kept; published: 0.1", "above": 0, "most": 1}
    )
    drop_seed: int = field(default=0, metadata={"help": "seed of the choice of entries"})

    def merge(self, stack: Stack) -> Merged:
        merged = torch.zeros_like(stack.updates[0])
        for place, update in enumerate(stack.weighted):
            mask = self.mask(f"{stack.name}/{stack.part}", place, update.shape).to(update.device)
            merged += update * mask / self.density
        return Merged(merged, self.name)

    def mask(self, weight: str, place: int, shape: torch.Size) -> Tensor:
        """Return which entries of one weight's update are kept for the expert at `place`; equal on all processes."""
        key = hashlib.sha256(f"{self.drop_seed}/{place}/{weight}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        return torch.rand(shape, generator=generator) < self.density
