"""What a PEFT adapter does to each weight of a model, one layer at a time, without a copy of the model.

PEFT itself builds the adapter's layers and merges them. LoRA is built over a model on the meta device: its update of a
weight does not depend on the weight. Other adapters are built over a model of NaN that takes no memory. If anything of
the adapter is still NaN once its file is loaded, it is built again, with each layer's weight in its place for the
moment in which the layer's adapter is made. To merge a layer, a copy of the layer that shares the adapter's tensors
gets the base's weight.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import HfEsmError
from .adapter_files import MERGE_REMEDY, is_plain_lora, live_name
from .base import quiet_peft
from .parts import parts_of


# The name that PEFT gives to the one adapter that is loaded.
_ADAPTER = "default"

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
    loading = _Loading(adapter, tensors, build, read, title, base_title)
    model = loading.load()
    names = set(build().state_dict())
    state = {path: tensor for path, tensor in model.state_dict().items() if path in loading.loaded}
    replaced = {live_name(path): tensor for path, tensor in state.items() if live_name(path) in names}
    changes = AdapterChanges({}, replaced, {}, set())

    def weight_of(live: str) -> Tensor:
        return replaced[live] if live in replaced else read(live)

    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    for path, layer in filter(lambda pair: loading.is_of(pair[0]), _merged_layers(model)):
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
            values = tokens.trainable_tokens_delta[_ADAPTER].detach()
            changes.token_rows[f"{live_name(path)}.weight"] = (list(tokens.token_indices[_ADAPTER]), values)
            _check_tokens(tokens.token_indices[_ADAPTER], tokens.get_base_layer().weight, title)
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


@dataclass
class _Loading:
    """The loading of one adapter; the fields are the arguments of `load_changes`, and what of the file was loaded."""

    adapter: PeftConfig
    tensors: dict[str, Tensor]
    build: Callable[[], PreTrainedModel]
    read: Callable[[str], Tensor]
    title: str
    base_title: str
    loaded: frozenset[str] = frozenset()

    def is_of(self, path: str) -> bool:
        """Whether a module can be the adapter's: not in a tower that the file has no tensor of, as of an adapter that
        was trained on the other tower alone, though the adapter's settings name modules of both.
        """
        return not any(path.startswith(tower) for tower in self._other_towers)

    @cached_property
    def _other_towers(self) -> list[str]:
        towers = [f"{place}." for place in parts_of(self.build())]
        return [tower for tower in towers if not any(name.startswith(tower) for name in self.loaded)]

    def load(self) -> nn.Module:
        """Return the model with the loaded adapter on it."""
        if is_plain_lora(self.adapter):
            return self._filled(self._installed(self.build(), low_cpu_mem_usage=True))
        with suppress(RuntimeError, ValueError):  # of a decomposition of NaN
            model = self._installed(_without_values(self.build()))
            if all(_is_stand_in(weight) for _, layer in _merged_layers(model) for weight in _weights(layer)):
                model = self._filled(model)
                if not any(_holds_nan(layer) for _, layer in _merged_layers(model)):
                    return model
        skeleton = _without_values(self.build())
        with _lending(skeleton, self.read, self.title):
            model = self._installed(skeleton)
        return self._filled(model)

    def _installed(self, skeleton: PreTrainedModel, **options: Any) -> PeftModel:
        """Return the model with the layers of the adapter, not loaded."""
        adapter = copy.deepcopy(self.adapter)
        if options:
            adapter.init_lora_weights = False
        try:
            with quiet_peft():
                model = PeftModel(skeleton, adapter, **options)
        except torch.linalg.LinAlgError:
            raise HfEsmError(
                f"{self.title}: peft makes an adapter of type {adapter.peft_type.value} out of all weights of the "
                f"base at once, which are read one by one here. {MERGE_REMEDY}"
            ) from None
        except (ValueError, RuntimeError, IndexError) as error:
            raise self._misfit(error) from None
        for module in model.modules():
            if options and isinstance(module, BaseTunerLayer):
                # It would move its tensors to the device and dtype of the base's weights, which have no values here.
                module._move_adapter_to_device_of_base_layer = lambda *args, **kwargs: None
        return model

    def _filled(self, model: PeftModel) -> nn.Module:
        """Load the tensors into the layers; return the model without PEFT's wrapper."""
        names = set(self.build().state_dict())
        tensors = {  # PEFT trains adapters in float32
            key: tensor.float() if tensor.is_floating_point() and live_name(key) not in names else tensor
            for key, tensor in self.tensors.items()
        }
        try:
            report = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
        except KeyError as error:
            raise HfEsmError(f"{self.title}: its file lacks {error}. Save or download the adapter again.") from None
        except (ValueError, RuntimeError) as error:
            raise self._misfit(error) from None
        state = model.state_dict()
        loaded = state.keys() - set(report.missing_keys)
        self.loaded = frozenset(key.removeprefix("base_model.model.") for key in loaded)
        # With `bias="all"` PEFT stores the biases of saved modules a second time, and rows of a tied head in any case.
        rows = [state[key] for key in loaded if ".trainable_tokens_delta." in key]
        unexpected = [key for key in report.unexpected_keys if ".modules_to_save." not in key]
        unexpected = [key for key in unexpected if not any(torch.equal(tensors[key], values) for values in rows)]
        if unexpected:
            raise HfEsmError(f"{self.title}: the model has no place for {unexpected[:3]}. {self._other_base}")
        filled = {state[key].data_ptr() for key in loaded}  # layers may share a tensor, which has a name in each
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[self.adapter.peft_type]
        missing = [key for key in report.missing_keys if prefix in key and self.is_of(live_name(key))]
        absent = [key for key in missing if state[key].is_meta or state[key].data_ptr() not in filled]
        if absent:
            raise HfEsmError(f"{self.title}: its file lacks {absent[:3]}. Save or download the adapter again.")
        return model.get_base_model()

    @property
    def _other_base(self) -> str:
        return f"Was it trained on another base than {self.base_title}?"

    def _misfit(self, error: Exception) -> HfEsmError:
        return HfEsmError(f"{self.title} does not fit: {' '.join(str(error).split())} {self._other_base}")


