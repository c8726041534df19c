"""The options of `merge_models` in one place: keyword arguments, recipes and command line flags are read off here."""

from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from typing import Any, Optional

from ..data import RunOptions
from ..errors import HfEsmError
from ..methods import METHODS
from ..utils import bytes_of


@dataclass
class MergeOptions(RunOptions):
    """Everything about a merge but the models and the data.

    Attributes:
        method: name of a method, `{"name": …, setting: value}`, or its settings dataclass.
        alpha: scale of the merged update; a number, `"auto"` to choose it on validation data, or None for the
            method's default.
        metric: what validation rows are scored by; see `metrics.resolve_metric`.
        rank: of the experts, for `method="esm++"` and `"tsv-c"`.
        heads: what every task keeps to itself; see `heads.plan_heads`.
        dtype: of the written weights, by its name in torch; by default each keeps the base's.
        output_dir: folder to write, which must not exist yet.
        overwrite: replace the output folder, once the new one is whole.
        max_shard_size: largest file of weights.
        statistics_dir: folder to keep the activation statistics in, one file per task, for later merges.
        resume_dir: folder to keep work in progress in (statistics, what is being learned, merged weights): a merge
            that was interrupted goes on from there. It goes away with a merge that ends well.
    """

    method: Any = field(
        default="esm",
        metadata={"help": f"merge method: {', '.join(METHODS)}"},
    )
    alpha: Optional[float | str] = field(
        default=None,
        metadata={"help": "scale of the merged update: a number, or 'auto' to choose it on validation data"},
    )
    metric: Any = field(
        default="accuracy",
        metadata={
            "help": "what 'auto' goes by: accuracy, perplexity, mean-iou, exact-match, word-f1, or one of the "
            "evaluate library"
        },
    )
    rank: Optional[int] = field(default=None, metadata={"help": "rank of the experts of esm++ and tsv-c", "least": 1})
    heads: Any = field(
        default="auto", metadata={"help": "what tasks keep to themselves: auto, merge, keep, or module names"}
    )
    dtype: Optional[str] = field(default=None, metadata={"help": "dtype of the written weights (default: the base's)"})
    output_dir: Optional[str] = field(default=None, metadata={"help": "folder to write; it must not exist yet"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output folder"})
    max_shard_size: str = field(default="5GB", metadata={"help": "largest file of weights"})
    statistics_dir: Optional[str] = field(
        default=None, metadata={"help": "folder to keep the activation statistics in, for later merges"}
    )
    resume_dir: Optional[str] = field(
        default=None, metadata={"help": "folder to keep work in progress in; an interrupted merge goes on from there"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, str) and self.alpha != "auto":  # YAML takes 1e0 for a text
            with suppress(ValueError):
                self.alpha = float(self.alpha)
        if self.alpha not in (None, "auto") and not (isinstance(self.alpha, Real) and isfinite(self.alpha)):
            raise HfEsmError(f"alpha must be a number or 'auto', not {self.alpha!r}.")
        bytes_of(self.max_shard_size, "max_shard_size")
