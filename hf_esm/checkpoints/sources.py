"""Sources: what a user names as a model (a Hub id, a folder, an adapter, a live model), opened as a checkpoint."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from datasets.fingerprint import Hasher
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from peft import PeftConfig, PeftModel
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..errors import HfEsmError
from ..utils import check_known, check_path, files_identity, plain_hub_errors
from .adapter_files import read_adapter_config
from .adapters import AdapterCheckpoint
from .base import Checkpoint, LiveCheckpoint
from .configs import read_config
from .embedding import EmbeddingCheckpoint
from .layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD_FILE, ROUTED_FOLDER
from .live_adapters import WrappedCheckpoint, open_live_adapter
from .live_embedders import is_embedder, live_modules, transformer_of
from .modules import SentenceModules, module_paths, read_modules, transformer_path
from .parts import RoutedTask, part_of_base
from .repositories import (
    SMALL_FILES,
    existing_folder,
    files_on_hub,
    folder_above,
    hub_id,
    inner_folder,
    joined,
    snapshot,
)
from .stored import FolderCheckpoint, NotDownloadedError, TensorFiles, stored_dtype


# How a user names a model: a folder, a Hub id, `{"path": …, "revision": …, "subfolder": …}`, or a live model, also one
# of PEFT or Sentence Transformers (an `nn.Sequential`). One task of a routed model is `{"path": …, "task": …}`.
ModelSpec = str | os.PathLike | Mapping[str, Any] | PreTrainedModel | PeftModel | torch.nn.Sequential

# Names of the files that hold the weights of a full model.
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")

_PICKLE_REMEDY = "If it has pickle weights, which can run code when read, and you trust it, pass `allow_pickle=True`."


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
        title: name of the model in messages, such as `expert 'sst2' (me/bert-sst2)`.
        model: the live model, if one was passed.
        embedder: the live `SentenceTransformer` that it is in, if it is in one.
        folder: folder of its files; for a Hub id, the snapshot with the small files. Of an older Sentence Transformers
            model, the subfolder of its Transformer.
        inside: name of that subfolder.
        subfolder: the folder of the repository, or of the folder, that the user named as the model's.
        task: of a routed model, the task that is meant.
        repo_id: its id on the Hub, if it has one.
        revision: its commit on the Hub.
        access: how it is opened.
        on_hub: names of the files beside an adapter's settings on the Hub, not all of which are downloaded.
    """

    title: str
    model: Optional[PreTrainedModel | PeftModel] = None
    folder: Optional[Path] = None
    repo_id: Optional[str] = None
    revision: Optional[str] = None
    access: Access = Access()
    inside: str = ""
    subfolder: str = ""
    task: Optional[str] = None
    embedder: Any = None
    on_hub: tuple[str, ...] = ()

    @property
    def root(self) -> Optional[Path]:
        """The folder of the whole model: the one that the user named, or the snapshot of the repository."""
        return folder_above(self.folder, self.inside) if self.inside else self.folder

    @property
    def name(self) -> str:
        """The model's id on the Hub, with its subfolder, or its folder; empty for a live model."""
        if self.repo_id:
            return "/".join(filter(None, (self.repo_id, self.subfolder)))
        return str(self.root or "")

    @property
    def is_adapter(self) -> bool:
        """Whether the source is a PEFT adapter: a folder of one without the weights of a model, whatever else is in
        it, or a live PEFT model.
        """
        if self.model is not None:
            return isinstance(self.model, PeftModel)
        return self.task is None and (self.folder / ADAPTER_CONFIG).is_file() and not self.stores_weights

    @property
    def stores_weights(self) -> bool:
        """Whether the folder holds the weights of a full model, as far as its files are known."""
        names = [*self.on_hub, *(path.name for path in self.folder.iterdir())]
        return any(fnmatch(name, weights) for name in names for weights in _WEIGHTS)

    @property
    def record(self) -> str | dict[str, Optional[str]]:
        """The name of the model in a recipe."""
        task = {"task": self.task} if self.task is not None else {}
        if self.repo_id:
            subfolder = {"subfolder": self.subfolder} if self.subfolder else {}
            return {"path": self.repo_id, "revision": self.revision, **subfolder, **task}
        if self.model is not None:
            return (not self.is_adapter and getattr(self.model, "name_or_path", "")) or type(self.model).__name__
        return {"path": str(self.root), **task} if task else str(self.root)

    @property
    def peft_config(self) -> PeftConfig:
        """Settings of an adapter."""
        if self.model is not None:
            return self.model.active_peft_config
        return read_adapter_config(self.folder, self.title)

    def card(self) -> str:
        """Return the text of the model card, or that of the repository around a subfolder; empty if there is none."""
        folders = [self.root, folder_above(self.root, self.subfolder)] if self.subfolder else [self.root]
        for folder in folders:
            if folder is not None and (folder / CARD_FILE).is_file():
                return (folder / CARD_FILE).read_text(encoding="utf-8")
        return ""

    def fetch(self, weights: str = "*.safetensors") -> None:
        """Download the weights of a Hub model: the safetensors files whose names match a pattern."""
        if not self.repo_id:
            return
        patterns = [weights, *SMALL_FILES] + (["*.bin"] if self.access.allow_pickle else [])
        place = joined(self.subfolder, self.inside)
        root = snapshot(self.title, self.repo_id, self.revision, self.access.token, patterns, place)
        self.folder = root / place
        if not self.access.allow_pickle and not any(self.folder.glob(weights)):
            raise HfEsmError(f"{self.title}: there are no safetensors weights in it. {_PICKLE_REMEDY}")


