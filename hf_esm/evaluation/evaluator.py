"""Running a merged or routed model, and its experts, on the labelled rows of each task."""

import copy
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import repeat
from numbers import Integral
from pathlib import Path
from typing import Any, Optional

from transformers import PreTrainedModel

from ..checkpoints import (
    BODY_WEIGHTS,
    HEADS_FOLDER,
    ROUTED_FOLDER,
    Access,
    ModelSource,
    ModelSpec,
    base_of_adapters,
    copy_of_embedder,
    first_processor,
    load_base_with_head,
    load_processor,
    load_task_model,
    open_checkpoint,
    prompt_before,
    resolve_class,
    resolve_source,
    whole_folder,
)
from ..data import DataSpec, SampleOptions, with_prompt
from ..errors import HfEsmError
from ..metrics import (
    HarnessMetric,
    LabelledSamples,
    Metric,
    MetricSpec,
    Outcome,
    Scores,
    load_labelled,
    resolve_metric,
    run,
)
from ..routing import RoutedModel, routes_by_block
from ..utils import check_known, default_accelerator, did_you_mean, tracked


ROUTES = ("routed", "oracle", "static")


def evaluate(
    model: str | os.PathLike,
    data: Optional[Mapping[str, DataSpec]] = None,
    *,
    experts: Optional[Mapping[str, ModelSpec]] = None,
    base: Optional[ModelSpec] = None,
    metric: MetricSpec = "accuracy",
    processor: Any = None,
    route: str = "routed",
    batch_size: int = 32,
    num_samples: int = 0,
    seed: int = 0,
    max_length: Optional[int] = None,
    columns: Optional[Mapping[str, str]] = None,
    token: Optional[str | bool] = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Scores:
    """Score a merged model on the rows of each task, with the head of that task.

    In an ESM++ model, the router chooses the expert, while the head is always the task's. `Scores.routing` says how
    often the router chooses the task's expert.

    Args:
        model: folder or Hub id of a merged model, or of any classifier or language model.
        data: by task, labelled rows in any form that `merge_models` takes. The column `label` holds a class index, a
            label name, a number for a head of one label, or, for metrics of texts, the right text, a list of right
            texts, or SQuAD's `answers`. Perplexity needs no labels.
        experts: by task, experts to score as well, each on its own task, as `merge_models` takes them. Each is run
            with the tokenizer or processor in its own folder.
        base: the base, to score as well, with the heads of the merged model; adapters among the experts are read over
            it. Without it, adapters are read over the base that they name, and no base is scored.
        metric: `"accuracy"`, `"f1"`, `"f1-macro"`, `"mcc"`, `"spearman"` (of values), `"perplexity"`, `"mean-iou"`,
            `"exact-match"`, `"word-f1"`, for embedding models `"similarity"`, `"mrr@10"` and `"recall@10"` on rows of
            two texts, the name of a metric of the `evaluate` library, a function of predictions and references, a
            `Metric`, or `{"lm_eval": [tasks], "limit": …}`: tasks of the lm-evaluation-harness with their rows.
        processor: tokenizer or processor, if the folders of the models hold none.
        route: for a routed model, `"routed"`, `"oracle"` (each task's expert for its rows, as always without a
            router), or `"static"` (no expert). The compressed experts of `tsv-c` are scored as `load_task_model` loads
            them by `"routed"`, and over their one shared body by `"oracle"`.
        batch_size: number of samples per batch.
        num_samples: number of rows per task, chosen at random if there are more; 0 takes all.
        seed: seed of that choice.
        max_length: number of tokens that a text is cut to; by default what the model takes, at most 512.
        columns: names of the columns that hold `text`, `text_pair`, `text_target`, `image`, `audio` and `label`, if
            they differ.
        token: access token for the Hub; by default the one that `hf auth login` stored.
        allow_pickle: read `.bin` checkpoints, which can run code.
        trust_remote_code: run code that comes with a model.
        progress: show progress, task by task: bars on a terminal or in a notebook, elsewhere lines in the log.

    Returns:
        Scores by task, with their intervals and numbers of rows. Print them for a table, which names the tasks on
        which the model is worse than the base.

    Raises:
        HfEsmError: if a model or rows cannot be read, or the metric cannot read the model's answers.

    Example:
        >>> from hf_esm import evaluate
        >>> scores = evaluate("merged", {"sst2": sst2_rows}, experts={"sst2": "bert-sst2"})
        >>> 0 <= scores.model["sst2"] <= 1
        True
        >>> sorted(scores.expert)
        ['sst2']
    """
    options = SampleOptions(num_samples=num_samples, seed=seed, max_length=max_length, columns=columns)
    experts = experts or {}
    metric = resolve_metric(metric)
    if isinstance(metric, HarnessMetric):
        data = metric.tasks
    _check_arguments(model, data, experts, route, batch_size)
    access = Access(token, allow_pickle, trust_remote_code)
    measurement = Measurement(data or {}, metric, options, access, processor, batch_size, progress)
    folder = whole_folder(model, str(model), token=token)
    outcomes = measurement.merged_outcomes(folder, str(model), route)
    expert_outcomes = measurement.expert_outcomes(experts, base, fallback=folder)
    base_outcomes = measurement.base_outcomes(base, folder) if base is not None else {}
    return Scores(
        model={task: outcome.score for task, outcome in outcomes.items()},
        expert={task: outcome.score for task, outcome in expert_outcomes.items()},
        base={task: outcome.score for task, outcome in base_outcomes.items()},
        routing={task: outcome.routed_share(task) for task, outcome in outcomes.items() if outcome.routed_to},
        metric=measurement.metric.name,
        higher_is_better=measurement.metric.higher_is_better,
        outcomes=outcomes,
    )


def _check_arguments(model: Any, data: Any, experts: Mapping[str, Any], route: str, batch_size: Any) -> None:
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise HfEsmError(f"batch_size must be a whole number, 1 or more, not {batch_size!r}.")
    if not isinstance(model, (str, os.PathLike)):
        raise HfEsmError(f"evaluate takes a folder or a Hub id, not a {type(model).__name__}.")
    if route not in ROUTES:
        raise HfEsmError(
            f"`route` must be 'routed', 'oracle' or 'static', not {route!r}{did_you_mean(route, ROUTES)}."
        )
    check_by_task(data, "`data`")
    check_known(experts, data, "task", "`data`")


def check_by_task(rows: Any, argument: str) -> None:
    """Raise `HfEsmError` for rows that are not a mapping by task."""
    if not isinstance(rows, Mapping) or not rows:
        raise HfEsmError(
            f"{argument}: give labelled rows by task, such as {{'sst2': 'sst2_test.jsonl'}}, not {rows!r}."
        )


@dataclass(frozen=True)
class Measurement:
    """Labelled rows of several tasks, and how models are run on them.

    Attributes:
        data: labelled rows by task.
        metric: what scores the outputs.
        options: how rows are selected and encoded.
        access: how models are opened.
        processor: tokenizer or processor for all models; None takes the one in each model's folder.
        batch_size: number of samples per batch.
        progress: whether to show how many tasks are scored.
    """

    data: Mapping[str, DataSpec]
    metric: Metric
    options: SampleOptions
    access: Access
    processor: Any = None
    batch_size: int = 32
    progress: bool = False

    def merged_outcomes(self, folder: Path, title: str, route: str = "routed") -> dict[str, Outcome]:
        """Outcomes of a merged model on every task, each with the task's head.

        Args:
            folder: the model's folder.
            title: name of the model in errors.
            route: see `evaluate`.
        """
        processor = self._processor_in(folder)
        compressed = any((folder / HEADS_FOLDER).glob(f"*/{BODY_WEIGHTS}"))
        if (folder / ROUTED_FOLDER).is_dir() and not (compressed and route == "routed"):
            return self._routed_outcomes(folder, route, processor)
        has_heads = (folder / HEADS_FOLDER).is_dir()
        outcomes = {}
        for task in tracked(self.data, "Scoring the model", self.progress):
            model = self._with_head(folder, task) if has_heads else _load_model(folder, title, None, self.access)
            outcomes[task] = self._outcome(model, task, processor)
        return outcomes

    def expert_outcomes(
        self, experts: Mapping[str, ModelSpec], base: Optional[ModelSpec] = None, fallback: Optional[Path] = None
    ) -> dict[str, Outcome]:
        """Outcomes of each expert on its own task.

        Args:
            experts: experts by task.
            base: base model of adapters; by default the one that they name.
            fallback: folder whose processor is used if neither the expert nor the base has one.
        """
        outcomes = {}
        for task, spec in tracked(experts.items(), "Scoring the experts", self.progress):
            sources = [resolve_source(spec, f"expert '{task}'", self.access)]
            sources += [resolve_source(base, "base", self.access)] if base is not None else []
            processor = self.processor or first_processor(sources, self.access.trust_remote_code)
            if processor is None and fallback is not None:
                processor = self._processor_in(fallback)
            outcomes[task] = self._outcome(_load_model(spec, f"expert '{task}'", base, self.access), task, processor)
        return outcomes

    def base_outcomes(self, base: ModelSpec, folder: Path) -> dict[str, Outcome]:
        """Outcomes of a base on every task, with the heads of a merged model; none of a base that lacks weights that
        the merged model has no head for.

        Args:
            base: the base.
            folder: folder of the merged model, whose processor is used if the base has none.
        """
        source = resolve_source(base, "base", self.access)
        opened, trusted = open_checkpoint(source), self.access.trust_remote_code
        processor = self.processor or first_processor([source], trusted) or self._processor_in(folder)
        if (folder / HEADS_FOLDER).is_dir():
            models = (load_base_with_head(opened, folder, task, trusted) for task in self.data)
        elif type(opened.skeleton) is resolve_class(ModelSource(str(folder), folder=folder, access=self.access))[1]:
            models = repeat(opened.load_model(), len(self.data))
        else:
            return {}
        tasks = tracked(self.data, "Scoring the base", self.progress)
        return {task: self._outcome(model, task, processor) for task, model in zip(tasks, models, strict=True)}

    def routes_by_block(self, folder: Path) -> dict[str, dict[str, list[float]]]:
        """See `routing.routes_by_block`: of the rows of every task, by a routed model."""
        routed, processor = self._routed_model(folder), self._processor_in(folder)
        samples = {task: self._rows(task, processor, routed.task_model(task)).samples for task in self.data}
        return routes_by_block(routed, samples, self.access, self.batch_size)

    def _routed_model(self, folder: Path) -> RoutedModel:
        allowed = {"allow_pickle": self.access.allow_pickle, "trust_remote_code": self.access.trust_remote_code}
        return RoutedModel.from_pretrained(folder, **allowed).to(default_accelerator().device)

    def _routed_outcomes(self, folder: Path, route: str, processor: Any) -> dict[str, Outcome]:
        routed = self._routed_model(folder)
        if route == "routed" and not routed.config.decides:
            route = "oracle"
        outcomes = {}
        for task in tracked(self.data, "Scoring the model", self.progress):
            forced = {"oracle": task, "static": "static"}.get(route)
            by_harness = isinstance(self.metric, HarnessMetric)
            # A task of the harness may be that of no expert; models that write have no heads of their own.
            named = routed.tasks[0] if by_harness and task not in routed.tasks else task
            with routed.route(forced) if forced else nullcontext():
                outcomes[task] = self._outcome(routed.task_model(named), task, processor)
            if not forced and not by_harness:
                rows = self._rows(task, processor, routed.task_model(task))
                explanations = routed.explain(rows.samples, self.batch_size)
                outcomes[task].routed_to = [explanation.likeliest for explanation in explanations]
        return outcomes

    def _outcome(self, model: PreTrainedModel, task: str, processor: Any) -> Outcome:
        rows = self._rows(task, processor, model)
        return run(model.to(default_accelerator().device), rows, self.metric, self.batch_size)

    def _rows(self, task: str, processor: Any, model: PreTrainedModel) -> LabelledSamples:
        if isinstance(self.metric, HarnessMetric):
            return self.metric.of_task(task, processor)
        processor = with_prompt(processor, prompt_before(model))
        return load_labelled(self.data[task], processor, model.config, f"data of '{task}'", self.options, self.metric)

    def _processor_in(self, folder: Path) -> Any:
        return self.processor or load_processor(folder, self.access.trust_remote_code)

    def _with_head(self, folder: Path, task: str) -> PreTrainedModel:
        trusted = {"trust_remote_code": True} if self.access.trust_remote_code else {}
        return load_task_model(folder, task, allow_pickle=self.access.allow_pickle, **trusted)


def _load_model(spec: ModelSpec, title: str, base: Optional[ModelSpec], access: Access) -> PreTrainedModel:
    """Model of the class that its config names. An adapter is merged into `base`, or into the base it names."""
    source = resolve_source(spec, title, access)
    if source.embedder is not None:
        return copy_of_embedder(source.embedder, source.title)
    if source.model is not None:
        return copy.deepcopy(source.model).eval()
    if not source.is_adapter:
        return open_checkpoint(source).load_model()
    base = base_of_adapters([source]) if base is None else base
    opened_base = open_checkpoint(resolve_source(base, f"base of {source.title}", access))
    return open_checkpoint(source, opened_base).load_model()
