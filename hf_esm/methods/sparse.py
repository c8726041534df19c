"""Methods that work entry by entry: most entries of the updates are dropped before the rest is added up."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import hardshrink

from ..errors import HfEsmError
from ..linalg import pieces, piecewise
from .stack import Merged, MergeMethod, Stack, WholeUpdates


_SAMPLE = 2**16  # entries that bracket a magnitude
_LOW_BITS = 15  # of the 31 bits of a magnitude, so that both halves index a table of 65,536

# Over which entries a method ranks the magnitudes of an update.
SCOPE: dict[str, Any] = {
    "help": "what magnitudes are ranked over: model, the expert's whole update; tensor, each weight by itself, as "
    "mergekit does",
    "choices": ("model", "tensor"),
}


def magnitude_threshold(parts: Callable[[], Iterable[Tensor]], density: float) -> float:
    """Return the smallest magnitude among the `⌊density · N⌋` largest (at least one) of the `N` entries of `parts()`.

    Exact, in two passes and 0.5 MB whatever `N` is.
    """
    (threshold,) = ranked_magnitudes(parts, lambda size: [max(int(density * size), 1)])
    return threshold


def ranked_magnitudes(parts: Callable[[], Iterable[Tensor]], ranks: Callable[[int], list[int]]) -> list[float]:
    """Return the magnitudes of some ranks among the `N` entries of `parts()`; rank 1 is the largest.

    Exact, in two passes and 0.5 MB (and 0.25 MB for each further rank) whatever `N` is. The bits of non-negative
    floats order as the floats do: the first pass counts the upper half of the bits, the second the lower half of those
    in the bins that hold the ranks.

    Args:
        parts: returns the entries, tensor by tensor; called twice.
        ranks: returns the ranks that are wanted of `N` entries.
    """
    counts = torch.zeros(2 ** (31 - _LOW_BITS), dtype=torch.long)
    for part in parts():
        counts += torch.bincount(_bits(part) >> _LOW_BITS, minlength=len(counts))
    wanted = ranks(int(counts.sum()))
    places = [_bin_of(counts, rank) for rank in wanted]
    lower_counts = {upper: torch.zeros(2**_LOW_BITS, dtype=torch.long) for upper, _ in places}
    for part in parts():
        bits = _bits(part)
        for upper, counts in lower_counts.items():
            lower = bits[bits >> _LOW_BITS == upper] & (2**_LOW_BITS - 1)
            counts += torch.bincount(lower, minlength=len(counts))
    lowers = [
        _bin_of(lower_counts[upper], rank - above)[0] for rank, (upper, above) in zip(wanted, places, strict=True)
    ]
    found = [upper << _LOW_BITS | lower for (upper, _), lower in zip(places, lowers, strict=True)]
    return torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist()


def _bits(part: Tensor) -> Tensor:
    return part.detach().float().abs().flatten().contiguous().view(torch.int32)


def _bin_of(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the bin of the `wanted`-th largest entry, and how many entries lie above that bin."""
    from_above = counts.flip(0).cumsum(0)
    place = int((from_above < wanted).sum())
    return len(counts) - 1 - place, int(from_above[place - 1]) if place else 0


def magnitude_of_rank(tensor: Tensor, rank: int) -> Tensor:
    """Return the magnitude of one rank among a tensor's entries; rank 1 is the largest.

    Exact. Of a large tensor, a sample of the entries brackets the magnitude, so that only what lies in the bracket is
    put in order.
    """
    entries = tensor.flatten()
    if len(entries) > 4 * _SAMPLE:
        places = torch.randint(len(entries), (_SAMPLE,), generator=Generator().manual_seed(0)).to(tensor.device)
        sample = entries[places].abs().sort(descending=True).values
        expected, error = _SAMPLE * rank / len(entries), 5 * (_SAMPLE * min(rank / len(entries), 0.25)) ** 0.5 + 5
        most = float(sample[int(expected - error)]) if expected > error else math.inf
        least = float(sample[int(expected + error)]) if expected + error < _SAMPLE else 0.0
        above, inside = 0, []
        for (piece,) in pieces(entries):
            magnitudes = piece.abs().cpu().numpy()  # which compares and selects faster
            above += int(np.count_nonzero(magnitudes > most))
            inside.append(magnitudes[(magnitudes >= least) & (magnitudes <= most)])
        bracketed = np.concatenate(inside)
        if above < rank <= above + len(bracketed):
            return torch.from_numpy(bracketed).kthvalue(len(bracketed) - (rank - above) + 1).values.to(tensor.device)
    return entries.abs().kthvalue(len(entries) - rank + 1).values


