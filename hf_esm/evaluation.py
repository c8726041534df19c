"""Scores of a model on labelled rows."""

import copy
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import send_to_device
from peft import PeftConfig
from transformers import AutoConfig, PreTrainedModel

from .checkpoints import open_checkpoint, resolve_source, whole_folder
from .errors import HfEsmError
from .experts import FOLDER as EXPERTS_FOLDER
from .heads import FOLDER as HEADS_FOLDER
from .heads import load_task_model
from .hub import RoutedModel
from .proxies import LabelledSamples, ProxyOptions, Sample, collate, load_labelled, load_processor


@torch.no_grad()
def predict(model: PreTrainedModel, samples: list[Sample], batch_size: int = 32) -> torch.Tensor:
    """The class of highest logit per sample, `[N]` int64 on the CPU. Samples of like length share a batch."""
    device = next(model.parameters()).device
    order = sorted(range(len(samples)), key=lambda i: max(value.numel() for value in samples[i].values()))
    classes = torch.empty(len(samples), dtype=torch.long)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = send_to_device(collate([samples[i] for i in chosen], model.config), device)
        batch = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in batch.items()}
        logits = getattr(model(**batch), "logits", None)
        if logits is None or logits.dim() != 2:
            raise HfEsmError(f"{type(model).__name__} gives no class per sample; accuracy needs a classifier.")
        classes[chosen] = logits.argmax(-1).cpu()
    return classes


def accuracy(model: PreTrainedModel, data: LabelledSamples, batch_size: int = 32) -> float:
    """Share of samples whose class is right, in [0, 1]."""
    return float((predict(model, data.samples, batch_size) == torch.tensor(data.labels)).double().mean())


@dataclass
class Scores:
    """Accuracy by task, beside the expert's own where it was measured.

    Attributes:
        accuracy: of the model, in [0, 1], by task.
        expert: of each task's own expert.
        routing: of a routed model, the share of the task's samples that the router took for it.
    """

    accuracy: dict[str, float]
    expert: dict[str, float]
    routing: dict[str, float] = field(default_factory=dict)

    @property
    def average(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)

    @property
    def normalised(self) -> Optional[float]:
        """Mean over tasks of the accuracy divided by the expert's; None unless every expert was right at all."""
        if not all(self.expert.get(task) for task in self.accuracy):
            return None
        return sum(score / self.expert[task] for task, score in self.accuracy.items()) / len(self.accuracy)

    def as_dict(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "expert": self.expert,
            "average": self.average,
            "normalised": self.normalised,
            **({"routing": self.routing} if self.routing else {}),
        }

    def __str__(self) -> str:
        width = max(len(task) for task in [*self.accuracy, "average"])
        lines = [
            f"{'task':{width}}  accuracy"
            + ("  expert" if self.expert else "")
            + ("  task found" if self.routing else "")
        ]
        for task, score in self.accuracy.items():
            beside = f"  {100 * self.expert[task]:6.1f}" if task in self.expert else ""
            found = f"  {100 * self.routing[task]:10.1f}" if task in self.routing else ""
            lines.append(f"{task:{width}}  {100 * score:8.1f}{beside}{found}")
        lines.append(f"{'average':{width}}  {100 * self.average:8.1f}")
        if self.normalised is not None:
            lines[-1] += f"  ({100 * self.normalised:.1f} % of the experts)"
        return "\n".join(lines)


def evaluate(
    model: str | os.PathLike,
    data: Mapping[str, Any],
    *,
    experts: Optional[Mapping[str, Any]] = None,
    processor: Any = None,
    route: str = "routed",
    batch_size: int = 32,
    **options: Any,
) -> Scores:
    """Accuracy of a merged model on each task's labelled rows, with the task's own head.

    Of an ESM++ model, the router chooses the expert while the head is the task's: how often the two agree is in
    `Scores.routing`.

    Args:
        model: folder or Hub id that `merge_models` wrote, or any sequence or image classifier.
        data: by task, labelled rows (column `label`: class index or label name) in any form that `merge_models` takes.
        experts: by task, the expert to measure beside it, as `merge_models` takes it; a LoRA adapter stands on the
            base that it names.
        processor: tokenizer or processor, where none stands beside the model.
        route: of a model with experts: `"routed"`, `"oracle"` (each task's expert for its rows; what a model without
            a router gets in any case), or `"static"`.
        options: fields of `ProxyOptions`; all rows are used unless `num_samples` says otherwise.
    """
    options = ProxyOptions(**{"num_samples": 0, **options})
    device = Accelerator().device
    experts = experts or {}
    if lacking := experts.keys() - data.keys():
        raise HfEsmError(f"There are no rows to measure the expert {sorted(lacking)[0]!r} on.")
    folder = whole_folder(model, str(model))
    processor = processor or load_processor(folder)

    def score(model: PreTrainedModel, task: str) -> float:
        labelled = load_labelled(data[task], processor, model.config, f"data of '{task}'", options)
        return accuracy(model.to(device), labelled, batch_size)

    if route not in ("routed", "oracle", "static"):
        raise HfEsmError(f"route must be 'routed', 'oracle' or 'static', not {route!r}.")
    found: dict[str, float] = {}
    if (folder / EXPERTS_FOLDER).is_dir():
        routed = RoutedModel.from_pretrained(folder).to(device)
        if route == "routed" and routed.config.router == "none":
            route = "oracle"
        merged = {}
        for task in data:
            forced = {"oracle": task, "static": "static"}.get(route)
            with routed.route(forced) if forced else nullcontext():
                merged[task] = score(routed.task_model(task), task)
            if not forced:
                samples = load_labelled(data[task], processor, routed.task_model(task).config, task, options).samples
                explained = routed.explain(samples, batch_size)
                found[task] = sum(e.likeliest == task for e in explained) / len(explained)
    else:
        has_heads = (folder / HEADS_FOLDER).is_dir()
        merged = {t: score(load_task_model(folder, t) if has_heads else _load(folder, str(model)), t) for t in data}
    own = {task: score(_load(expert, f"expert '{task}'"), task) for task, expert in experts.items()}
    return Scores(merged, own, found)


def _load(spec: Any, title: str) -> PreTrainedModel:
    """A model in the class that its config names, or a LoRA adapter merged into the base that it names."""
    source = resolve_source(spec, title)
    if source.model is not None:
        return copy.deepcopy(source.model).eval()
    if source.is_adapter:
        base = PeftConfig.from_pretrained(source.folder).base_model_name_or_path
        return open_checkpoint(source, open_checkpoint(resolve_source(base, f"base of {source.title}"))).load_model()
    config = AutoConfig.from_pretrained(source.folder)
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(source.repo_id or source.folder, revision=source.revision).eval()
