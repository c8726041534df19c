"""Refines the chosen merge, and measures how far the model that is written agrees with the experts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Optional

import torch
from accelerate import Accelerator

from ..data import Sample
from ..errors import HfEsmError
from ..metrics import ExpertAnswers
from ..planning import MergeOptions, MergePlan, RefineSettings
from ..utils import bytes_of, gather, together
from .choice import Chosen
from .expert_statistics import Inputs
from .gates import Factors, RefinedWeights, UpdateFactors, build_gates
from .judging import Judge, TaskAgreement, by_task
from .refining import Refined, refine


def refine_chosen(
    plan: MergePlan,
    chosen: Chosen,
    inputs: Inputs,
    settings: Optional[RefineSettings],
    options: MergeOptions,
    *,
    accelerator: Accelerator,
    folder: Path,
    progress: Callable[[str], Callable[[Iterable], Iterable]],
) -> Chosen:
    """Return the choice with refined weights, if there are settings of refining, and with its agreement.

    Gates learn on three quarters of the samples that agreement is measured on, two or more of every task, and stop by
    the last quarter. The agreement of a refined model is that on the last quarter. If the mean of the updates agrees
    more, it is taken.

    Args:
        folder: for factors, and for the state of work that can be resumed.
    """
    judge = chosen.judge
    if judge is None:
        return chosen
    held_back: Optional[dict[str, range]] = None
    if settings is not None:
        held_back = {task: _held_back(answers) for task, answers in inputs.answers.items()}
        weights, trained = _refined(
            plan,
            chosen,
            inputs,
            held_back,
            settings,
            options,
            accelerator=accelerator,
            folder=folder,
            progress=progress,
        )
        chosen = replace(chosen, weight=weights.weight, refined=trained.history, gated=weights)
    measured = None
    with together(accelerator):
        if accelerator.is_main_process:
            measured = _measured(judge, chosen, held_back)
    agreement, by_mean = gather(accelerator, measured)[0]
    if by_mean:
        rival = chosen.rival
        alpha = rival.method.default_alpha
        weight = partial(rival.updates.weight, alpha=alpha)
        note = f"{chosen.note}; refined, it agrees less than {rival.method.name}, which is written".lstrip("; ")
        chosen = replace(chosen, candidate=rival, alpha=alpha, by_kind={}, weight=weight, scores={}, note=note)
        chosen = replace(chosen, refined={}, gated=None)
    return replace(chosen, agreement=agreement, judge=None)


def too_few_to_refine(samples: Mapping[str, list[Sample]]) -> str:
    """Return the first task without two samples, one to learn from and one to stop by; empty if all have them."""
    return next((task for task, rows in samples.items() if len(rows) < 2), "")


def check_refinable(plan: MergePlan, samples: Mapping[str, list[Sample]]) -> None:
    """Raise an error if the samples beside those of the statistics are too few to refine on."""
    task = too_few_to_refine({task: samples.get(task, []) for task in plan.experts})
    if task:
        raise HfEsmError(
            f"{plan.experts[task].title}: `refine` needs two samples or more that no statistics were made from. Pass "
            "more samples as its `calibration`, or leave `refine` out."
        )


def _held_back(answers: ExpertAnswers) -> range:
    """Return the last quarter of the samples, which gates do not learn from; one at least."""
    count = len(answers.samples)
    return range(count - max(count // 4, 1), count)


def _part(answers: ExpertAnswers, indices: range) -> ExpertAnswers:
    return replace(
        answers, samples=[answers.samples[i] for i in indices], answers=[answers.answers[i] for i in indices]
    )


def _refined(
    plan: MergePlan,
    chosen: Chosen,
    inputs: Inputs,
    held_back: Mapping[str, range],
    settings: RefineSettings,
    options: MergeOptions,
    *,
    accelerator: Accelerator,
    folder: Path,
    progress: Callable[[str], Callable[[Iterable], Iterable]],
) -> tuple[RefinedWeights, Refined]:
    """Train the gates of the chosen merge."""
    judge, answers = chosen.judge, inputs.answers
    max_memory = options.max_memory and bytes_of(options.max_memory, "max_memory")
    factors = build_gates(
        plan,
        inputs.statistics,
        settings.components,
        folder,
        accelerator,
        max_memory=max_memory,
        progress=progress("Decomposing"),
    )
    factors |= _embedding_factors(plan, chosen)
    judge.models.set_weights(chosen.weight)
    state = None
    if options.resume_dir:  # gates of another merged model are of no use
        scales = " ".join(f"{scale:g}" for scale in (chosen.alpha, *chosen.by_kind.values()))
        state = folder / f"refining {chosen.candidate.method.name} {scales}"
        state.mkdir(exist_ok=True)
    trained = refine(
        judge.models.by_task,
        factors,
        {task: _part(answers[task], range(held_back[task].start)) for task in answers},
        {task: _part(answers[task], held_back[task]) for task in answers},
        {task: agreement.divergence / judge.weights[task] for task, agreement in judge.base.items()},
        settings,
        accelerator,
        seed=options.seed,
        folder=state,
        progress=progress,
    )
    return RefinedWeights(plan, chosen.weight, factors, trained.gates, not settings.keep_adapter), trained


def _embedding_factors(plan: MergePlan, chosen: Chosen) -> dict[str, Factors]:
    """Return what the coefficients of each trained embedding multiply: its merged update, and every expert's."""
    factors: dict[str, Factors] = {}
    for name in plan.heads.shared:
        if name in plan.base.embeddings and name not in plan.unchanged:
            base = plan.base.tensor(name)
            updates = [expert.update(name, base) for expert in plan.experts.values()]
            factors[name] = UpdateFactors(torch.stack([chosen.weight(name).float() - base.float(), *updates]))
    return factors


def _measured(
    judge: Judge, chosen: Chosen, held_back: Optional[Mapping[str, range]]
) -> tuple[dict[str, TaskAgreement], bool]:
    """Return the agreement of the written model by task, and whether that is the mean because it agrees more."""
    base = judge.base if held_back is None else judge.measure(judge.models.plan.base.tensor, held_back)
    weight = chosen.weight if chosen.adapter is None else replace(chosen.adapter, folded=True).weight
    found = chosen.measured if chosen.measured and held_back is None else judge.measure(weight, held_back)
    if chosen.rival is not None and held_back is not None:
        by_mean = partial(chosen.rival.updates.weight, alpha=chosen.rival.method.default_alpha)
        rival = judge.measure(by_mean, held_back)
        if judge.mean(rival, base) > judge.mean(found, base):
            return by_task(rival, base), True
    return by_task(found, base), False
