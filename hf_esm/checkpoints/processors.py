"""The tokenizer or processor beside a model."""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer, ImageProcessingMixin

from ..architecture import without_labels
from .layout import CONFIG_FILE
from .modules import transformer_path, transformer_settings
from .sources import ModelSource


logger = logging.getLogger(__name__)

# A model's type may ask for a processor of several parts, of which the folder holds one.
_KINDS = (AutoProcessor, AutoTokenizer, AutoImageProcessor, AutoFeatureExtractor)

# Files that show that somebody saved a processor or a tokenizer.
_PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER_CONFIG = "tokenizer_config.json"

_PROCESSOR_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py")


def load_processor(folder: str | os.PathLike, trust_remote_code: bool = False) -> Any:
    """Load the processor, tokenizer, image processor or feature extractor in a folder; return None if there is none.

    A library that only a part of the processor needs (Pillow for images, say) need not be installed: the parts that
    can do without are loaded, and a warning names the library. The length that a Sentence Transformers model cuts
    texts to is that of its tokenizer.
    """
    folder = Path(folder) / transformer_path(Path(folder))
    lacking: Optional[ImportError] = None
    for kind in _KINDS:
        try:
            processor = kind.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except ImportError as error:
            lacking = lacking or error
            continue
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if _is_saved(processor, folder):
            break
    else:
        processor = None
    saved = _PROCESSOR_CONFIGS if processor is not None else (*_PROCESSOR_CONFIGS, _TOKENIZER_CONFIG)
    if lacking is not None and any((folder / name).is_file() for name in saved):
        reason = " ".join(str(lacking).split()).partition(" Please note")[0]
        logger.warning("%s: its processor, or a part of it, is left out: %s", folder, reason)
    tokenizer, length = getattr(processor, "tokenizer", processor), transformer_settings(folder).get("max_seq_length")
    if length and hasattr(tokenizer, "model_max_length"):
        tokenizer.model_max_length = length
    return processor


def _is_saved(processor: Any, folder: Path) -> bool:
    """Whether the folder holds a tokenizer's vocabulary: without one, Transformers makes up an empty tokenizer."""
    tokenizer = getattr(processor, "tokenizer", processor)
    vocabulary = set((getattr(tokenizer, "vocab_files_names", None) or {}).values())
    return not vocabulary or any((folder / name).is_file() for name in {"tokenizer.json", *vocabulary})


def find_processors(
    sources: dict[str, ModelSource], processor: Any = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return the processor of each expert, and under `"base"` the one of the merged model.

    Args:
        sources: the models, by task, and the base.
        processor: the processor of all models, if the caller passed one.
        trust_remote_code: run code that comes with a processor.

    Models whose folders hold equal files share one processor. A model without a processor gets the first of the
    others'; without any, None.
    """
    read: dict[Any, Any] = {}
    processors = {}
    for name, source in sources.items():
        key = None if processor else _processor_files(source)
        if key not in read:
            read[key] = processor or first_processor([source], trust_remote_code)
        processors[name] = read[key]
    first = next((processor for processor in processors.values() if processor is not None), None)
    return {name: first if processor is None else processor for name, processor in processors.items()}


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
