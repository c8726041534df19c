"""A routed model as a Transformers pipeline."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from datasets import Dataset
from transformers import Pipeline

from .explanations import Prediction
from .model import RoutedModel


class RoutedPipeline(Pipeline):
    """Inputs in, `{"task": …, "label": …, "score": …, "sure": …}` out, for classifiers that `merge_models` routed.

    `RoutedPipeline(model)(texts)` takes what `RoutedModel.predict` takes, one input or a list, a generator or a
    `datasets` column, and its options (`tasks="sst2"` where the task is known, `batch_size`).
    """

    def __init__(self, model: RoutedModel, device: Any = None, **kwargs: Any):
        self.routed = model if device is None else model.to(device)
        super().__init__(model=model.model.get_base_model(), device=model.device, **kwargs)

    def __call__(self, inputs: Any, **options: Any) -> Any:
        several = isinstance(inputs, (Sequence, Iterator, Dataset)) and not isinstance(inputs, (str, tuple))
        found = self.routed.predict(list(inputs) if several else [inputs], **{**self._forward_params, **options})
        return [asdict(prediction) for prediction in found] if several else asdict(found[0])

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        return {}, options, {}

    def preprocess(self, inputs: Any) -> dict[str, Any]:
        return {"inputs": inputs}

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Prediction]:
        return {"prediction": self.routed.predict([model_inputs["inputs"]], **options)[0]}

    def postprocess(self, model_outputs: dict[str, Prediction]) -> dict[str, Any]:
        return asdict(model_outputs["prediction"])
