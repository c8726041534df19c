"""The options that `calibrate`, `evaluate`, `compare` and `merge_models` share; each field also makes a flag."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Optional

from ..utils import bytes_of, check_fields, check_known


COLUMNS = ("text", "text_pair", "text_target", "image", "audio", "label")


@dataclass
class SampleOptions:
    """How samples are chosen and encoded.

    Attributes:
        num_samples: number of samples per task, chosen at random if there are more; 0 takes all.
        seed: seed of that choice.
        max_length: number of tokens that a text is cut to; by default what the model takes, at most 512.
        columns: names of the columns that hold `text`, `text_pair`, `text_target` (what an encoder-decoder is to
            write), `image`, `audio` and `label`; needed only for columns that are named otherwise.
    """

    num_samples: int = field(
        default=32, metadata={"help": "samples per task, chosen at random; 0 takes all", "least": 0}
    )
    seed: int = field(default=0, metadata={"help": "seed of the choice of samples", "least": 0})
    max_length: Optional[int] = field(
        default=None, metadata={"help": "tokens that a text is cut to (default: at most 512)", "least": 1}
    )
    columns: Optional[Mapping[str, str]] = field(
        default=None,
        metadata={"help": "columns that hold text, text_pair, text_target, image, audio or label, as text=NAME"},
    )

    def __post_init__(self) -> None:
        check_fields(self)
        self.columns = self.columns or {}
        check_known(self.columns, COLUMNS, "kind of column", "`columns`")


@dataclass
class RunOptions(SampleOptions):
    """How a model is opened and run: the options that `calibrate` and `merge_models` share.

    Attributes:
        batch_size: number of samples per batch and process, while calibrating and validating.
        max_memory: memory for the model that is being calibrated, and later for the weights that are merged at the
            same time: `"16GB"`, or a number of bytes. The rest of a model, and of the factors, goes to disk.
        allow_pickle: read `.bin` checkpoints, which can run code.
        trust_remote_code: run code that comes with a model.
        progress: show progress: bars on a terminal or in a notebook, elsewhere lines in the log (level `INFO`).
    """

    batch_size: int = field(default=8, metadata={"help": "samples per batch and process", "least": 1})
    max_memory: Optional[int | float | str] = field(
        default=None, metadata={"help": "memory to calibrate and to merge in, such as 16GB"}
    )
    allow_pickle: bool = field(default=False, metadata={"help": "read .bin checkpoints (can run code)"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with a model"})
    progress: bool = field(default=True, metadata={"help": "show progress"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_memory is not None:
            bytes_of(self.max_memory, "max_memory")
