"""From what a user writes for a model to a checkpoint: an id, a folder, an adapter, a live model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from datasets.fingerprint import Hasher
from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..errors import HfEsmError
from ..utils import files_identity, hub_errors
from .adapters import LoraCheckpoint
from .base import Checkpoint, LiveCheckpoint
from .stored import FolderCheckpoint, TensorFiles, stored_dtype


# How a user names a model: a folder, a Hub id, `{"path": …, "revision": …}`, or a live model.
ModelSpec = str | os.PathLike | Mapping[str, Any] | PreTrainedModel


@dataclass(frozen=True)
class Access:
    """How models are opened.

    Attributes:
        token: access token for the Hub; True for the one that `hf auth login` stored.
        allow_pickle: whether `.bin` files, which can run code when they are read, may be read.
        trust_remote_code: whether code from a model's repository may be run.
    """

    token: Optional[str | bool] = field(default=None, repr=False)
    allow_pickle: bool = False
    trust_remote_code: bool = False


@dataclass
class ModelSource:
    """A model that a user named, with a Hub revision resolved to its commit.

    Attributes:
        title: what messages call it, such as `expert 'sst2' (me/bert-sst2)`.
        model: the live model, if one was given.
        folder: where its files are; for a Hub id, the snapshot with the small files.
        repo_id: its id on the Hub, if it has one.
        revision: the commit on the Hub.
        access: how it is opened.
    """

    title: str
    model: Optional[PreTrainedModel] = None
    folder: Optional[Path] = None
    repo_id: Optional[str] = None
    revision: Optional[str] = None
    access: Access = Access()

    @property
    def is_adapter(self) -> bool:
        folder = self.folder
        return folder is not None and (folder / "adapter_config.json").is_file() and not self._has_weights()

    @property
    def stores_weights(self) -> bool:
        """Whether weights of a whole model stand in the folder already."""
        return any(any(self.folder.glob(names)) for names in ("model*.safetensors*", "pytorch_model*.bin*"))

    def _has_weights(self) -> bool:
        """Whether a full model stands there; of a Hub model, only small files were fetched so far."""
        return self.stores_weights or (self.repo_id is not None and (self.folder / "config.json").is_file())

    @property
    def record(self) -> Any:
        """How a recipe names it again."""
        if self.repo_id:
            return {"path": self.repo_id, "revision": self.revision}
        if self.model is not None:
            return getattr(self.model, "name_or_path", "") or type(self.model).__name__
        return str(self.folder)

    def card(self) -> str:
        """The text of its README, empty if it has none."""
        if self.folder is not None and (self.folder / "README.md").is_file():
            return (self.folder / "README.md").read_text(encoding="utf-8")
        return ""

    def fetch(self, weights: str = "*.safetensors") -> None:
        """Download the weights of a Hub model, or those of its safetensors files that fit a pattern."""
        if not self.repo_id:
            return
        patterns = [weights, *_SMALL_FILES] + (["*.bin"] if self.access.allow_pickle else [])
        self.folder = Path(
            _on_hub(
                self.title,
                snapshot_download,
                self.repo_id,
                self.revision,
                self.access.token,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
            )
        )
        if not self.access.allow_pickle and not any(self.folder.glob(weights)):
            raise HfEsmError(f"{self.title}: there are no safetensors weights in it. {_PICKLE_REMEDY}")


_PICKLE_REMEDY = "If it has pickle weights, which can run code when read, and you trust it, pass allow_pickle=True."


_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "README.md"]


def resolve_source(spec: ModelSpec, title: str, access: Access = Access()) -> ModelSource:
    """Find out what `spec` names, and its commit; fetches small files only.

    Args:
        spec: a folder, a Hub id (`"me/model"`, `"me/model@revision"`), `{"path": …, "revision": …}`, or a live model.
        title: what messages call it.
        access: how it is opened.
    """
    if isinstance(spec, PreTrainedModel):
        return ModelSource(f"{title} ({type(spec).__name__})", model=spec, access=access)
    if isinstance(spec, torch.nn.Module):
        raise HfEsmError(
            f"{title} is a {type(spec).__name__}, not a Transformers model. For a PEFT model, pass the folder or id "
            "of its adapter, or `model.merge_and_unload()`."
        )
    revision = None
    if isinstance(spec, Mapping):
        spec, revision = spec.get("path"), spec.get("revision")
    if not isinstance(spec, (str, os.PathLike)):
        raise HfEsmError(f"{title}: expected a Hub id, a folder or a live model, not {type(spec).__name__}.")
    folder = Path(spec).expanduser()
    title = f"{title} ({spec})"
    if folder.is_dir():
        return ModelSource(title, folder=folder, access=access)
    repo_id, revision = _hub_id(spec, title, revision)
    snapshot = Path(
        _on_hub(
            title,
            snapshot_download,
            repo_id,
            revision,
            access.token,
            allow_patterns=_SMALL_FILES,
            ignore_patterns=["*/*"],
        )
    )
    return ModelSource(title, folder=snapshot, repo_id=repo_id, revision=snapshot.name, access=access)


def whole_folder(
    spec: str | os.PathLike, title: str, revision: Optional[str] = None, token: Optional[str | bool] = None
) -> Path:
    """The folder that `spec` names, with everything in it; that of a Hub id is downloaded."""
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return folder
    repo_id, revision = _hub_id(spec, title, revision)
    return Path(_on_hub(title, snapshot_download, repo_id, revision, token))


def _hub_id(spec: str | os.PathLike, title: str, revision: Optional[str]) -> tuple[str, Optional[str]]:
    """Id and revision of what is no folder: `me/model`, `me/model@revision`."""
    if str(spec).startswith((".", "/", "~")) or str(spec).count("/") > 1:
        raise HfEsmError(f"{title}: there is no such folder.")
    repo_id, _, tag = str(spec).partition("@")
    return repo_id, revision or tag or None


def open_checkpoint(source: ModelSource, base: Optional[Checkpoint] = None, headers_only: bool = False) -> Checkpoint:
    """The checkpoint behind a source: its names, shapes and dtypes now, its weights when they are asked for.

    Args:
        base: the base model, which an adapter needs.
        headers_only: read no more than names and shapes; for a Hub model, weights are not downloaded.
    """
    if source.model is not None:
        return LiveCheckpoint(source.model, source.title)
    if source.stores_weights and (source.folder / "adapter_config.json").is_file():
        raise HfEsmError(
            f"{source.title}: a whole model and a PEFT adapter stand in it, and Transformers would put one on the "
            "other. Move one of them away: the adapter, if it is merged into the weights."
        )
    if source.is_adapter:
        if base is None:
            raise HfEsmError(f"{source.title} is a PEFT adapter; the base must be a full model.")
        # An adapter is small, and its shapes alone do not say what it changes.
        source.fetch("adapter_model.safetensors" if headers_only else "*.safetensors")
        checkpoint = LoraCheckpoint(source.folder, source.title, base, source.access.allow_pickle)
    else:
        config, model_class = resolve_class(source)
        whole = not headers_only or not source.repo_id or is_offline_mode()
        files = None if whole else _hub_headers(source)
        if files is None:
            source.fetch()
            files = TensorFiles.open(source.folder, source.title, source.access.allow_pickle)
        options = {"trust_remote_code": True} if source.access.trust_remote_code else {}
        checkpoint = FolderCheckpoint(source.folder, source.title, model_class, config, files, load_options=options)
    checkpoint.source, checkpoint.revision = source.repo_id or str(source.folder), source.revision
    return checkpoint


def resolve_class(source: ModelSource) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The config, and the class that its `architectures` names."""
    if not (source.folder / "config.json").is_file():
        raise HfEsmError(f"{source.title}: no config.json (nor adapter_config.json) in {source.folder}.")
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.access.trust_remote_code)
    except (ValueError, OSError) as error:
        raise HfEsmError(f"{source.title}: its config.json cannot be used: {error}") from None
    architecture = (config.architectures or [None])[0]
    if architecture is None:
        return config, AutoModel._model_mapping[type(config)]
    if hasattr(transformers, architecture):
        return config, getattr(transformers, architecture)
    references = [
        ref for ref in (getattr(config, "auto_map", None) or {}).values() if ref.endswith(f".{architecture}")
    ]
    if references and source.access.trust_remote_code:
        return config, get_class_from_dynamic_module(references[0], source.folder)
    remedy = "Pass trust_remote_code=True if you trust its code." if references else "Upgrade transformers."
    raise HfEsmError(f"{source.title}: Transformers {transformers.__version__} has no class {architecture}. {remedy}")


