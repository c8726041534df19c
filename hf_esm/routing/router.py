"""The router of a routed adapter, as tensors and settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .discriminant import fit_discriminant


Features = Mapping[str, Mapping[str, Tensor]]


@dataclass
class Router:
    """A router, as an adapter stores it.

    Attributes:
        readers: full names of the modules that it reads, in the order in which they run.
        tensors: by their names in the adapter.
        settings: fields of `RoutedExpertsConfig`.
    """

    readers: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def prototype_router(prototypes: Mapping[str, Tensor]) -> Router:
    """A router that decides in every module, by prototypes `[T, d_in]` by the module's name."""
    return Router(tensors={f"{module}.routed_experts_prototypes": rows for module, rows in prototypes.items()})


def discriminant_router(features: Features, depth: float, towers: Sequence[str] = ()) -> Router:
    """A router that decides once per sample; over two towers, once in each.

    Args:
        features: pooled inputs `[N_t, d_in]` or `[N_t, P, d_in]`, by task and module, in the order in which the
            modules run.
        depth: share of the blocks that run before the decision.
        towers: names of the towers of a model that has two.
    """
    blocks = _by_tower(features, towers)
    if not towers:
        return _fit(features, blocks[""], depth)
    routers = {tower: _fit(features, names, depth) for tower, names in blocks.items()}
    whole = Router(settings={"towers": {tower: router.settings for tower, router in routers.items()}})
    for router in routers.values():
        whole.readers += router.readers
        whole.tensors |= router.tensors
    return whole


def found_by_block(
    features: Features, samples: Features, towers: Sequence[str] = ()
) -> dict[str, dict[str, list[float]]]:
    """The share of each task's samples that a discriminant router would send to the task, by the number of blocks that
    run before it decides: by tower (`""` without towers), task and number. Towers that read no samples are left out.

    Args:
        features: pooled inputs of all blocks, as for `discriminant_router`, that the router is made from.
        samples: the same of other samples, by task and module; of several beginnings, the whole samples count.
        towers: names of the towers of a model that has two.
    """
    whole = {
        task: {name: rows[:, -1] if rows.dim() == 3 else rows for name, rows in of_task.items()}
        for task, of_task in samples.items()
    }
    shares: dict[str, dict[str, list[float]]] = {}
    for tower, blocks in _by_tower(features, towers).items():
        if not all(set(blocks) <= of_task.keys() for of_task in whole.values()):
            continue
        shares[tower] = {task: [] for task in features}
        for end in range(1, len(blocks) + 1):
            router, read = fit_discriminant(_joined(features, blocks[:end])), _joined(whole, blocks[:end])
            for i, task in enumerate(features):
                near, _ = router.distances(read[task])
                shares[tower][task].append(float((near.argmin(-1) == i).double().mean()))
    return shares


def blocks_before(depth: float, blocks: int) -> int:
    """The number of blocks that run before a discriminant router decides, of all blocks of a model or tower."""
    return min(int(depth * blocks), blocks - 1)


def shift_of_task(features: Features, task: str, shifts: Mapping[str, Tensor], towers: Sequence[str] = ()) -> float:
    """The mean shift from the base's features to the merged model's, over the distance of a task from the nearest
    other one, as the router measures both. Over two towers, the larger of their ratios.

    A task that is added with the base's features gets the mean shift of the other tasks, and its own is not known. If
    the shift is as large as the distance between tasks, samples of the task can be found to be of another one.

    Args:
        features: pooled inputs of all tasks, as for `discriminant_router`, of the modules that it reads.
        task: the task that was added.
        shifts: `[S, d_in]` by module, mean feature of the merged model minus that of the base, of `S` tasks.
        towers: names of the towers of a model that has two.
    """
    ratios = []
    for readers in _by_tower(features, towers).values():
        joined = _joined(features, readers)
        router = fit_discriminant(joined)
        means = {name: rows.flatten(0, -2).double().mean(0) for name, rows in joined.items()}
        apart = min(router.length(mean - means[task]) for name, mean in means.items() if name != task)
        ratios.append(router.length(torch.cat([shifts[module].double().mean(0) for module in readers])) / apart)
    return max(ratios)


def _by_tower(features: Features, towers: Sequence[str]) -> dict[str, list[str]]:
    """The modules with features, by tower; under "" in a model without towers."""
    modules = list(next(iter(features.values())))
    blocks = {tower: [module for module in modules if module.startswith(f"{tower}.")] for tower in towers}
    # A tower that consists of convolutions has no blocks to read.
    return {tower: names for tower, names in blocks.items() if names} if towers else {"": modules}


def _joined(features: Features, readers: list[str]) -> dict[str, Tensor]:
    """The features of these modules side by side, by task."""
    return {task: torch.cat([pooled[module] for module in readers], dim=-1) for task, pooled in features.items()}


def _fit(features: Features, blocks: list[str], depth: float) -> Router:
    """A discriminant router that reads the first of these blocks."""
    readers = blocks[: blocks_before(depth, len(blocks)) + 1]
    fit = fit_discriminant(_joined(features, readers))
    widths = [next(iter(features.values()))[module].shape[-1] for module in readers]
    columns = torch.cat([fit.directions, fit.center[None]]).float().split(widths, dim=1)
    tensors = {f"{module}.routed_experts_projection": part for module, part in zip(readers, columns, strict=True)}
    offset = torch.cat([fit.directions @ fit.center, fit.center.square().sum()[None]])
    tensors[f"{readers[-1]}.routed_experts_classes"] = fit.classes.float()
    tensors[f"{readers[-1]}.routed_experts_precision"] = torch.stack([fit.precision, offset]).float()
    settings = {
        "directions": len(fit.directions),
        "temperature": fit.temperature,
        "threshold": fit.threshold if fit.threshold < float("inf") else None,
    }
    return Router(readers, tensors, settings)
