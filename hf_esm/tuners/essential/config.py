"""The configuration of an adapter of essential components."""

from dataclasses import dataclass, field
from typing import Optional

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from ...errors import HfEsmError
from ..base import check_tasks, names_to_sets
from ..registration import HfEsmPeftType


# Adapters with gates are of version 2, so that an hf_esm that knows no gates refuses them.
FORMAT_VERSIONS = (1, 2)


@dataclass
class EssentialComponentsConfig(PeftConfig):
    """Configuration of an `EssentialComponentsModel`.

    Attributes:
        r: number of components of each linear map.
        rank_pattern: rank of the modules that have another rank than `r`. Keys are regular expressions for the ends
            of module names, as in LoRA; `^` before a full name matches that module alone.
        gates: whether every component has a factor, its gate. Gates are zero at the start, and they alone are trained.
        tasks: of an adapter with gates, the tasks whose components it holds; those of the first task come first.
        task_ranks: number of components of each task, in modules where tasks have unequal numbers. Keys as in
            `rank_pattern`.
        target_modules: names of the modules to adapt, a regular expression, or `"all-linear"`, as in LoRA.
        exclude_modules: names of modules that are not adapted although `target_modules` matches, or a regular
            expression.
        modules_to_save: other modules, such as a classifier, that are trained and saved with the adapter.
        format_version: version of the adapter's folder: 2 with gates, otherwise 1.

    Raises:
        HfEsmError: if a rank is below 1, tasks are named twice or without gates, or the format version is unknown.

    Example:
        >>> from hf_esm import EssentialComponentsConfig
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> base = BertModel(BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
        >>> config = EssentialComponentsConfig(r=4, target_modules=["query", "value"])
        >>> model = get_peft_model(base, config)  # the output is that of the base until the adapter is trained
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        256
        >>> gated = EssentialComponentsConfig(r=4, target_modules=["query"], gates=True, tasks=["law", "code"])
        >>> gated.task_ranks_of("encoder.layer.0.attention.self.query")
        {'law': 2, 'code': 2}
    """

    r: int = field(default=8, metadata={"help": "number of components of each linear map"})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "rank of modules with another rank than r, by the ends of their names"}
    )
    target_modules: Optional[list[str] | str] = field(
        default=None, metadata={"help": "names of the modules to adapt, a regular expression, or 'all-linear'"}
    )
    exclude_modules: Optional[list[str] | str] = field(
        default=None, metadata={"help": "names of modules that are not adapted, or a regular expression"}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "other modules to train and save with the adapter"}
    )
    gates: bool = field(
        default=False, metadata={"help": "train one factor per component, from zero, and nothing else"}
    )
    tasks: Optional[list[str]] = field(
        default=None, metadata={"help": "tasks whose components an adapter with gates holds, in order"}
    )
    task_ranks: dict[str, list[int]] = field(
        default_factory=dict,
        metadata={"help": "components of each task, by the ends of module names, where tasks have unequal numbers"},
    )
    format_version: int = field(default=1, metadata={"help": "version of the adapter's format"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HfEsmPeftType.ESSENTIAL_COMPONENTS
        names_to_sets(self)
        if self.format_version not in FORMAT_VERSIONS:
            versions = " and ".join(map(str, FORMAT_VERSIONS))
            raise HfEsmError(
                f"The adapter of essential components has format version {self.format_version}; this hf_esm reads "
                f"versions {versions}. Upgrade hf_esm."
            )
        self.format_version = FORMAT_VERSIONS[self.gates]
        for rank in (self.r, *self.rank_pattern.values()):
            if rank < 1:
                raise HfEsmError(f"Essential components of rank {rank}. Give 1 or more, or leave the module out.")
        if (self.tasks or self.task_ranks) and not self.gates:
            raise HfEsmError("Only gates combine the components of several tasks. Pass `gates=True`, or no `tasks`.")
        if self.tasks is not None:
            check_tasks(self.tasks)

    def rank_of(self, module: str) -> int:
        """Return the number of components of a module, by its full name."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.r)

    def task_ranks_of(self, module: str) -> dict[str, int]:
        """Return the number of components of each task in a module, in their order; empty if tasks are not known.

        Raises:
            HfEsmError: if they are not as many as the module has.
        """
        if not self.tasks:
            return {}
        rank, equal = self.rank_of(module), [self.rank_of(module) // len(self.tasks)] * len(self.tasks)
        ranks = self.task_ranks.get(get_pattern_key(list(self.task_ranks), module), equal)
        if len(ranks) != len(self.tasks) or sum(ranks) != rank:
            raise HfEsmError(
                f"{module} has {rank} components, but its {len(self.tasks)} tasks have {ranks}. Say in `task_ranks` "
                "how many of them are of each task."
            )
        return dict(zip(self.tasks, ranks, strict=True))