def _hub_headers(source: ModelSource) -> Optional[TensorFiles]:
    """Names, shapes and dtypes of a Hub model's weights, from the first bytes of its files; None where there are only
    pickle files, which cannot be read in part, and they are allowed.
    """
    try:
        metadata = _on_hub(
            source.title, HfApi(token=source.access.token).get_safetensors_metadata, source.repo_id, source.revision
        )
    except NotASafetensorsRepoError:
        if source.access.allow_pickle:
            return None
        raise HfEsmError(f"{source.title}: there are no safetensors weights in it. {_PICKLE_REMEDY}") from None
    except SafetensorsParsingError as error:
        raise HfEsmError(f"{source.title}: its weights cannot be read: {error}") from None
    headers = {
        name: (tuple(tensor.shape), stored_dtype(tensor.dtype, name, source.title))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }

    def refuse(key: str) -> torch.Tensor:
        raise RuntimeError(f"{source.title}: only headers were read, '{key}' was not downloaded")

    return TensorFiles(headers, refuse)


def _on_hub(title: str, call: Any, repo_id: str, revision: Optional[str], token: Any = None, **options: Any) -> Any:
    """The result of a call of the Hub client, with its errors in the words of the user who named the model."""
    if token is not None:
        options["token"] = token
    with hub_errors(title):
        try:
            return call(repo_id, revision=revision, **options)
        except HFValidationError:
            raise HfEsmError(f"{title}: neither a folder nor a Hub id.") from None


def model_identity(source: ModelSource) -> Any:
    """A model's commit on the Hub, the sizes and times of its files, or a hash of its weights if it is a live one."""
    if source.model is not None:
        return Hasher.hash({name: tensor.detach().cpu() for name, tensor in source.model.state_dict().items()})
    if source.revision is not None:
        return [source.repo_id, source.revision]
    return files_identity(Path(source.folder))
