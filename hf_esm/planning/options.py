"""The options of `merge_models`: the one source of its keyword arguments, of recipe keys and of flags."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch

from ..architecture import KINDS
from ..data import RunOptions
from ..errors import HfEsmError
from ..methods import MergeMethod
from ..metrics import BUILT_IN, Metric
from ..utils import bytes_of, check_known, finite_number
from .depth import LinesSettings, resolve_lines
from .refinement import RefineSettings, resolve_refine


@dataclass
class MergeOptions(RunOptions):
    """Everything about a merge except the models and the data. `merge_models` takes each field as an argument.

    Attributes:
        method: name of a method, `{"name": …, setting: value}`, an instance of its class, or `"auto"`: ESM; for models
            that write, ESM or RegMean, whichever agrees more with the experts, refined.
        alpha: scale of the merged update; a number, `"auto"` to choose the number on validation data or, without
            labels, by agreement with the experts, or None for the default of the method. Or one of these by kind of
            weight (`"attention"`, `"mlp"`, `"norm"`, `"embedding"`, `"head"`, `"bias"`), searched one kind after the
            other; other kinds keep the method's default.
        refine: train gates on the experts' essential directions after the merge: True, or settings, see
            `RefineSettings`. By default, only `method="auto"` refines, and only models that write.
        lines: let the scale of the merged update grow linearly with depth, by any method that has an α: True, or end
            points as factors of α, `{"first": 0.5, "last": 1.5}`, see `LinesSettings`.
        num_samples: number of samples per task, chosen at random if there are more; 0 takes all. Where agreement
            chooses or refines, they are split: statistics are taken from some, agreement from the others.
        statistics_samples: number of samples per task that statistics are taken from; 0 takes all, and leaves none for
            agreement. By default 32, or half of the samples if agreement is used and there are fewer than 64.
        weights: weights of tasks in the merge by name, as `{"sst2": 0.5}`; 1 for a task that is not named, negative to
            negate what its expert learned.
        overrides: other settings for some weights of the model, as
            `[{"match": "self_attn", "method": "mean", "alpha": 0.6}]`. `match` is searched in the weight's name
            (`re.search`), `kind` is one of those of `alpha`. `weights`, `method` and `alpha` are set, each by the last
            entry that selects the weight; a list instead of a number is interpolated linearly over the blocks.
        tokenizer: whose tokens the merged model has: `"base"`, `"union"` (the base's, and those that experts added) or
            a task, or `{"source": …, "tokens": {"<|im_end|>": {"source": "chat"}}, "pad_to_multiple_of": 64}`, where
            `tokens` names whose row a token gets in models that lack it or, with `"force": True`, in the merged model:
            a task, `"base"`, `{"kind": "zero"}` or `{"kind": "model_token", "model": …, "token": …}`; by
            default `"union"` where experts add tokens, else `"base"`. Rows of embeddings and output maps are matched
            by token.
        chat_template: the task, or `"base"`, whose chat template, special tokens and settings of generation the merged
            model has, where templates differ.
        metric: what validation rows are scored by: a name, a function, or a `Metric`; see `metrics.resolve_metric`.
        output: `"model"`, or `"lora"` to write one LoRA adapter of the base, where all experts are LoRA adapters and
            the method is one of `mean`, `task-arithmetic`, `regmean`, `esm`, `tsv-m`, `iso-c`, `iso-cts`,
            `cat`, `wudi`, `knots`.
        rank: of the adapter that `output="lora"` writes, by default the sum of the experts' ranks, which is exact; or
            of each expert of `method="esm++"` and `"tsv-c"`, per linear map, by default that of the method.
        heads: which weights each task keeps for itself: `"auto"`, `"merge"`, `"keep"`, or names of modules; see
            `planning.heads.plan_heads`.
        dtype: floating-point dtype of the written weights, such as `"bfloat16"`; by default each weight keeps the
            dtype of the base, or has bfloat16 if the base is quantised.
        output_dir: folder for the merged model, which must not exist yet; by default a temporary one.
        overwrite: replace an earlier merged model in the output folder, when the new one is complete.
        max_shard_size: size of the largest file of weights: `"5GB"`, or a number of bytes.
        statistics_dir: folder in which the activation statistics are kept for later merges, one file per task.
        cache_dir: folder of statistics and experts' answers by what they depend on, so that later merges and
            comparisons of the same experts compute none of them again.
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
    alpha: Optional[float | str | Mapping[str, float | str]] = field(
        default=None,
        metadata={
            "help": "scale of the merged update: a number, or 'auto' to choose it on validation data or by agreement; "
            "or '{attention: auto, mlp: 0.8}' by kind of weight"
        },
    )
    refine: Optional[bool | Mapping[str, Any] | RefineSettings] = field(
        default=None, metadata={"help": "train gates on the experts' essential directions after the merge"}
    )
    lines: Optional[bool | Mapping[str, Any] | LinesSettings] = field(
        default=None, metadata={"help": "let the scale of the merged update grow with depth (LiNeS)"}
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
    overrides: Optional[Iterable[Mapping[str, Any]]] = field(
        default=None,
        metadata={"help": "other settings for some weights, as '{match: self_attn, method: mean, alpha: 0.6}'"},
    )
    tokenizer: Optional[str | Mapping[str, Any]] = field(
        default=None,
        metadata={"help": "whose tokens the merged model has: base, union, a task, or '{source: …, tokens: …}'"},
    )
    chat_template: Optional[str] = field(
        default=None, metadata={"help": "task, or base, whose chat template the merged model has"}
    )
    metric: str | os.PathLike | Mapping[str, Any] | Metric | Callable[..., float] = field(
        default="accuracy",
        metadata={"help": f"what 'auto' goes by: {', '.join(BUILT_IN)}, or one of the evaluate library"},
    )
    output: str = field(
        default="model",
        metadata={
            "help": "what is written: model, or lora, one adapter of LoRA experts",
            "choices": ("model", "lora"),
        },
    )
    rank: Optional[int] = field(
        default=None, metadata={"help": "rank of the experts of esm++ and tsv-c, or of --output lora", "least": 1}
    )
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
    cache_dir: Optional[str | os.PathLike] = field(
        default=None,
        metadata={"help": "folder of statistics and answers that merges and comparisons share"},
    )
    resume_dir: Optional[str | os.PathLike] = field(
        default=None, metadata={"help": "folder to keep work in progress in; an interrupted merge continues there"}
    )

    def __post_init__(self) -> None:
        if isinstance(self.alpha, Mapping):
            check_known(self.alpha, KINDS, "kind", "`alpha`")
            self.alpha = {kind: _scale(alpha, f"`alpha` of {kind!r}") for kind, alpha in self.alpha.items()}
        elif self.alpha is not None:
            self.alpha = _scale(self.alpha, "`alpha`")
        super().__post_init__()
        resolve_refine(self.refine)
        resolve_lines(self.lines)
        torch_dtype(self.dtype)
        bytes_of(self.max_shard_size, "max_shard_size")

    @property
    def alpha_by_kind(self) -> Mapping[str, float | str]:
        """`alpha` of every kind of weight that has one of its own."""
        return self.alpha if isinstance(self.alpha, Mapping) else {}

    @property
    def searches_alpha(self) -> bool:
        """Whether α, or that of a kind of weight, is searched."""
        return self.alpha == "auto" or "auto" in self.alpha_by_kind.values()


def _scale(alpha: Any, name: str) -> float | str:
    return alpha if alpha == "auto" else finite_number(alpha, name, "a finite number or 'auto'")


_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def torch_dtype(dtype: Optional[str | torch.dtype]) -> Optional[torch.dtype]:
    """Return the floating-point dtype of this name in torch (also `"bf16"`, `"fp16"`, `"fp32"`); None for None."""
    resolved = getattr(torch, _SHORT_DTYPES.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        raise HfEsmError(f"`dtype` must be a floating-point dtype of torch such as 'bfloat16', not {dtype!r}.")
    return resolved