# By what a method divides the sum of the entries that agree in sign.
NORMALIZE: dict[str, Any] = {
    "help": "what the sum of the entries that agree in sign is divided by: count, their number; weights, the sum of "
    "their tasks' weights (mergekit's `normalize: true`); none, nothing (`normalize: false`)",
    "choices": ("count", "weights", "none"),
}


def elected_mean(updates: Sequence[Tensor], weights: Sequence[float], normalize: str) -> Tensor:
    """Merge the entries that have the sign of their sum, without zeros.

    Args:
        updates: of the experts, times their weights.
        weights: of the experts.
        normalize: see `NORMALIZE`.
    """
    signs = torch.zeros_like(updates[0])
    for update in updates:
        signs += update
    signs.sign_()
    merged, shares = torch.zeros_like(signs), torch.zeros_like(signs)
    for update, weight in zip(updates, weights, strict=True):
        agreeing = (update * signs).clamp_min_(0)
        merged += agreeing
        if normalize != "none":
            shares.add_(agreeing.sign_(), alpha=weight if normalize == "weights" else 1.0)
    merged *= signs
    # Comparisons that write floats are faster than those that write booleans.
    return merged if normalize == "none" else merged.div_(shares.add_(torch.eq(shares, 0, out=signs)))


@dataclass
class TIES(MergeMethod):
    """TIES (arXiv 2306.01708): trim, elect signs, merge.

    Of every expert's update only the largest entries are kept, and all that are as large as the last of these; of
    these, the entries that agree with the sign of their sum; of these, the mean. A task's weight multiplies what is
    kept of its update, and with `normalize: weights` the mean, as in mergekit.
    """

    name: ClassVar[str] = "ties"
    papers: ClassVar[tuple[str, ...]] = ("2306.01708",)

    density: float = field(
        default=0.2,
        metadata={
            "help": "share of every expert's update that is kept, by magnitude; published: 0.2",
            "above": 0,
            "most": 1,
            "search": (0.05, 0.6, "linear"),
        },
    )
    density_scope: str = field(default="model", metadata=SCOPE)
    normalize: str = field(default="count", metadata=NORMALIZE)

    @property
    def reads_whole(self) -> bool:
        """Whether magnitudes are ranked over the expert's whole update."""
        return self.density_scope == "model"

    def prepare(self, whole: WholeUpdates) -> list[float]:
        """Return, per expert, the smallest magnitude among the entries of the whole update that are kept."""
        if not self.reads_whole:
            return []
        return [magnitude_threshold(partial(whole.read, task), self.density) for task in whole.progress(whole.tasks)]

    def merge(self, stack: Stack) -> Merged:
        thresholds, weights = torch.as_tensor(stack.thresholds, dtype=torch.float32), stack.weights
        if not self.reads_whole:
            rank = max(int(self.density * stack.updates[0].numel()), 1)
            thresholds = torch.stack([magnitude_of_rank(update, rank) for update in stack.updates])
        below = thresholds.nextafter(torch.zeros_like(thresholds)).tolist()  # the largest magnitudes that are trimmed

        def merge(*updates: Tensor) -> Tensor:
            trimmed = [hardshrink(update, least) for update, least in zip(updates, below, strict=True)]
            for update, weight in zip(trimmed, weights, strict=True):
                update *= weight
            return elected_mean(trimmed, weights, self.normalize)

        return Merged(piecewise(merge, *stack.updates), self.name)


