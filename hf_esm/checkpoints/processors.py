"""The tokenizer or processor beside a model."""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer, ImageProcessingMixin

from ..architecture import without_labels
from ..data import UnreadProcessor, with_prompt
from ..errors import DamagedFileError, HfEsmError
from ..utils import reading, reason_of
from .layout import CHAT_TEMPLATE, CONFIG_FILE
from .modules import prompt_in, transformer_path, transformer_settings
from .sources import ModelSource


logger = logging.getLogger(__name__)

# A model's type may ask for a processor of several parts, of which the folder holds one.
_KINDS = (AutoProcessor, AutoTokenizer, AutoImageProcessor, AutoFeatureExtractor)

# Files of processors and tokenizers, and those that hold a tokenizer's vocabulary.
_PREPARING = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
_TEMPLATES = (CHAT_TEMPLATE, "chat_template.json", "tokenizer_config.json")
_SETTINGS = ("special_tokens_map.json", "added_tokens.json", "merges.txt", "sentencepiece.bpe.model")
_FILES = (*_PREPARING, *_VOCABULARIES, *_TEMPLATES, *_SETTINGS)

_PROCESSOR_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py")

_AGAIN = "Copy or download it again."


def load_processor(folder: str | os.PathLike, trust_remote_code: bool = False) -> Any:
    """Load the processor, tokenizer, image processor or feature extractor in a folder; return None if there is none.

    A processor that needs a library that is not installed, or code that is not trusted, is an `UnreadProcessor`, which
    raises where rows are encoded. Of a processor of several parts, those that can do without are loaded, and a warning
    names the library. The length that a Sentence Transformers model cuts texts to is that of its tokenizer, and
    `encode` puts its default prompt before them.

    Raises:
        DamagedFileError: if files are there that cannot be read.
    """
    prompt = prompt_in(Path(folder))
    folder = Path(folder) / transformer_path(Path(folder))
    present = [name for name in _FILES if (folder / name).is_file()]
    for name in present:
        _check_json(folder / name)
    processor, failed = _first_of_kinds(folder, trust_remote_code)
    lacking = next((error for error in failed.values() if _is_lacking(error)), None)
    if lacking is not None and present:
        reason = " ".join(str(lacking).split()).partition(" Please note")[0]
        if processor is None:
            return UnreadProcessor(folder, tuple(present), reason)
        if any(name in _PREPARING for name in present):
            logger.warning("%s: a part of its processor is left out: %s", folder, reason)
    _check_read(processor, folder, present, failed)
    _check_template(processor, folder)
    tokenizer, length = getattr(processor, "tokenizer", processor), transformer_settings(folder).get("max_seq_length")
    if length and hasattr(tokenizer, "model_max_length"):
        tokenizer.model_max_length = length
    return with_prompt(processor, prompt)


def _first_of_kinds(folder: Path, trust_remote_code: bool) -> tuple[Any, dict[type, Exception]]:
    """Return the first processor that can be loaded, and why the kinds before it could not."""
    failed: dict[type, Exception] = {}
    for kind in _KINDS:
        try:
            processor = kind.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # each library that reads files has errors of its own
            failed[kind] = error
            continue
        if _is_saved(processor, folder):
            return processor, failed
    return None, failed


def _is_lacking(error: Exception) -> bool:
    """Return whether a processor could not be loaded for want of a library, or of trust in its code."""
    return isinstance(error, ImportError) or "trust_remote_code" in str(error)


def _check_json(path: Path) -> None:
    if path.suffix != ".json":
        return
    with reading(path):
        json.loads(path.read_text(encoding="utf-8"))


def _check_read(processor: Any, folder: Path, present: Iterable[str], failed: Mapping[type, Exception]) -> None:
    """Raise an error if the files of a tokenizer, or of another processor, are there, and none was made of them."""
    has_tokenizer = hasattr(getattr(processor, "tokenizer", processor), "get_vocab")
    read = {AutoTokenizer: has_tokenizer, AutoImageProcessor: processor is not None}
    for kind, files in ((AutoTokenizer, _VOCABULARIES), (AutoImageProcessor, _PREPARING)):
        unread = [name for name in present if name in files]
        if unread and not read[kind] and kind in failed and not _is_lacking(failed[kind]):
            raise DamagedFileError(f"{folder / unread[0]} cannot be read ({reason_of(failed[kind])}). {_AGAIN}")


def _check_template(processor: Any, folder: Path) -> None:
    """Raise an error if a chat template cannot be read; it may refuse a conversation for other reasons."""
    if getattr(processor, "chat_template", None) and hasattr(processor, "apply_chat_template"):
        try:
            processor.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
        except TemplateSyntaxError as error:
            name = next(name for name in _TEMPLATES if (folder / name).is_file())
            raise DamagedFileError(
                f"{folder / name}: the chat template cannot be read (line {error.lineno}: {error.message}). {_AGAIN}"
            ) from None
        except Exception:  # such as a conversation that the template does not take
            logger.debug("%s: its chat template refuses an empty turn", folder)


