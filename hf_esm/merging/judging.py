"""Agreement of merged models with the experts: the experts' answers, and a judge that compares models with them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isnan
from pathlib import Path
from typing import Optional

import torch
from accelerate import Accelerator
from torch import Tensor

from ..calibration import loaded_model, with_decoder_inputs
from ..checkpoints import ExpertLoader
from ..data import Sample, load_samples, save_samples
from ..errors import HfEsmError
from ..metrics import Agreement, ExpertAnswers, agreement_of, collect_answers, in_vocabulary
from ..planning import MergeOptions, MergePlan, Vocabulary
from ..utils import together
from .alpha import CandidateModels
from .cache import InputCache
from .contest import Scored, first_rows


@dataclass(frozen=True)
class TaskAgreement:
    """How far the merged model agrees with one expert.

    Attributes:
        merged: agreement of the merged model; see `Agreement.score`. 1 is the expert.
        base: that of the base; 0 for models that write.
    """

    merged: float
    base: float


def ask_experts(
    plan: MergePlan,
    samples: Mapping[str, list[Sample]],
    options: MergeOptions,
    accelerator: Accelerator,
    folder: Path,
    progress: Callable[[Iterable], Iterable] = iter,
    cache: Optional[InputCache] = None,
) -> dict[str, ExpertAnswers]:
    """Return every expert's answers on samples of its task.

    The processes share the tasks. One expert at a time is in memory, and its answers are a file before the next is
    loaded; files that an interrupted merge left, and files in the cache, are used again.

    Args:
        samples: by task, other samples than the statistics were taken from.
        folder: for the files.
        cache: keeps the files for other merges.
    """
    paths = {task: (folder / f"asked-{task}.safetensors", folder / f"answers-{task}.safetensors") for task in samples}
    if cache is not None:
        paths = {task: cache.answers(task, rows) for task, rows in samples.items()}
    with together(accelerator):
        mine = list(samples)[accelerator.process_index :: accelerator.num_processes]
        loader = ExpertLoader()
        for task in progress([task for task in mine if not _readable(*paths[task])]):
            with loaded_model(plan.experts[task], accelerator, options.max_memory, folder, loader) as expert:
                asked = with_decoder_inputs(expert, samples[task], options.batch_size)
                if plan.vocabulary is not None:
                    asked = plan.vocabulary.readable(task, asked)
                answers = collect_answers(
                    expert, asked, batch_size=options.batch_size, title=task, progress=options.progress
                )
            if plan.vocabulary is not None:
                asked = plan.in_merged_tokens(task, asked)
                answers = replace(_in_merged_tokens(answers, plan.vocabulary, task), samples=asked)
            save_samples(asked, paths[task][0])
            answers.save(paths[task][1])
    return {task: ExpertAnswers.load(path, load_samples(asked)) for task, (asked, path) in paths.items()}


def _readable(asked: Path, answers: Path) -> bool:
    """Return whether answers and their samples can be read; experts are asked again for damaged ones."""
    try:
        ExpertAnswers.load(answers, load_samples(asked))
    except (HfEsmError, OSError):
        return False
    return True


def _in_merged_tokens(answers: ExpertAnswers, vocabulary: Vocabulary, task: str) -> ExpertAnswers:
    """Return answers with the ids of the merged model's tokens."""
    if answers.kind != "tokens":
        return answers
    ids, size = vocabulary.tokens[task].ids, len(vocabulary.given.given)
    return replace(answers, answers=[in_vocabulary(answer, ids, size) for answer in answers.answers])


class Judge:
    """Measures how far merged models agree with the experts, one model at a time, in one shared body.

    Attributes:
        models: the models that the weights are written into, in the dtype of the base.
        answers: answers of every expert on samples of its task.
        base: agreement of the base with every expert, with the task's head.
        weights: by task, how much its agreement counts: the caller's weights of the tasks, 1 on average.
        evaluations: number of merged models that `scored` has measured.
    """

    def __init__(
        self, plan: MergePlan, answers: Mapping[str, ExpertAnswers], accelerator: Accelerator, batch_size: int
    ):
        self.models = CandidateModels(plan, accelerator.device, dtype=None)
        self.answers, self.batch_size, self.evaluations = answers, batch_size, 0
        weights = {task: weight for task, weight in zip(plan.experts, plan.weights, strict=True) if task in answers}
        self.weights = {task: weight * len(weights) / sum(weights.values()) for task, weight in weights.items()}
        self.base = self.measure(plan.base.tensor)

    def measure(
        self, weight: Callable[[str], Tensor], indices: Optional[Mapping[str, Sequence[int]]] = None
    ) -> dict[str, Agreement]:
        """Return the agreement of a model with every expert.

        Args:
            weight: returns the model's weights by canonical name.
            indices: by task, of the samples to measure on; by default all.
        """
        self.models.set_weights(weight)
        return {
            task: agreement_of(
                self.models.by_task[task], answers, indices and indices[task], batch_size=self.batch_size
            )
            for task, answers in self.answers.items()
        }

    @property
    def rows(self) -> dict[str, int]:
        """Number of samples by task."""
        return {task: len(answers.samples) for task, answers in self.answers.items()}

    def scored(self, weight: Callable[[str], Tensor], share: float = 1.0) -> Scored:
        """Return the mean agreement over all tasks of a model, by its weights, on the first share of their samples."""
        rows = first_rows(self.rows, share)
        self.evaluations += 1
        return self._scored(self.measure(weight, {task: range(count) for task, count in rows.items()}), rows)

    def base_scored(self, share: float = 1.0) -> Scored:
        """Return the same of the base, which is known already."""
        return self._scored(self.base, first_rows(self.rows, share))

    def _scored(self, found: Mapping[str, Agreement], rows: Mapping[str, int]) -> Scored:

        def of_draws(draws: Mapping[str, Tensor]) -> Tensor:
            scores = [self.weights[t] * found[t].scores_of_draws(self.base[t], draw) for t, draw in draws.items()]
            return torch.stack(scores).mean(0)

        return Scored(rows, of_draws, measured=found)

    def mean(self, agreements: Mapping[str, Agreement], base: Mapping[str, Agreement]) -> float:
        """Return the weighted mean over all tasks of `Agreement.score`."""
        scores = [self.weights[task] * agreements[task].score(base[task]) for task in agreements]
        return -inf if isnan(sum(scores)) else sum(scores) / len(scores)


def by_task(agreements: Mapping[str, Agreement], base: Mapping[str, Agreement]) -> dict[str, TaskAgreement]:
    """Return both models' agreement with every expert."""
    return {
        task: TaskAgreement(agreements[task].score(base[task]), base[task].score(base[task])) for task in agreements
    }
