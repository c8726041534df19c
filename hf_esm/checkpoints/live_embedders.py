"""Live models of Sentence Transformers: the Transformer inside one, and the modules after it."""

import copy
import json
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import HfEsmError
from .embedding import attached
from .layout import MODULES_FILE, SENTENCE_SETTINGS
from .modules import SentenceModules, read_modules


class _Scratch:
    """A folder that is removed with the last modules that were read from it."""

    def __init__(self) -> None:
        self.folder = Path(mkdtemp(prefix="hf-esm-"))
        weakref.finalize(self, shutil.rmtree, self.folder, True)


def is_embedder(spec: Any) -> bool:
    """Return whether an object is a `SentenceTransformer`, without importing the library."""
    library = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(spec, library.SentenceTransformer)


def transformer_of(embedder: Any, title: str) -> PreTrainedModel | PeftModel:
    """Return the live model that a `SentenceTransformer` begins with.

    Raises:
        HfEsmError: if it begins with something else, or with a model that adapters were added to.
    """
    model = getattr(embedder[0], "model", None)
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise HfEsmError(f"{title} begins with a {type(embedder[0]).__name__}, and not with a model of Transformers.")
    if not isinstance(model, PeftModel) and getattr(model, "_hf_peft_config_loaded", False):
        raise HfEsmError(
            f"{title} has adapters inside. Save it with `save_pretrained`, and pass its folder, which is read as an "
            "adapter of the base."
        )
    return model


def live_modules(embedder: Any, title: str) -> SentenceModules:
    """Return the modules of a `SentenceTransformer`, as those of the folder that it would be saved to.

    Raises:
        HfEsmError: if the code of a module came with the model, or they cannot be read; see `read_modules`.
    """
    scratch, entries = _Scratch(), []
    folder = scratch.folder
    for index, (name, module) in enumerate(embedder.named_children()):
        kind, code = type(module).__name__, type(module).__module__
        if code.startswith("transformers_modules."):
            raise HfEsmError(f"{title}: the code of its module {kind} came with it. Pass its folder or id.")
        path = f"{index}_{kind}" if index else ""
        (folder / path).mkdir(exist_ok=True)
        module.save(str(folder / path)) if index else module.save_config(str(folder))
        settings = {"kwargs": kwargs} if (kwargs := (embedder.module_kwargs or {}).get(name)) else {}
        entries.append({"idx": index, "name": name, "path": path, "type": f"{code}.{kind}", **settings})
    settings = {
        "model_type": embedder.model_type,
        "prompts": embedder.prompts,
        "default_prompt_name": embedder.default_prompt_name,
        "similarity_fn_name": embedder.similarity_fn_name,
    }
    (folder / MODULES_FILE).write_text(json.dumps(entries), encoding="utf-8")
    (folder / SENTENCE_SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    modules = read_modules(folder, title)
    if modules is None:
        raise HfEsmError(f"{title} makes no embeddings.")
    return replace(modules, scratch=scratch)


def copy_of_embedder(embedder: Any, title: str) -> PreTrainedModel | PeftModel:
    """Return a copy of the Transformer that answers with the embeddings of the modules after it."""
    return attached(copy.deepcopy(transformer_of(embedder, title)).eval(), live_modules(embedder, title))
