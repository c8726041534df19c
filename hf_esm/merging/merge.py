"""`merge_models`: several fine-tunes of one checkpoint in, one merged model out."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional

import torch
from accelerate import Accelerator

from ..checkpoints import Access, ModelSpec
from ..data import DataSpec
from ..methods import MergeMethod, resolve_method
from ..metrics import Metric
from ..planning import (
    LinesSettings,
    MergeData,
    MergeOptions,
    MergePlan,
    RefineSettings,
    check_arguments,
    name_experts,
    task_weights,
)
from ..utils import default_accelerator, from_arguments
from .result import MergeResult
from .run import MergeRun


def merge_models(
    base: Optional[ModelSpec],
    experts: Mapping[str, ModelSpec] | Iterable[Any],
    *,
    method: str | Mapping[str, Any] | MergeMethod = "auto",
    calibration: Optional[Mapping[str, Any] | str | os.PathLike] = None,
    alpha: Optional[float | str | Mapping[str, float | str]] = None,
    refine: Optional[bool | Mapping[str, Any] | RefineSettings] = None,
    lines: Optional[bool | Mapping[str, Any] | LinesSettings] = None,
    weights: Optional[Mapping[str, float]] = None,
    overrides: Optional[Iterable[Mapping[str, Any]]] = None,
    tokenizer: Optional[str | Mapping[str, Any]] = None,
    chat_template: Optional[str] = None,
    validation: Optional[Mapping[str, DataSpec]] = None,
    metric: str | os.PathLike | Mapping[str, Any] | Metric | Callable[..., float] = "accuracy",
    score_fn: Optional[Callable[[Any], float] | Mapping[str, Callable[[Any], float]]] = None,
    output: str = "model",
    rank: Optional[int] = None,
    heads: str | Iterable[str] = "auto",
    output_dir: Optional[str | os.PathLike] = None,
    overwrite: bool = False,
    dtype: Optional[str | torch.dtype] = None,
    max_shard_size: str | int | float = "5GB",
    num_samples: int = 64,
    statistics_samples: Optional[int] = None,
    seed: int = 0,
    max_length: Optional[int] = None,
    columns: Optional[Mapping[str, str]] = None,
    batch_size: int = 8,
    max_memory: Optional[int | float | str] = None,
    statistics_dir: Optional[str | os.PathLike] = None,
    cache_dir: Optional[str | os.PathLike] = None,
    resume_dir: Optional[str | os.PathLike] = None,
    processor: Any = None,
    token: Optional[str | bool] = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
    callback: Optional[Callable[[str, int, int], None]] = None,
    accelerator: Optional[Accelerator] = None,
    dry_run: bool = False,
) -> MergeResult | MergePlan:
    """Merge fine-tunes of one checkpoint into one model, without labels.

    Args:
        base: checkpoint that the experts were tuned from: a Hub id (`"me/model"`, `"me/model@revision"`), a folder,
            `{"path": …, "revision": …, "subfolder": …}`, or a live `PreTrainedModel`, `PeftModel` or
            `SentenceTransformer`. None for the one that all experts that are adapters name.
        experts: models by task name, each given like the base, or as the folder or id of a PEFT adapter, as a live
            `PeftModel`, or as `{"path": …, "task": …}` for one task of a routed model. Or a list of folders and ids,
            whose last part names the task.
        method: name of a method, `{"name": …, setting: value}`, an instance of its class, or `"auto"`, the best of
            several at its best α: by labelled rows (`validation`, `score_fn`), else by agreement with the experts on
            samples that the statistics were not taken from. Without labels, classifiers are merged by ESM; models that
            write (language models) by ESM or RegMean, and then refined. `{"name": "auto", "methods": […]}` names other
            candidates. The result scores no less than the mean of the experts, or the base, on the rows that chose it.
        calibration: by task name, unlabelled samples: strings, pairs of strings, rows (`text`, `text_pair`, `image`,
            `audio`, or the columns that `columns` names), ready model inputs (`input_ids`, …), images, a
            `datasets.Dataset`, a `DataLoader`, a data file, or `{"path": …}` for `datasets.load_dataset`. Or
            `ActivationStatistics`, or the path of a statistics file, or both as `{"statistics": …, "samples": …}`,
            where the samples are for agreement. Or the one folder that was the `statistics_dir`
            of an earlier merge. Experts with a statistics file in their folder need none, and neither do methods that
            use no statistics.
        alpha: scale of the merged update: a number, `"auto"` to choose the number on `validation`, by `score_fn`, or
            without labels by agreement with the experts, or None for the default of the method. Or one of these by
            kind of weight, as `{"attention": "auto", "mlp": 0.8}` (also `"norm"`, `"embedding"`, `"head"`, `"bias"`),
            searched one kind after the other; other kinds keep the method's default.
        refine: train gates on the experts' essential directions after the merge until the model answers as the experts
            do on unlabelled samples: True, or settings (see `RefineSettings`). By default, only `method="auto"`
            refines, and only models that write.
        lines: let the scale of the merged update grow linearly with depth (LiNeS), by any method that has an α: True
            for the published scale, or end points as factors of α, `{"first": 0.5, "last": 1.5}`; see `LinesSettings`.
        weights: weights of tasks in the merge by name; 1 for a task that is not named, negative to negate what its
            expert learned. A weight can also be in an expert's mapping, as `{"path": …, "weight": 0.5}`.
        overrides: other settings for some weights of the model, as
            `[{"match": "self_attn", "method": "mean", "alpha": 0.6}]`. `match` is searched in the weight's name
            (`re.search`), `kind` is one of those of `alpha`. `weights`, `method` and `alpha` are set, each by the last
            entry that selects the weight; a list instead of a number is interpolated linearly over the blocks. A
            method merges the embeddings that it is named for by its own rule, and brings its own default α.
        tokenizer: whose tokens the merged model has: `"base"`, `"union"` (the base's, and those that experts added) or
            a task, or `{"source": …, "tokens": {"<|im_end|>": {"source": "chat"}}, "pad_to_multiple_of": 64}`, where
            `tokens` names whose row a token gets in models that lack it or, with `"force": True`, in the merged model:
            a task, `"base"`, `{"kind": "zero"}` or `{"kind": "model_token", "model": …, "token": …}`. By
            default `"union"` where experts add tokens, else `"base"`. Rows of embeddings and output maps are matched
            by token. A token that the base lacks gets the row of the expert that added it, or the mean of several by
            their token counts, whatever α is.
        chat_template: the task, or `"base"`, whose chat template, special tokens and settings of generation the merged
            model has, where templates differ.
        validation: by task name, labelled rows (column `label`), for `method="auto"` and `alpha="auto"`.
        metric: what validation rows are scored by; see `hf_esm.metrics.resolve_metric`.
        score_fn: used instead of `validation`. A function is called with the merged model; functions
            by task name are called with each task's model. Higher is better.
        output: `"model"`, or `"lora"`: one LoRA adapter of the base, loadable by PEFT and inference servers, where all
            experts are LoRA adapters that change linear maps alone, besides the tasks' heads. For `mean`,
            `task-arithmetic`, `regmean`, `esm`, `tsv-m`, `iso-c`, `iso-cts`, `cat`, `wudi` and `knots`, refined or
            not, whose results lie in the span of the experts' factors. `mean` and `task-arithmetic` read no weight of
            the base.
        rank: of the adapter that `output="lora"` writes; by default the sum of the experts' ranks, which is exact. A
            lower rank is the best one for the inputs in the experts' statistics, or in the plain norm without
            statistics, and the report states its error per layer. Otherwise the rank of each expert of `"esm++"` and
            `"tsv-c"`, per linear map; by default that of the method.
        heads: which weights each task keeps for itself: `"auto"`, `"merge"`, `"keep"`, or names of modules.
        output_dir: folder for the merged model, which must not exist yet; by default a temporary one.
        overwrite: replace an earlier merged model in the output folder, when the new one is complete.
        dtype: floating-point dtype of the written weights; by default each weight keeps the dtype of the base.
        max_shard_size: size of the largest file of weights: `"5GB"`, or a number of bytes.
        num_samples: number of samples per task, chosen at random if there are more; 0 takes all. Where agreement
            chooses or refines, 32 of them (of fewer than 64, half) are for statistics, the others for agreement.
            Without agreement, at most 32 are used, but for a mask that is learned on samples: all of them.
        statistics_samples: number of samples per task that statistics are taken from, if it is to be another.
        seed: seed of that choice, and of what a method learns.
        max_length: number of tokens that a text is cut to; by default what the model takes, at most 512.
        columns: names of the columns for `text`, `text_pair`, `text_target`, `image`, `audio` and `label`, if they
            differ.
        batch_size: number of samples per batch and process.
        max_memory: memory for calibrating and merging: `"16GB"`, or a number of bytes.
        statistics_dir: folder in which the activation statistics are kept for later merges.
        cache_dir: folder of statistics and experts' answers by what they depend on, so that later merges and
            comparisons of the same experts (also by other methods) compute none of them again.
        resume_dir: folder for work in progress; after an interruption, the same call continues from there.
        processor: tokenizer or processor of all models, for models that have none in their folders.
        token: access token for the Hub.
        allow_pickle: read `.bin` checkpoints, which can run code.
        trust_remote_code: run code that comes with a model.
        progress: show progress: bars on a terminal or in a notebook, elsewhere lines in the log.
        callback: called on the main process as `callback(stage, done, total)`.
        accelerator: Accelerate instance to run under; by default a new one.
        dry_run: stop after the checks of headers, of a few matrices of local models, of free memory and disk, and of
            one row of every file, and return the `MergePlan`. The output may exist.

    Returns:
        A `MergeResult`, the same on every process; with `dry_run` a `MergePlan`.

    Raises:
        HfEsmError: on input that cannot be merged, before any long work; nothing is left at `output_dir`.

    Example:
        >>> from hf_esm import merge_models
        >>> result = merge_models(
        ...     "bert-base",
        ...     {"sst2": "bert-sst2", "mrpc": "bert-mrpc-lora"},
        ...     calibration={"sst2": sst2_texts, "mrpc": mrpc_pairs},
        ...     output_dir="merged-bert",
        ...     progress=False,
        ... )
        >>> result
        MergeResult(esm of sst2, mrpc, alpha=1, output_dir='merged-bert')
        >>> type(result.load_task_model("sst2")).__name__
        'BertForSequenceClassification'
    """
    options = from_arguments(MergeOptions, locals())
    merge_method = resolve_method(options.method)
    if rank is not None and output != "lora":
        merge_method = merge_method.with_rank(rank)
    experts, options.weights = task_weights(name_experts(experts), options.weights)
    data = MergeData(calibration, validation, score_fn, processor)
    check_arguments(options, merge_method, experts, data, writes=not dry_run)
    run = MergeRun(options, merge_method, data, accelerator or default_accelerator(), callback)
    run.open_models(base, experts, Access(token, allow_pickle, trust_remote_code), headers_only=dry_run)
    if dry_run:
        run.check_inputs()
        return run.dry_plan()
    run.announce()
    inputs = run.read_inputs()
    run.find_work(inputs)
    run.check_weights()
    with run.workspace():
        inputs = run.calibrate(inputs)
        inputs = run.ask_experts(inputs)
        candidates = run.merge_weights(inputs)
        chosen = run.choose(inputs, candidates)
        chosen = run.refine(inputs, chosen)
        chosen = run.score(inputs, chosen)
        result = run.result_of(chosen)
        run.write(result, inputs, chosen)
        run.add_experts(inputs, chosen)
        run.publish(result)
    return result
