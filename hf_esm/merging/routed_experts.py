"""The experts and the router of ESM++ (arXiv 2606.19164), or the experts of TSV-C, written beside a merged model."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Optional

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from ..architecture import is_routable, to_matrices
from ..calibration import ActivationStatistics, pooled_inputs
from ..checkpoints import ROUTED_FOLDER, quiet_loading, write_body
from ..data import Sample
from ..planning import MergeOptions, MergePlan
from ..routing import RoutedExperts, expert_factors, unrouted
from ..utils import fast_products, together
from .weights import Worker, merge_units


def write_experts(
    folder: Path,
    scratch: Path,
    plan: MergePlan,
    merged: Callable[[str], Tensor],
    *,
    statistics: Mapping[str, ActivationStatistics],
    samples: Mapping[str, list[Sample]],
    accelerator: Accelerator,
    options: MergeOptions,
    progress: Callable[[str], Callable[[Iterable], Iterable]],
) -> None:
    """Write experts and router into the folder of a merged model.

    The processes share the linear maps, and leave their experts in `scratch`; the main process collects them.

    Args:
        merged: returns the merged model's weight by its canonical name.
        statistics: by task; empty if the method needs none.
        samples: unlabelled samples by task, of the tasks that have any; those of the statistics come first.
    """
    worker = Worker.of(accelerator)
    with together(accelerator), fast_products(plan.method.tolerance):
        tensors = decompose_experts(plan, merged, statistics, worker, progress("Experts"))
        save_file(tensors, scratch / f"experts-{worker.rank}.safetensors")
    with together(accelerator):
        if accelerator.is_main_process:
            parts = [load_file(path) for path in sorted(scratch.glob("experts-*.safetensors"))]
            experts = _assemble(plan, {name: tensor for part in parts for name, tensor in part.items()})
            with quiet_loading():
                model = type(plan.base.skeleton).from_pretrained(folder)
            if plan.method.needs_features:
                features = {task: known.pooled for task, known in statistics.items() if known}
                # All tasks' features are of one model: a router would learn to tell two models apart.
                if plan.method.needs_merged_features and samples.keys() >= statistics.keys():
                    read = {task: plan.in_merged_tokens(task, rows) for task, rows in samples.items()}
                    experts.shift = _rename(plan, _shift_features(features, model, read, accelerator, options))
                experts.features = {task: _rename(plan, rows) for task, rows in features.items()}
            experts.save(folder / ROUTED_FOLDER, model)
            if plan.method.keeps_bodies:
                _write_bodies(folder, plan, worker.device)


def _write_bodies(folder: Path, plan: MergePlan, device: Optional[torch.device]) -> None:
    """Write what each task keeps of its body beside its head: what no routed expert holds."""
    method, base = plan.method, plan.base

    def compress(update: Tensor) -> tuple[Tensor, Tensor]:
        rank = method.expert_rank(update.shape, len(plan.experts))
        return expert_factors(update.to(device), None, rank, method.tolerance)

    changed = [name for name in plan.heads.shared if name not in plan.unchanged and base.dtype(name).is_floating_point]
    names = unrouted(changed, base)
    for task, expert in plan.experts.items():
        write_body(folder, task, expert, base, names, compress)


def decompose_experts(
    plan: MergePlan,
    merged: Callable[[str], Tensor],
    statistics: Mapping[str, ActivationStatistics],
    worker: Worker,
    progress: Callable[[Iterable], Iterable],
) -> dict[str, Tensor]:
    """Compute the experts and prototypes of this process's share of the linear maps with statistics of all tasks.

    Returns `A [T, r, d_in]`, `B [T, d_out, r]` and, if there are statistics, `P [T, d_in]` of every map, named `A/`,
    `B/` and `P/` and the module's name.
    """
    tensors: dict[str, Tensor] = {}
    for unit in progress(worker.share(_routed_units(plan, statistics))):
        merged_weights = [merged(name).float() for name in unit]
        of_tasks = [_expert_factors(plan, t, unit, merged_weights, statistics, worker.device) for t in plan.experts]
        means = [statistics[task][unit[0]].mean.cpu() for task in plan.experts if plan.method.needs_statistics]
        for name, factors in zip(unit, zip(*of_tasks, strict=True), strict=True):
            module = _module(plan, name)
            tensors[f"A/{module}"], tensors[f"B/{module}"] = (torch.stack(p) for p in zip(*factors, strict=True))
            if means:
                tensors[f"P/{module}"] = torch.stack([normalize(mean, dim=0) for mean in means])
    return tensors


def _routed_units(plan: MergePlan, statistics: Mapping[str, ActivationStatistics]) -> list[list[str]]:
    """Return the linear maps that get experts: singly, or several that the method treats as one (q, k and v)."""
    method, base = plan.method, plan.base

    def routed(name: str) -> bool:
        known = not method.needs_statistics or all(name in of_task for of_task in statistics.values())
        return known and is_routable(name, base.linear.get(name)) and method.routes_on(base.names[name])

    units = [[name for name in unit if routed(name)] for unit in merge_units(plan, statistics)]
    return [unit for unit in units if unit]


def _expert_factors(
    plan: MergePlan,
    task: str,
    unit: list[str],
    merged: list[Tensor],
    statistics: Mapping[str, ActivationStatistics],
    device: Optional[torch.device],
) -> list[tuple[Tensor, Tensor]]:
    """Return `A [r, d_in]` and `B [d_out, r]` of one task's expert of each linear map of a unit.

    Several maps are decomposed as one, stacked along the output, and share `A`.
    """
    method, expert, base = plan.method, plan.experts[task], plan.base

    def stacked(parts: list[Tensor]) -> Tensor:
        return torch.cat(
            [to_matrices(part.to(device), base.linear[n])[0] for n, part in zip(unit, parts, strict=True)]
        )

    residual = stacked([expert.residual(n, weight) for n, weight in zip(unit, merged, strict=True)])
    update = None
    if method.directions == "update":
        update = stacked([expert.update(name, base.tensor(name)) for name in unit])
    inputs = statistics[task][unit[0]].to(device) if method.needs_statistics else None
    rank = method.expert_rank(residual.shape, len(plan.experts))
    a, b = expert_factors(residual, inputs, rank, method.tolerance, update)
    heights = [to_matrices(weight, base.linear[n])[0].shape[0] for n, weight in zip(unit, merged, strict=True)]
    return [(a, part.contiguous()) for part in b.split(heights)]


def _module(plan: MergePlan, name: str) -> str:
    """The module in the base model that holds a weight."""
    return plan.base.names[name].removesuffix(".weight")


def _rename(plan: MergePlan, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name rows by module instead of by weight."""
    return {_module(plan, name): row for name, row in rows.items()}


