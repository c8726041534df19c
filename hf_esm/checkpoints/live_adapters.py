"""Live PEFT models: the adapter of one as an expert, and the base inside one."""

import weakref
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from ..architecture import canonical_names, ties, untie
from ..errors import HfEsmError
from .adapter_files import live_name
from .adapters import AdapterCheckpoint
from .base import Checkpoint, LiveCheckpoint, build_skeleton, quiet_peft


class WrappedCheckpoint(LiveCheckpoint):
    """The base inside a live PEFT model, without the adapters, under the names that it has by itself."""

    def __init__(self, model: PeftModel, title: str):
        """See `LiveCheckpoint`.

        Raises:
            HfEsmError: if an adapter is merged into the weights, or some of the weights are offloaded.
        """
        if any(getattr(module, "merged", False) for module in model.modules()):
            raise HfEsmError(f"{title}: an adapter is merged into its weights. Call `model.unmerge_adapter()` first.")
        inner = model.get_base_model()
        super().__init__(inner, title)
        self.skeleton = build_skeleton(type(inner), inner.config)
        untie(self.skeleton, ties(self.skeleton).keys() - inner.all_tied_weights_keys.keys())
        of_base = (key for key in self._state if ".modules_to_save." not in key)  # an adapter's copy of a module
        self._state = {live_name(key.replace(".original_module", "")): self._state[key] for key in of_base}
        self.names = canonical_names(self.skeleton)

    def load_model(self, **placement: Any) -> PreTrainedModel:
        return self.load_model_as(type(self.skeleton), self.config)


def open_live_adapter(model: PeftModel, title: str, base: Checkpoint) -> AdapterCheckpoint:
    """Open the active adapter of a live PEFT model, which is never changed, over a base.

    Raises:
        HfEsmError: if several adapters are active, or the adapter cannot be read; see `AdapterCheckpoint`.
    """
    active = model.active_adapters
    if len(active) != 1:
        raise HfEsmError(
            f"{title} has {len(active)} active adapters ({', '.join(active)}), and an expert is one. Call "
            "`model.set_adapter(name)`, or pass their folders."
        )
    with ExitStack() as stack, quiet_peft():
        folder = Path(stack.enter_context(TemporaryDirectory()))
        model.save_pretrained(folder, selected_adapters=active)
        checkpoint = AdapterCheckpoint(folder if active == ["default"] else folder / active[0], title, base)
        weakref.finalize(checkpoint, stack.pop_all().close)
        return checkpoint