@dataclass
class Breadcrumbs(MergeMethod):
    """Model Breadcrumbs (arXiv 2312.06795): the smallest and the very largest entries of every update are dropped, and
    the updates summed.

    Of `N` entries, the `⌊gamma · N⌋` largest are dropped, and of the rest the `⌊density · N⌋` largest (at least one)
    are kept, with all that are as large as the first or the last of these. If `density + gamma` is above 1, fewer of
    the largest are dropped. As in the paper, each weight is ranked by itself (the published code ranks each row).
    mergekit's settings have the same names; it keeps exactly `⌊density · N⌋` entries, also none.
    """

    name: ClassVar[str] = "breadcrumbs"
    papers: ClassVar[tuple[str, ...]] = ("2312.06795",)
    default_alpha: ClassVar[float] = 0.6  # on validation rows of text and language tasks better than 0.3 and 1

    density: float = field(
        default=0.1,
        metadata={
            "help": "share of every update that is kept",
            "above": 0,
            "most": 1,
            "search": (0.05, 0.95, "linear"),
        },
    )
    gamma: float = field(
        default=0.01,
        metadata={
            "help": "share of every update that is dropped because it is largest",
            "least": 0,
            "below": 1,
            "search": (0.001, 0.1, "log"),
        },
    )
    density_scope: str = field(default="tensor", metadata=SCOPE)

    def ranks(self, size: int) -> list[int]:
        """Return the ranks of the largest and the smallest entry that are kept, of a number of entries."""
        kept = max(int(self.density * size), 1)
        dropped = min(int(self.gamma * size), size - kept)
        return [dropped + 1, dropped + kept]

    @property
    def reads_whole(self) -> bool:
        """Whether magnitudes are ranked over the expert's whole update."""
        return self.density_scope == "model"

    def prepare(self, whole: WholeUpdates) -> list[Any]:
        """Return, per expert, the largest and the smallest magnitude of the whole update that are kept."""
        if not self.reads_whole:
            return []
        return [ranked_magnitudes(partial(whole.read, task), self.ranks) for task in whole.progress(whole.tasks)]

    def merge(self, stack: Stack) -> Merged:
        thresholds = stack.thresholds
        if not self.reads_whole:
            ranks = self.ranks(stack.updates[0].numel())
            thresholds = [[magnitude_of_rank(update, rank) for rank in ranks] for update in stack.updates]

        def merge(*updates: Tensor) -> Tensor:
            merged = torch.zeros_like(updates[0])
            for update, weight, (most, least) in zip(updates, stack.weights, thresholds, strict=True):
                magnitudes = update.abs()
                merged += weight * update * ((magnitudes >= least) & (magnitudes <= most))
            return merged

        return Merged(piecewise(merge, *stack.updates), self.name)


@dataclass
class DARE(MergeMethod):
    """DARE (*Language Models are Super Mario*, arXiv 2311.03099): random entries of every update are dropped, the
    others scaled up, and the updates summed.

    The scale is one over the share that is kept. mergekit scales each weight by the norm `Σ|Δ|` that the drawn entries
    lack, which is the same in the mean.
    """

    name: ClassVar[str] = "dare"
    papers: ClassVar[tuple[str, ...]] = ("2311.03099",)
    default_alpha: ClassVar[float] = 0.3

    density: float = field(
        default=0.1,
        metadata={
            "help": "share of every update that is kept; published: 0.1",
            "above": 0,
            "most": 1,
            "search": (0.1, 0.9, "linear"),
        },
    )
    drop_seed: int = field(default=0, metadata={"help": "seed of the choice of entries"})

    def merge(self, stack: Stack) -> Merged:
        return Merged(reduce(Tensor.add_, self.drawn(stack)), self.name)

    def drawn(self, stack: Stack) -> Iterator[Tensor]:
        """Yield the weighted updates, with the entries that are drawn scaled up and the others zero."""
        for place, (update, weight) in enumerate(zip(stack.updates, stack.weights, strict=True)):
            draws = self.draws(f"{stack.name}/{stack.part}", place)

            def draw(entries: Tensor, share: Tensor, weight: float = weight, draws: Generator = draws) -> Tensor:
                uniform = torch.rand(entries.shape, generator=draws).to(entries.device)
                return uniform.lt_(share).mul_(entries).mul_(weight).div_(share)

            yield piecewise(draw, update, self.shares(update))

    def shares(self, update: Tensor) -> Tensor:
        """Return how likely each entry is kept."""
        return torch.tensor(self.density, device=update.device).expand_as(update)

    def draws(self, weight: str, place: int) -> Generator:
        """Return the generator of the draws for one weight of the expert at `place`; equal on all processes."""
        key = hashlib.sha256(f"{self.drop_seed}/{place}/{weight}".encode()).digest()
        return Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


@dataclass
class DARETIES(DARE):
    """DARE with the merge of TIES (arXiv 2311.03099): random entries of every update are dropped and the others scaled
    up; of these, the mean of the entries that agree with the sign of their sum.

    No entry is trimmed by magnitude: the published code trims to more entries than the draw leaves. mergekit sums the
    entries that agree (`normalize: none`), unless its `normalize` is true.
    """

    name: ClassVar[str] = "dare-ties"
    papers: ClassVar[tuple[str, ...]] = ("2311.03099", "2306.01708")

    normalize: str = field(default="count", metadata=NORMALIZE)

    def merge(self, stack: Stack) -> Merged:

        def merge(*updates: Tensor) -> Tensor:
            return elected_mean(updates, stack.weights, self.normalize)

        return Merged(piecewise(merge, *self.drawn(stack)), self.name)


