"""What a routed adapter holds (ESM++, arXiv 2606.19164): experts by task and linear map, and the router."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..architecture import towers
from ..checkpoints import ROUTED_FOLDER, ROUTER_FEATURES, Checkpoint, LoraCheckpoint, rank_settings, write_adapter
from ..linalg import essential_subspace, truncated_svd
from ..methods import InputStatistics
from ..tuners.routed import RoutedExpertsConfig, fingerprint
from .discriminant import fit_discriminant


ROUTER_SETTINGS = ("top_k", "mixing_temperature", "confidence")


def expert_factors(
    residual: Tensor,
    inputs: Optional[InputStatistics],
    rank: int,
    tolerance: float = 0.0,
    update: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """One task's expert of one linear map: `A [r, d_in]` and `B [d_out, r]`, float32, with `B A = B Bᵀ residual`.

    `B` are the leading essential directions of the expert's own `update` `W_t − W_0`, so that along them the map gives
    what the expert's does; without one, of the residual `W_t − W_M` itself, which `B A` then comes nearest to. Without
    statistics of the inputs, they are leading singular vectors. Directions that are not there are zero, so that the
    ranks of all tasks agree.
    """
    shift = residual if update is None else update
    if inputs is None:
        directions, _, _ = truncated_svd(shift, rank, tolerance)
    else:
        directions = essential_subspace(inputs.factor, shift, rank, tolerance=tolerance).directions
    a, b = torch.zeros(rank, residual.shape[1]), torch.zeros(residual.shape[0], rank)
    found = directions.shape[1]
    a[:found], b[:, :found] = directions.T @ residual.to(directions.dtype), directions
    return a, b


def residual_update(expert: Checkpoint, name: str, merged: Tensor) -> Tensor:
    """`W_t − W_M`, float32: what an expert's weight has that the merged model's lacks."""
    if isinstance(expert, LoraCheckpoint) and name in expert.base.names:  # its update is over its own base
        own = expert.base.tensor(name)
        return expert.update(name, own) + (own.float() - merged.float())
    return expert.update(name, merged)


@dataclass
class RoutedExperts:
    """All that the adapter holds, before it is one.

    Attributes:
        tasks: names of the experts.
        factors: `(A [T, r, d_in], B [T, d_out, r])` by the module's name.
        prototypes: `[T, d_in]` by the module's name, normalised mean inputs.
        features: per task, what every block reads: `[N_t, d_in]` by the module's name, in the order in which they run.
        router: name of the router.
        depth: share of the blocks that run before the router decides.
        settings: of the router: `top_k`, `mixing_temperature`, `confidence`.
        expert_directions: what the directions of `factors` were taken of, for an expert that comes later.
        shift: by module, how much farther the merged model's mean feature is than the base's, which brings near what
            statistics say of another task; empty where the features are the base's own.
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

    def save(self, folder: Path, model: PreTrainedModel, base_fingerprint: Optional[dict[str, str]] = None) -> None:
        """Write the adapter for a merged model, and beside it the features that its router is made from."""
        readers, tensors, settings = self._route(towers(model))
        ranks = {module: a.shape[1] for module, (a, _) in self.factors.items()}
        ranks |= {module: 0 for module in readers if module not in ranks}
        largest, _ = rank_settings(ranks)
        config = RoutedExpertsConfig(
            tasks=self.tasks,
            r=largest,
            rank_pattern={f"^{module}": rank for module, rank in ranks.items()},
            target_modules=list(ranks),
            router=self.router,
            readers=readers,
            base_fingerprint=base_fingerprint or fingerprint(model, ranks),
            inference_mode=True,
            **self.settings,
            **settings,
        )
        tensors |= {f"{module}.routed_experts_A": a for module, (a, _) in self.factors.items()}
        tensors |= {f"{module}.routed_experts_B": b for module, (_, b) in self.factors.items()}
        write_adapter(folder, config, tensors, type(model))
        rows = {f"{task}/{module}": rows for task, found in self.features.items() for module, rows in found.items()}
        rows |= {f"/{module}": shift for module, shift in self.shift.items()}
        header = {"modules": self.modules, "depth": self.depth, "expert_directions": self.expert_directions}
        save_file(
            {name: tensor.contiguous() for name, tensor in rows.items()},
            folder / ROUTER_FEATURES,
            {"header": json.dumps(header)},  # one key: several have no order
        )

    @property
    def modules(self) -> list[str]:
        """The first modules of the blocks, which a router may read."""
        return list(next(iter(self.features.values())))

    def _route(self, apart: Sequence[str]) -> tuple[list[str], dict[str, Tensor], dict]:
        """The router's readers, tensors and settings; of two towers, each has its own."""
        if self.router != "discriminant":
            prototypes = self.prototypes if self.router == "prototype" else {}
            return [], {f"{m}.routed_experts_prototypes": p for m, p in prototypes.items()}, {}
        if not apart:
            return self._discriminant(self.modules)
        blocks = {name: [module for module in self.modules if module.startswith(f"{name}.")] for name in apart}
        found = {name: self._discriminant(own) for name, own in blocks.items() if own}  # one may be all convolutions
        readers = [module for own, _, _ in found.values() for module in own]
        tensors = {name: tensor for _, own, _ in found.values() for name, tensor in own.items()}
        return readers, tensors, {"towers": {name: settings for name, (_, _, settings) in found.items()}}

    def _discriminant(self, blocks: list[str]) -> tuple[list[str], dict[str, Tensor], dict]:
        """Readers, tensors and settings of one that reads the first of these blocks."""
        readers = blocks[: min(int(self.depth * len(blocks)), len(blocks) - 1) + 1]
        found = fit_discriminant({t: torch.cat([self.features[t][m] for m in readers], dim=1) for t in self.tasks})
        widths = [self.features[self.tasks[0]][m].shape[1] for m in readers]
        stacked = torch.cat([found.directions, found.center[None]]).float()
        parts = dict(zip(readers, stacked.split(widths, dim=1), strict=True))
        tensors = {f"{module}.routed_experts_projection": part for module, part in parts.items()}
        offset = torch.cat([found.directions @ found.center, found.center.square().sum()[None]])
        tensors[f"{readers[-1]}.routed_experts_classes"] = found.classes.float()
        tensors[f"{readers[-1]}.routed_experts_precision"] = torch.stack([found.precision, offset]).float()
        settings = {
            "directions": len(found.directions),
            "temperature": found.temperature,
            "threshold": found.threshold if found.threshold < float("inf") else None,
        }
        return readers, tensors, settings


def load_experts(folder: Path) -> RoutedExperts:
    """What stands in a merged model's folder."""
    config = PeftConfig.from_pretrained(str(folder / ROUTED_FOLDER))
    with safe_open(folder / ROUTED_FOLDER / ROUTER_FEATURES, "pt") as file:
        header = json.loads(file.metadata()["header"])
        modules = header["modules"]
        features = {task: {module: file.get_tensor(f"{task}/{module}") for module in modules} for task in config.tasks}
        shift = {key[1:]: file.get_tensor(key) for key in file.keys() if key.startswith("/")}
    held: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in load_file(folder / ROUTED_FOLDER / SAFETENSORS_WEIGHTS_NAME).items():
        module, _, name = key.removeprefix("base_model.model.").rpartition(".")
        held[name][module] = tensor
    factors = {module: (a, held["routed_experts_B"][module]) for module, a in held["routed_experts_A"].items()}
    prototypes = held["routed_experts_prototypes"]
    return RoutedExperts(
        config.tasks,
        factors,
        prototypes,
        features,
        config.router,
        header["depth"],
        {name: getattr(config, name) for name in ROUTER_SETTINGS},
        header["expert_directions"],
        shift,
    )
