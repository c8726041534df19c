"""What an adapter of essential components is made of."""

from dataclasses import dataclass, field
from typing import Optional

from peft import PeftConfig

from ...errors import HfEsmError
from ..registration import HfEsmPeftType


FORMAT_VERSION = 1


@dataclass
class EssentialComponentsConfig(PeftConfig):
    """Settings of an `EssentialComponentsModel`.

    Attributes:
        r: components per linear map.
        rank_pattern: another rank for some modules, by regular expressions of the ends of their names, as in LoRA;
            `^` before a full name stands for that module alone.
        target_modules: names of the adapted modules, or a regular expression, as in LoRA.
        exclude_modules: names of modules that are left alone all the same, or a regular expression.
        modules_to_save: other modules, such as a classifier, that are trained and saved with the adapter.
        format_version: of the adapter's folder.
    """

    r: int = field(default=8, metadata={"help": "components per linear map"})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "rank of modules where it is not r, by the ends of their names"}
    )
    target_modules: Optional[list[str] | str] = field(
        default=None, metadata={"help": "names of the adapted modules, a regular expression, or 'all-linear'"}
    )
    exclude_modules: Optional[list[str] | str] = field(
        default=None, metadata={"help": "names of modules to leave alone, or a regular expression"}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "other modules to train and save with the adapter"}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "version of the adapter's format"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HfEsmPeftType.ESSENTIAL_COMPONENTS
        for name in ("target_modules", "exclude_modules"):  # PEFT looks names up in sets
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.format_version != FORMAT_VERSION:
            raise HfEsmError(
                f"Essential components of format version {self.format_version}; this hf_esm reads {FORMAT_VERSION}. "
                "Upgrade hf_esm."
            )
        for rank in (self.r, *self.rank_pattern.values()):
            if rank < 1:
                raise HfEsmError(f"Essential components: rank {rank}. Give 1 or more, or leave the module out.")
