"""The tokenizer or processor beside a model."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer, ImageProcessingMixin

from ..architecture import without_labels
from .sources import ModelSource


def load_processor(folder: str | os.PathLike, trust_remote_code: bool = False) -> Any:
    """The tokenizer, image processor, feature extractor or processor in a folder; None if there is none."""
    # A model's type may call for a processor of several parts of which one alone stands there.
    for kind in (AutoProcessor, AutoTokenizer, AutoImageProcessor, AutoFeatureExtractor):
        try:
            processor = kind.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        # Where there is no tokenizer, Transformers makes one up from the model's type, with an empty vocabulary.
        tokenizer = getattr(processor, "tokenizer", processor)
        vocabulary = set((getattr(tokenizer, "vocab_files_names", None) or {}).values())
        if not vocabulary or any((Path(folder) / name).is_file() for name in {"tokenizer.json", *vocabulary}):
            return processor
    return None


_PROCESSOR_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py")


def find_processors(sources: dict[str, ModelSource], given: Any, trust_remote_code: bool = False) -> dict[str, Any]:
    """The tokenizer or processor of each expert, and under `"base"` the one that the merged model gets. It is read
    once where the same files stand beside several models.
    """
    read: dict[Any, Any] = {}
    beside = {}
    for name, source in sources.items():
        key = None if given else _processor_files(source)
        if key not in read:
            read[key] = given or first_processor([source], trust_remote_code)
        beside[name] = read[key]
    first = next((processor for processor in beside.values() if processor is not None), None)
    return {name: first if processor is None else processor for name, processor in beside.items()}


def _processor_files(source: ModelSource) -> Any:
    """The same for folders with the same of what a processor may be made from; labels make no difference. Where there
    are folders in the folder, it is like no other.
    """
    paths = sorted(source.folder.iterdir()) if source.folder else []
    if not paths or any(path.is_dir() for path in paths):
        return source.title
    found = {path.name: path.read_bytes() for path in paths if path.suffix in _PROCESSOR_SUFFIXES}
    config = without_labels(json.loads(found.pop("config.json", "{}")))
    return repr(config), *((name, hashlib.sha256(content).digest()) for name, content in found.items())


def first_processor(sources: list[ModelSource], trust_remote_code: bool = False) -> Any:
    """The first tokenizer or processor that stands beside one of the models; None if there is none."""
    for source in sources:
        folder = source.folder or Path(getattr(source.model, "name_or_path", "") or ".no-folder")
        processor = load_processor(folder, trust_remote_code) if folder.is_dir() else None
        if processor is not None:
            return processor
    return None


def differing_processors(processors: dict[str, Any], tasks: Iterable[str]) -> list[str]:
    """What the experts' tokenizers and image processors do otherwise than the one that the merged model gets."""
    found = []
    for task in tasks:
        own, merged = processors.get(task), processors.get("base")
        if own is None or merged is None or own is merged:
            continue
        numbered, base = (getattr(p, "tokenizer", p) for p in (own, merged))
        if hasattr(numbered, "get_vocab") and hasattr(base, "get_vocab"):
            places = base.get_vocab()
            words = {place: word for word, place in places.items()}
            moved = [w for w, i in numbered.get_vocab().items() if places.get(w, i) != i or words.get(i, w) != w]
            if moved:
                found.append(
                    f"'{task}': its tokenizer numbers {len(moved)} tokens otherwise than the base's, such as "
                    f"{moved[0]!r}: embeddings of unlike tokens are merged, and the merged model reads as the base."
                )
        ours, theirs = (getattr(p, "image_processor", p) for p in (merged, own))
        if not isinstance(ours, ImageProcessingMixin):
            continue
        names = [name for name in _PICTURE_SETTINGS if getattr(ours, name, None) != getattr(theirs, name, None)]
        if names:
            found.append(f"'{task}': its pictures are prepared otherwise than the base's ({', '.join(names)}).")
    return found


# Settings of image processors of which a difference makes other inputs.
_PICTURE_SETTINGS = (
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
