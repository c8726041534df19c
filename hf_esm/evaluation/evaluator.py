"""Running a merged or routed model, and its experts, on each task's rows."""

import copy
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, Optional

from peft import PeftConfig
from transformers import PreTrainedModel

from ..checkpoints import (
    HEADS_FOLDER,
    ROUTED_FOLDER,
    Access,
    first_processor,
    load_processor,
    load_task_model,
    open_checkpoint,
    resolve_source,
    whole_folder,
)
from ..data import SampleOptions
from ..errors import HfEsmError
from ..metrics import ACCURACY, Metric, Outcome, Scores, load_labelled, resolve_metric, run
from ..routing import RoutedModel
from ..utils import default_accelerator


def evaluate(
    model: str | os.PathLike,
    data: Mapping[str, Any],
    *,
    experts: Optional[Mapping[str, Any]] = None,
    base: Any = None,
    metric: Any = "accuracy",
    processor: Any = None,
    route: str = "routed",
    batch_size: int = 32,
    token: Optional[str | bool] = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Scores:
    """Score of a merged model on each task's rows, with the task's own head.

    Of an ESM++ model, the router chooses the expert while the head is the task's: how often the two agree is in
    `Scores.routing`.

    Args:
        model: folder or Hub id that `merge_models` wrote, or any sequence or image classifier, or language model.
        data: by task, labelled rows (column `label`: class index or label name, or a number for a head of one label)
            in any form that `merge_models` takes. Perplexity needs no labels; where answers are words, the label is
            the right text, a list of them, or SQuAD's `answers`.
        experts: by task, the expert to measure beside it, as `merge_models` takes it, each with what reads its rows
            beside it.
        base: what experts that are LoRA adapters stand on; by default, the base that they name.
        metric: `"accuracy"`, `"perplexity"`, `"mean-iou"`, `"exact-match"`, `"word-f1"`, the name of a metric of the
            `evaluate` library, a function of predictions and references, or a `Metric`; see `metrics.resolve_metric`.
        processor: tokenizer or processor, where none stands beside the model.
        route: of a model with experts: `"routed"`, `"oracle"` (each task's expert for its rows; what a model without
            a router gets in any case), or `"static"`.
        token, allow_pickle, trust_remote_code: as for `merge_models`.
        options: fields of `SampleOptions`; all rows are used unless `num_samples` says otherwise.
    """
    if unknown := options.keys() - {f.name for f in fields(SampleOptions)}:
        raise TypeError(f"evaluate has no argument {sorted(unknown)[0]!r}")
    options = SampleOptions(**{"num_samples": 0, **options})
    if not isinstance(batch_size, int) or batch_size < 1:
        raise HfEsmError(f"batch_size must be a whole number, 1 or more, not {batch_size!r}.")
    if not isinstance(model, (str, os.PathLike)):
        raise HfEsmError(f"evaluate takes a folder or a Hub id, not a {type(model).__name__}.")
    metric = resolve_metric(metric)
    device = default_accelerator().device
    experts = experts or {}
    check_by_task(data, "data")
    if lacking := experts.keys() - data.keys():
        raise HfEsmError(f"There are no rows to measure the expert {sorted(lacking)[0]!r} on.")
    access = Access(token, allow_pickle, trust_remote_code)
    folder = whole_folder(model, str(model), token=token)
    beside = processor or load_processor(folder, trust_remote_code)

    def outcome(model: PreTrainedModel, task: str) -> Outcome:
        rows = load_labelled(data[task], beside, model.config, f"data of '{task}'", options, metric)
        return run(model.to(device), rows, metric, batch_size)

    if route not in ("routed", "oracle", "static"):
        raise HfEsmError(f"route must be 'routed', 'oracle' or 'static', not {route!r}.")
    if (folder / ROUTED_FOLDER).is_dir():
        routed = RoutedModel.from_pretrained(folder, trust_remote_code=trust_remote_code).to(device)
        if route == "routed" and not routed.config.decides:
            route = "oracle"
        merged = {}
        for task in data:
            forced = {"oracle": task, "static": "static"}.get(route)
            with routed.route(forced) if forced else nullcontext():
                merged[task] = outcome(routed.task_model(task), task)
            if not forced:
                config = routed.task_model(task).config
                rows = load_labelled(data[task], beside, config, task, options, metric)
                merged[task].routed_to = [e.likeliest for e in routed.explain(rows.samples, batch_size)]
    else:
        has_heads = (folder / HEADS_FOLDER).is_dir()
        trusted = {"trust_remote_code": True} if trust_remote_code else {}

        def load(task: str) -> PreTrainedModel:
            return load_task_model(folder, task, **trusted) if has_heads else _load(folder, str(model), None, access)

        merged = {task: outcome(load(task), task) for task in data}
    own = expert_outcomes(
        experts,
        data,
        base=base,
        metric=metric,
        processor=processor,
        fallback=beside,
        batch_size=batch_size,
        access=access,
        options=options,
    )
    return Scores(
        {task: found.score for task, found in merged.items()},
        {task: found.score for task, found in own.items()},
        {
            task: found.routed_to.count(task) / len(found.routed_to)
            for task, found in merged.items()
            if found.routed_to
        },
        metric.name,
        metric.higher_is_better,
        merged,
    )


def check_by_task(rows: Any, what: str) -> None:
    """Refuse rows that are not given by task."""
    if not isinstance(rows, Mapping) or not rows:
        raise HfEsmError(f"{what}: give labelled rows by task, such as {{'sst2': 'sst2_test.jsonl'}}, not {rows!r}.")


def expert_outcomes(
    experts: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    base: Any = None,
    metric: Metric = ACCURACY,
    processor: Any = None,
    fallback: Any = None,
    batch_size: int = 32,
    access: Access,
    options: SampleOptions,
) -> dict[str, Outcome]:
    """What each expert puts out on its own task's rows.

    Args:
        experts, data, processor: as `evaluate` takes them; a processor is looked for beside each expert, then beside
            the base; `fallback` is what there is where none is found.
        base: what LoRA adapters stand on; by default, the base that they name.
        access: how models are opened.
    """
    device, found = default_accelerator().device, {}
    for task, spec in experts.items():
        sources = [resolve_source(spec, f"expert '{task}'", access)]
        sources += [resolve_source(base, "base", access)] if base is not None else []
        own = processor or first_processor(sources, access.trust_remote_code) or fallback
        model = _load(spec, f"expert '{task}'", base, access).to(device)
        rows = load_labelled(data[task], own, model.config, f"data of '{task}'", options, metric)
        found[task] = run(model, rows, metric, batch_size)
    return found


def _load(spec: Any, title: str, base: Any, access: Access) -> PreTrainedModel:
    """A model in the class that its config names, or a LoRA adapter merged into `base`, or the base that it names."""
    source = resolve_source(spec, title, access)
    if source.model is not None:
        return copy.deepcopy(source.model).eval()
    if not source.is_adapter:
        return open_checkpoint(source).load_model()
    if base is None and (base := PeftConfig.from_pretrained(source.folder).base_model_name_or_path) is None:
        raise HfEsmError(f"{title} is a LoRA adapter that names no base. Give `base`.")
    return open_checkpoint(
        source, open_checkpoint(resolve_source(base, f"base of {source.title}", access))
    ).load_model()
