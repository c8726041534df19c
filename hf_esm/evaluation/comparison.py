"""`compare`: several methods on a user's own experts and rows, with what is needed to choose one of them."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Optional

import torch

from ..checkpoints import Access, ModelSpec, base_of_adapters, resolve_source
from ..data import DataSpec
from ..errors import HfEsmError
from ..methods import MergeMethod, resolve_method
from ..metrics import HarnessMetric, MetricSpec, resolve_metric
from ..planning import LinesSettings, MergeOptions, name_experts, task_weights
from ..utils import Alone, default_accelerator
from .cells import NOT_COMPARED, Inputs
from .comparing import BEST, ComparisonRun
from .report import Comparison


METHODS_COMPARED = ("esm", "mean", "task-arithmetic", "ties", "tsv-m", "iso-c", "iso-cts", "esm++")


def compare(
    base: Optional[ModelSpec],
    experts: Mapping[str, ModelSpec] | Sequence[ModelSpec],
    *,
    test: Optional[Mapping[str, DataSpec]] = None,
    output_dir: str | os.PathLike,
    methods: Sequence[Any] = METHODS_COMPARED,
    calibration: Any = None,
    validation: Optional[Mapping[str, DataSpec]] = None,
    seeds: int | Sequence[int] = (0,),
    num_test: int = 0,
    keep: Optional[str] = None,
    pictures: str = "usual",
    search: int = 0,
    processor: Any = None,
    token: Optional[str | bool] = None,
    lines: Optional[bool | Mapping[str, Any] | LinesSettings] = None,
    weights: Optional[Mapping[str, float]] = None,
    overrides: Optional[Iterable[Mapping[str, Any]]] = None,
    tokenizer: Optional[str | Mapping[str, Any]] = None,
    chat_template: Optional[str] = None,
    metric: MetricSpec = "accuracy",
    heads: str | Iterable[str] = "auto",
    dtype: Optional[str | torch.dtype] = None,
    num_samples: int = 64,
    statistics_samples: Optional[int] = None,
    max_length: Optional[int] = None,
    columns: Optional[Mapping[str, str]] = None,
    batch_size: int = 8,
    max_memory: Optional[int | float | str] = None,
    cache_dir: Optional[str | os.PathLike] = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Comparison:
    """Merge the same experts by several methods, and measure every merged model on every task.

    One rule chooses α for all methods: with validation rows that of `alpha="auto"`, else each method's default.
    Results are cached, so that a second run computes only what is new, such as another method or more seeds; all
    merges share statistics and answers of the experts. Under `accelerate launch`, each process merges and measures
    some of the models.

    Args:
        base, experts, calibration, validation, processor, token: see `merge_models`.
        test: by task, labelled rows to measure on; none for the metric `{"lm_eval": {task: [tasks of the harness]}}`.
        output_dir: folder of the report; it may exist.
        methods: names, or settings as in recipes: `["esm", {"name": "esm", "shrinkage": 0.0}]`. `label` in the
            settings names the row of the report.
        seeds: seeds of the choice of samples. Methods that use samples are merged once for each seed.
        keep: `"best"` to keep the merged model that is best on the test rows, in `output_dir/best`, with the recipe
            that repeats its merge. With several seeds, the model of the first one.
        pictures: `"usual"`, `"none"`, or `"all"`, which measures more: energy spectra before and after merging,
            compressed experts by rank, where a router could decide, and merges of the first 2, 3, … tasks by each
            static method. That is about as many merges as there are tasks, times the methods. Drawing needs
            matplotlib.
        search: number of settings to try for each method whose settings declare a range (`metadata["search"]`), by
            Optuna, on the `validation` rows or else on agreement with the experts. What is found is a row of its own.
        cache_dir: folder of all that is measured and computed, by default `output_dir/cache`. Merges with this
            `cache_dir` use the same statistics and answers.
        num_test: number of test rows per task, chosen at random; 0 takes all.

    The other arguments are options of every merge, see `MergeOptions`.

    Returns:
        Comparison with one row per method. Print it for a table, or open `report.md` in `output_dir`.

    Raises:
        HfEsmError: if the models cannot be merged or measured; as far as their headers tell, before the first merge.

    Example:
        >>> from hf_esm import compare
        >>> experts = {"sst2": "bert-sst2", "mrpc": "bert-mrpc"}
        >>> test = {"sst2": sst2_rows, "mrpc": mrpc_rows}
        >>> comparison = compare(
        ...     "bert-base", experts, test=test, methods=["mean", "tsv-m"], output_dir="report", progress=False
        ... )
        >>> [row.label for row in comparison.rows]
        ['mean', 'tsv-m']
    """
    experts, weights = task_weights(name_experts(experts), weights)
    arguments: dict[str, Any] = locals()
    shared = {option.name for option in fields(MergeOptions)} - {*NOT_COMPARED, "output_dir"}
    options = MergeOptions(**{name: arguments[name] for name in shared})
    accelerator = default_accelerator()
    seeds = (seeds,) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds))
    if base is None:
        access = Access(token, allow_pickle, trust_remote_code)
        base = base_of_adapters(resolve_source(spec, f"expert '{task}'", access) for task, spec in experts.items())
    scorer = resolve_metric(metric)
    inputs = Inputs(
        base=base,
        experts=experts,
        test=scorer.tasks if isinstance(scorer, HarnessMetric) else (test or {}),
        calibration=calibration,
        validation=validation,
        num_test=num_test,
        processor=processor,
        token=token,
        options=options,
        metric=scorer,
        accelerator=Alone(accelerator) if accelerator.num_processes > 1 else accelerator,
        keep=_check_keep(keep),
    )
    run = ComparisonRun(
        inputs, name_methods(methods), seeds, Path(output_dir).expanduser(), accelerator, pictures, search
    )
    run.check()
    return run.run(describe_rules(inputs, seeds))


def _check_keep(keep: Optional[str]) -> bool:
    if keep not in (None, BEST):
        raise HfEsmError(f"`keep` must be {BEST!r} or None, not {keep!r}.")
    return keep is not None


def name_methods(methods: Sequence[Any]) -> dict[str, MergeMethod]:
    """Methods by the labels of their rows: a method's `label`, or its name and the settings that are not defaults."""
    if isinstance(methods, (str, Mapping)) or not methods:
        raise HfEsmError("`methods` must be a list of methods, such as [esm, tsv-m].")
    named: dict[str, MergeMethod] = {}
    for entry in methods:
        label = None
        if isinstance(entry, Mapping):
            entry = dict(entry)
            label = entry.pop("label", None)
        method = resolve_method(entry)
        label = str(label or _label_of(entry, method))
        if label in named:
            raise HfEsmError(f"`methods` names {label!r} twice. Give one of them a `label`.")
        named[label] = method
    return named


