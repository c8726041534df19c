"""The configuration of an adapter of essential components."""

from dataclasses import dataclass, field
from typing import Optional

from peft import PeftConfig

from ...errors import HfEsmError
from ..base import names_to_sets
from ..registration import HfEsmPeftType


FORMAT_VERSION = 1


@dataclass
class EssentialComponentsConfig(PeftConfig):
    """Configuration of an `EssentialComponentsModel`.

    Attributes:
        r: number of components of each linear map.
        rank_pattern: rank of the modules that have another rank than `r`. Keys are regular expressions for the ends
            of module names, as in LoRA; `^` before a full name matches that module alone.
        target_modules: names of the modules to adapt, a regular expression, or `"all-linear"`, as in LoRA.
        exclude_modules: names of modules that are not adapted although `target_modules` matches, or a regular
            expression.
        modules_to_save: other modules, such as a classifier, that are trained and saved with the adapter.
        format_version: version of the adapter's folder.

    Raises:
        HfEsmError: if a rank is below 1, or the format version is unknown.

    Example:
        >>> from hf_esm import EssentialComponentsConfig
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> base = BertModel(BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
        >>> config = EssentialComponentsConfig(r=4, target_modules=["query", "value"])
        >>> model = get_peft_model(base, config)  # the output is that of the base until the adapter is trained
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        256
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
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "version of the adapter's format"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HfEsmPeftType.ESSENTIAL_COMPONENTS
        names_to_sets(self)
        if self.format_version != FORMAT_VERSION:
            raise HfEsmError(
                f"The adapter of essential components has format version {self.format_version}; this hf_esm reads "
                f"version {FORMAT_VERSION}. Upgrade hf_esm."
            )
        for rank in (self.r, *self.rank_pattern.values()):
            if rank < 1:
                raise HfEsmError(f"Essential components of rank {rank}. Give 1 or more, or leave the module out.")
