"""A checkpoint in another vocabulary: its embeddings and output maps with the rows of the merged model's tokens."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture import canonical_names, ties, untie
from ..errors import HfEsmError
from .base import Checkpoint, build_skeleton


def has_token_embeddings(model: PreTrainedModel) -> bool:
    """Return whether a model reads tokens through an embedding that Transformers can resize."""
    try:
        return isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    except (NotImplementedError, AttributeError):
        return False


def token_rows(model: PreTrainedModel) -> int:
    """Return the number of rows of a model's token embedding."""
    return model.get_input_embeddings().weight.shape[0]


def token_embedding(checkpoint: Checkpoint) -> str:
    """Return the canonical name of a checkpoint's token embedding."""
    model = checkpoint.skeleton
    module = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    weight = ties(model).get(f"{module}.weight", f"{module}.weight")
    return next(name for name, live in checkpoint.names.items() if live == weight)


@dataclass
class TokenRows:
    """Where the rows of the merged model's vocabulary are in one model, and where the model's own rows go.

    Attributes:
        rows: `[V]` int64: the model's row of each merged row; -1 where it has none.
        ids: `[V_own]` int64: the merged row of each of the model's rows; -1 where it is left out.
    """

    rows: Tensor
    ids: Tensor


@dataclass
class GivenRows:
    """Merged rows that are taken from models as they are, or are 0.

    Attributes:
        given: `[V]` bool: which rows these are.
        givers: pairs of a checkpoint and `[V]` int64, its row of each given row that it gives; -1 elsewhere.
        shares: for every giver `[V]` float64, its share of a row; they sum to 1, or less where zeros have a share.
    """

    given: Tensor
    givers: list[tuple[Checkpoint, Tensor]]
    shares: list[Tensor]

    @classmethod
    def collect(
        cls,
        gifts: Mapping[int, Sequence[tuple[Optional[str], int, float]]],
        models: Mapping[str, Checkpoint],
        size: int,
    ) -> "GivenRows":
        """Return the rows that models give.

        Args:
            gifts: by merged row, for each model that gives it: its name, or None for zeros, its row, its share.
            models: the checkpoints by name.
            size: number of merged rows.
        """
        given = torch.zeros(size, dtype=torch.bool)
        given[list(gifts)] = True
        of_giver: dict[tuple[str, int], list[tuple[int, int, float]]] = {}
        for place, of_row in gifts.items():
            times = Counter[str]()  # a model may give two of its rows
            for name, row, share in of_row:
                if name is not None:
                    of_giver.setdefault((name, times[name]), []).append((place, row, share))
                    times[name] += 1
        givers, shares = [], []
        for (name, _), entries in of_giver.items():
            places, rows, parts = zip(*entries, strict=True)
            at = torch.tensor(places)
            givers.append((models[name], torch.full((size,), -1).index_copy(0, at, torch.tensor(rows))))
            part = torch.tensor(parts, dtype=torch.float64)
            shares.append(torch.zeros(size, dtype=torch.float64).index_copy(0, at, part))
        return cls(given, givers, shares)

    def fill(self, weight: Tensor, name: str, dim: int) -> Tensor:
        """Return a weight of the base, by canonical name, with the given rows in it along one dimension."""
        filled, along = torch.zeros_like(weight, dtype=torch.float32), [1] * weight.dim()
        along[dim] = -1
        for (giver, rows), shares in zip(self.givers, self.shares, strict=True):
            has = (rows >= 0).nonzero()[:, 0]
            part = giver.tensor(name).float().index_select(dim, rows[has]) * shares[has].float().view(along)
            filled.index_add_(dim, has.to(weight.device), part.to(weight.device))
        places = self.given.nonzero()[:, 0].to(weight.device)
        return weight.index_copy(dim, places, filled.index_select(dim, places).to(weight.dtype))

    def share(self, counts: Sequence[Tensor]) -> None:
        """Share each row by how often each giver's samples read it, `[V]` per giver, where one does."""
        total = sum(counts)
        self.shares = [
            torch.where(total > 0, count / total.clamp_min(1), share)
            for count, share in zip(counts, self.shares, strict=True)
        ]


