"""A Sentence Transformers model as a checkpoint: a body, and the modules that make embeddings of its output."""

import copy
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..utils import device_of
from .base import Checkpoint
from .configs import read_config
from .modules import SentenceModules, read_modules
from .pooling import attach


class EmbeddingCheckpoint(Checkpoint):
    """A checkpoint of any kind with the modules that follow it.

    The weights of dense modules and norms are weights of the model, under names that begin with `sentence_modules`.
    Live models answer with a `sentence_embedding` besides their hidden states. For the rest this is the checkpoint of
    its body: `isinstance` says of which kind, and what only that kind has can be asked for.

    Attributes:
        body: the checkpoint of the Transformer.
        modules: the modules after it.
    """

    def __init__(self, body: Checkpoint, modules: SentenceModules):
        self.body, self.modules = body, modules
        self.title, self.source, self.revision = body.title, body.source, body.revision
        self.quantised = body.quantised
        self.extra = [] if modules.embeds else body.extra  # a head that the library does not load
        self.skeleton = attach(_apart(body.skeleton), modules.head())
        self.names = {**body.names, **{name: name for name in modules.tensors}}
        # The library makes do without a whole part that no embedding is made from, such as BERT's pooler.
        parts = {name.partition(".")[0] for name in body.names}
        self.missing = [name for name in body.missing if name.partition(".")[0] in parts]

    @property
    def __class__(self) -> type:
        return type(self.body)

    def __getattr__(self, name: str) -> Any:
        if name == "body":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.body, name)

    @property
    def kind(self) -> str:
        return self.body.kind

    @property
    def stored(self) -> Checkpoint:
        return self if self.body.stored is self.body else self.body.stored

    def counts_of_rows(self, name: str, counts: Tensor) -> Tensor:
        return self.body.counts_of_rows(name, counts)

    def changes(self, name: str) -> bool:
        """Return whether an adapter changes a weight, by its canonical name. Modules come with all of theirs."""
        return name in self.modules.tensors or self.body.changes(name)

    def shape(self, name: str) -> tuple[int, ...]:
        tensors = self.modules.tensors
        return tuple(tensors[name].shape) if name in tensors else self.body.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.modules.tensors[name].dtype if name in self.modules.tensors else self.body.dtype(name)

    def tensor(self, name: str) -> Tensor:
        return self.modules.tensors[name] if name in self.modules.tensors else self.body.tensor(name)

    def update(self, name: str, base: Tensor, out: Optional[Tensor] = None) -> Tensor:
        owner = super() if name in self.modules.tensors else self.body
        return owner.update(name, base, out)

    def residual(self, name: str, merged: Tensor) -> Tensor:
        of_modules = name in self.modules.tensors
        return super().residual(name, merged) if of_modules else self.body.residual(name, merged)

    def factors(self, name: str) -> Optional[tuple[Tensor, Tensor]]:
        return None if name in self.modules.tensors else self.body.factors(name)

    def extra_tensors(self) -> dict[str, Tensor]:
        return self.body.extra_tensors() if self.extra else {}

    def load_model(self, **placement: Any) -> PreTrainedModel:
        model = self.body.load_model(**placement)
        return attached(_apart(model) if model is self.body.skeleton else model, self.modules)

    def load_model_as(self, model_class: type, config: PretrainedConfig, **placement: Any) -> PreTrainedModel:
        model = self.body.load_model_as(model_class, config, **placement)
        return attached(model, self.modules) if model_class is type(self.body.skeleton) else model

    def seen_as(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> Checkpoint:
        return self.body.seen_as(model_class, config)


def with_modules(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put the modules in a merged model's folder behind a model, if it is of the class that they follow there."""
    modules = read_modules(folder, str(folder))
    if modules is None or (read_config(folder, str(folder)).architectures or [""])[0] != type(model).__name__:
        return model
    return attached(model, modules)


def attached(model: PreTrainedModel, modules: SentenceModules) -> PreTrainedModel:
    """Put modules with weights of their own behind a model, on its device."""
    device = device_of(model)
    head = modules.head()
    head.load_state_dict({name: tensor.clone() for name, tensor in head.state_dict().items()}, assign=True)
    return attach(model, head if device.type == "meta" else head.to(device))


def _apart(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy that shares all parts with a model, and can get one more."""
    model = copy.copy(model)
    model._modules = dict(model._modules)
    return model
