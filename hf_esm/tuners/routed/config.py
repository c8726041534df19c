"""The configuration of an adapter of routed experts."""

import copy
from dataclasses import dataclass, field
from typing import Any, Optional

from peft import PeftConfig

from ...errors import HfEsmError
from ...utils import check_known
from ..base import check_tasks, names_to_sets
from ..registration import HfEsmPeftType


DECIDING = ("prototype", "discriminant")


ROUTERS = (*DECIDING, "oracle", "static")


FORMAT_VERSION = 3


@dataclass
class RoutedExpertsConfig(PeftConfig):
    """Configuration of a `RoutedExpertsModel`.

    Attributes:
        tasks: names of the experts, in the order of the factors.
        r: rank of each expert on each linear map.
        rank_pattern: rank of every module; keys are `^` and the full name. Modules that only a router reads have 0.
        target_modules: full names of the modules with experts, and of those that a router reads.
        exclude_modules: names of modules that are not adapted although `target_modules` matches, or a regular
            expression.
        router: how experts are chosen. `"prototype"`: every module decides for itself, by the cosine of its pooled
            input with the mean inputs of the experts (arXiv 2606.19164). `"discriminant"`: one decision per sample, by
            a linear discriminant on the pooled inputs of a few modules; modules that ran before the decision add no
            expert. `"oracle"`: the caller names the task of every sample, else an error is raised. `"static"`: no
            expert, unless the caller names a task.
        readers: names of the modules that a discriminant router reads, in the order in which they run; the last one
            decides.
        directions: number `K` of directions that a discriminant router reads along.
        top_k: maximal number of experts that a discriminant router adds to a sample.
        temperature: temperature of the tasks' probabilities.
        mixing_temperature: factor on `temperature` for the weights of experts. The weight that the experts lack to 1
            is that of the static model.
        confidence: probability from which on a task counts as sure.
        threshold: distance beyond which a sample counts as belonging to none of the tasks, and gets no expert.
        towers: `directions`, `temperature` and `threshold` by tower, for a model with two towers such as CLIP
            (`text_model`, `vision_model`). Each tower has its own readers, and decides for its own samples.
        base_fingerprint: fingerprint of the weights under the experts, by dtype; see `fingerprint`.
        format_version: version of the adapter's folder.

    Raises:
        HfEsmError: if a setting is not possible, or the format version is unknown.

    Example:
        >>> import torch
        >>> from hf_esm import RoutedExpertsConfig
        >>> from hf_esm.tuners import route
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> base = BertModel(BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
        >>> config = RoutedExpertsConfig(tasks=["sst2", "mrpc"], r=4, router="oracle", target_modules=["query"])
        >>> model = get_peft_model(base, config)
        >>> with route(model, ["sst2", "mrpc"]):  # one task per sample
        ...     output = model(input_ids=torch.tensor([[2, 7, 3], [2, 9, 3]]))
        >>> output.last_hidden_state.shape
        torch.Size([2, 3, 16])
    """

    tasks: list[str] = field(default_factory=list, metadata={"help": "names of the experts"})
    r: int = field(default=32, metadata={"help": "rank of each expert on each linear map"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "rank by module"})
    target_modules: Optional[list[str] | str] = field(default=None, metadata={"help": "modules with experts"})
    exclude_modules: Optional[list[str] | str] = field(
        default=None, metadata={"help": "names of modules that are not adapted, or a regular expression"}
    )
    router: str = field(default="discriminant", metadata={"help": f"how experts are chosen: {', '.join(ROUTERS)}"})
    readers: list[str] = field(default_factory=list, metadata={"help": "modules that the router reads"})
    directions: int = field(default=0, metadata={"help": "number of directions that the router reads along"})
    top_k: int = field(default=2, metadata={"help": "maximal number of experts of a sample"})
    temperature: float = field(default=1.0, metadata={"help": "temperature of the tasks' probabilities"})
    mixing_temperature: float = field(
        default=2.0, metadata={"help": "factor on temperature for the weights of experts"}
    )
    confidence: float = field(default=0.85, metadata={"help": "probability from which on a task counts as sure"})
    threshold: Optional[float] = field(
        default=None, metadata={"help": "distance beyond which a sample belongs to none of the tasks"}
    )
    towers: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "directions, temperature and threshold by tower"}
    )
    base_fingerprint: Optional[dict[str, str]] = field(
        default=None, metadata={"help": "fingerprint of the weights under the experts, by dtype"}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "version of the adapter's format"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HfEsmPeftType.ROUTED_EXPERTS
        names_to_sets(self)
        if self.format_version != FORMAT_VERSION:
            raise HfEsmError(
                f"The adapter of routed experts has format version {self.format_version}; this hf_esm reads version "
                f"{FORMAT_VERSION}. {'Upgrade hf_esm' if self.format_version > FORMAT_VERSION else 'Merge again'}."
            )
        check_known([self.router], ROUTERS, "router")
        check_tasks(self.tasks)
        if self.router == "discriminant" and not self.readers:
            raise HfEsmError("A discriminant router needs the modules that it reads: readers=[…].")

    @property
    def decides(self) -> bool:
        """Whether the router decides on tasks by itself."""
        return self.router in DECIDING

    def of_tower(self, tower: str) -> "RoutedExpertsConfig":
        """The settings of one tower; the whole configuration for a model without towers."""
        if tower not in self.towers:
            return self
        config = copy.copy(self)
        config.readers = [name for name in self.readers if name.startswith(f"{tower}.")]
        vars(config).update(self.towers[tower])
        return config

    @property
    def modules(self) -> list[str]:
        """Full names of the adapted modules, from `rank_pattern`; PEFT shortens `target_modules`."""
        return [pattern.removeprefix("^") for pattern in self.rank_pattern]