class InVocabulary(Checkpoint):
    """A checkpoint whose token embeddings, output maps and their biases have the rows of the merged vocabulary.

    Rows that the base lacks and no model gives are the mean of the base's rows. An expert's update of rows that it
    lacks and that no model lends it, and of given rows, is 0. A model that is loaded has its own vocabulary, except
    the base's.

    Attributes:
        origin: the checkpoint as it is stored.
        tokens: where its rows are.
        base: the base in the merged vocabulary; None if this is the base.
        lent: rows of other models that stand in for rows that this expert lacks; None for none.
    """

    def __init__(
        self,
        origin: Checkpoint,
        tokens: TokenRows,
        given: GivenRows,
        base: Optional["InVocabulary"] = None,
        lent: Optional[GivenRows] = None,
    ):
        self.origin, self.tokens, self.given, self.base, self.lent = origin, tokens, given, base, lent
        self.title, self.source, self.revision = origin.title, origin.source, origin.revision
        self.names, self.missing, self.extra = origin.names, origin.missing, origin.extra
        self.skeleton, self._dims = _resized(origin.skeleton, len(tokens.rows))

    @property
    def stored(self) -> Checkpoint:
        return self.origin.stored

    @property
    def kind(self) -> str:
        return self.origin.kind

    def changes(self, name: str) -> bool:
        return self.origin.changes(name) or (name in self._dims and self.lent is not None)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = list(self.origin.shape(name))
        if name in self._dims:
            shape[self._dims[name]] = len(self.tokens.rows)
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.origin.dtype(name)

    def tensor(self, name: str) -> Tensor:
        weight = self.origin.tensor(name)
        return weight if name not in self._dims else self._in_vocabulary(name, weight)

    def _in_vocabulary(self, name: str, weight: Tensor) -> Tensor:
        dim = self._dims[name]
        if self.base is None:
            rows = weight.index_select(dim, self.tokens.rows.clamp_min(0))
            lacking = (self.tokens.rows < 0).nonzero()[:, 0]
            mean = weight.float().mean(dim, keepdim=True).to(weight.dtype)
            rows = rows.index_copy(dim, lacking, mean.expand_as(rows.index_select(dim, lacking)))
            return self.given.fill(rows, name, dim)
        base = self.base.tensor(name).to(weight.dtype)
        own = self._own_rows
        rows = base.index_copy(dim, own, weight.index_select(dim, self.tokens.rows[own]))
        return rows if self.lent is None else self.lent.fill(rows, name, dim)

    @property
    def _own_rows(self) -> Tensor:
        """The merged rows that this expert takes part in."""
        return ((self.tokens.rows >= 0) & ~self.given.given).nonzero()[:, 0]

    def update(self, name: str, base: Tensor, out: Optional[Tensor] = None) -> Tensor:
        return self._in_own_rows(name, base, self.origin.update)

    def residual(self, name: str, merged: Tensor) -> Tensor:
        return self._in_own_rows(name, merged, self.origin.residual)

    def _in_own_rows(self, name: str, other: Tensor, difference: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Return the difference of a weight from another model's: 0 in rows that this expert takes no part in."""
        if name not in self._dims:
            return difference(name, other)
        dim, own = self._dims[name], self._own_rows.to(other.device)
        ids = self.tokens.ids.to(other.device)
        of_origin = other.index_select(dim, ids.clamp_min(0))  # an adapter's update may depend on the weight
        rows = difference(name, of_origin).index_select(dim, self.tokens.rows.to(other.device)[own])
        full = torch.zeros_like(other, dtype=torch.float32).index_copy(dim, own, rows)
        return full if self.lent is None else full + self.lent.fill(other.float(), name, dim) - other.float()

    def factors(self, name: str) -> Optional[tuple[Tensor, Tensor]]:
        return None if name in self._dims else self.origin.factors(name)

    def counts_of_rows(self, name: str, counts: Tensor) -> Tensor:
        if name not in self._dims:
            return counts
        rows = self.tokens.rows.to(counts.device)
        return torch.where(rows >= 0, counts[rows.clamp_min(0)], 0)

    def extra_tensors(self) -> dict[str, Tensor]:
        return self.origin.extra_tensors()

    def load_model(self, **placement: Any) -> PreTrainedModel:
        if self.base is not None:
            return self.origin.load_model(**placement)
        return self.load_model_as(type(self.skeleton), self.config, **placement)

    def load_model_as(self, model_class: type, config: PretrainedConfig, **placement: Any) -> PreTrainedModel:
        if torch.equal(self.tokens.rows, torch.arange(len(self.tokens.ids))) and not self.given.given.any():
            return self.origin.load_model_as(model_class, config, **placement)
        if placement:
            raise HfEsmError(
                f"{self.title} does not fit into memory, and its vocabulary differs from that of the experts. Give "
                "more `max_memory`, or take the vocabulary of the base: `tokenizer='base'`."
            )
        own_config = copy.deepcopy(config)
        own_config.get_text_config().vocab_size = len(self.tokens.ids)
        return self._filled(self.origin.load_model_as(model_class, own_config))

    def _filled(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return a loaded model with the merged vocabulary."""
        model.resize_token_embeddings(len(self.tokens.rows), mean_resizing=False)
        untie(model, self.names.values())  # resizing ties again what the config ties
        state, names = model.state_dict(), canonical_names(model)
        with torch.no_grad():
            for name in self._dims.keys() & names.keys() & self.names.keys():
                state[names[name]].copy_(self.tensor(name))
        return model

    def seen_as(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> Checkpoint:
        origin = self.origin.seen_as(model_class, config)
        return InVocabulary(origin, self.tokens, self.given, self.base, self.lent)


def _resized(model: PreTrainedModel, size: int) -> tuple[PreTrainedModel, dict[str, int]]:
    """Return a skeleton of a model with another number of token rows, and the dimension of these by canonical name."""
    skeletons: list[PreTrainedModel] = []
    for rows in (size, size + 1):  # two sizes show which weights hold a row per token
        skeleton = build_skeleton(type(model), model.config)
        skeleton.resize_token_embeddings(rows, mean_resizing=False)
        untie(skeleton, canonical_names(model).values())
        skeletons.append(skeleton.to("meta"))
    if hasattr(model, "_weight_conversions"):
        skeletons[0]._weight_conversions = model._weight_conversions
    one, other = (skeleton.state_dict() for skeleton in skeletons)
    dims = {}
    for name, live in canonical_names(skeletons[0]).items():
        differing = [d for d, (a, b) in enumerate(zip(one[live].shape, other[live].shape, strict=True)) if a != b]
        if differing:
            dims[name] = differing[0]
    return skeletons[0], dims
