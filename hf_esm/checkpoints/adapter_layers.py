"""What a PEFT adapter does to each weight of a model, one layer at a time, without a copy of the model.

PEFT itself merges each layer of the loaded adapter (see `adapter_loading`): a copy of the layer that shares the
adapter's tensors gets the base's weight.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import HfEsmError
from ..utils import reason_of
from .adapter_files import LEAVE_OUT, is_plain_lora, live_name
from .adapter_loading import ADAPTER, AdapterLoading, base_of, merged_layers


# Types whose merge adds `get_delta_weight` to the weight, which is the update without the rounding of a difference.
ADDED_TYPES = frozenset(
    (
        *(
            "ADALORA",
            "ADAMSS",
            "C3A",
            "DEFT",
            "DELORA",
            "ESSENTIAL_COMPONENTS",
            "FOURIERFT",
            "GRALORA",
            "LOHA",
            "LOKR",
        ),
        *("OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA"),
        *("VERA", "WAVEFT"),
    )
)

Addition = Callable[[Tensor], Tensor]


@dataclass
class AdapterChanges:
    """What an adapter changes in a model, by live name.

    Attributes:
        additions: functions from a weight to the update of it, float32, on the CPU.
        replaced: weights that are the adapter's own (`modules_to_save`, biases).
        token_rows: of embeddings of which the adapter trains some rows, the indices of these rows and their values.
        tied: weights that PEFT itself keeps tied to others.
    """

    additions: dict[str, Addition]
    replaced: dict[str, Tensor]
    token_rows: dict[str, tuple[list[int], Tensor]]
    tied: set[str]


def load_changes(
    adapter: PeftConfig,
    tensors: dict[str, Tensor],
    build: Callable[[], PreTrainedModel],
    read: Callable[[str], Tensor],
    title: str,
    base_title: str,
) -> AdapterChanges:
    """Build the layers of an adapter, load its tensors into them, and return what they change.

    Args:
        adapter: settings of the adapter.
        tensors: its stored tensors.
        build: returns the model on the meta device.
        read: returns a weight of the base by its live name.
        title: name of the adapter in messages.
        base_title: name of the base in messages.

    Raises:
        HfEsmError: if the adapter does not fit the model, lacks tensors, or cannot be merged into weights.
    """
    loading = AdapterLoading(adapter, tensors, build, read, title, base_title)
    model = loading.load()
    names = set(build().state_dict())
    state = {path: tensor for path, tensor in model.state_dict().items() if path in loading.loaded}
    replaced = {live_name(path): tensor for path, tensor in state.items() if live_name(path) in names}
    changes = AdapterChanges({}, replaced, {}, set())

    def weight_of(live: str) -> Tensor:
        return replaced[live] if live in replaced else read(live)

    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    for path, layer in filter(lambda pair: loading.is_of(pair[0]), merged_layers(model)):
        tokens = getattr(layer, "token_adapter", layer)
        if getattr(tokens, "tied_adapter", None) is not None:
            changes.tied.add(f"{live_name(path)}.weight")  # a head follows the embeddings
            continue
        if isinstance(layer, LoraLayer) and kind == "LORA":
            changes.additions |= _lora_additions(live_name(path), layer, weight_of, title)
            continue
        for leaf in ["weight"] if kind in ADDED_TYPES else _parameters(layer):
            merge = _LayerMerge(layer, live_name(path), leaf, weight_of, title, kind in ADDED_TYPES)
            changes.additions[f"{live_name(path)}.{leaf}"] = merge
        if hasattr(tokens, "trainable_tokens_delta"):
            values = tokens.trainable_tokens_delta[ADAPTER].detach()
            changes.token_rows[f"{live_name(path)}.weight"] = (list(tokens.token_indices[ADAPTER]), values)
            _check_tokens(tokens.token_indices[ADAPTER], tokens.get_base_layer().weight, title)
    if not is_plain_lora(adapter):
        _try_merges(changes.additions.values(), title, kind)
    return changes


def _check_tokens(tokens: list[int], embeddings: Tensor, title: str) -> None:
    """Raise an error if the adapter trains tokens that the embeddings have no rows for."""
    if max(tokens) >= len(embeddings):
        raise HfEsmError(
            f"{title} trains the row of token {max(tokens)}, but the base has {len(embeddings)} rows and the adapter "
            "stores no others. Save the adapter again with `save_pretrained(…, save_embedding_layers=True)`."
        )


def _parameters(layer: nn.Module) -> list[str]:
    """Return the names of the base's parameters inside the module that an adapter's layer changes."""
    return [name for name, _ in base_of(layer).named_parameters()]


def _lora_additions(
    path: str, layer: LoraLayer, weight_of: Callable[[str], Tensor], title: str
) -> dict[str, Addition]:
    """Return what a LoRA layer adds to its weight and its bias."""
    leaf = getattr(layer, "parameter_name", None) or "weight"
    by_factors = ADAPTER not in layer.lora_variant  # variants such as DoRA rescale the sum
    additions: dict[str, Addition] = {f"{path}.{leaf}": _LayerMerge(layer, path, leaf, weight_of, title, by_factors)}
    if layer.lora_bias.get(ADAPTER):
        bias = layer.lora_B[ADAPTER].bias.detach() * layer.scaling[ADAPTER]
        additions[f"{path}.bias"] = lambda weight: bias
    return additions


@dataclass
class _LayerMerge:
    """The update of one parameter, by merging a copy of an adapter's layer, which shares its tensors.

    Attributes:
        layer: the loaded layer of the adapter.
        path: live name of the module that it changes.
        leaf: name of the parameter inside that module.
        weight_of: returns a weight of the base by its live name.
        title: name of the adapter in messages.
        adds: whether the merge adds `get_delta_weight` to the parameter `weight`.
    """

    layer: nn.Module
    path: str
    leaf: str
    weight_of: Callable[[str], Tensor]
    title: str
    adds: bool

    def __call__(self, weight: Tensor) -> Tensor:
        layer, values = self._copy({self.leaf: weight})
        if self.adds and (isinstance(layer, LoraLayer) or self.leaf == "weight"):
            return layer.get_delta_weight(ADAPTER).detach()
        try:
            merged = self._merge(layer, safely=True)
        except ValueError:
            raise HfEsmError(
                f"{self.title}: weight '{self.path}.{self.leaf}' holds NaN or infinite values once it is merged. Save "
                "or download the adapter again."
            ) from None
        return merged.get_parameter(self.leaf).detach() - values[self.leaf]

    def attempt(self) -> None:
        """Merge into zeros, to find out whether PEFT can."""
        shapes = {leaf: weight.shape for leaf, weight in base_of(self.layer).named_parameters()}
        layer, _ = self._copy({leaf: torch.zeros(shape) for leaf, shape in shapes.items()})
        names = {name for name, _ in self._merge(layer, safely=False).named_parameters()}
        if new := sorted(names - shapes.keys()):
            raise ValueError(f"'{self.path}' would get a {new[0]}")

    def _copy(self, known: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return a copy of the layer over the base's weights, and these weights, float32."""
        tensors = [*self.layer.parameters(), *self.layer.buffers()]
        layer = copy.deepcopy(self.layer, {id(tensor): tensor for tensor in tensors})
        base, values = base_of(layer), {}
        for leaf in [name for name, _ in base.named_parameters()]:
            if self.adds and leaf not in known:
                continue
            value = known[leaf] if leaf in known else self.weight_of(f"{self.path}.{leaf}")
            values[leaf] = value.detach().to("cpu", torch.float32)
            owner, _, last = leaf.rpartition(".")
            base.get_submodule(owner)._parameters[last] = nn.Parameter(values[leaf].clone(), requires_grad=False)
        return layer, values

    def _merge(self, layer: nn.Module, safely: bool) -> nn.Module:
        """Merge the adapter of a layer; return the module that takes the layer's place."""
        if isinstance(layer, TrainableTokensWrapper):
            return layer.unload_and_optionally_merge_module(True, safely, [ADAPTER])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge(safe_merge=safely, adapter_names=[ADAPTER])
        return layer.get_base_layer()


def _try_merges(merges: Any, title: str, kind: str) -> None:
    """Raise an error if PEFT cannot merge the layers of an adapter: one of each class is tried, without values."""
    for merge in {type(merge.layer): merge for merge in merges}.values():
        try:
            merge.attempt()
        except (RuntimeError, ValueError) as error:
            reason = f" ({reason_of(error).partition('. ')[0]})" if str(error) else ""
            raise HfEsmError(
                f"{title}: peft cannot merge an adapter of type {kind} into weights{reason}. {LEAVE_OUT}"
            ) from None
