"""The experts and features that a routed adapter stores (ESM++, arXiv 2606.19164)."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..architecture import SENTENCE_MODULES, is_routable, towers
from ..checkpoints import (
    ROUTED_FOLDER,
    ROUTER_FEATURES,
    Checkpoint,
    rank_settings,
    read_routed_settings,
    write_adapter,
)
from ..errors import DamagedFileError
from ..linalg import essential_subspace, truncated_svd
from ..methods import InputStatistics
from ..tuners.routed import RoutedExpertsConfig, fingerprint
from ..utils import AGAIN, read_tensors, reading
from .router import Router, discriminant_router, prototype_router


_ROUTER_SETTINGS = ("top_k", "mixing_temperature", "confidence")


def expert_factors(
    residual: Tensor,
    inputs: Optional[InputStatistics],
    rank: int,
    tolerance: float = 0.0,
    update: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """One task's expert on one linear map: `A [r, d_in]` and `B [d_out, r]`, float32, with `B A = B Bᵀ residual`.

    Columns of `B` beyond the rank of the decomposed matrix are zero, so that the experts of all tasks have one rank.

    Args:
        residual: `W_t − W_M [d_out, d_in]`, see `Checkpoint.residual`.
        inputs: statistics of the map's inputs. Without them, `B` are leading singular vectors.
        rank: number `r` of directions.
        tolerance: of the decomposition; 0 is exact.
        update: the expert's own update `W_t − W_0`. If given, `B` are its leading essential directions, along which
            the map then gives the expert's output. Without it, `B` are those of the residual, and `B A` is the nearest
            approximation of the residual.
    """
    decomposed = residual if update is None else update
    if inputs is None:
        directions, _, _ = truncated_svd(decomposed, rank, tolerance)
    else:
        directions = essential_subspace(inputs.factor, decomposed, rank, tolerance=tolerance).directions
    a, b = torch.zeros(rank, residual.shape[1]), torch.zeros(residual.shape[0], rank)
    count = directions.shape[1]
    a[:count], b[:, :count] = directions.T @ residual.to(directions.dtype), directions
    return a, b


def unrouted(names: Iterable[str], base: Checkpoint) -> list[str]:
    """Return the weights of a body to which no routed expert can be added, without dense modules after the model."""
    routable = {name for name in names if is_routable(name, base.linear.get(name))}
    return [name for name in names if name not in routable and not name.startswith(f"{SENTENCE_MODULES}.")]


@dataclass
class RoutedExperts:
    """Everything that a routed adapter is made from.

    Attributes:
        tasks: names of the experts.
        factors: `(A [T, r, d_in], B [T, d_out, r])` by the module's name.
        prototypes: `[T, d_in]` by the module's name: normalised mean inputs.
        features: per task, the pooled inputs of every block, or of those that the router reads: `[N_t, d_in]`, or
            `[N_t, P, d_in]` of `P` beginnings of a sample, by the name of the block's first module, in the order in
            which blocks run.
        router: name of the router.
        depth: share of the blocks that run before the router decides.
        settings: settings of the router: `top_k`, `mixing_temperature`, `confidence`.
        expert_directions: the matrix whose directions the experts have, `"update"` or `"residual"`, for experts that
            are added later.
        shift: `[S, d_in]` by module: of `S` tasks, the mean feature of the merged model minus that of the base. Their
            mean is added to the base's features of a task that comes later. Empty if `features` are the base's own.
    """

    tasks: list[str]
    factors: dict[str, tuple[Tensor, Tensor]]
    prototypes: dict[str, Tensor]
    features: dict[str, dict[str, Tensor]]
    router: str = "discriminant"
    depth: float = 1 / 3
    settings: dict[str, Any] = field(default_factory=dict)
    expert_directions: str = "residual"
    shift: dict[str, Tensor] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """The first modules of the blocks, which a router may read."""
        return list(next(iter(self.features.values())))

    def remove(self, task: str) -> None:
        """Remove the expert of a task."""
        left = [i for i, name in enumerate(self.tasks) if name != task]
        self.factors = {module: (a[left], b[left]) for module, (a, b) in self.factors.items()}
        self.prototypes = {module: rows[left] for module, rows in self.prototypes.items()}
        self.tasks.remove(task)
        del self.features[task]

    def save(self, folder: Path, model: PreTrainedModel, base_fingerprint: Optional[dict[str, str]] = None) -> None:
        """Write the adapter over a merged model, and the features from which its router is made.

        Args:
            folder: must not exist yet.
            model: the merged model.
            base_fingerprint: of the merged model, if it is known.
        """
        router = self._make_router(model)
        ranks = {module: a.shape[1] for module, (a, _) in self.factors.items()}
        ranks |= {module: 0 for module in router.readers if module not in ranks}
        largest, _ = rank_settings(ranks)
        config = RoutedExpertsConfig(
            tasks=self.tasks,
            r=largest,
            rank_pattern={f"^{module}": rank for module, rank in ranks.items()},
            target_modules=list(ranks),
            router=self.router,
            readers=router.readers,
            base_fingerprint=base_fingerprint or fingerprint(model, ranks),
            inference_mode=True,
            **self.settings,
            **router.settings,
        )
        tensors = dict(router.tensors)
        tensors |= {f"{module}.routed_experts_A": a for module, (a, _) in self.factors.items()}
        tensors |= {f"{module}.routed_experts_B": b for module, (_, b) in self.factors.items()}
        write_adapter(folder, config, tensors, type(model))
        self._save_features(folder / ROUTER_FEATURES, router.readers)

    def _make_router(self, model: PreTrainedModel) -> Router:
        if self.router == "discriminant":
            return discriminant_router(self.features, self.depth, towers(model))
        return prototype_router(self.prototypes if self.router == "prototype" else {})

    def _save_features(self, path: Path, readers: list[str]) -> None:
        """Write the features of the modules that the router reads; with these alone, it reads all (depth 1)."""
        tensors = {f"{task}/{module}": pooled[module] for task, pooled in self.features.items() for module in readers}
        tensors |= {f"/{module}": shift for module, shift in self.shift.items() if module in readers}
        header = {"modules": readers, "depth": 1.0, "expert_directions": self.expert_directions}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            path,
            {"header": json.dumps(header)},  # one key, since several keys are written in any order
        )


def load_experts(folder: Path) -> RoutedExperts:
    """The experts in a merged model's folder."""
    config = read_routed_settings(folder, str(folder))
    path = folder / ROUTED_FOLDER / ROUTER_FEATURES
    with reading(path), safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["header"])
        modules = header["modules"]
        features = {task: {module: file.get_tensor(f"{task}/{module}") for module in modules} for task in config.tasks}
        # hf_esm 0.1 stored the mean over the tasks alone.
        shift = {key[1:]: torch.atleast_2d(file.get_tensor(key)) for key in file.keys() if key.startswith("/")}
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in read_tensors(folder / ROUTED_FOLDER / SAFETENSORS_WEIGHTS_NAME).items():
        module, _, name = key.removeprefix("base_model.model.").rpartition(".")
        tensors[name][module] = tensor
    if tensors["routed_experts_A"].keys() != tensors["routed_experts_B"].keys():
        raise DamagedFileError(f"{folder / ROUTED_FOLDER}: factors of some experts are missing. {AGAIN}")
    return RoutedExperts(
        tasks=config.tasks,
        factors={
            module: (a, tensors["routed_experts_B"][module]) for module, a in tensors["routed_experts_A"].items()
        },
        prototypes=tensors["routed_experts_prototypes"],
        features=features,
        router=config.router,
        depth=header["depth"],
        settings={name: getattr(config, name) for name in _ROUTER_SETTINGS},
        expert_directions=header["expert_directions"],
        shift=shift,
    )
