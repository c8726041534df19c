"""What an adapter of routed experts is made of."""

import copy
from dataclasses import dataclass, field
from typing import Any, Optional

from peft import PeftConfig

from ...errors import HfEsmError
from ..registration import HfEsmPeftType


DECIDING = ("prototype", "discriminant")


ROUTERS = (*DECIDING, "oracle", "static")


FORMAT_VERSION = 3


@dataclass
class RoutedExpertsConfig(PeftConfig):
    """Settings of a `RoutedExpertsModel`.

    Attributes:
        tasks: names of the experts, in the order of the factors.
        r: rank of each expert, per linear map.
        rank_pattern: the rank of every module, by `^` and its full name; 0 for those that only a router reads.
        target_modules: full names of the modules with experts, and of those that a router reads.
        router: `"prototype"`: every module decides for itself, by the cosine of its pooled input with the experts'
            mean inputs (arXiv 2606.19164). `"discriminant"`: decided once per sample, by a linear discriminant on
            the pooled inputs of a few modules; modules that ran before add no expert. `"oracle"`: the caller
            names the task of every sample, and it is an error if not. `"static"`: no expert where none is named.
        readers: the modules that the discriminant router reads, in the order in which they run; the last decides.
        directions: number `K` of directions that it reads along.
        top_k: experts that a discriminant router adds to a sample at most: those of the likeliest tasks.
        temperature: of the probabilities.
        mixing_temperature: what `temperature` is multiplied by for the weights that experts are added with; what the
            weights lack to one is the static model's share.
        confidence: probability from which on a task counts as found.
        threshold: distance beyond which a sample is taken for none of the tasks and gets no expert.
        towers: `directions`, `temperature` and `threshold` by tower of a model with two, as CLIP's `text_model` and
            `vision_model`: each has readers of its own, and decides for its own samples.
        base_fingerprint: of the weights below the experts, by dtype; see `fingerprint`.
        format_version: of the adapter.
    """

    tasks: list[str] = field(default_factory=list, metadata={"help": "names of the experts"})
    r: int = field(default=32, metadata={"help": "rank of each expert, per linear map"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "rank by module"})
    target_modules: Optional[list[str] | str] = field(default=None, metadata={"help": "modules with experts"})
    exclude_modules: Optional[list[str] | str] = field(default=None, metadata={"help": "modules to leave alone"})
    router: str = field(default="discriminant", metadata={"help": f"how experts are chosen: {', '.join(ROUTERS)}"})
    readers: list[str] = field(default_factory=list, metadata={"help": "modules that the router reads"})
    directions: int = field(default=0, metadata={"help": "directions that the router reads along"})
    top_k: int = field(default=2, metadata={"help": "experts that a sample gets at most"})
    temperature: float = field(default=1.0, metadata={"help": "of the tasks' probabilities"})
    mixing_temperature: float = field(default=2.0, metadata={"help": "of the experts' weights, over that one"})
    confidence: float = field(default=0.85, metadata={"help": "probability from which on a task counts as found"})
    threshold: Optional[float] = field(default=None, metadata={"help": "distance from which a sample is of no task"})
    towers: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "directions, temperature and threshold by tower"}
    )
    base_fingerprint: Optional[dict[str, str]] = field(
        default=None, metadata={"help": "of the weights below the experts"}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "of the adapter"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HfEsmPeftType.ROUTED_EXPERTS
        for name in ("target_modules", "exclude_modules"):  # PEFT looks names up in sets
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.format_version != FORMAT_VERSION:
            raise HfEsmError(
                f"Routed experts of format version {self.format_version}; this hf_esm reads {FORMAT_VERSION}. "
                f"{'Upgrade' if self.format_version > FORMAT_VERSION else 'Merge again'}."
            )
        if self.router not in ROUTERS:
            raise HfEsmError(f"There is no router {self.router!r}; there are {', '.join(ROUTERS)}.")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise HfEsmError(f"Routed experts need tasks of different names, not {self.tasks}.")
        if self.router == "discriminant" and not self.readers:
            raise HfEsmError("A discriminant router needs the modules that it reads: readers=[…].")

    @property
    def decides(self) -> bool:
        """Whether it finds tasks by itself."""
        return self.router in DECIDING

    def of_tower(self, tower: str) -> "RoutedExpertsConfig":
        """The settings that hold in one of two towers."""
        if tower not in self.towers:
            return self
        found = copy.copy(self)
        found.readers = [name for name in self.readers if name.startswith(f"{tower}.")]
        vars(found).update(self.towers[tower])
        return found

    @property
    def modules(self) -> list[str]:
        """Full names of the modules, as far as `rank_pattern` says them; PEFT shortens `target_modules`."""
        return [pattern.removeprefix("^") for pattern in self.rank_pattern]