@dataclass
class DELLA(DARETIES):
    """DELLA (arXiv 2406.11617): as DARE-TIES, but larger entries are likelier kept, by their rank in each row.

    The share that is kept rises evenly with the rank of the magnitude in the row `[d_in]` of a matrix, from
    `density − epsilon / 2` to `density + epsilon / 2`, and an entry is divided by its own share. With `density` 1,
    nothing is dropped. Biases and norms are one row; a kernel is one row per output channel. `epsilon` is the whole
    width, as in the paper (`window_size` in its code; mergekit's `epsilon` is half of it). mergekit scales each weight
    by the norm `Σ|Δ|` that the drawn entries lack, which leaves small entries smaller than the paper does.
    """

    name: ClassVar[str] = "della"
    papers: ClassVar[tuple[str, ...]] = ("2406.11617",)
    default_alpha: ClassVar[float] = 0.7  # on validation rows of language tasks; at 1.1 the merge is below the base

    density: float = field(
        default=0.7,
        metadata={
            "help": "mean share of every update that is kept; in the example of the published code: 0.7",
            "above": 0,
            "most": 1,
            "search": (0.2, 0.9, "linear"),
        },
    )
    epsilon: float = field(
        default=0.14,
        metadata={
            "help": "by how much likelier the largest entry of a row is kept than the smallest; in the example of the "
            "published code: 0.14",
            "least": 0,
            "below": 1,
            "search": (0.0, 0.2, "linear"),
        },
    )

    def __post_init__(self) -> None:
        """Check the settings, and that all shares are above 0 and at most 1."""
        super().__post_init__()
        least, most = self.density - self.epsilon / 2, self.density + self.epsilon / 2
        if self.density < 1 and (least <= 0 or most > 1 + 1e-9):
            raise HfEsmError(
                f"{self.name}: with density {self.density:g} and epsilon {self.epsilon:g}, the shares of the entries "
                f"that are kept would run from {least:g} to {most:g}. Set epsilon below "
                f"{2 * min(self.density, 1 - self.density):.6g}."
            )

    def shares(self, update: Tensor) -> Tensor:
        rows = update.abs().reshape(len(update) if update.dim() > 1 else 1, -1)
        if self.density == 1 or (last := rows.shape[1] - 1) == 0:
            return super().shares(update)
        order = rows.argsort(dim=1, stable=True)
        evenly = torch.linspace(-0.5, 0.5, last + 1, dtype=rows.dtype, device=rows.device).expand_as(rows)
        return self.density + self.epsilon * torch.empty_like(rows).scatter_(1, order, evenly).view_as(update)


@dataclass
class SCE(MergeMethod):
    """SCE (*FuseChat*, arXiv 2408.07990): select, calculate, erase.

    Of each weight, the entries are selected that vary most between the experts. The experts count as the squares of
    what is selected of their updates in this weight; at each entry, those that disagree with the sign of the sum are
    left out. A task's weight multiplies its update. Where the experts do not vary (one expert, equal experts), every
    entry is selected; mergekit selects none. mergekit counts all experts alike where the sum of their mean squares is
    below 1e-6, as it is of most fine-tunes; here, only where it is 0.
    """

    name: ClassVar[str] = "sce"
    papers: ClassVar[tuple[str, ...]] = ("2408.07990",)

    density: float = field(
        default=0.1,
        metadata={
            "help": "share of each weight's entries that is selected, by variance (τ of the paper, `select_topk` of "
            "mergekit)",
            "above": 0,
            "most": 1,
            "search": (0.05, 1.0, "linear"),
        },
    )

    def merge(self, stack: Stack) -> Merged:
        updates = torch.stack(stack.weighted)
        # In units of the largest entry, whose square no float32 loses.
        units = updates / updates.abs().max().clamp_min(torch.finfo(updates.dtype).tiny)
        variances = units.var(0, correction=0)
        varying = int(variances.count_nonzero())
        if varying:
            updates = updates * (variances >= magnitude_of_rank(variances, max(int(self.density * varying), 1)))
        squares = updates.double().square().reshape(len(updates), -1).sum(1)
        shares = squares / squares.sum() if squares.any() else torch.ones_like(squares)
        of_experts = shares.to(updates.dtype).view(-1, *[1] * (updates.dim() - 1))
        agreeing = (updates.sign() == updates.sum(0).sign()) * of_experts
        total = agreeing.sum(0)
        return Merged((updates * agreeing).sum(0) / torch.where(total > 0, total, 1), self.name)