def _assemble(plan: MergePlan, tensors: Mapping[str, Tensor]) -> RoutedExperts:
    """The adapter's experts, from what `decompose_experts` returned, still without features."""
    method = plan.method
    present = {name.partition("/")[2] for name in tensors}
    modules = [module for module in (_module(plan, name) for name in plan.base.linear) if module in present]
    experts = RoutedExperts(
        tasks=list(plan.experts),
        factors={module: (tensors[f"A/{module}"], tensors[f"B/{module}"]) for module in modules},
        prototypes={module: tensors[f"P/{module}"] for module in modules if f"P/{module}" in tensors},
        features={task: {} for task in plan.experts},
        router=method.router,
        expert_directions=method.directions,
    )
    if method.needs_features:
        experts.depth, experts.settings = method.depth, method.router_settings
    return experts


def _shift_features(
    features: dict[str, Mapping[str, Tensor]],
    model: PreTrainedModel,
    samples: Mapping[str, list[Sample]],
    accelerator: Accelerator,
    options: MergeOptions,
) -> dict[str, Tensor]:
    """Replace the base's features by those of the merged model; return the mean differences (see `RoutedExperts`)."""
    of_base = dict(features)
    for task, rows in samples.items():
        features[task] = pooled_inputs(
            model,
            rows,
            accelerator=accelerator,
            batch_size=options.batch_size,
            title=f"{task} for the router",
            progress=options.progress,
        )
    shift = {}
    for name in next(iter(features.values())):
        apart = []
        for task, rows in of_base.items():
            merged = features[task][name][: len(rows[name])]
            apart.append((merged - rows[name]).flatten(0, -2).mean(0))
        shift[name] = torch.stack(apart)
    return shift
