"""How samples are chosen and encoded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Optional

from ..errors import HfEsmError
from ..utils import bytes_of


COLUMNS = ("text", "text_pair", "text_target", "image", "audio", "label")


@dataclass
class SampleOptions:
    """How samples are chosen and encoded.

    Attributes:
        num_samples: how many are taken, at random where there are more; 0 takes all.
        seed: seed of that choice.
        max_length: tokens that a text is cut to; by default what the model takes, at most 512.
        columns: names of the columns for `text`, `text_pair`, `text_target` (what an encoder-decoder is to write),
            `image`, `audio` and `label`, where they differ.
    """

    num_samples: int = field(
        default=32, metadata={"help": "samples per task, chosen at random; 0 takes all", "least": 0}
    )
    seed: int = field(default=0, metadata={"help": "seed of their selection", "least": 0})
    max_length: Optional[int] = field(
        default=None, metadata={"help": "tokens a text is cut to (default: at most 512)", "least": 1}
    )
    columns: Mapping[str, str] = field(
        default_factory=dict,
        metadata={"help": "columns that hold text, text_pair, text_target, image, audio or label, as text=NAME"},
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value, least = getattr(self, option.name), option.metadata.get("least")
            if least is None or (value is None and option.default is None):
                continue
            if not isinstance(value, Integral) or value < least:
                raise HfEsmError(f"{option.name} must be a whole number, {least} or more, not {value!r}.")
        if not isinstance(self.columns, Mapping) or not set(self.columns) <= set(COLUMNS):
            raise HfEsmError(f"columns must name the columns of {', '.join(COLUMNS)}, not {self.columns!r}.")


@dataclass
class RunOptions(SampleOptions):
    """How a model is opened and run: what `calibrate` and `merge_models` share.

    Attributes:
        batch_size: samples per batch and process while calibrating and validating.
        max_memory: what a model that calibrates, and then the weights that are merged side by side, may take: `"16GB"`
            or bytes. More of a model, and factors that do not fit beside it, go to disk.
        allow_pickle: read `.bin` checkpoints.
        trust_remote_code: run code that comes with a model.
        progress: show progress bars.
    """

    batch_size: int = field(default=8, metadata={"help": "samples per batch and process", "least": 1})
    max_memory: Optional[int | str] = field(
        default=None, metadata={"help": "memory to calibrate and to merge in, such as 16GB"}
    )
    allow_pickle: bool = field(default=False, metadata={"help": "read .bin checkpoints (can run code)"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with a model"})
    progress: bool = field(default=True, metadata={"help": "show progress bars"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in fields(self):
            if isinstance(option.default, bool) and not isinstance(getattr(self, option.name), bool):
                raise HfEsmError(f"{option.name} must be true or false, not {getattr(self, option.name)!r}.")
        if self.max_memory is not None:
            bytes_of(self.max_memory, "max_memory")