def _without_values(skeleton: PreTrainedModel) -> PreTrainedModel:
    """Put NaN that takes no memory in the place of every parameter of a model on the meta device."""
    stand_ins: dict[int, nn.Parameter] = {}
    for module in skeleton.modules():
        for leaf, weight in module._parameters.items():
            if weight is not None:
                new = nn.Parameter(torch.full((), math.nan).expand(weight.shape), requires_grad=False)
                module._parameters[leaf] = stand_ins.setdefault(id(weight), new)
    return skeleton


def _is_stand_in(weight: Tensor) -> bool:
    """Whether a weight is one number for all elements."""
    return weight.untyped_storage().nbytes() == weight.element_size()


@contextmanager
def _lending(skeleton: PreTrainedModel, read: Callable[[str], Tensor], title: str) -> Iterator[None]:
    """Give a module its weights when PEFT asks for it, and take them back when PEFT asks for the next one.

    Raises:
        HfEsmError: if an adapter changes the weights while it is made.
    """
    names = {id(module): name for name, module in skeleton.named_modules()}
    lent: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = []

    def take_back() -> None:
        while lent:
            module, leaf, stand_in, value = lent.pop()
            changed = not torch.equal(module._parameters[leaf], value)
            module._parameters[leaf] = stand_in
            if changed:
                raise HfEsmError(f"{title}: its initialisation changes the base's own weights. {MERGE_REMEDY}")

    def module_of(path: str) -> nn.Module:
        take_back()
        module = nn.Module.get_submodule(skeleton, path)
        for leaf, weight in module._parameters.items():
            if weight is not None and id(module) in names:
                value = read(f"{names[id(module)]}.{leaf}").to("cpu", torch.float32)
                lent.append((module, leaf, weight, value))
                module._parameters[leaf] = nn.Parameter(value.clone(), requires_grad=False)
        return module

    skeleton.get_submodule = module_of
    try:
        yield
        take_back()
    finally:
        del skeleton.get_submodule


