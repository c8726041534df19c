"""Experts loaded one after another; adapters of one base take turns on one loaded model."""

from typing import Any, Optional

from transformers import PreTrainedModel

from .adapters import AdapterCheckpoint
from .base import Checkpoint


class ExpertLoader:
    """Loads experts, one at a time: the model of one is given up, or changed, when the next is loaded.

    A base is read once for all adapters of it that follow each other and make the same class of model of it; each
    takes the weights of the one before it off, to the bit. The loader keeps the last adapter's model in memory.
    """

    def __init__(self) -> None:
        self._last: Optional[tuple[AdapterCheckpoint, PreTrainedModel]] = None

    def load(self, checkpoint: Checkpoint, **placement: Any) -> PreTrainedModel:
        """Load a model; see `Checkpoint.load_model`."""
        last, self._last = self._last, None
        if placement or not isinstance(checkpoint, AdapterCheckpoint):
            del last
            return checkpoint.load_model(**placement)
        if last is not None and checkpoint.shares_base(last[0]):
            model = last[1]
            last[0].take_off(model)
            checkpoint.put_on(model)
        else:
            del last
            model = checkpoint.load_model()
        self._last = checkpoint, model
        return model
