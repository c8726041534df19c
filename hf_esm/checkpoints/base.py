"""A checkpoint: the live model's weight names, and tensors that are read one at a time."""

import contextlib
import copy
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Optional

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..architecture import LinearMap, canonical_names, linear_maps
from ..errors import HfEsmError


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep Transformers' bars and reports on new weights to itself, while a model is loaded as a part of our work."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def build_skeleton(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model without its weights: modules, names, shapes and ties, on the meta device."""
    with torch.device("meta"), no_init_weights():
        return model_class(copy.deepcopy(config)).eval()


def refuse_quantised(config: PretrainedConfig, title: str) -> None:
    """Raise on a quantised model: its stored numbers are codes, not weights."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise HfEsmError(
            f"{title} is quantised ({method}). Load it, call `model.dequantize()`, save it with `save_pretrained`, "
            "and merge that, or merge the checkpoint that it was quantised from."
        )


class Checkpoint:
    """One model's weights under its live names, read when asked for.

    Attributes:
        title: what messages call it.
        source: id or folder, empty for a live model.
        revision: commit on the Hub, if it came from there.
        skeleton: the model on the meta device (or the live model): classes, names, shapes.
        names: `{canonical name: live name}` of the weights that the checkpoint has; see `weights.canonical_names`.
        missing: canonical names of weights of the skeleton that it lacks.
        extra: stored tensors that the skeleton has no place for.
    """

    title: str
    source: str = ""
    revision: Optional[str] = None
    skeleton: PreTrainedModel
    names: dict[str, str]
    missing: list[str]
    extra: list[str]

    @property
    def config(self) -> PretrainedConfig:
        return self.skeleton.config

    @cached_property
    def linear(self) -> dict[str, LinearMap]:
        """The linear maps by their weights' canonical names."""
        maps, live = linear_maps(self.skeleton), self.names
        return {name: maps[live[name]] for name in live if live[name] in maps}

    @cached_property
    def trained(self) -> set[str]:
        """Canonical names of the parameters; other weights are buffers, such as running means and variances."""
        parameters = {live for live, _ in self.skeleton.named_parameters(remove_duplicate=False)}
        return {name for name, live in self.names.items() if live in parameters}

    def shape(self, name: str) -> tuple[int, ...]:
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        raise NotImplementedError

    def tensor(self, name: str) -> Tensor:
        """The weight with this canonical name, as stored."""
        raise NotImplementedError

    def update(self, name: str, base: Tensor) -> Tensor:
        """The update of the weight over the base's, float32."""
        return self.tensor(name).to(base.device, torch.float32) - base.float()

    def extra_tensors(self) -> dict[str, Tensor]:
        """The stored tensors named in `extra`."""
        return {}

    def load_model(self, **placement: Any) -> PreTrainedModel:
        """The live model, in the dtype of the checkpoint, in evaluation mode; see `placement.placement`."""
        raise NotImplementedError

    def load_model_as(self, model_class: type, config: PretrainedConfig, **placement: Any) -> PreTrainedModel:
        """The weights in a model of another class on the same body; what that class adds is newly initialised."""
        raise NotImplementedError

    def seen_as(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> "Checkpoint":
        """The same weights as a model of another class on the same body reads them; `missing` is what that one lacks,
        weights of another shape included.
        """
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize for name in self.names)


class LiveCheckpoint(Checkpoint):
    """The weights of a model in memory. It is read only, and never changed."""

    def __init__(self, model: PreTrainedModel, title: str):
        self.title, self.skeleton = title, model
        self.source = getattr(model, "name_or_path", "")
        self._state = model.state_dict()
        refuse_quantised(model.config, title)
        if any(tensor.is_meta for tensor in self._state.values()):
            raise HfEsmError(f"{title} is offloaded: some weights are not in memory. Pass its folder or id instead.")
        self.names, self.missing, self.extra = canonical_names(model), [], []

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[self.names[name]].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[self.names[name]].dtype

    def tensor(self, name: str) -> Tensor:
        return self._state[self.names[name]].detach().cpu()

    def seen_as(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> "LiveCheckpoint":
        view, skeleton = copy.copy(self), build_skeleton(model_class, config)
        state, expected = skeleton.state_dict(), canonical_names(skeleton)
        fits = {
            name for name, live in expected.items() if name in self.names and self.shape(name) == state[live].shape
        }
        view.names = {name: live for name, live in self.names.items() if name in fits}
        view.missing = [name for name in expected if name not in view.names]
        return view

    def load_model(self, **placement: Any) -> PreTrainedModel:
        return self.skeleton

    def load_model_as(self, model_class: type, config: PretrainedConfig, **placement: Any) -> PreTrainedModel:
        model = model_class(copy.deepcopy(config)).to(self.skeleton.dtype)
        own = model.state_dict()
        for canonical, live in canonical_names(model).items():
            if canonical in self.names and own[live].shape == self.shape(canonical):
                own[live].copy_(self.tensor(canonical))
        return model.eval()
