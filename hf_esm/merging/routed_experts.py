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
from ..checkpoints import ROUTED_FOLDER, quiet_loading
from ..data import Sample
from ..planning import MergeOptions, MergePlan
from ..routing import RoutedExperts, expert_factors
from ..utils import fast_products, together
from .weights import Worker


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
    base, tensors = plan.base, {}
    routable = [name for name in plan.heads.shared if is_routable(name, base.linear.get(name))]
    if plan.method.needs_statistics:
        routable = [name for name in routable if all(name in known for known in statistics.values())]
    for name in progress(worker.share(routable)):
        weight, module = merged(name).float(), _module(plan, name)
        factors = [_expert_factors(plan, task, name, weight, statistics, worker.device) for task in plan.experts]
        tensors[f"A/{module}"], tensors[f"B/{module}"] = (torch.stack(part) for part in zip(*factors, strict=True))
        if plan.method.needs_statistics:
            means = [statistics[task][name].to(worker.device).mean for task in plan.experts]
            tensors[f"P/{module}"] = torch.stack([normalize(mean, dim=0).cpu() for mean in means])
    return tensors


def _expert_factors(
    plan: MergePlan,
    task: str,
    name: str,
    merged: Tensor,
    statistics: Mapping[str, ActivationStatistics],
    device: Optional[torch.device],
) -> tuple[Tensor, Tensor]:
    """Return `A [r, d_in]` and `B [d_out, r]` of one task's expert of a linear map."""
    method, expert, linear = plan.method, plan.experts[task], plan.base.linear[name]
    (residual,) = to_matrices(expert.residual(name, merged).to(device), linear)
    update = None
    if method.directions == "update":
        (update,) = to_matrices(expert.update(name, plan.base.tensor(name)).to(device), linear)
    inputs = statistics[task][name].to(device) if method.needs_statistics else None
    rank = method.expert_rank(residual.shape, len(plan.experts))
    return expert_factors(residual, inputs, rank, method.tolerance, update)


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
    """Replace the base's features by those of the merged model; return the mean difference (see `RoutedExperts`)."""
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
        shift[name] = torch.stack(apart).mean(0)
    return shift