def resolve_source(spec: ModelSpec, title: str, access: Access = Access()) -> ModelSource:
    """Find out what `spec` names, and its commit. Of a Hub model, only small files are downloaded.

    Args:
        spec: a folder, a Hub id (`"me/model"`, `"me/model@revision"`), `{"path": …, "revision": …}`, a live model, or
            `{"path": …, "task": …}` for one task of a routed model. `"subfolder"` names the folder inside that holds
            the model.
        title: name of the model in messages, such as `base`; `spec` is added.
        access: how the model is opened.

    Raises:
        HfEsmError: if `spec` names no model; `HubError` if the Hub refuses it or cannot be reached.
    """
    if is_embedder(spec):
        title = f"{title} ({type(spec).__name__})"
        return ModelSource(title, model=transformer_of(spec, title), embedder=spec, access=access)
    if isinstance(spec, (PreTrainedModel, PeftModel)):
        return ModelSource(f"{title} ({type(spec).__name__})", model=spec, access=access)
    if isinstance(spec, torch.nn.Module):
        raise HfEsmError(
            f"{title} is a {type(spec).__name__}, no model of Transformers, PEFT or Sentence Transformers. Pass its "
            "folder or id."
        )
    named: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        check_known(spec, ("path", *_TEXTS), "key", title)
        named = {key: _text(spec[key], key, title) for key in _TEXTS if spec.get(key) is not None}
        spec = spec.get("path")
    if not isinstance(spec, (str, os.PathLike)):
        raise HfEsmError(f"{title}: expected a Hub id, a folder or a live model, not {type(spec).__name__}.")
    check_path(spec, title)
    task, subfolder = named.get("task"), inner_folder(named.get("subfolder", ""), title)
    parts = {"subfolder": subfolder or None, "task": task}
    title = f"{title} ({', '.join([str(spec), *(f'{key} {value!r}' for key, value in parts.items() if value)])})"
    folder = Path(spec).expanduser()
    if folder.is_dir():
        if "revision" in named:
            raise HfEsmError(f"{title}: a folder has no revision {named['revision']!r}. Leave `revision` out.")
        folder = existing_folder(folder, subfolder, title)
        inside = transformer_path(folder)
        return ModelSource(title, folder=folder / inside, access=access, inside=inside, subfolder=subfolder, task=task)
    repo_id, revision = hub_id(spec, title, named.get("revision"))
    repository = snapshot(title, repo_id, revision, access.token, [CARD_FILE] if subfolder else SMALL_FILES)
    revision = repository.name
    if subfolder:
        snapshot(title, repo_id, revision, access.token, SMALL_FILES, subfolder)
    folder = existing_folder(repository, subfolder, title)
    inside = transformer_path(folder)
    if inside:
        snapshot(title, repo_id, revision, access.token, SMALL_FILES, joined(subfolder, inside))
    for path in module_paths(folder):
        snapshot(title, repo_id, revision, access.token, ["*"], joined(subfolder, path))
    place, is_adapter = joined(subfolder, inside), (folder / inside / ADAPTER_CONFIG).is_file()
    on_hub = files_on_hub(title, repo_id, revision, access.token, place) if is_adapter else ()
    return ModelSource(title, None, folder / inside, repo_id, revision, access, inside, subfolder, task, on_hub=on_hub)


