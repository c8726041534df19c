"""`Checkpoint`: the weights of one model under its live names, read one at a time; and a live model as one."""

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Optional

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..architecture import LinearMap, canonical_names, embeddings, linear_maps, untie
from ..errors import HfEsmError
from ..linalg import piecewise
from .configs import buildable
from .quantised import refuse_quantised


if TYPE_CHECKING:
    from .modules import SentenceModules


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the progress bars of Transformers, and its reports on newly initialised weights, inside the block."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence the warning about a deprecated name that PEFT 0.21 reads from models of Transformers 5.23."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def build_skeleton(
    model_class: type[PreTrainedModel], config: PretrainedConfig, held: Iterable[str] = ()
) -> PreTrainedModel:
    """Build the model on the meta device: modules, names, shapes and ties, without values.

    Args:
        held: live names of weights that are not tied, whatever the config says.
    """
    with buildable(config.name_or_path or f"a {model_class.__name__}"), torch.device("meta"), no_init_weights():
        model = model_class(copy.deepcopy(config)).eval()
    untie(model, held)
    return model


class Checkpoint:
    """The weights of one model by their canonical names, each read when it is asked for.

    Attributes:
        title: name of the model in messages.
        source: id or folder; of a live model, its `name_or_path`.
        revision: commit on the Hub, if the model is from there.
        skeleton: the model on the meta device, or the live model: classes, names, shapes.
        names: `{canonical name: live name}` of the weights that the checkpoint holds; see
            `architecture.canonical_names`.
        missing: canonical names of the skeleton's weights that the checkpoint does not hold.
        extra: names of stored tensors that the skeleton has no place for.
        modules: what follows the body in a Sentence Transformers model; None in any other.
        quantised: name of the quantisation of the stored weights, which are read dequantised, in bfloat16; empty if
            they are not quantised.
    """

    title: str
    source: str = ""
    revision: Optional[str] = None
    skeleton: PreTrainedModel
    names: dict[str, str]
    missing: list[str]
    extra: list[str]
    modules: Optional["SentenceModules"] = None
    quantised: str = ""

    @property
    def stored(self) -> "Checkpoint":
        """The checkpoint as it is stored, if this one shows it in another vocabulary; else itself."""
        return self

    @property
    def config(self) -> PretrainedConfig:
        """Settings of the model."""
        return self.skeleton.config

    @cached_property
    def linear(self) -> dict[str, LinearMap]:
        """The linear maps by the canonical names of their weights."""
        maps = linear_maps(self.skeleton)
        return {name: maps[live] for name, live in self.names.items() if live in maps}

    @cached_property
    def embeddings(self) -> set[str]:
        """Canonical names of the embeddings' weights, those that are tied to an output map included."""
        weights = embeddings(self.skeleton)
        return {name for name, live in self.names.items() if live in weights}

    @cached_property
    def trained(self) -> set[str]:
        """Canonical names of the parameters. The other weights are buffers, such as running means and variances."""
        parameters = {live for live, _ in self.skeleton.named_parameters(remove_duplicate=False)}
        return {name for name, live in self.names.items() if live in parameters}

    @property
    def kind(self) -> str:
        """What the checkpoint is, for the plan and the model card: its class, or the kind of adapter."""
        return type(self.skeleton).__name__

    def changes(self, name: str) -> bool:
        """Return whether a weight, by its canonical name, can differ from the base's, as far as headers show."""
        return True

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight, by its canonical name."""
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a weight, by its canonical name."""
        raise NotImplementedError

    def tensor(self, name: str) -> Tensor:
        """Read a weight, by its canonical name, in its stored dtype, on the CPU."""
        raise NotImplementedError

    def update(self, name: str, base: Tensor, out: Optional[Tensor] = None) -> Tensor:
        """Return the update of a weight: its difference from the base's weight, float32, on the device of `base`.

        Args:
            out: a tensor of that kind, which may be filled and returned instead of a new one.
        """
        tuned = self.tensor(name).to(base.device)
        return piecewise(lambda one, other: one.float() - other.float(), tuned, base, out=out)

    def residual(self, name: str, merged: Tensor) -> Tensor:
        """Return the difference of a weight from that of a merged model, float32, on the device of `merged`; 0 in rows
        of tokens that the model lacks.
        """
        return self.update(name, merged)

    def factors(self, name: str) -> Optional[tuple[Tensor, Tensor]]:
        """Return `A [r, d_in]` and `B [d_out, r]`, float32, of the update `B A` of a linear map by a LoRA adapter;
        None if the update has no such factors.
        """
        return None

    def counts_of_rows(self, name: str, counts: Tensor) -> Tensor:
        """Return token counts `[V]` of an embedding from those of its stored rows; 0 of rows that are not stored."""
        return counts

    def extra_tensors(self) -> dict[str, Tensor]:
        """Read the stored tensors that `extra` names; those of a quantised model are left out."""
        return {}

    def load_model(self, **placement: Any) -> PreTrainedModel:
        """Load the model in the dtype of the checkpoint, in evaluation mode.

        Args:
            placement: arguments of `from_pretrained` for a model that does not fit on one device; see
                `calibration.placement.placement`.
        """
        raise NotImplementedError

    def load_model_as(self, model_class: type, config: PretrainedConfig, **placement: Any) -> PreTrainedModel:
        """Load the weights into a model of another class on the same body. Weights that only that class has are newly
        initialised.
        """
        raise NotImplementedError

    def seen_as(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> "Checkpoint":
        """Return the checkpoint as a model of another class on the same body reads it. Its `missing` includes weights
        of another shape.
        """
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Size of all weights in bytes, in their stored dtypes."""
        return sum(torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize for name in self.names)


class LiveCheckpoint(Checkpoint):
    """The weights of a model in memory, which is never changed."""

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
        view, skeleton = copy.copy(self), build_skeleton(model_class, config, self.names.values())
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
        untie(model, self.names.values())
        state = model.state_dict()
        for name, live in canonical_names(model).items():
            if name in self.names and state[live].shape == self.shape(name):
                state[live].copy_(self.tensor(name))
        return model.eval()
