"""Tasks of the lm-evaluation-harness as a metric of models that write."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..errors import HfEsmError
from ..utils import check_known
from .labels import LabelledSamples
from .metric import Metric


SETTINGS = ("lm_eval", "limit", "folder", "num_fewshot")


def _mean(outputs: Tensor, _: Tensor) -> float:
    return float(outputs.double().mean())


@dataclass(frozen=True)
class HarnessMetric(Metric):
    """Score of whole models on tasks of the lm-evaluation-harness, which bring their own rows.

    The outputs are the values of each document by the task's first metric, and the score is their mean. A routed model
    decides by each prompt: the tokens before the answer that is scored, or that it continues.

    Attributes:
        tasks: names of the harness' tasks by the task or column of ours.
        limit: number of documents of each task; None takes all.
        folder: folder of further tasks as YAML files.
        num_fewshot: number of examples before each prompt, if another than the task's own.
    """

    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    limit: Optional[int] = None
    folder: Optional[str] = None
    num_fewshot: Optional[int] = None

    def of_task(self, task: str, tokenizer: Any) -> LabelledSamples:
        """What stands for the rows of a task: its name, and the tokenizer."""
        if tokenizer is None:
            raise HfEsmError(
                f"'{task}': lm_eval needs a tokenizer. Save one in the model's folder, or pass `processor`."
            )
        return LabelledSamples([], [task], tokenizer=getattr(tokenizer, "tokenizer", tokenizer))

    def outputs(self, model: PreTrainedModel, data: LabelledSamples, batch_size: int) -> Tensor:
        if not model.can_generate():
            raise HfEsmError(f"{type(model).__name__} writes no text, which the tasks of lm_eval need.")
        lm_eval = require_harness()
        names = list(self.tasks[data.labels[0]])
        manager = _tasks_in(self.folder, self.folder is None)
        if not set(names) <= set(manager.all_subtasks):
            manager = _tasks_in(self.folder, True)
        check_known(names, manager.all_tasks, "task", "lm_eval")
        found = lm_eval.simple_evaluate(
            _reader(model, data.tokenizer, batch_size),
            tasks=names,
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            task_manager=manager,
            bootstrap_iters=0,
        )
        values: list[float] = []
        for name, documents in found["samples"].items():
            metrics = documents[0]["metrics"]
            if not all(isinstance(document[metrics[0]], (int, float)) for document in documents):
                raise HfEsmError(f"lm_eval: {metrics[0]} of {name} is no mean over documents. Choose another task.")
            values += [float(document[metrics[0]]) for document in documents]
        data.labels[:] = [0.0] * len(values)
        return torch.tensor(values, dtype=torch.float64)

    def labels(self, data: LabelledSamples) -> Tensor:
        """`[N]` zeros: the harness has compared the answers already."""
        return torch.tensor(data.labels)

    def scores_of_draws(self, outputs: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
        return outputs.double()[draws].mean(1)


def harness_metric(settings: Mapping[str, Any]) -> HarnessMetric:
    """Metric from `{"lm_eval": [tasks], "limit": …, "folder": …, "num_fewshot": …}`, or with the tasks by ours:
    `{"lm_eval": {"code": ["humaneval"], "maths": ["gsm8k"]}}`.

    Raises:
        HfEsmError: if the settings are of another form.
    """
    check_known(settings, SETTINGS, "key", "`metric`")
    tasks = settings.get("lm_eval")
    if isinstance(tasks, str):
        tasks = [tasks]
    if isinstance(tasks, (list, tuple)):
        tasks = {name: [name] for name in tasks}
    if not isinstance(tasks, Mapping) or not tasks:
        raise HfEsmError(f"`metric`: lm_eval takes names of tasks, or a mapping to them by task, not {tasks!r}.")
    by_task = {task: (names,) if isinstance(names, str) else tuple(names) for task, names in tasks.items()}
    folder = settings.get("folder")
    folder = None if folder is None else os.path.abspath(os.path.expanduser(folder))
    options = {"limit": settings.get("limit"), "folder": folder, "num_fewshot": settings.get("num_fewshot")}
    return HarnessMetric("lm_eval", _mean, tasks=by_task, **options)


def require_harness() -> Any:
    """The lm-evaluation-harness.

    Raises:
        HfEsmError: if it is not installed.
    """
    try:
        import lm_eval
    except ImportError:
        raise HfEsmError(
            "The metric lm_eval needs the lm-evaluation-harness, which is not installed: pip install hf_esm[lm-eval]"
        ) from None
    return lm_eval


@cache
def _tasks_in(folder: Optional[str], its_own: bool) -> Any:
    """The index of the tasks in a folder, and of the harness' own, which takes up to a minute to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=its_own)


def _reader(model: PreTrainedModel, tokenizer: Any, batch_size: int) -> Any:
    """The harness' reader of a live model, whose passes say where each prompt ends."""
    from lm_eval.models.huggingface import HFLM

    class Reader(HFLM):
        @torch.no_grad()
        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: Optional[int] = None
        ) -> list[tuple[float, bool]]:
            answers = []
            for start in range(0, len(requests), batch_size):
                answers += self._likelihoods([request[1:] for request in requests[start : start + batch_size]])
            return answers

        def _likelihoods(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            """Log-likelihood of each answer after its prompt, and whether each of its tokens is the likeliest."""
            rows, targets = [], []
            for prompt, answer in pairs:
                tokens = torch.tensor([*prompt, *answer][-self.max_length :])
                target = tokens.clone()
                target[: -len(answer)] = -100
                rows.append(tokens)
                targets.append(target)
            ids, labels = pad_sequence(rows, True, 0), pad_sequence(targets, True, -100)
            mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0)
            inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            logits = self.model(**{name: value.to(self.device) for name, value in inputs.items()}).logits
            logits, labels = logits[:, :-1].float().cpu().log_softmax(-1), labels[:, 1:]
            counted = labels != -100
            chosen = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            likeliest = (logits.argmax(-1) == labels) | ~counted
            totals = (chosen * counted).sum(1)
            return [(float(total), bool(whole)) for total, whole in zip(totals, likeliest.all(1), strict=True)]

    return Reader(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