def _is_saved(processor: Any, folder: Path) -> bool:
    """Whether the folder holds a tokenizer's vocabulary: without one, Transformers makes up an empty tokenizer."""
    tokenizer = getattr(processor, "tokenizer", processor)
    vocabulary = set((getattr(tokenizer, "vocab_files_names", None) or {}).values())
    return not vocabulary or any((folder / name).is_file() for name in {"tokenizer.json", *vocabulary})


def find_processors(
    sources: dict[str, ModelSource], processor: Any = None, trust_remote_code: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Return the processor of each expert, and under `"base"` the one of the merged model; and a warning for each
    model that lacks one and gets another's.

    Args:
        sources: the models, by task, and the base.
        processor: the processor of all models, if the caller passed one.
        trust_remote_code: run code that comes with a processor.

    Models whose folders hold equal files share one processor. A model without a processor gets the first of the
    others', an adapter without a warning; without any, None.

    Raises:
        HfEsmError: if the files of a processor are damaged, or of some models alone the tokenizer cannot be read.
    """
    read: dict[Any, Any] = {}
    processors = {}
    for name, source in sources.items():
        key = None if processor else _processor_files(source)
        if key not in read:
            read[key] = processor or first_processor([source], trust_remote_code)
        processors[name] = read[key]
    of_others = {n: p for n, p in processors.items() if not isinstance(p, (UnreadProcessor, NoneType))}
    giver, first = next(iter(of_others.items()), ("", None))
    for name, unread in processors.items():
        if isinstance(unread, UnreadProcessor) and first is not None and set(unread.files) & set(_VOCABULARIES):
            raise HfEsmError(f"{sources[name].title}: its tokenizer cannot be read: {unread.reason}")
    lacking = [name for name, own in processors.items() if own is None and not sources[name].is_adapter]
    warnings = [
        f"{sources[name].title}: there is no tokenizer or processor in its folder, so that of {sources[giver].title} "
        "serves for it."
        for name in lacking
        if first is not None
    ]
    return {name: first if own is None else own for name, own in processors.items()}, warnings


def _processor_files(source: ModelSource) -> Any:
    """Return a key that folders share if all files that a processor may be made from are equal. Labels in the config
    make no difference. A folder with subfolders is like no other.
    """
    paths = sorted(source.folder.iterdir()) if source.folder else []
    if not paths or any(path.is_dir() for path in paths):
        return source.title
    contents = {path.name: path.read_bytes() for path in paths if path.suffix in _PROCESSOR_SUFFIXES}
    config = without_labels(json.loads(contents.pop(CONFIG_FILE, "{}")))
    return repr(config), *((name, hashlib.sha256(content).digest()) for name, content in contents.items())


def first_processor(sources: list[ModelSource], trust_remote_code: bool = False) -> Any:
    """Return the first processor in the models' folders; None if there is none."""
    for source in sources:
        if source.embedder is not None:
            return copy.deepcopy(source.embedder[0].processor)
        folder = source.folder or Path(getattr(source.model, "name_or_path", "") or ".no-folder")
        processor = load_processor(folder, trust_remote_code) if folder.is_dir() else None
        if processor is not None:
            return processor
    return None


def differing_processors(processors: dict[str, Any], tasks: Iterable[str]) -> list[str]:
    """Return a warning for every expert whose tokenizer or image processor differs from the merged model's."""
    merged, warnings = processors.get("base"), []
    for task in tasks:
        tuned = processors.get(task)
        if tuned is None or merged is None or tuned is merged:
            continue
        if moved := _tokens_with_other_ids(tuned, merged):
            warnings.append(
                f"'{task}': its tokenizer gives {len(moved)} tokens other ids than the base's, such as {moved[0]!r}. "
                "Embeddings of different tokens are merged, and the merged model gets the base's tokenizer."
            )
        if names := _differing_image_settings(tuned, merged):
            warnings.append(f"'{task}': its images are prepared differently from the base's ({', '.join(names)}).")
    return warnings


def _tokens_with_other_ids(tuned: Any, merged: Any) -> list[str]:
    tuned, merged = (getattr(processor, "tokenizer", processor) for processor in (tuned, merged))
    if not hasattr(tuned, "get_vocab") or not hasattr(merged, "get_vocab"):
        return []
    ids = merged.get_vocab()
    words = {i: word for word, i in ids.items()}
    return [word for word, i in tuned.get_vocab().items() if ids.get(word, i) != i or words.get(i, word) != word]


def _differing_image_settings(tuned: Any, merged: Any) -> list[str]:
    tuned, merged = (getattr(processor, "image_processor", processor) for processor in (tuned, merged))
    if not isinstance(merged, ImageProcessingMixin):
        return []
    return [name for name in _IMAGE_SETTINGS if getattr(tuned, name, None) != getattr(merged, name, None)]


# Settings of image processors that change the model's inputs.
_IMAGE_SETTINGS = (
    "image_mean",
    "image_std",
    "size",
    "crop_size",
    "resample",
    "rescale_factor",
    "do_resize",
    "do_center_crop",
    "do_normalize",
    "do_rescale",
)
