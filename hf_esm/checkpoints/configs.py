"""The settings of a model, read from its folder."""

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModel, PretrainedConfig

from ..errors import HfEsmError
from ..utils import is_file, reading, reason_of
from .layout import ADAPTER_CONFIG, CONFIG_FILE


# Settings that say how many modules a model has, or how many names Transformers makes up; more than a model can have.
_COUNTS = re.compile(r"(layers?|depths?|num_blocks|num_stages|num_labels)$")
_MOST = 100_000
_MOST_LAYERS = 1_000
_MOST_WEIGHTS = 300_000  # matrices and vectors, of whatever size; the largest mixtures have less than 100,000

_CORRECT = "Correct it, or copy or download it again."


def read_config(folder: Path, title: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the config of a model that Transformers knows.

    Args:
        title: name of the model in messages.
        trust_remote_code: run code that comes with the model.

    Raises:
        HfEsmError: if there is none, or it cannot be used. A model of more layers than fit into memory is refused
            before it is built.
    """
    path = folder / CONFIG_FILE
    if not is_file(path):
        raise HfEsmError(f"{title}: no {CONFIG_FILE} (nor {ADAPTER_CONFIG}) in {folder}.")
    with reading(path, f"{title}: its {CONFIG_FILE} cannot be used: {path}"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        for key, value in _counts(settings):
            most = _MOST if key.endswith("labels") else _MOST_LAYERS
            if value > most:
                raise HfEsmError(f"{title}: {path} says {key} = {value}, more than {most}. {_CORRECT}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # Transformers does not check the types of its settings
        raise HfEsmError(f"{title}: its {CONFIG_FILE} cannot be used: {reason_of(error)}. {_CORRECT}") from None
    architectures = config.architectures
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise HfEsmError(f"{title}: {path} says architectures = {architectures!r}, not a list of names. {_CORRECT}")
    if not architectures and type(config) not in AutoModel._model_mapping:
        raise HfEsmError(f"{title}: {path} names no class under 'architectures'. Add it, as `save_pretrained` does.")
    return config


@contextmanager
def buildable(title: str) -> Iterator[None]:
    """Turn exceptions of Transformers, about a config or weights that make no model, into one sentence.

    Raises:
        HfEsmError: for every exception inside the block, but for those that tell of too little memory; if a model of
            more weights is built than a model can have.
    """
    built = itertools.count(1)

    def count(*_: Any) -> None:
        if next(built) > _MOST_WEIGHTS:
            raise HfEsmError(f"{title}: its {CONFIG_FILE} asks for more than {_MOST_WEIGHTS:,} weights. {_CORRECT}")

    counting = register_module_parameter_registration_hook(count)
    try:
        yield
    except (HfEsmError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise HfEsmError(f"{title}: {reason_of(error)}") from error
    except Exception as error:
        reason = reason_of(error)
        raise HfEsmError(
            f"{title}: Transformers cannot make the model that its {CONFIG_FILE} describes: {reason}. {_CORRECT}"
        ) from error
    finally:
        counting.remove()


def _counts(settings: Any) -> Iterator[tuple[str, int]]:
    """Yield the name and the value of every count in settings, also of a part of a model."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, dict):
            yield from _counts(value)
        elif _COUNTS.search(key):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)):
                    yield key, number
