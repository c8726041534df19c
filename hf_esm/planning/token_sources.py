"""The setting `tokenizer`: whose tokens the merged model has, and the sources of single tokens' rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, Optional

from ..errors import HfEsmError
from ..utils import check_fields, check_known, did_you_mean


BASE, UNION = "base", "union"

# Kinds of sources besides a model, with the settings of each.
_KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
_EXAMPLES = "{kind: zero}, {kind: model_token, model: …, token: …}, {kind: model_token, model: …, token_id: …}"


@dataclass(frozen=True)
class TokenSource:
    """The source of one token's row.

    Attributes:
        model: task, or `"base"`; None for a row of zeros.
        token: token of that model whose row it is; None for the token itself.
        token_id: index of the row in that model, instead of a token.
        force: whether the merged row is the source's. Otherwise the source stands in for the models that lack the
            token.
    """

    model: Optional[str] = None
    token: Optional[str] = None
    token_id: Optional[int] = field(default=None, metadata={"least": 0})
    force: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """The vocabulary of the merged model.

    Attributes:
        source: `"base"`, `"union"` of the base's tokens and those that experts added, or a task, whose expert's tokens
            the merged model has; by default `"union"` where experts add tokens, else `"base"`.
        tokens: sources of the rows of some tokens, as `{"<|im_end|>": {"source": …, "force": …}}`; after
            `resolve_tokenizer`, a `TokenSource` each. A token that the vocabulary lacks is added to it.
        pad_to_multiple_of: the number of rows is made a multiple of this by rows of no token.
    """

    source: Optional[str] = None
    tokens: Mapping[str, Any] = field(default_factory=dict)
    pad_to_multiple_of: Optional[int] = field(default=None, metadata={"least": 1})

    def __post_init__(self) -> None:
        check_fields(self, "`tokenizer`")


def resolve_tokenizer(tokenizer: Any, tasks: Iterable[str]) -> TokenizerSettings:
    """Return the settings that `tokenizer` says: a source, or a mapping of settings.

    Raises:
        HfEsmError: on an unknown setting, source or task.
    """
    if isinstance(tokenizer, str):
        tokenizer = {"source": tokenizer}
    if not isinstance(tokenizer, Mapping) and tokenizer is not None:
        raise HfEsmError(f"`tokenizer` must be 'base', 'union', a task or a mapping of settings, not {tokenizer!r}.")
    check_known(tokenizer or {}, [setting.name for setting in fields(TokenizerSettings)], "setting", "`tokenizer`")
    settings = TokenizerSettings(**(tokenizer or {}))
    models = [BASE, *tasks]
    if settings.source is not None:
        check_known([settings.source], [BASE, UNION, *models[1:]], "source", "`tokenizer`")
    sources = {token: _token_source(token, source, models) for token, source in settings.tokens.items()}
    return TokenizerSettings(settings.source, sources, settings.pad_to_multiple_of)


def _token_source(token: str, setting: Any, models: list[str]) -> TokenSource:
    """Return the source that a setting names: a model, or a mapping with `source` and maybe `force`."""
    where = f"`tokenizer`: token {token!r}"
    setting = setting if isinstance(setting, Mapping) else {"source": setting}
    check_known(setting, ["source", "force"], "key", where)
    source, force = setting.get("source"), setting.get("force", False)
    if not isinstance(source, Mapping):
        if source not in models:
            _refuse(where, source, models)
        source = {"kind": "model_token", "model": source, "token": token}
    kind = source.get("kind")
    if kind not in _KINDS:
        _refuse(where, dict(source), models)
    check_known(source, _KINDS[kind], f"key of the kind {kind}:", where)
    given = {name: value for name, value in source.items() if name != "kind"}
    if kind == "model_token":
        check_known([given.get("model")], models, "model", where)
        if sum(given.get(name) is not None for name in ("token", "token_id")) != 1:
            raise HfEsmError(f"{where}: a source of the kind model_token names either `token` or `token_id`.")
    result = TokenSource(**given, force=force)
    check_fields(result, where)
    return result


def _refuse(where: str, source: Any, models: list[str]) -> NoReturn:
    """Raise an error that lists all sources that there are."""
    names = [*models, *_KINDS] if isinstance(source, str) else []
    raise HfEsmError(
        f"{where}: there is no source {source!r}{did_you_mean(source, names) if names else ''}; there are "
        f"{', '.join(models)}, {_EXAMPLES}."
    )
