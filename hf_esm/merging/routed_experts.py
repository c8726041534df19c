"""The experts and the router of ESM++ (arXiv 2606.19164), made from a merged model's plan."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Optional

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..architecture import is_routable, to_matrices
from ..calibration import ActivationStatistics, pooled_inputs
from ..checkpoints import ROUTED_FOLDER, quiet_loading
from ..data import Sample
from ..planning import MergeOptions, MergePlan
from ..routing import RoutedExperts, expert_factors, residual_update
from ..utils import algebra_device, fast_products, together
from .updates import MergedUpdates


def decompose_experts(
    plan: MergePlan,
    merged: Callable[[str], Tensor],
    statistics: Mapping[str, ActivationStatistics],
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[Iterable], Iterable] = iter,
    device: Optional[torch.device] = None,
) -> dict[str, Tensor]:
    """Experts and prototypes of this process's share of the linear maps that all tasks have statistics of: `A`, `B`
    and, if any, `P` of every map, by `A/` and so on before the module's name.

    `merged` gives the merged model's weight by its canonical name; `device` is where to compute, by default the CPU.
    """
    method, base = plan.method, plan.base
    tensors = {}
    routable = [name for name in plan.heads.shared if is_routable(name, base.linear.get(name))]
    if method.needs_statistics:
        routable = [name for name in routable if all(name in found for found in statistics.values())]
    for name in progress(routable[rank::world_size]):
        linear = base.linear[name]
        weight = merged(name).float()
        found, means = [], []
        for task, expert in plan.experts.items():
            (residual,) = to_matrices(residual_update(expert, name, weight).to(device), linear)
            update = None
            if method.directions == "update":
                (update,) = to_matrices(expert.update(name, base.tensor(name)).to(device), linear)
            inputs = statistics[task][name].to(device) if method.needs_statistics else None
            kept = method.expert_rank(residual.shape, len(plan.experts))
            found.append(expert_factors(residual, inputs, kept, method.tolerance, update))
            if inputs is not None:
                means.append(torch.nn.functional.normalize(inputs.mean, dim=0).cpu())
        module = base.names[name].removesuffix(".weight")
        tensors[f"A/{module}"], tensors[f"B/{module}"] = (torch.stack(factors) for factors in zip(*found, strict=True))
        if means:
            tensors[f"P/{module}"] = torch.stack(means)
    return tensors


def _assemble(
    plan: MergePlan,
    tensors: Mapping[str, Tensor],
    features: Mapping[str, Mapping[str, Tensor]],
    shift: Mapping[str, Tensor],
) -> RoutedExperts:
    """The adapter of what `decompose_experts` and `calibration.pooled_inputs` gave; `shift` as in `RoutedExperts`."""
    method, base = plan.method, plan.base
    present = {name.partition("/")[2] for name in tensors}
    ordered = [module for module in (base.names[n].removesuffix(".weight") for n in base.linear) if module in present]
    factors = {module: (tensors[f"A/{module}"], tensors[f"B/{module}"]) for module in ordered}
    prototypes = {module: tensors[f"P/{module}"] for module in ordered if f"P/{module}" in tensors}
    modules = {name: base.names[name].removesuffix(".weight") for found in features.values() for name in found}
    by_module = {task: {modules[name]: rows for name, rows in found.items()} for task, found in features.items()}
    experts = RoutedExperts(list(plan.experts), factors, prototypes, by_module, method.router)
    experts.expert_directions = method.directions
    if method.needs_features:
        experts.depth = method.depth
        experts.settings = method.router_settings
        experts.shift = {modules[name]: rows for name, rows in shift.items()}
    return experts


def write_experts(
    folder: Path,
    scratch: Path,
    plan: MergePlan,
    updates: MergedUpdates,
    alpha: float,
    statistics: Mapping[str, ActivationStatistics],
    samples: Mapping[str, list[Sample]],
    accelerator: Accelerator,
    options: MergeOptions,
    progress: Callable[[str], Callable[[Iterable], Iterable]],
) -> None:
    """Put experts and router beside the merged model in `folder`; the processes share the maps, and the main one
    collects what they left in `scratch`.
    """
    rank, size = accelerator.process_index, accelerator.num_processes
    with together(accelerator), fast_products(plan.method.tolerance):
        merged, device = partial(updates.weight, alpha=alpha), algebra_device(accelerator)
        tensors = decompose_experts(plan, merged, statistics, rank, size, progress("Experts"), device)
        save_file(tensors, scratch / f"experts-{rank}.safetensors")
    with together(accelerator):
        if accelerator.is_main_process:
            parts = [load_file(path) for path in sorted(scratch.glob("experts-*.safetensors"))]
            found = {name: tensor for part in parts for name, tensor in part.items()}
            with quiet_loading():
                model = type(plan.base.skeleton).from_pretrained(folder)
            features, shift = _features(model, plan, statistics, samples, accelerator, options)
            _assemble(plan, found, features, shift).save(folder / ROUTED_FOLDER, model)


def _features(
    model: PreTrainedModel,
    plan: MergePlan,
    statistics: Mapping[str, ActivationStatistics],
    samples: Mapping[str, list[Sample]],
    accelerator: Accelerator,
    options: MergeOptions,
) -> tuple[Mapping[str, Mapping[str, Tensor]], dict[str, Tensor]]:
    """What a router is made from, by task, and its shift; see `RoutedExperts`."""
    features: dict[str, Mapping[str, Tensor]] = {t: found.pooled for t, found in statistics.items() if found}
    shift: dict[str, Tensor] = {}
    # All tasks' features are of one model: a router would learn to tell two models apart.
    if not plan.method.needs_features:
        features = {task: {} for task in plan.experts}
    elif plan.method.needs_merged_features and samples.keys() >= statistics.keys():
        for task, rows in samples.items():
            features[task] = pooled_inputs(
                model,
                rows,
                accelerator=accelerator,
                batch_size=options.batch_size,
                title=f"{task} for the router",
                progress=options.progress,
            )
        for name in next(iter(features.values())):
            apart = [features[task][name].mean(0) - statistics[task].pooled[name].mean(0) for task in features]
            shift[name] = torch.stack(apart).mean(0)
    return features, shift
