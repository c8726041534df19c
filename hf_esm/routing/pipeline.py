"""A routed model as a Transformers pipeline."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Optional

import torch
from datasets import Dataset
from transformers import Pipeline

from .explanations import Prediction
from .model import RoutedModel


class RoutedPipeline(Pipeline):
    """A pipeline from inputs to `{"task": …, "label": …, "score": …, "sure": …}`, for routed classifiers.

    `RoutedPipeline(model)(texts)` takes one input, a list, a generator or a `datasets` column, each input as for
    `RoutedModel.predict`, and the options of `predict`: `tasks="sst2"` where the task is known, `batch_size`.

    Args:
        model: a routed model.
        device: where to run the model; by default where it is.
        kwargs: passed to `transformers.Pipeline`, or options of `predict`.
    """

    def __init__(self, model: RoutedModel, device: Optional[int | str | torch.device] = None, **kwargs: Any):
        self.routed = model if device is None else model.to(device)
        super().__init__(model=model.model.get_base_model(), device=model.device, **kwargs)

    def __call__(self, inputs: Any, **options: Any) -> Any:
        several = isinstance(inputs, (Sequence, Iterator, Dataset)) and not isinstance(inputs, (str, tuple))
        rows = list(inputs) if several else [inputs]
        predictions = self.routed.predict(rows, **{**self._forward_params, **options})
        return [asdict(prediction) for prediction in predictions] if several else asdict(predictions[0])

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        return {}, options, {}

    def preprocess(self, inputs: Any) -> dict[str, Any]:
        return {"inputs": inputs}

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Prediction]:
        return {"prediction": self.routed.predict([model_inputs["inputs"]], **options)[0]}

    def postprocess(self, model_outputs: dict[str, Prediction]) -> dict[str, Any]:
        return asdict(model_outputs["prediction"])
