"""What a routed model offers of `torch.nn.Module`, which it is not."""

from typing import Any, TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import MissingAttributeError
from ..utils import device_of
from .adapters import check_present


Own = TypeVar("Own", bound="AsModule")


class AsModule:
    """Devices, dtypes and modes of the model and of all task models.

    Attributes:
        model: the `PeftModel`.
    """

    model: PeftModel
    _task_models: dict[str, PreTrainedModel]

    def __getattr__(self, name: str) -> Any:
        raise MissingAttributeError(
            f"RoutedModel has no '{name}': it holds a torch module, and is none. Give a Trainer or an Accelerator its "
            "`model`, which is a PeftModel, or the `task_model` of a task."
        )

    def to(self: Own, *args: Any, **kwargs: Any) -> Own:
        """Move or cast the model, as `torch.nn.Module.to`. Experts and router stay in float32."""
        for model in (check_present(self), *self._task_models.values()):
            model.to(*args, **kwargs)
        return self

    def half(self: Own) -> Own:
        """Cast the static model and the heads to float16."""
        return self.to(torch.float16)

    def bfloat16(self: Own) -> Own:
        """Cast the static model and the heads to bfloat16."""
        return self.to(torch.bfloat16)

    def train(self: Own, mode: bool = True) -> Own:
        """Set the training mode of the model and of all task models."""
        for model in (check_present(self), *self._task_models.values()):
            model.train(mode)
        return self

    def eval(self: Own) -> Own:
        """Set the evaluation mode of the model and of all task models."""
        return self.train(False)

    @property
    def device(self) -> torch.device:
        """Device on which the model computes first."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the static model."""
        return self.model.base_model.model.dtype
