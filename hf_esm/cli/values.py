"""Values of flags that are written as YAML."""

from collections.abc import Iterable
from typing import Any, Optional

import yaml

from ..errors import HfEsmError
from ..planning import read_yaml
from .flags import pairs


def yaml_value(text: str, flag: str) -> Any:
    """The value that a text is in YAML, such as `0.2`, `true` or `[query, key]`."""
    try:
        return read_yaml(text)
    except (yaml.YAMLError, RecursionError):
        raise HfEsmError(f"{flag}: {text!r} is not a YAML value.") from None


def plain_or_yaml(text: str, flag: str) -> Any:
    """A text as it is, or the mapping or list that it is in YAML if it begins as one."""
    return yaml_value(text, flag) if text.startswith(("{", "[")) else text


def by_task(items: Optional[Iterable[str]], flag: str) -> dict[str, Any]:
    """Models or data from every `TASK=…` of a flag: a path or id, or a mapping in YAML.

    Example:
        >>> by_task(["mrpc={path: rows.jsonl, columns: {text: first}}"], "--data")
        {'mrpc': {'path': 'rows.jsonl', 'columns': {'text': 'first'}}}
    """
    return {task: plain_or_yaml(text, flag) for task, text in pairs(items, flag).items()}
