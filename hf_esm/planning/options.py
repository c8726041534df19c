"""The options of `merge_models`: the one source of its keyword arguments, of recipe keys and of flags."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from typing import Any, Optional

import torch

from ..data import RunOptions
from ..errors import HfEsmError
from ..methods import MergeMethod
from ..metrics import Metric
from ..utils import bytes_of
from .refinement import RefineSettings, resolve_refine


@dataclass
class MergeOptions(RunOptions):
    """Everything about a merge except the models and the data. `merge_models` takes each field as an argument.

    Attributes:
        method: name of a method, `{"name": …, setting: value}`, an instance of its class, or `"auto"`: ESM; for models
            that write, ESM or RegMean, whichever agrees more with the experts, refined.
        alpha: scale of the merged update; a number, `"auto"` to choose the number on validation data or, without
            labels, by agreement with the experts, or None for the default of the method.
        refine: train gates on the experts' essential directions after the merge: True, or settings, see
            `RefineSettings`. By default, only `method="auto"` refines, and only models that write.
        num_samples: number of samples per task, chosen at random if there are more; 0 takes all. Where agreement
            chooses or refines, they are split: statistics are taken from some, agreement from the others.
        statistics_samples: number of samples per task that statistics are taken from; 0 takes all, and leaves none for
            agreement. By default 32, or half of the samples if agreement is used and there are fewer than 64.
        weights: weights of tasks in the merge by name, as `{"sst2": 0.5}`; 1 for a task that is not named, negative to
            negate what its expert learned.
        metric: what validation rows are scored by: a name, a function, or a `Metric`; see `metrics.resolve_metric`.
        rank: rank of each expert of `method="esm++"` and `"tsv-c"`, per linear map; by default that of the method.
        heads: which weights each task keeps for itself: `"auto"`, `"merge"`, `"keep"`, or names of modules; see
            `planning.heads.plan_heads`.
        dtype: floating-point dtype of the written weights, such as `"bfloat16"`; by default each weight keeps the
            dtype of the base.
        output_dir: folder for the merged model, which must not exist yet; by default a temporary one.
        overwrite: replace an earlier merged model in the output folder, when the new one is complete.
        max_shard_size: size of the largest file of weights: `"5GB"`, or a number of bytes.
        statistics_dir: folder in which the activation statistics are kept for later merges, one file per task.
        resume_dir: folder for work in progress (statistics, learned masks, merged weights). After an interruption, the
            same call continues from there. The work is removed when the merge has succeeded.

    Raises:
        HfEsmError: if a value is of another kind than its field, or out of range.

    Example:
        >>> from hf_esm import MergeOptions
        >>> options = MergeOptions(method={"name": "esm", "gamma": 0.2}, alpha=0.8)
        >>> options.num_samples, options.max_shard_size
        (64, '5GB')
    """

    method: str | Mapping[str, Any] | MergeMethod = field(
        default="auto", metadata={"help": "name of a merge method, or auto: chosen for the kind of model"}
    )
    alpha: Optional[float | str] = field(
        default=None,
        metadata={
            "help": "scale of the merged update: a number, or 'auto' to choose it on validation data or by agreement"
        },
    )
    refine: Optional[bool | Mapping[str, Any] | RefineSettings] = field(
        default=None, metadata={"help": "train gates on the experts' essential directions after the merge"}
    )
    num_samples: int = field(
        default=64, metadata={"help": "samples per task, chosen at random; 0 takes all", "least": 0}
    )
    statistics_samples: Optional[int] = field(
        default=None,
        metadata={"help": "samples per task for statistics (default: 32); 0 takes all", "least": 0},
    )
    weights: Optional[Mapping[str, float]] = field(
        default=None, metadata={"help": "weights of tasks in the merge, by name (default: 1)"}
    )
    metric: str | os.PathLike | Metric | Callable[..., float] = field(
        default="accuracy",
        metadata={
            "help": "what 'auto' goes by: accuracy, perplexity, mean-iou, exact-match, word-f1, or one of the "
            "evaluate library"
        },
    )
    rank: Optional[int] = field(default=None, metadata={"help": "rank of the experts of esm++ and tsv-c", "least": 1})
    heads: str | Iterable[str] = field(
        default="auto", metadata={"help": "what tasks keep for themselves: auto, merge, keep, or module names"}
    )
    dtype: Optional[str | torch.dtype] = field(
        default=None, metadata={"help": "dtype of the written weights (default: the base's)"}
    )
    output_dir: Optional[str | os.PathLike] = field(
        default=None, metadata={"help": "folder to write; it must not exist yet"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output folder"})
    max_shard_size: str | int | float = field(default="5GB", metadata={"help": "largest file of weights"})
    statistics_dir: Optional[str | os.PathLike] = field(
        default=None, metadata={"help": "folder to keep the activation statistics in, for later merges"}
    )
    resume_dir: Optional[str | os.PathLike] = field(
        default=None, metadata={"help": "folder to keep work in progress in; an interrupted merge continues there"}
    )

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str) and self.alpha != "auto":  # YAML reads 1e0 as a text
            with suppress(ValueError):
                self.alpha = float(self.alpha)
        if self.alpha not in (None, "auto") and not (isinstance(self.alpha, Real) and isfinite(self.alpha)):
            raise HfEsmError(f"`alpha` must be a finite number or 'auto', not {self.alpha!r}.")
        super().__post_init__()
        resolve_refine(self.refine)
        torch_dtype(self.dtype)
        bytes_of(self.max_shard_size, "max_shard_size")


def torch_dtype(dtype: Optional[str | torch.dtype]) -> Optional[torch.dtype]:
    """Return the floating-point dtype of this name in torch; None for None."""
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        raise HfEsmError(f"`dtype` must be a floating-point dtype of torch such as 'bfloat16', not {dtype!r}.")
    return resolved