def _merged_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield, with its path, every module that PEFT merges as one. Of LoRA on several parameters of one module, that is
    one for each of them.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    outer = None
    for path, module in model.named_modules():
        inside = outer is not None and path.startswith(f"{outer}.")
        if isinstance(module, LoraLayer) and _ADAPTER in module.scaling:
            yield path, module
        elif isinstance(module, (BaseTunerLayer, TrainableTokensWrapper)) and not inside:
            outer = path
            yield path, module


def _base_of(layer: nn.Module) -> nn.Module:
    """Return the module of the base that an adapter's layer changes."""
    return getattr(layer, "token_adapter", layer).get_base_layer()


def _parameters(layer: nn.Module) -> list[str]:
    """Return the names of the base's parameters inside the module that an adapter's layer changes."""
    return [name for name, _ in _base_of(layer).named_parameters()]


def _weights(layer: nn.Module) -> list[Tensor]:
    return list(_base_of(layer).parameters())


def _holds_nan(layer: nn.Module) -> bool:
    """Whether anything of the adapter in a layer is NaN."""
    base = {id(weight) for weight in _weights(layer)}
    held = [tensor for tensor in (*layer.parameters(), *layer.buffers()) if id(tensor) not in base]
    return any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in held)


def _lora_additions(
    path: str, layer: LoraLayer, weight_of: Callable[[str], Tensor], title: str
) -> dict[str, Addition]:
    """Return what a LoRA layer adds to its weight and its bias."""
    leaf = getattr(layer, "parameter_name", None) or "weight"
    by_factors = _ADAPTER not in layer.lora_variant  # variants such as DoRA rescale the sum
    additions: dict[str, Addition] = {f"{path}.{leaf}": _LayerMerge(layer, path, leaf, weight_of, title, by_factors)}
    if layer.lora_bias.get(_ADAPTER):
        bias = layer.lora_B[_ADAPTER].bias.detach() * layer.scaling[_ADAPTER]
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
            return layer.get_delta_weight(_ADAPTER).detach()
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
        shapes = {leaf: weight.shape for leaf, weight in _base_of(self.layer).named_parameters()}
        layer, _ = self._copy({leaf: torch.zeros(shape) for leaf, shape in shapes.items()})
        names = {name for name, _ in self._merge(layer, safely=False).named_parameters()}
        if new := sorted(names - shapes.keys()):
            raise ValueError(f"'{self.path}' would get a {new[0]}")

    def _copy(self, known: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return a copy of the layer over the base's weights, and these weights, float32."""
        tensors = [*self.layer.parameters(), *self.layer.buffers()]
        layer = copy.deepcopy(self.layer, {id(tensor): tensor for tensor in tensors})
        base, values = _base_of(layer), {}
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
            return layer.unload_and_optionally_merge_module(True, safely, [_ADAPTER])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge(safe_merge=safely, adapter_names=[_ADAPTER])
        return layer.get_base_layer()


def _try_merges(merges: Any, title: str, kind: str) -> None:
    """Raise an error if PEFT cannot merge the layers of an adapter: one of each class is tried, without values."""
    for merge in {type(merge.layer): merge for merge in merges}.values():
        try:
            merge.attempt()
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
            reason = f" ({reason})" if reason else ""
            raise HfEsmError(
                f"{title}: peft cannot merge an adapter of type {kind} into weights{reason}. Leave it out, or merge a "
                "LoRA adapter of the same data in its place."
            ) from None
