"""The vocabulary of a merge: whose tokens the merged model has, and which rows of each model they are."""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from tokenizers import AddedToken
from torch import Tensor

from ..checkpoints import (
    AdapterCheckpoint,
    Checkpoint,
    EmbeddingCheckpoint,
    GivenRows,
    InVocabulary,
    TokenRows,
    has_token_embeddings,
    token_embedding,
    token_rows,
)
from ..data import Sample
from ..errors import HfEsmError
from .token_sources import BASE, UNION, TokenizerSettings, TokenSource


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of the merged model, where it is not simply that of all models.

    Attributes:
        base: the base in this vocabulary.
        experts: the experts in it, by task.
        tokens: where its rows are in each model, by task, and in the base as `"base"`.
        added: tokens that the base lacks.
        given: the rows that are taken from models as they are.
    """

    base: Checkpoint
    experts: dict[str, Checkpoint]
    tokens: dict[str, TokenRows]
    added: list[str]
    given: GivenRows

    def __str__(self) -> str:
        rows = len(self.given.given)
        added = ", ".join(map(repr, self.added[:3])) + (
            f" and {len(self.added) - 3} more" if len(self.added) > 3 else ""
        )
        return f"{rows} rows, matched by token" + (f"; added {added}" if self.added else "")

    @property
    def embedding(self) -> str:
        """Canonical name of the token embedding."""
        return token_embedding(self.base)

    def readable(self, task: str, samples: list[Sample]) -> list[Sample]:
        """Return the encoded samples of an expert whose tokens the merged model has, all of them.

        Raises:
            HfEsmError: if there is none.
        """
        ids = self.tokens[task].ids
        read = [s for s in samples if all((ids[s[name].long()] >= 0).all() for name in _IDS if name in s)]
        if samples and not read:
            raise HfEsmError(
                f"{self.experts[task].title}: every sample holds a token that the merged model does not have. Merge "
                "with all tokens: `tokenizer='union'`."
            )
        return read

    def translate(self, task: str, samples: list[Sample]) -> list[Sample]:
        """Return encoded samples of an expert in the tokens of the merged model, without those that it cannot read."""
        ids = self.tokens[task].ids
        return [
            {name: _translated(name, value, ids) for name, value in sample.items()}
            for sample in self.readable(task, samples)
        ]

    def weigh(self, counts: Mapping[str, Optional[Tensor]]) -> None:
        """Take the mean of rows that several models give by token counts, where all of these are known.

        Args:
            counts: by task, how often the samples read each row of the expert's own token embedding.
        """
        names = self.givers()
        if any(counts.get(name) is None for name in names):
            return
        read = []
        for name, (_, rows) in zip(names, self.given.givers, strict=True):
            own = (rows >= 0) & (rows == self.tokens[name].rows)  # a row of another token is not read as this one
            read.append(torch.where(own, counts[name][rows.clamp_min(0)].double(), 0))
        self.given.share(read)

    def givers(self) -> list[str]:
        """Return the models that rows are taken from: tasks, and maybe `"base"`."""
        names = {id(expert.stored): task for task, expert in self.experts.items()} | {id(self.base.stored): BASE}
        return [names[id(giver.stored)] for giver, _ in self.given.givers]


_IDS = ("input_ids", "decoder_input_ids")  # -100 among labels is no token


def _translated(name: str, value: Tensor, ids: Tensor) -> Tensor:
    if name in _IDS:
        return ids[value.long()].to(value.dtype)
    if name == "labels" and value.dim() == 1 and not value.is_floating_point():
        return torch.where(value >= 0, ids[value.long().clamp_min(0)].to(value.dtype), value)
    return value


def plan_vocabulary(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    tokenizers: Mapping[str, Any],
    settings: TokenizerSettings,
) -> tuple[Optional[Vocabulary], Any, list[str]]:
    """Return the vocabulary of the merged model, or None if all models have one and the same, its tokenizer, and
    warnings.

    Rows are matched by token. Models without a tokenizer are taken to have the tokens of the base in its order.

    Args:
        tokenizers: by task, and of the base as `"base"`; None for a model without one.

    Raises:
        HfEsmError: if added tokens cannot be told apart, or a setting names a token that is not there.
    """
    models = {BASE: base, **experts}
    if not all(has_token_embeddings(model.skeleton) for model in models.values()):
        return None, tokenizers[BASE], []
    rows = {name: token_rows(model.skeleton) for name, model in models.items()}
    own = _own_tokens(rows, tokenizers)
    chosen = _chosen_rows(settings.tokens, own, rows, models, any(t is not None for t in tokenizers.values()))
    source, tokenizer = _merged_tokenizer(own, tokenizers, settings, models)
    tokenizer = _with_chosen_tokens(tokenizer, settings.tokens, chosen, tokenizers)
    ids = own[BASE] if tokenizer is None else tokenizer.get_vocab()
    if tokenizer is None and source != BASE:
        ids = {token: row for of in own.values() for token, row in of.items()}
    least = rows[BASE if source == UNION else source]
    size = max(least, *(row + 1 for token, row in ids.items() if source == UNION or token in chosen), 0)
    size = -(-size // (settings.pad_to_multiple_of or 1)) * (settings.pad_to_multiple_of or 1)
    ids = {token: row for token, row in ids.items() if row < size}
    places = {name: _token_rows(ids, own[name], size, rows[name]) for name in models}
    gifts, loans, idle = _given_rows(models, places, {ids[token]: of for token, of in chosen.items()})
    given = GivenRows.collect(gifts, models, size)
    lost = {task: [str(token) for token in own[task] if token not in ids] for task in experts}
    warnings = _warnings(lost, [token for token in chosen if ids[token] in idle])
    same = all(size == rows[n] and torch.equal(places[n].rows, torch.arange(size)) for n in models)
    if same and not gifts:
        return None, tokenizer, warnings
    merged_base = InVocabulary(base if base.modules is None else base.body, places[BASE], given)
    views = {}
    for name, model in models.items():
        body = model if model.modules is None else model.body
        lent = GivenRows.collect(loans[name], models, size) if name in loans else None
        view = merged_base if name == BASE else InVocabulary(body, places[name], given, merged_base, lent)
        views[name] = view if model.modules is None else EmbeddingCheckpoint(view, model.modules)
    added = [str(token) for token, row in ids.items() if places[BASE].rows[row] < 0]
    return Vocabulary(views.pop(BASE), views, places, added, given), tokenizer, warnings


def _warnings(lost: Mapping[str, list[str]], idle: list[str]) -> list[str]:
    """Return a warning for each task that has tokens of its own that the merged model lacks, and for every token whose
    source changes nothing.
    """
    return [
        *(
            f"'{task}': the merged model lacks {len(tokens)} of its tokens, such as {tokens[0]!r}. To keep them, see "
            "`tokenizer`."
            for task, tokens in lost.items()
            if tokens
        ),
        *(
            f"`tokenizer`: every expert has the token {token!r}, so its source has no effect. To take the source's "
            "row instead of theirs, set `force`."
            for token in idle
        ),
    ]


def _rows_of_one_adapter(models: Mapping[str, Checkpoint], places: Mapping[str, TokenRows]) -> list[tuple[str, int]]:
    """Return the task and the merged row of every token that one adapter trains by itself, and nobody else."""
    name, trained = token_embedding(models[BASE]), {}
    for task, model in models.items():
        alone = model.token_rows(name) if isinstance(model, AdapterCheckpoint) and name in model.names else None
        if alone is not None:
            trained[task] = {int(places[task].ids[row]) for row in alone[0]} - {-1}
        elif task != BASE and name in model.names and model.changes(name):
            return []
    counted = Counter(row for rows in trained.values() for row in rows)
    return [(task, row) for task, rows in trained.items() for row in rows if counted[row] == 1]


Tokens = dict[Any, int]


def _own_tokens(rows: Mapping[str, int], tokenizers: Mapping[str, Any]) -> dict[str, Tokens]:
    """Return the row of every token of every model; without a tokenizer, the index of a row stands for its token."""
    known = {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None}
    if not known:
        longer = [name for name in rows if rows[name] > rows[BASE]]
        if len(longer) > 1:
            raise HfEsmError(
                f"The experts {', '.join(map(repr, longer))} add rows to the base's {rows[BASE]} embeddings, and "
                "without tokenizers nothing tells which tokens they are. Save each expert's tokenizer in its folder."
            )
        return {name: {row: row for row in range(count)} for name, count in rows.items()}
    first = known.get(BASE) or next(iter(known.values()))
    vocabularies = {id(tokenizer): tokenizer.get_vocab() for tokenizer in {id(t): t for t in known.values()}.values()}
    return {
        name: {token: row for token, row in vocabularies[id(known.get(name, first))].items() if row < rows[name]}
        for name in rows
    }


def _merged_tokenizer(
    own: Mapping[str, Tokens],
    tokenizers: Mapping[str, Any],
    settings: TokenizerSettings,
    models: Mapping[str, Checkpoint],
) -> tuple[str, Any]:
    """Return the source of the merged vocabulary, and its tokenizer, if there is one."""
    first = tokenizers[BASE] or next((t for t in tokenizers.values() if t is not None), None)
    lacking = {task: [t for t in tokens if t not in own[BASE]] for task, tokens in own.items()}
    source = settings.source or (UNION if any(lacking.values()) else BASE)
    if first is None or source == BASE:
        return source, first
    if source != UNION:
        return source, tokenizers[source] or first
    union = copy.deepcopy(first)
    for task, tokens in lacking.items():
        if not tokens:
            continue
        added = (
            {str(token): token for token in tokenizers[task].added_tokens_decoder.values()} if tokenizers[task] else {}
        )
        strange = [token for token in tokens if token not in added]
        if strange and settings.source == UNION:
            raise HfEsmError(
                f"{models[task].title}: its tokenizer has {len(strange)} tokens such as {strange[0]!r} that the "
                "base's has not and that were not added to it: it is another tokenizer. Choose one: "
                f"`tokenizer='base'` or `tokenizer={task!r}`."
            )
        if strange:  # two tokenizers have no union
            return BASE, first
        for token in sorted(tokens, key=own[task].get):
            union.add_tokens([added[token]], special_tokens=added[token].special)
    return source, union


def _token_rows(ids: Tokens, own: Tokens, size: int, own_size: int) -> TokenRows:
    """Return where the rows of a vocabulary are in one model. Rows of no token are matched by their index."""
    rows, back = torch.full((size,), -1), torch.full((own_size,), -1)
    shared = [(row, own[token]) for token, row in ids.items() if token in own]
    if shared:
        merged, stored = map(torch.tensor, zip(*shared, strict=True))
        rows[merged] = stored
        back[stored] = merged
    count = min(size, own_size)
    unused = torch.ones(count, dtype=torch.bool)
    for taken in (ids, own):
        places = torch.tensor([row for row in taken.values() if row < count], dtype=torch.long)
        unused[places] = False
    padding = unused.nonzero()[:, 0]
    rows[padding], back[padding] = padding, padding
    return TokenRows(rows, back)


# The model, None for zeros, and its row that a token's row is taken from, and whether it is that in any case.
Chosen = tuple[Optional[str], int, bool]

# By merged row, the models, or None for zeros, that give theirs, each with the row and its share.
Gifts = dict[int, list[tuple[Optional[str], int, float]]]


def _chosen_rows(
    sources: Mapping[str, TokenSource],
    own: Mapping[str, Tokens],
    rows: Mapping[str, int],
    models: Mapping[str, Checkpoint],
    named: bool,
) -> dict[str, Chosen]:
    """Return the row that each source names; `named` is whether any model has a tokenizer."""
    if sources and not named:
        raise HfEsmError(
            "`tokenizer`: no model has a tokenizer, which would tell the rows of `tokens`. Save one in the base's "
            "folder."
        )
    chosen: dict[str, Chosen] = {}
    for token, source in sources.items():
        if source.model is None:
            chosen[token] = (None, 0, source.force)
            continue
        title, count = models[source.model].title, rows[source.model]
        row = own[source.model].get(source.token) if source.token_id is None else source.token_id
        if row is None:
            raise HfEsmError(
                f"`tokenizer`: token {token!r}: there is no token {source.token!r} in {title}. Name another source."
            )
        if row >= count:
            raise HfEsmError(f"`tokenizer`: token {token!r}: {title} has {count} rows, and none with token_id {row}.")
        chosen[token] = (source.model, row, source.force)
    return chosen


def _with_chosen_tokens(
    tokenizer: Any, sources: Mapping[str, TokenSource], chosen: Mapping[str, Chosen], tokenizers: Mapping[str, Any]
) -> Any:
    """Return a tokenizer with all chosen tokens. One that is added is as special as the token whose row it gets."""
    lacking = [token for token in sources if token not in tokenizer.get_vocab()] if sources else []
    if not lacking:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    for token in lacking:
        name, row, _ = chosen[token]
        known = tokenizers[name].added_tokens_decoder if name is not None and tokenizers[name] else {}
        like = known.get(row, AddedToken(token))
        settings = ("single_word", "lstrip", "rstrip", "normalized", "special")
        tokenizer.add_tokens([AddedToken(token, **{setting: getattr(like, setting) for setting in settings})])
    return tokenizer


def _given_rows(
    models: Mapping[str, Checkpoint], places: Mapping[str, TokenRows], chosen: Mapping[int, Chosen]
) -> tuple[Gifts, dict[str, Gifts], set[int]]:
    """Return the rows that are not merged, of tokens that the base lacks and of chosen ones; by task, rows that stand
    in for those that its expert lacks; and chosen rows without effect, as every expert has them.
    """
    holders: dict[int, list[tuple[str, int]]] = {}
    lacking = places[BASE].rows < 0
    for name in models:
        has = (lacking & (places[name].rows >= 0)).nonzero()[:, 0]
        for row, its_row in zip(has.tolist(), places[name].rows[has].tolist(), strict=True):
            holders.setdefault(row, []).append((name, its_row))
    gifts: Gifts = {row: [(*entry, 1 / len(entries)) for entry in entries] for row, entries in holders.items()}
    for task, row in _rows_of_one_adapter(models, places):
        gifts[row] = [(task, int(places[task].rows[row]), 1.0)]
    loans: dict[str, Gifts] = {}
    idle: set[int] = set()
    for row, (name, its_row, force) in chosen.items():
        without = [task for task in models if task != BASE and places[task].rows[row] < 0]
        if force:
            gifts[row] = [(name, its_row, 1.0)]
        elif not without:
            idle.add(row)
        elif lacking[row]:  # the experts without the token have the source's row
            votes = Counter[tuple[Optional[str], int]](holders.get(row, []))
            votes[name, its_row] += len(without)
            gifts[row] = [(*entry, count / votes.total()) for entry, count in votes.items()]
        else:
            for task in without:
                loans.setdefault(task, {})[row] = [(name, its_row, 1.0)]
    return gifts, loans, idle
