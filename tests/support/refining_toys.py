"""A base, two experts and their mean as live models, with all that refining reads."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_esm import ActivationStatistics, calibrate
from hf_esm.architecture import canonical_names
from hf_esm.checkpoints import Access, open_checkpoint, resolve_source
from hf_esm.merging.alpha import CandidateModels
from hf_esm.merging.gates import Factors, build_gates, fold
from hf_esm.merging.refining import Refined, refine
from hf_esm.methods import resolve_method
from hf_esm.metrics import ExpertAnswers, agreement_of, collect_answers
from hf_esm.planning import MergePlan, RefineSettings, plan_merge
from support.routed_toys import task_ids, tuned
from support.tiny import GPT2, LLAMA
from support.toys import base_model, classifier


KINDS = {"llama": LLAMA, "gpt2": GPT2}
TASKS = ["law", "code"]


@dataclass
class Problem:
    """What refining reads, and the models that it comes from.

    Attributes:
        models: the merged model, the mean of the experts, by task: one for all, or one with each task's head around
            one body.
    """

    base: PreTrainedModel
    experts: dict[str, PreTrainedModel]
    models: dict[str, PreTrainedModel]
    plan: MergePlan
    statistics: dict[str, ActivationStatistics]
    learn: dict[str, ExpertAnswers]
    held_back: dict[str, ExpertAnswers]
    base_divergence: dict[str, float]

    @property
    def merged(self) -> PreTrainedModel:
        return self.models["law"]

    def factors(self, components: int, folder: Path) -> dict[str, Factors]:
        return build_gates(self.plan, self.statistics, components, folder, Accelerator())

    def refine(self, factors: dict[str, Factors], **options: Any) -> Refined:
        run = {name: options.pop(name) for name in ("folder", "progress", "seed") if name in options}
        settings = RefineSettings(**{"steps": 30, "batch_size": 2, **options})
        models = self.models if len({id(model) for model in self.models.values()}) > 1 else self.merged
        answers = self.learn, self.held_back, self.base_divergence
        return refine(models, factors, *answers, settings, Accelerator(), **run)

    @torch.no_grad()
    def folded(self, factors: dict[str, Factors], gates: dict[str, Tensor]) -> dict[str, PreTrainedModel]:
        """Copies of the merged models with gates folded into their weights."""
        models = {task: copy.deepcopy(model) for task, model in self.models.items()}
        for model in models.values():
            live = canonical_names(model)
            for name, part in factors.items():
                module = model.get_submodule(live[name].removesuffix(".weight"))
                module.weight.copy_(fold(module.weight, part, gates[name], isinstance(module, Conv1D)))
        return models

    def loss(self, models: dict[str, PreTrainedModel], answers: dict[str, ExpertAnswers]) -> float:
        """The mean over tasks of the divergence from the expert's answers, divided by the base's."""
        parts = [agreement_of(models[task], answers[task]).divergence / self.base_divergence[task] for task in TASKS]
        return sum(parts) / len(parts)


def samples_of(task: str, seed: int = 0, count: int = 10) -> list[dict[str, Tensor]]:
    return task_ids("ab"[TASKS.index(task)], seed, count)


def language_problem(kind: str, dtype: torch.dtype = torch.float32) -> Problem:
    """Experts that differ from the base in linear maps; the second one does in one map by a matrix of rank one."""
    base = KINDS[kind].build()
    experts = {task: tuned(base, seed, 0.1) for seed, task in enumerate(TASKS)}
    maps = {name: m for name, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    weak = next(iter(maps))
    with torch.no_grad():
        row, column = (torch.linspace(-0.3, 0.3, size) for size in maps[weak].weight.shape)
        experts["code"].get_submodule(weak).weight.copy_(maps[weak].weight + row[:, None] * column)
    merged = with_mean_weights(base, list(experts.values())).to(dtype)
    return problem(base, experts, dict.fromkeys(TASKS, merged), dict.fromkeys(TASKS, base))


def classifier_problem() -> Problem:
    """Two classifiers with heads of their own around one body."""
    base = base_model()
    experts = {task: tuned(classifier(base, label), seed) for seed, (task, label) in enumerate(zip(TASKS, "ab"))}
    merged, of_base = CandidateModels(plan_of(base, experts), torch.device("cpu")), {}
    for task, model in merged.by_task.items():
        of_base[task] = copy.deepcopy(model)
        model.bert.load_state_dict(with_mean_weights(base, [e.bert for e in experts.values()]).state_dict())
    return problem(base, experts, merged.by_task, of_base)


@torch.no_grad()
def with_mean_weights(base: PreTrainedModel, experts: list[PreTrainedModel]) -> PreTrainedModel:
    merged = copy.deepcopy(base)
    for name, weight in merged.named_parameters():
        weight.copy_(sum(expert.get_parameter(name) for expert in experts) / len(experts))
    return merged


def problem(
    base: PreTrainedModel,
    experts: dict[str, PreTrainedModel],
    models: dict[str, PreTrainedModel],
    of_base: dict[str, PreTrainedModel],
) -> Problem:
    """Answers on twenty samples, of which twelve are learned from, and the statistics of ten others."""
    samples = {task: samples_of(task, 1, 20) for task in experts}
    answers = {task: collect_answers(expert, samples[task], progress=False) for task, expert in experts.items()}
    return Problem(
        base,
        experts,
        models,
        plan_of(base, experts),
        {task: calibrate(expert, samples_of(task), progress=False) for task, expert in experts.items()},
        {task: ExpertAnswers(a.kind, a.samples[:12], a.answers[:12]) for task, a in answers.items()},
        {task: ExpertAnswers(a.kind, a.samples[12:], a.answers[12:]) for task, a in answers.items()},
        {task: agreement_of(of_base[task], answers[task]).divergence for task in experts},
    )


def plan_of(base: Any, experts: dict[str, Any]) -> MergePlan:
    sources = {name: resolve_source(model, name, Access()) for name, model in {"base": base, **experts}.items()}
    opened = open_checkpoint(sources["base"])
    checkpoints = {task: open_checkpoint(sources[task], opened) for task in experts}
    return plan_merge(opened, checkpoints, resolve_method("mean"), sources=sources)
