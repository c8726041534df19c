"""A PEFT adapter as a checkpoint: the update of each weight, without a full copy of the model."""

from pathlib import Path
from typing import Optional

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from transformers import PreTrainedModel

from ..architecture import canonical_names, ties, untie
from ..errors import HfEsmError
from ..utils import first_names
from .adapter_files import LEAVE_OUT, adapted_class, part_of_adapter, read_adapter_config, read_adapter_tensors
from .adapter_layers import load_changes
from .base import Checkpoint, build_skeleton
from .parts import DerivedCheckpoint


class AdapterCheckpoint(DerivedCheckpoint):
    """The base model with a PEFT adapter on it: `W = W0 + ΔW`.

    ΔW is what PEFT's own merge of that layer makes of the base's weight, less that weight: of any type of adapter that
    PEFT can merge, see `adapter_layers`. Weights that the adapter replaces (`modules_to_save`, biases) are read in
    full; all other weights are the base's. Weights that are tied in the base, but not with the adapter on it, are read
    apart.

    Attributes:
        folder: folder of the adapter.
        peft_config: settings of the adapter.
        base: the base as a model of the adapter's class reads it.
    """

    def __init__(
        self, folder: Path, title: str, base: Checkpoint, allow_pickle: bool = False, headers_only: bool = False
    ):
        """Read the adapter.

        Args:
            folder: folder of the adapter.
            title: name of the adapter in messages.
            base: the model that the adapter was trained on.
            allow_pickle: read the adapter's weights from a pickle file.
            headers_only: the base's weights cannot be read, nor updates that depend on them.

        Raises:
            HfEsmError: if the adapter cannot be read, cannot be merged into weights, or does not fit the base.
        """
        self.folder, self.title = folder, title
        self.peft_config = adapter = read_adapter_config(folder, title)
        tensors = read_adapter_tensors(folder, title, allow_pickle)
        self._given_base = base
        base = part_of_adapter(adapter, base, tensors)
        model_class, config = adapted_class(adapter, base, tensors)
        self.base = base.seen_as(model_class, config)
        held = list(self.base.names.values())
        self.skeleton = build_skeleton(model_class, config, held)
        self._names_of_base = {live: name for name, live in self.base.names.items()}
        self._headers_only = headers_only
        loaded = load_changes(
            adapter, tensors, lambda: build_skeleton(model_class, config, held), self._base_weight, title, base.title
        )
        self._additions, self._replaced, self._token_rows = loaded.additions, loaded.replaced, loaded.token_rows
        self._sources = self._untied(loaded.tied)
        self.extra = []
        expected = canonical_names(self.skeleton)
        for live in {*self._additions, *self._replaced} - {*expected.values(), *ties(self.skeleton)}:
            raise HfEsmError(f"{title} changes '{live}', which is not a stored weight. {LEAVE_OUT}")
        stored = self.base.names.keys() | self._sources.keys()
        self.names = {n: live for n, live in expected.items() if live in self._replaced or n in stored}
        self.missing = [name for name in self.base.missing if name not in self.names]
        if self.missing:
            rows, known = (getattr(one.get_text_config(), "vocab_size", None) for one in (self.config, base.config))
            resized = f" for the {rows} tokens that the adapter was trained with" if rows != known else ""
            raise HfEsmError(
                f"{title}: neither the adapter nor the base holds {first_names(self.missing)}{resized}, which "
                f"{model_class.__name__} needs. Give as base the checkpoint that the adapter was trained on."
            )

    def _base_weight(self, live: str) -> Tensor:
        """Return a weight of the base, by its live name; noise of its shape if only headers are known."""
        source = ties(self.skeleton).get(live, live)
        if self._headers_only or source not in self._names_of_base:
            shape = self.skeleton.get_parameter(source).shape
            return torch.randn(shape, generator=torch.Generator().manual_seed(0))  # tied weights are equal
        return self.base.tensor(self._names_of_base[source])

    def _untied(self, tied: set[str]) -> dict[str, str]:
        """Untie every weight that the adapter makes different from the one that it is tied to in the base.

        PEFT trains them apart: an adapter of a tied head leaves the embeddings as they are, and the reverse.

        Args:
            tied: live names of weights that PEFT ties itself.

        Returns the canonical name of the base's weight, by that of the untied one.
        """
        changed, names = {*self._additions, *self._replaced}, {}
        for live, source in ties(self.skeleton).items():
            if live in tied or not {live, source} & changed:
                continue
            one, other = self._changed(live), self._changed(source)
            if one.shape != other.shape or (one - other).norm() > 1e-6 * other.norm():
                names[live] = self._names_of_base[source]
        untie(self.skeleton, names)
        return {name: names[live] for name, live in canonical_names(self.skeleton).items() if live in names}

    def _changed(self, live: str) -> Tensor:
        """Return a weight with the adapter, float32, by its live name."""
        weight = self._replaced[live] if live in self._replaced else self._base_weight(live)
        return weight.float() + (self._additions[live](weight) if live in self._additions else 0)

    @property
    def kind(self) -> str:
        peft_type = getattr(self.peft_config.peft_type, "value", self.peft_config.peft_type)
        return f"{'LoRA' if peft_type == 'LORA' else peft_type} adapter"

    def token_rows(self, name: str) -> Optional[tuple[list[int], Tensor]]:
        """Return the rows of an embedding that the adapter trains by themselves (`trainable_token_indices`): their
        indices, and their new values `[rows, width]`. None if it trains no row, or all.
        """
        return self._token_rows.get(self.names[name])

    def replaces(self, name: str) -> bool:
        """Return whether the adapter holds a weight in full, by its canonical name."""
        return self.names.get(name) in self._replaced

    def changes(self, name: str) -> bool:
        return self.names[name] in self._additions or self.names[name] in self._replaced

    def shape(self, name: str) -> tuple[int, ...]:
        live, source = self.names[name], self._sources.get(name, name)
        return tuple(self._replaced[live].shape) if live in self._replaced else self.base.shape(source)

    def dtype(self, name: str) -> torch.dtype:
        live, source = self.names[name], self._sources.get(name, name)
        return self._replaced[live].dtype if live in self._replaced else self.base.dtype(source)

    def tensor(self, name: str) -> Tensor:
        live, source = self.names[name], self._sources.get(name, name)
        weight = self._replaced[live] if live in self._replaced else self.base.tensor(source)
        return (weight + self._additions[live](weight)).to(weight.dtype) if live in self._additions else weight

    def update(self, name: str, base: Tensor, out: Optional[Tensor] = None) -> Tensor:
        live = self.names[name]
        weight = self._replaced.get(live, base).to(base.device)
        update = weight.float() - base.float()
        return update + self._additions[live](weight).to(base.device) if live in self._additions else update

    def residual(self, name: str, merged: Tensor) -> Tensor:
        if name not in self.base.names:  # a weight of the adapter's, whole
            return self.update(name, merged)
        base = self.base.tensor(name).to(merged.device)
        return self.update(name, base) + (base.float() - merged.float())

    def factors(self, name: str) -> Optional[tuple[Tensor, Tensor]]:
        live = self.names[name]
        addition = self._additions.get(live)
        layer = getattr(addition, "layer", None)
        if live in self._replaced or type(layer) is not Linear or not addition.adds:  # such as DoRA, and embeddings
            return None
        (adapter,) = layer.lora_A
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        return a.float(), b.float() * layer.scaling[adapter]

    def shares_base(self, other: "AdapterCheckpoint") -> bool:
        """Return whether the models of both adapters are the same model of the same base without the adapters."""
        return (
            self._given_base is other._given_base
            and type(self.skeleton) is type(other.skeleton)
            and self.config.to_dict() == other.config.to_dict()
            and ties(self.skeleton) == ties(other.skeleton)
        )

    def take_off(self, model: PreTrainedModel) -> None:
        """Write the base's weights into a model that holds the adapter's; a head that the base lacks stays."""
        state = model.state_dict()
        for name, live in self.names.items():
            if self.changes(name) and (source := self._sources.get(name, name)) in self.base.names:
                state[live].copy_(self.base.tensor(source))
