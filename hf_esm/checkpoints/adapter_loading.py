"""A PEFT adapter built and loaded by PEFT itself, over a model whose weights are not in memory.

LoRA is built over a model on the meta device: its update of a weight does not depend on the weight. Other adapters are
built over a model of NaN that takes no memory. If anything of the adapter is still NaN once its file is loaded, it is
built again, with each layer's weight in its place for the moment in which the layer's adapter is made.
"""

import copy
import math
import re
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
from ..utils import first_names, reason_of
from .adapter_files import MERGE_REMEDY, PEFT_PREFIX, UNWRAP, is_plain_lora, live_name
from .adapter_settings import unusable
from .base import quiet_peft
from .parts import parts_of
from .vocabulary import has_token_embeddings, token_rows


# The name that PEFT gives to the one adapter that is loaded.
ADAPTER = "default"

# Names that a wrapper puts into those of a model's weights: of data parallelism, `torch.compile`, FSDP, checkpointing.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# One line of what torch says about tensors of other sizes than a model's.
_MISMATCH = re.compile(r"size mismatch for (\S+): copying .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)")


@dataclass
class AdapterLoading:
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
            if all(_is_stand_in(weight) for _, layer in merged_layers(model) for weight in _weights(layer)):
                model = self._filled(model)
                if not any(_holds_nan(layer) for _, layer in merged_layers(model)):
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
        except HfEsmError:
            raise
        except (ValueError, RuntimeError, IndexError) as error:
            raise self._misfit(error) from None
        except Exception as error:  # PEFT does not check the types of its settings
            raise unusable(self.title, error) from error
        for module in model.modules():
            if options and isinstance(module, BaseTunerLayer):
                # It would move its tensors to the device and dtype of the base's weights, which have no values here.
                module._move_adapter_to_device_of_base_layer = lambda *args, **kwargs: None
        return model

    def _filled(self, model: PeftModel) -> nn.Module:
        """Load the tensors into the layers; return the model without PEFT's wrapper."""
        names, numbers = set(self.build().state_dict()), _floating(model)
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
        for key in sorted(numbers & loaded - _floating(model)):
            dtype = str(state[key].dtype).removeprefix("torch.")
            raise HfEsmError(f"{self.title}: '{key}' is stored as {dtype}, which no weight is. Save it again.")
        self.loaded = frozenset(key.removeprefix("base_model.model.") for key in loaded)
        # With `bias="all"` PEFT stores the biases of saved modules a second time, and rows of a tied head in any case.
        rows = [state[key] for key in loaded if ".trainable_tokens_delta." in key]
        unexpected = [key for key in report.unexpected_keys if ".modules_to_save." not in key]
        unexpected = [key for key in unexpected if not any(torch.equal(tensors[key], values) for values in rows)]
        if unexpected:
            raise self._misplaced(unexpected)
        filled = {state[key].data_ptr() for key in loaded}  # layers may share a tensor, which has a name in each
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[self.adapter.peft_type]
        missing = [key for key in report.missing_keys if prefix in key and self.is_of(live_name(key))]
        absent = [key for key in missing if state[key].is_meta or state[key].data_ptr() not in filled]
        if absent:
            raise HfEsmError(
                f"{self.title}: its file lacks {first_names(absent)}. Save or download the adapter again."
            )
        return model.get_base_model()

    @property
    def _other_base(self) -> str:
        return f"Was it trained on another base than {self.base_title}?"

    def _misfit(self, error: Exception) -> HfEsmError:
        """Return the error about an adapter that PEFT cannot put on the model."""
        sizes = _MISMATCH.findall(str(error))
        if not sizes:
            return HfEsmError(f"{self.title} does not fit: {reason_of(error)}. {self._other_base}")
        key, stored, expected = sizes[0]
        more = f", and {len(sizes) - 1} more do not fit" if len(sizes) > 1 else ""
        model = self.build()
        text = f"'{key}' is [{stored}] in its file, [{expected}] on the base{more}"
        if has_token_embeddings(model) and str(token_rows(model)) in expected.split(", "):
            return HfEsmError(
                f"{self.title} was trained with another vocabulary than that of {self.base_title}: {text}. Give as "
                "base the checkpoint with the resized vocabulary."
            )
        return HfEsmError(f"{self.title} does not fit: {text}. {self._other_base}")

    def _misplaced(self, keys: list[str]) -> HfEsmError:
        """Return the error about stored tensors that the model has no place for, with the cause if it shows."""
        if wrapper := next((part for part in keys[0].split(".") if part in _WRAPPERS), ""):
            return HfEsmError(
                f"{self.title}: its file names {first_names(keys)}, with the '{wrapper}' of a wrapped model, so that "
                f"PEFT loads none of it. {UNWRAP}"
            )
        if keys[0].startswith(2 * PEFT_PREFIX) or not keys[0].startswith(PEFT_PREFIX):
            return HfEsmError(
                f"{self.title}: its file names {first_names(keys)}, where PEFT writes '{PEFT_PREFIX}' once before the "
                "names of the base's modules, so that PEFT loads none of it. Save it again with the `save_pretrained` "
                "of one PeftModel."
            )
        return HfEsmError(f"{self.title}: the model has no place for {first_names(keys)}. {self._other_base}")


def _floating(model: nn.Module) -> set[str]:
    """Return the names of a model's tensors that are floating-point."""
    return {key for key, tensor in model.state_dict().items() if tensor.is_floating_point()}


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


def merged_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield, with its path, every module that PEFT merges as one. Of LoRA on several parameters of one module, that is
    one for each of them.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    outer = None
    for path, module in model.named_modules():
        inside = outer is not None and path.startswith(f"{outer}.")
        if isinstance(module, LoraLayer) and ADAPTER in module.scaling:
            yield path, module
        elif isinstance(module, (BaseTunerLayer, TrainableTokensWrapper)) and not inside:
            outer = path
            yield path, module


def base_of(layer: nn.Module) -> nn.Module:
    """Return the module of the base that an adapter's layer changes."""
    return getattr(layer, "token_adapter", layer).get_base_layer()


def _weights(layer: nn.Module) -> list[Tensor]:
    return list(base_of(layer).parameters())


def _holds_nan(layer: nn.Module) -> bool:
    """Whether anything of the adapter in a layer is NaN."""
    base = {id(weight) for weight in _weights(layer)}
    held = [tensor for tensor in (*layer.parameters(), *layer.buffers()) if id(tensor) not in base]
    return any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in held)
