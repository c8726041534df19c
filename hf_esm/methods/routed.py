"""ESM++: ESM with routed experts (arXiv 2606.19164)."""

import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Optional

import torch

from .essential import EssentialMerge
from .published import ROUTED_ROBERTA, ROUTED_VIT


@dataclass
class RoutedMerge(EssentialMerge):
    """ESM++: the static ESM model with an expert per task and linear map, and a router (arXiv 2606.19164).

    The settings are those of ESM, for the static model, and the following. In addition to the published router there
    is a router that decides once per sample and adds the experts of the likeliest tasks, each weighted by how likely
    its task is. With that router, an expert's directions are those of the expert's update: within them the routed
    model answers as the expert does, outside of them as the merged model, so that an expert of the wrong task does a
    quarter of the harm. The published directions, those of what the merged model lacks (`residual`), are as good or
    better if the task is known.

    `roberta()` and `vit()` are the published routed models: the static model of that paper's code, a prototype router
    that decides per layer, and experts of residual directions on the linear maps that the code routes. One thing
    differs: the RoBERTa code pools over a whole batch, here each sample is routed by itself.

    Tasks of language models differ so much that a router finds nearly all of them before the first block. There it
    decides before that block, and the directions are the published ones.
    """

    name: ClassVar[str] = "esm++"

    rank: int = field(
        default=32, metadata={"help": "rank of each expert, per linear map; published: 8 and 32", "least": 1}
    )
    static_method: str = field(
        default="auto",
        metadata={
            "help": "what the static model is merged by: own, ESM with the settings above; auto, on models that write "
            "what method=auto chooses there, otherwise own; or one of the methods that it chooses from",
            "choices": ("auto", "own", "esm", "regmean", "mean"),
        },
    )
    router: str = field(
        default="discriminant",
        metadata={
            "help": "how experts are chosen: discriminant, once per sample; prototype, per layer, as published; "
            "oracle, by the caller alone; static, by the caller if at all",
            "choices": ("discriminant", "prototype", "oracle", "static"),
        },
    )
    depth: Optional[float] = field(
        default=None,
        metadata={
            "help": "share of the blocks that run before the discriminant router decides; by default 0 for language "
            "models, else 1/3",
            "least": 0,
            "most": 1,
        },
    )
    top_k: int = field(
        default=2,
        metadata={"help": "experts that the discriminant router adds to a sample at most", "least": 1},
    )
    mixing_temperature: Optional[float] = field(
        default=None,
        metadata={
            "help": "temperature of the weights that experts are added with, over that of the probabilities; by "
            "default 1 for language models, else 2",
            "above": 0,
        },
    )
    confidence: float = field(
        default=0.85,
        metadata={"help": "probability from which on a sample's task counts as found", "least": 0, "most": 1},
    )
    expert_directions: str = field(
        default="",
        metadata={
            "help": "what an expert approximates: update, the expert's whole update; residual, what the merged model "
            "lacks of it, as published; by default, update for the discriminant router except on language models, "
            "else residual",
            "choices": ("update", "residual", ""),
        },
    )
    targets: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "regular expressions of the names of linear maps that get experts; by default, all get them"
        },
    )
    router_features: str = field(
        default="merged",
        metadata={
            "help": "whose features the router is made from: merged (one more pass), or base (no data needed)",
            "choices": ("merged", "base"),
        },
    )

    @classmethod
    def roberta(cls) -> "RoutedMerge":
        """Return the settings of the published RoBERTa code, which routes the six linear maps of each block."""
        return cls(**ROUTED_ROBERTA)

    @classmethod
    def vit(cls) -> "RoutedMerge":
        """Return the settings of the published ViT code, which routes q, k and v as one map, and the first MLP map."""
        return cls(**ROUTED_VIT)

    def routes_on(self, name: str) -> bool:
        """Return whether a linear map, by the name of its weight in the base, gets experts."""
        return not self.targets or any(re.search(target, name) for target in self.targets)

    def for_model(self, reads_prompts: bool, writes: bool = False) -> "RoutedMerge":
        """Return the method with values for `depth`, `mixing_temperature` and `expert_directions`."""
        depth, temperature = (0.0, 1.0) if reads_prompts else (1 / 3, 2.0)
        directions = "update" if self.needs_features and not reads_prompts else "residual"
        return replace(
            self,
            depth=depth if self.depth is None else self.depth,
            mixing_temperature=temperature if self.mixing_temperature is None else self.mixing_temperature,
            expert_directions=self.expert_directions or directions,
        )

    @property
    def directions(self) -> str:
        """`expert_directions`; see `for_model`."""
        return self.expert_directions

    @property
    def needs_merged_features(self) -> bool:
        """Whether the router is made from features of the merged model, not from the base's."""
        return self.router_features == "merged"

    @property
    def router_settings(self) -> dict[str, Any]:
        """`top_k`, `mixing_temperature` and `confidence` of the discriminant router."""
        return {name: getattr(self, name) for name in ("top_k", "mixing_temperature", "confidence")}

    def expert_rank(self, shape: torch.Size, tasks: int) -> int:
        """Return the rank of one expert of a map `[d_out, d_in]`."""
        return min(self.rank, *shape)