# Keys of a model's mapping besides `path`, all of them texts.
_TEXTS = ("revision", "subfolder", "task")


def _text(value: Any, key: str, title: str) -> str:
    if not isinstance(value, str) or not value:
        raise HfEsmError(f"{title}: {key!r} must be a text, not {value!r}. In YAML, put it in quotes.")
    return value


def base_of_adapters(sources: Iterable[ModelSource]) -> dict[str, Optional[str]]:
    """Return the base that all adapters among the sources name, as `resolve_source` takes it.

    Raises:
        HfEsmError: if there is no adapter among them, or they name different bases, or none.
    """
    named: dict[tuple[Optional[str], Optional[str]], str] = {}
    for source in sources:
        if source.is_adapter:
            config = source.peft_config
            named.setdefault((config.base_model_name_or_path or None, config.revision), source.title)
    if len(named) == 1 and all(path for path, _ in named):
        ((path, revision),) = named
        return {"path": path, "revision": None if Path(path).is_dir() else revision}
    if not named:
        raise HfEsmError("No expert is an adapter that names the base. Pass `base`.")
    names = [
        f"{title} names {path or 'no base'}{f' @ {revision}' if revision else ''}"
        for (path, revision), title in named.items()
    ]
    raise HfEsmError(f"{', '.join(names)}. Pass `base`.")


def resolve_models(
    base: Optional[ModelSpec], experts: Mapping[str, ModelSpec], access: Access = Access()
) -> dict[str, ModelSource]:
    """Resolve the base, as `"base"`, and the experts by task; see `resolve_source`. Without a base, it is the one that
    all adapters among the experts name.
    """
    sources = {task: resolve_source(spec, f"expert '{task}'", access) for task, spec in experts.items()}
    base = base_of_adapters(sources.values()) if base is None else base
    return {"base": resolve_source(base, "base", access), **sources}


def open_checkpoint(source: ModelSource, base: Optional[Checkpoint] = None, headers_only: bool = False) -> Checkpoint:
    """Open the checkpoint of a source: names, shapes and dtypes now, each weight when it is asked for.

    Args:
        base: the base model, which an adapter needs. Without it, a live PEFT model is opened as the base inside it.
        headers_only: read names and shapes alone; the weights of a Hub model are not downloaded.

    Raises:
        HfEsmError: if the source cannot be opened.
    """
    if source.model is not None:
        live = live_modules(source.embedder, source.title) if source.embedder is not None else None
        return _with_modules(_open_live(source, base), live, base)
    modules = read_modules(source.root, source.title, source.access.allow_pickle)
    if source.stores_weights and (source.folder / ADAPTER_CONFIG).is_file():
        raise HfEsmError(
            f"{source.title}: it holds a full model and a PEFT adapter, which Transformers would add to the model, "
            "though it may be merged into it. Take a folder without one of them: without the adapter's files "
            "(adapter_*), if it is merged into the weights."
        )
    if source.task is not None:
        checkpoint = _open_task(source)
    elif source.is_adapter:
        checkpoint = _open_adapter(source, base, headers_only)
    else:
        checkpoint = _open_folder(source, headers_only, modules)
    checkpoint = part_of_base(checkpoint, base)
    checkpoint.source, checkpoint.revision = source.name, source.revision
    return _with_modules(checkpoint, modules, base)


def _with_modules(
    checkpoint: Checkpoint, modules: Optional[SentenceModules], base: Optional[Checkpoint]
) -> Checkpoint:
    """Return a checkpoint with the modules after it: its own, or those of a base of the same class."""
    if modules is None and base is not None and type(checkpoint.skeleton) is type(base.skeleton):
        modules = base.modules
    return checkpoint if modules is None else EmbeddingCheckpoint(checkpoint, modules)


def _open_live(source: ModelSource, base: Optional[Checkpoint]) -> Checkpoint:
    """Open a live model; of one of PEFT its adapter, or without a base the base inside it."""
    if not source.is_adapter:
        return LiveCheckpoint(source.model, source.title)
    if base is None:
        return WrappedCheckpoint(source.model, source.title)
    return open_live_adapter(source.model, source.title, base)


