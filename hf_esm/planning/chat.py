"""Whose chat template and special tokens a merged model has."""

import copy
import re
from collections.abc import Mapping
from typing import Any, Optional

from ..errors import HfEsmError
from ..utils import check_known
from .token_sources import BASE, UNION


# Of a tokenizer, besides its vocabulary: what a chat begins and ends with.
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor, or itself if it is one; None if it has none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer if hasattr(tokenizer, "get_vocab") else None


def _template_of(processor: Any) -> Any:
    own = getattr(processor, "chat_template", None)
    return own if own is not None else getattr(tokenizer_of(processor), "chat_template", None)


def choose_voice(processors: Mapping[str, Any], source: Optional[str], chat_template: Optional[str]) -> str:
    """Return the model whose chat template, special tokens and settings of generation the merged model has.

    It is the one that the caller names, that of the `source` of the vocabulary, or else the first that has a template,
    if no two of them differ; `"base"` if none has one.

    Args:
        processors: by task, and of the base as `"base"`.
        source: source of the merged vocabulary, if the caller named one.
        chat_template: the model that the caller named, if any.

    Raises:
        HfEsmError: if templates differ and none was named, or the named model has none.
    """
    templates = {name: found for name, processor in processors.items() if (found := _template_of(processor))}
    if chat_template is not None:
        check_known([chat_template], processors, "model", "`chat_template`")
        if chat_template not in templates:
            raise HfEsmError(f"`chat_template`: {chat_template!r} has no template. {_named(templates)}")
        return chat_template
    if source not in (None, UNION) and (source in templates or not templates):
        return source
    if source is None and BASE in templates and templates.keys() == processors.keys() and _equal(templates):
        return BASE
    if not _equal(templates):
        tasks = ", ".join(repr(name) for name in templates)
        raise HfEsmError(
            f"The chat templates of {tasks} differ. Choose the one that the merged model gets, as "
            f"`chat_template={next(iter(templates))!r}`."
        )
    return next(iter(templates), BASE)


def _equal(templates: Mapping[str, Any]) -> bool:
    return len({repr(template) for template in templates.values()}) <= 1


def _named(templates: Mapping[str, Any]) -> str:
    return f"Name one of {', '.join(templates)}." if templates else "No model has one: leave it out."


def merged_processor(processors: Mapping[str, Any], tokenizer: Any, voice: str) -> Any:
    """Return the processor of the merged model: the base's, with another vocabulary, template and special tokens.

    Args:
        processors: by task, and of the base as `"base"`.
        tokenizer: the merged tokenizer, if there is one.
        voice: see `choose_voice`.
    """
    own, spoken = processors[BASE], tokenizer_of(processors[voice])
    template = _template_of(processors[voice])
    if tokenizer is None or (tokenizer is tokenizer_of(own) and voice == BASE):
        return own
    merged = copy.deepcopy(tokenizer)
    known = merged.get_vocab()
    for name in _SPECIAL:
        token = getattr(spoken, name, None)
        if token is not None and str(token) in known:
            setattr(merged, name, token)
    merged.chat_template = template
    if tokenizer_of(own) is own:
        return merged
    processor = copy.copy(own)
    processor.tokenizer = merged
    processor.chat_template = template
    return processor


_TURNS = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]


# What looks like a token, and not like text: <|im_end|>, </s>, [/INST].
_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


def endless_turns(processor: Any, ends: int | list[int] | None) -> list[str]:
    """Return a warning if the mark that ends an answer in the chat template does not end generation: because it is not
    a token, so that it is written in pieces, or not one of the tokens that generation ends at.

    Args:
        processor: of the merged model.
        ends: the tokens that generation ends at.
    """
    tokenizer = tokenizer_of(processor)
    if tokenizer is None or not _template_of(processor):
        return []
    try:
        text = processor.apply_chat_template(_TURNS, tokenize=False)
    except Exception:  # a template may refuse any conversation, and says so when one is held
        return []
    mark = _MARK.match(text.rpartition("Answer")[2].strip())
    if mark is None:
        return []
    token, ids = mark.group(), tokenizer.get_vocab()
    if token not in ids:
        return [
            f"The chat template ends an answer with {token!r}, which is not a token of the merged model, so that its "
            "answers would not end. Choose the tokens of a model that has it, by `tokenizer`, or another "
            "`chat_template`."
        ]
    if ids[token] not in (ends if isinstance(ends, list) else [ends]):
        return [
            f"The chat template ends an answer with {token!r}, at which generation does not end. Add its id, "
            f"{ids[token]}, to `eos_token_id` in the generation_config.json of the model whose template it is."
        ]
    return []