def _label_of(entry: Any, method: MergeMethod) -> str:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, Mapping):
        return method.name
    default = resolve_method(entry["name"])
    changed = [name for name in entry if name != "name" and getattr(method, name) != getattr(default, name)]
    settings = ", ".join(f"{name} {entry[name]}" for name in changed)
    return entry["name"] + (f" ({settings})" if settings else "")


def describe_rules(inputs: Inputs, seeds: Sequence[int]) -> list[str]:
    """Sentences that a reader of the table needs: how α was chosen, and on what rows and samples."""
    rows = "all test rows" if not inputs.num_test else f"up to {inputs.num_test} test rows"
    if inputs.validation is None:
        alpha = "α: the default of each method, chosen without labels."
    else:
        chosen = "the value with the best score on the validation rows"
        if inputs.metric.is_share:
            chosen = (
                "of the values whose score on the validation rows is within one standard error of the best, the one "
                "nearest to the method's default"
            )
        alpha = f"α, among 0.1, 0.2 … 3.0 (or a method's `largest_alpha`): {chosen}; the same rule for every method."
    return [
        alpha,
        f"Measured on {rows} per task. Intervals hold 95 % of {inputs.metric.draws} draws of test rows, the same for "
        "all methods.",
        f"Samples: {inputs.options.num_samples or 'all'} per task, seeds {', '.join(map(str, seeds))}.",
    ]
