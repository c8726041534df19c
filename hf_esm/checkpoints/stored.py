"""A folder of safetensors files as a checkpoint."""

import copy
import json
import re
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, Optional
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture import ties, untie
from ..errors import DamagedFileError, HfEsmError
from ..utils import AGAIN, is_file, reading, stays_inside
from .base import Checkpoint, build_skeleton, quiet_loading
from .configs import buildable
from .conversion import StoredWeights
from .layout import CONFIG_FILE, PICKLED_WEIGHTS, WEIGHTS_FILE
from .quantised import ACTIVATION_SCALES, dense_config, dense_dtype, dequantiser, quantisation_name
from .shards import DTYPES, TensorFile
from .written import load_read, load_written


class FolderCheckpoint(Checkpoint):
    """A folder of safetensors files. Its tensors are converted to the live model's weights, one group at a time.

    The weights of a quantised model are those of the model that Transformers dequantises, in bfloat16. Each group is
    dequantised when it is read.
    """

    def __init__(
        self,
        folder: str | Path,
        title: str,
        model_class: type[PreTrainedModel],
        config: PretrainedConfig,
        files: "TensorFiles",
        load_options: Optional[dict[str, Any]] = None,
    ):
        """Read the headers.

        Args:
            folder: folder that `save_pretrained` wrote.
            title: name of the model in messages.
            model_class: class of the live model.
            config: settings of the live model.
            files: the stored tensors.
            load_options: further arguments of `from_pretrained`.

        Raises:
            HfEsmError: if the model is quantised in a way that is not read, or a weight does not have the shape that
                the config describes.
        """
        self.folder, self.title, self.source = Path(folder), title, str(folder)
        self.files, self._load_options = files, load_options or {}
        self._quantiser = dequantiser(config, title)
        if self._quantiser is not None:
            self.quantised, config = quantisation_name(self._quantiser), dense_config(config)
        self._open_as(model_class, config)
        self._unwrap(model_class, config)
        for key in self._weights.unscaled:
            raise HfEsmError(
                f"{self.title}: '{key}' is stored as {self.files.headers[key][1]}, without scales that Transformers "
                "knows. Merge the checkpoint that it was quantised from."
            )
        for name in self._weights.misfits:
            described = tuple(self.skeleton.state_dict()[self.names[name]].shape)
            raise HfEsmError(
                f"{self.title}: weight '{self.names[name]}' is {self.shape(name)} in the file, but its own "
                f"{CONFIG_FILE} describes {described}. Save the model again with `save_pretrained`."
            )

    def _open_as(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
        with dense_dtype(self._quantiser):
            self.skeleton = build_skeleton(model_class, config)
        self._weights = self._stored_weights()
        if apart := [name for name, source in ties(self.skeleton).items() if self._differ(name, source)]:
            untie(self.skeleton, apart)  # Transformers loads both, whatever the config says
            self._weights = self._stored_weights()
        self.names, self.missing = dict(self._weights.names), list(self._weights.missing)
        needless = ACTIVATION_SCALES if self.quantised else "(?!)"
        self.extra = [key for key in self._weights.extra if not re.search(needless, key)]
        self._last: tuple[str, MutableMapping[str, Tensor]] = ("", {})

    def _stored_weights(self) -> StoredWeights:
        return StoredWeights(self.skeleton, self.files.headers, self.files.meta, self._quantiser)

    def _differ(self, name: str, source: str) -> bool:
        """Whether both of two weights that the config ties are stored, with different values. Where only headers are
        read, they are taken to differ, as `save_pretrained` writes tied weights once.
        """
        weights = self._weights
        if not {name, source} <= weights.tensors.keys() or weights.group_of(name) == weights.group_of(source):
            return False
        if self.files.headers_only:
            return True
        one, other = (self._read(weights.group_of(live))[live] for live in (name, source))
        dtype = torch.promote_types(one.dtype, other.dtype)
        return not torch.equal(one.to(dtype), other.to(dtype))

    def _unwrap(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
        """Read names without what training wrappers put into them, if the model then lacks fewer weights."""
        wrapped, missing = self.files, self.missing
        if missing and (unwrapped := wrapped.unwrapped()) is not None:
            self.files = unwrapped
            self._open_as(model_class, config)
            if len(self.missing) >= len(missing):
                self.files = wrapped
                self._open_as(model_class, config)

    def seen_as(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> "FolderCheckpoint":
        view = copy.copy(self)
        for cached in ("linear", "trained"):
            view.__dict__.pop(cached, None)
        view._open_as(model_class, config)
        for name in view._weights.misfits:
            del view.names[name]
        view.missing += view._weights.misfits
        return view

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights.tensors[self.names[name]].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.tensors[self.names[name]].dtype

    def tensor(self, name: str) -> Tensor:
        live = self.names[name]
        group = self._weights.group_of(live)
        last = self._last  # another thread may replace the pair meanwhile
        weight = last[1].get(live) if last[0] == group else None
        if weight is None:
            weights = self._read(group)
            weight = weights[live]
            # A weight that was read alone is there as long as a caller holds it.
            self._last = (group, weights if len(weights) > 1 else WeakValueDictionary(weights))
        return weight

    def _read(self, group: str) -> dict[str, Tensor]:
        """Read a group of weights, and dequantise them if they are quantised."""
        if not self.quantised:
            return self._weights.read(group, self.files.read)
        remedy = "Copy or download the model again, or merge the checkpoint that it was quantised from."
        try:
            weights = self._weights.read(group, self.files.read)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise HfEsmError(f"{self.title}: '{group}' cannot be dequantised ({reason}). {remedy}") from None
        for live, weight in weights.items():
            if weight.shape != self._weights.tensors[live].shape:
                raise HfEsmError(
                    f"{self.title}: '{live}' is {tuple(weight.shape)} when it is dequantised, but {CONFIG_FILE} "
                    f"describes {tuple(self._weights.tensors[live].shape)}. {remedy}"
                )
        return weights

    def extra_tensors(self) -> dict[str, Tensor]:
        return {} if self.quantised else {key: self.files.read(key) for key in self.extra}

    def load_model(self, **placement: Any) -> PreTrainedModel:
        return self.load_model_as(type(self.skeleton), self.config, **placement)

    def load_model_as(self, model_class: type, config: PretrainedConfig, **placement: Any) -> PreTrainedModel:
        options = {**self._load_options, **placement}
        if self.quantised or not self.files.as_saved:
            return (load_written if placement else load_read)(self.seen_as(model_class, config), **options)
        with buildable(self.title), quiet_loading():
            return model_class.from_pretrained(
                self.folder, config=config, dtype="auto", ignore_mismatched_sizes=True, **options
            ).eval()


# What training wrappers put into the names of weights: anywhere, and before all names.
_WRAPPERS = r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
_INDEX = f"{WEIGHTS_FILE}.index.json"
_WRAPPING_PREFIXES = ("module.", "base_model.model.")


class NotDownloadedError(RuntimeError):
    """A weight was asked for of a model of which only headers were read."""


class TensorFiles:
    """Stored tensors by name: all shapes and dtypes at once, values when they are asked for.

    Attributes:
        headers: `(shape, dtype)` of every tensor by its name.
        read: returns the values of a tensor by its name.
        headers_only: whether `read` can return none, as the files were not downloaded.
        as_saved: whether Transformers loads the files as they are.
    """

    def __init__(
        self,
        headers: dict[str, tuple[tuple[int, ...], torch.dtype]],
        read: Callable[[str], Tensor],
        headers_only: bool = False,
        as_saved: bool = True,
    ):
        self.headers, self.read, self.headers_only, self.as_saved = headers, read, headers_only, as_saved

    def unwrapped(self) -> Optional["TensorFiles"]:
        """Return the tensors by their names without what training wrappers put into them: `torch.compile` and FSDP
        anywhere, DDP and PEFT before all names. None if there is nothing like that, or two names become one.
        """
        names = {key: re.sub(_WRAPPERS, r"\1", key) for key in self.headers}
        for prefix in _WRAPPING_PREFIXES:
            if all(name.startswith(prefix) for name in names.values()):
                names = {key: name.removeprefix(prefix) for key, name in names.items()}
        stored = {name: key for key, name in names.items()}
        if len(stored) < len(names) or stored.keys() == self.headers.keys():
            return None
        headers = {name: self.headers[key] for name, key in stored.items()}
        return TensorFiles(headers, lambda name: self.read(stored[name]), self.headers_only, as_saved=False)

    def meta(self, key: str) -> Tensor:
        """Return a tensor on the meta device."""
        shape, dtype = self.headers[key]
        return torch.empty(shape, dtype=dtype, device="meta")

    @classmethod
    def open(cls, folder: Path, title: str, allow_pickle: bool = False) -> "TensorFiles":
        """Open the weights in a folder: one safetensors file, shards with an index, or, if allowed, pickle files.

        Raises:
            HfEsmError: if there are no such files, or a file cannot be read.
        """
        paths = weight_files(folder, title, allow_pickle)
        if paths[0].suffix == ".bin":
            return cls._open_pickle(paths, title)
        headers, file_of = {}, {}
        as_saved = not is_file(folder / _INDEX) or "metadata" in _read_index(folder / _INDEX, title)
        for path in paths:
            file = TensorFile(path, title)
            for key, (shape, code) in file.headers.items():
                headers[key], file_of[key] = (shape, stored_dtype(code, key, title)), file
        return cls(headers, lambda key: file_of[key].read(key), as_saved=as_saved)

    @classmethod
    def _open_pickle(cls, paths: list[Path], title: str) -> "TensorFiles":
        state: dict[str, Tensor] = {}
        for path in paths:
            with reading(path, f"{title}: {path}", "Save or download it again."):
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                state |= {str(key): value.detach() for key, value in loaded.items()}
        return cls({key: (tuple(value.shape), value.dtype) for key, value in state.items()}, state.__getitem__)


def weight_files(folder: Path, title: str, allow_pickle: bool = False) -> list[Path]:
    """Return the files of a model's weights in a folder: safetensors files, or, if allowed, pickle files.

    Raises:
        HfEsmError: if there are none, an index names a file outside of the folder, or there are pickle files only,
            which are not allowed.
    """
    for index in (_INDEX, f"{PICKLED_WEIGHTS}.index.json"):
        if is_file(folder / index) and (paths := _indexed(folder, index, title)) and index == _INDEX:
            return paths
    if is_file(folder / WEIGHTS_FILE):
        return [folder / WEIGHTS_FILE]
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not pickled:
        if shards := sorted(folder.glob("model-*-of-*.safetensors")):
            raise DamagedFileError(
                f"{title}: {folder} has {len(shards)} shards without their {_INDEX}. Copy or download that, too."
            )
        raise HfEsmError(f"{title}: no {WEIGHTS_FILE} in {folder}. Is it a folder written by `save_pretrained`?")
    if not allow_pickle:
        raise HfEsmError(
            f"{title}: {folder} has pickle weights only ({pickled[0].name}), which can run code when they are read. "
            "Save the model again as safetensors, or pass `allow_pickle=True` if you trust it."
        )
    return pickled


def _read_index(path: Path, title: str) -> dict[str, Any]:
    with reading(path, f"{title}: {path}"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def _indexed(folder: Path, index: str, title: str) -> list[Path]:
    """Return the files that an index names."""
    files = _read_index(folder / index, title).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise DamagedFileError(f"{title}: {folder / index} is damaged (it names no files). {AGAIN}")
    names = sorted(set(files.values()))
    if outside := [name for name in names if not stays_inside(name)]:
        raise HfEsmError(
            f"{title}: {folder / index} names {outside[0]!r}, which is not in the model's folder. Do not use this "
            "model."
        )
    return [folder / name for name in names]


def stored_dtype(code: str, key: str, title: str) -> torch.dtype:
    """Return the dtype that a safetensors file calls by this code."""
    if code in DTYPES:
        return DTYPES[code]
    raise HfEsmError(f"{title}: '{key}' is stored as {code}, which is not read here. Save the model in another dtype.")