def _open_adapter(source: ModelSource, base: Optional[Checkpoint], headers_only: bool) -> AdapterCheckpoint:
    if base is None:
        raise HfEsmError(f"{source.title} is a PEFT adapter; the base must be a full model.")
    # An adapter is small, and its shapes alone do not tell which weights it changes.
    source.fetch(ADAPTER_WEIGHTS if headers_only else "*.safetensors")
    return AdapterCheckpoint(source.folder, source.title, base, source.access.allow_pickle, headers_only)


def _open_task(source: ModelSource) -> RoutedTask:
    """Open one task of a routed model, whose repository is downloaded."""
    if source.repo_id:
        repository = snapshot(source.title, source.repo_id, source.revision, source.access.token)
        source.folder = repository / source.subfolder
    if not (source.folder / ROUTED_FOLDER / ADAPTER_CONFIG).is_file():
        raise HfEsmError(f"{source.title}: there are no routed experts in {source.folder}. Leave `task` out.")

    def task_class(head: Path) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
        return resolve_class(replace(source, folder=head, inside=""))

    static = _open_folder(replace(source, repo_id=None), headers_only=False)
    return RoutedTask(source.folder, source.title, source.task, static, task_class)


def _open_folder(
    source: ModelSource, headers_only: bool, modules: Optional[SentenceModules] = None
) -> FolderCheckpoint:
    config, model_class = resolve_class(source)
    if modules is not None:
        model_class = modules.encoder_class(config, model_class)
    in_root = not source.inside and not source.subfolder
    from_hub = headers_only and source.repo_id and in_root and not is_offline_mode()
    files = _hub_headers(source) if from_hub else None
    if files is None:
        source.fetch()
        files = TensorFiles.open(source.folder, source.title, source.access.allow_pickle)
    options = {"trust_remote_code": True} if source.access.trust_remote_code else {}
    return FolderCheckpoint(source.folder, source.title, model_class, config, files, load_options=options)


def resolve_class(source: ModelSource) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """Return the config, and the class that its `architectures` names.

    Raises:
        HfEsmError: if there is no usable config, or Transformers does not know the class.
    """
    config = read_config(source.folder, source.title, source.access.trust_remote_code)
    architecture = (config.architectures or [None])[0]
    if architecture is None:
        return config, AutoModel._model_mapping[type(config)]
    if issubclass(getattr(transformers, architecture, None) or object, PreTrainedModel):
        return config, getattr(transformers, architecture)
    references = [
        ref for ref in (getattr(config, "auto_map", None) or {}).values() if ref.endswith(f".{architecture}")
    ]
    if references and source.access.trust_remote_code:
        return config, get_class_from_dynamic_module(references[0], source.folder)
    remedy = "Pass `trust_remote_code=True` if you trust its code." if references else "Upgrade transformers."
    raise HfEsmError(f"{source.title}: Transformers {transformers.__version__} has no class {architecture}. {remedy}")


def _hub_headers(source: ModelSource) -> Optional[TensorFiles]:
    """Read names, shapes and dtypes of a Hub model's weights from the first bytes of its files.

    Returns None if there are only pickle files, which cannot be read in part, and they are allowed.
    """
    try:
        with plain_hub_errors(source.title):
            metadata = HfApi(token=source.access.token).get_safetensors_metadata(
                source.repo_id, revision=source.revision
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
        raise NotDownloadedError(f"{source.title}: only headers were read; '{key}' was not downloaded")

    return TensorFiles(headers, refuse, headers_only=True)


def model_identity(source: ModelSource) -> Any:
    """Return what changes with the model, for cache keys: a hash of a live model's weights, the commit on the Hub, or
    the names, sizes and times of a folder's files.
    """
    if source.model is not None:
        whole = source.model if source.embedder is None else source.embedder
        return Hasher.hash({name: tensor.detach().cpu() for name, tensor in whole.state_dict().items()})
    if source.revision is not None:
        subfolder = [{"subfolder": source.subfolder}] if source.subfolder else []
        return [source.repo_id, source.revision, *subfolder, *filter(None, [source.task])]
    return [*files_identity(Path(source.root)), *filter(None, [source.task])]
