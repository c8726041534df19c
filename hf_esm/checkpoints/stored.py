"""A folder of safetensors files as a checkpoint."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from ..architecture import canonical_names
from ..errors import HfEsmError
from .base import Checkpoint, build_skeleton, quiet_loading, refuse_quantised
from .shards import DTYPE_CODES


@dataclass
class _Group:
    """Stored tensors that Transformers turns into live weights together; usually one for one."""

    keys: list[tuple[str, Optional[str]]]
    converter: Optional[WeightConverter]
    alias: Optional[tuple[str, str]] = None


class FolderCheckpoint(Checkpoint):
    """A folder of safetensors files. Names and layouts on disk are turned into the live model's by Transformers' own
    conversion tables, one weight at a time.
    """

    def __init__(
        self,
        folder: str | Path,
        title: str,
        model_class: type[PreTrainedModel],
        config: PretrainedConfig,
        files: "TensorFiles",
        revision: Optional[str] = None,
        source: str = "",
        load_options: Optional[dict[str, Any]] = None,
    ):
        self.folder, self.title, self.revision = Path(folder), title, revision
        self.source, self.load_options = source or str(folder), load_options or {}
        refuse_quantised(config, title)
        self.files = files
        self.skeleton = build_skeleton(model_class, config)
        self._locate()
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        for name in self._misfits:
            described = tuple(self.skeleton.state_dict()[self.names[name]].shape)
            raise HfEsmError(
                f"{self.title}: weight '{self.names[name]}' is {self.shape(name)} in the file, but its own "
                f"config.json describes {described}. Save the model again with `save_pretrained`."
            )

    def seen_as(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> "FolderCheckpoint":
        view = copy.copy(self)
        for cached in ("linear", "trained"):
            view.__dict__.pop(cached, None)
        view.skeleton, view._last = build_skeleton(model_class, config), ("", {})
        view._locate()
        for name in view._misfits:
            del view.names[name]
        view.missing += view._misfits
        return view

    def _locate(self) -> None:
        """Find for every live weight the stored tensors that it is made of, as Transformers' loader does."""
        skeleton = self.skeleton
        conversions = get_model_conversion_mapping(skeleton)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, state = skeleton.base_model_prefix, skeleton.state_dict()
        groups: dict[str, _Group] = {}
        self.extra = []
        for key in sorted(self.files.headers, key=dot_natural_key):
            renamed, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if renamed not in state and key in state:
                renamed, pattern = rename_source_key(key, [], [], prefix, state)
            if renamed in state:
                groups.setdefault(renamed, _Group([], by_pattern.get(pattern))).keys.append((key, pattern))
            else:
                self.extra.append(key)
        # What `revert_weight_conversion` undoes when the merged model is written.
        skeleton._weight_conversions = [entry for entry in conversions if entry.was_used()]
        self._groups, self._group_of, shapes = groups, {}, {}
        for first, group in groups.items():
            for live, tensor in self._realise(first, self.files.meta).items():
                self._group_of[live], shapes[live] = first, tensor
        for target, kept in (getattr(skeleton, "all_tied_weights_keys", None) or {}).items():
            if kept not in shapes and target in shapes:  # stored under the alias alone
                self._group_of[kept], shapes[kept] = self._group_of[target], shapes[target]
                groups[self._group_of[kept]].alias = (target, kept)
        self._shapes = shapes
        expected = canonical_names(skeleton)
        self.names = {name: live for name, live in expected.items() if live in shapes}
        # Transformers knows which are dispensable (BART's bias of zeros) or outdated (BERT's position_ids).
        found = LoadStateDictInfo(
            missing_keys={live for live in expected.values() if live not in shapes},
            unexpected_keys=set(self.extra),
            mismatched_keys=set(),
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        skeleton._adjust_missing_and_unexpected_keys(found)
        self.missing = [name for name, live in expected.items() if live in found.missing_keys]
        self.extra = [key for key in self.extra if key in found.unexpected_keys]
        self._misfits = [name for name, live in self.names.items() if shapes[live].shape != state[live].shape]

    def _realise(self, first: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The live weights of one group."""
        group = self._groups[first]
        if group.converter is None:
            realised = {first: read(group.keys[0][0])}
        else:
            converter = copy.deepcopy(group.converter)
            for key, pattern in group.keys:
                converter.add_tensor(first, key, pattern, read(key))
            realised = converter.convert(first, model=self.skeleton, config=self.config)
            realised = {live: t[0] if isinstance(t, list) else t for live, t in realised.items()}
        if group.alias:
            realised[group.alias[1]] = realised[group.alias[0]]
        return realised

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shapes[self.names[name]].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._shapes[self.names[name]].dtype

    def tensor(self, name: str) -> Tensor:
        live = self.names[name]
        first = self._group_of[live]
        last = self._last  # threads may read side by side: each keeps to the pair that it saw
        if last[0] != first:
            self._last = last = (first, self._realise(first, self.files.read))
        return last[1][live]

    def extra_tensors(self) -> dict[str, Tensor]:
        return {key: self.files.read(key) for key in self.extra}

    def load_model(self, **placement: Any) -> PreTrainedModel:
        return self.load_model_as(type(self.skeleton), self.config, **placement)

    def load_model_as(self, model_class: type, config: PretrainedConfig, **placement: Any) -> PreTrainedModel:
        options = {**self.load_options, **placement}
        with quiet_loading():
            return model_class.from_pretrained(
                self.folder, config=config, dtype="auto", ignore_mismatched_sizes=True, **options
            ).eval()


class TensorFiles:
    """Stored tensors by name: headers at once, values on demand."""

    def __init__(self, headers: dict[str, tuple[tuple[int, ...], torch.dtype]], read: Callable[[str], Tensor]):
        self.headers, self.read = headers, read

    def meta(self, key: str) -> Tensor:
        shape, dtype = self.headers[key]
        return torch.empty(shape, dtype=dtype, device="meta")

    @classmethod
    def open(cls, folder: Path, title: str, allow_pickle: bool = False) -> "TensorFiles":
        """The weights in a folder: `model.safetensors`, the shards its index names, or, if allowed, pickle files."""
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                paths = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, AttributeError) as error:
                raise HfEsmError(f"{title}: {index} is broken ({error!r}). Copy or download it again.") from None
        elif (folder / "model.safetensors").is_file():
            paths = [folder / "model.safetensors"]
        else:
            return cls._open_pickle(folder, title, allow_pickle)
        headers, owner = {}, {}
        for path in paths:
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise HfEsmError(
                    f"{title}: {path} cannot be read ({error}); it is missing or cut short. Copy or download it again."
                ) from None
            for key in file.keys():
                part = file.get_slice(key)
                headers[key] = (tuple(part.get_shape()), stored_dtype(part.get_dtype(), key, title))
                owner[key] = file
        return cls(headers, lambda key: owner[key].get_tensor(key))

    @classmethod
    def _open_pickle(cls, folder: Path, title: str, allow_pickle: bool) -> "TensorFiles":
        paths = sorted(folder.glob("pytorch_model*.bin"))
        if not paths:
            raise HfEsmError(
                f"{title}: no model.safetensors in {folder}. Is it a folder written by `save_pretrained`?"
            )
        if not allow_pickle:
            raise HfEsmError(
                f"{title}: {folder} has pickle weights only ({paths[0].name}), which can run code when they are read. "
                "Save the model again as safetensors, or pass allow_pickle=True if you trust it."
            )
        state: dict[str, Tensor] = {}
        for path in paths:
            try:
                state.update(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                why = str(error).splitlines()[0]
                raise HfEsmError(f"{title}: {path} cannot be read ({why}). Save or download it again.") from None
        return cls({key: (tuple(value.shape), value.dtype) for key, value in state.items()}, state.__getitem__)


def stored_dtype(code: str, key: str, title: str) -> torch.dtype:
    """A tensor's dtype by its name in a safetensors file."""
    for dtype, known in DTYPE_CODES.items():
        if code == known:
            return dtype
    raise HfEsmError(f"{title}: '{key}' is stored as {code}, which is not read here. Save the model in another dtype.")
