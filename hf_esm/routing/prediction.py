"""Predictions of a routed model and explanations of its routes, in batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

from ..architecture import towers
from ..data import PROMPT_MASK, SampleOptions, batch_for, encode, read_rows
from ..errors import HfEsmError
from ..metrics import batches_of
from ..tuners.routed import Decision, Decisions, Named, decide, route, routing_state
from ..utils import check_known
from .adapters import check_present
from .explanations import Explanation, Prediction, explanation, is_sure, probabilities, take, vote


if TYPE_CHECKING:
    from .model import RoutedModel


@torch.no_grad()
def predict(
    routed: "RoutedModel",
    inputs: Any,
    tasks: Optional[str | Sequence[str]],
    batch_size: int,
    options: Mapping[str, Any],
    with_probabilities: bool = False,
) -> list[Prediction]:
    """See `RoutedModel.predict`; `options` are fields of `SampleOptions`."""
    rows = _list_rows(inputs)
    named = _named_tasks(routed, tasks, len(rows))
    if towers(whole := routed.model.get_base_model()):
        raise HfEsmError(
            f"A {type(whole).__name__} compares its inputs, and has no class per sample: call the model itself. "
            "`explain` gives the tasks of its inputs."
        )
    if named is None:
        _check_router(routed, "predict")
    predictions: list[Optional[Prediction]] = [None] * len(rows)
    for indices, batch in _batches(routed, rows, batch_size, options):
        if named is None:
            with evaluating(routed.model):
                decision, names = vote(routed.config, decide(routed.model, batch))
        else:
            decision, names = None, [named[i] for i in indices]
        for task in dict.fromkeys(names):
            part = [row for row, name in enumerate(names) if name == task]
            labels = _labels(routed, task, {name: value[part] for name, value in batch.items()}, decision, part)
            for row, (label, score, every) in zip(part, labels, strict=True):
                sure = decision is None or is_sure(routed.config, decision, row)
                every = every if with_probabilities else {}
                predictions[indices[row]] = Prediction(task, label, score, sure, every)
    return predictions


def _labels(
    routed: "RoutedModel", task: str, batch: dict[str, Tensor], decision: Optional[Decision], rows: list[int]
) -> list[tuple[str, float, dict[str, float]]]:
    """The likeliest label of each sample by the head of a task, its probability, and those of all labels.

    Args:
        batch: some samples of a larger batch.
        decision: the router's decision on the larger batch; None adds the expert of the task in all layers.
        rows: indices of the samples in the larger batch.
    """
    model = routed.task_model(task)
    if model.can_generate():
        raise HfEsmError(
            f"{task!r} has no class per sample: its model generates text. Call `generate`, or `hf-esm chat`; "
            "`explain` gives the task of each prompt."
        )
    decisions = decision and Decisions({routed.model.active_adapter: take(decision, rows)})
    with evaluating(model), route(routed.model, decisions or task):
        logits = getattr(model(**batch), "logits", None)
    if logits is None or logits.dim() != 2:
        raise HfEsmError(f"{task!r} has no class per sample; run `task_model({task!r})` yourself.")
    known = probabilities(logits.float(), model.config)
    names = [model.config.id2label[i] for i in range(known.shape[1])]
    scores, labels = known.max(-1)
    return [
        (names[label], score, dict(zip(names, row, strict=True)))
        for label, score, row in zip(labels.tolist(), scores.tolist(), known.tolist(), strict=True)
    ]


@torch.no_grad()
def explain(routed: "RoutedModel", inputs: Any, batch_size: int, options: Mapping[str, Any]) -> list[Explanation]:
    """See `RoutedModel.explain`; `options` are fields of `SampleOptions`."""
    rows = _list_rows(inputs)
    _check_router(routed, "explain")
    explanations: list[Optional[Explanation]] = [None] * len(rows)
    generates = routed.model.get_base_model().can_generate()  # then labels mark the end of the prompt
    for indices, batch in _batches(routed, rows, batch_size, options, with_targets=generates):
        with evaluating(routed.model):
            records = decide(routed.model, batch)
        if not records:
            raise HfEsmError(
                f"explain: the router does not read {', '.join(batch)}, which pass no linear map with experts."
            )
        for row, i in enumerate(indices):
            explanations[i] = explanation(routed.config, records, row)
    return explanations


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off inside the block, and set every module back to its mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _list_rows(inputs: Any) -> list[Any]:
    """Inputs as a list of rows. A mapping, such as a tokenizer's batch, has columns."""
    if isinstance(inputs, str):
        raise HfEsmError("Give a list of inputs, even for one: [text].")
    if not isinstance(inputs, (Mapping, Iterable)):
        raise HfEsmError(f"Give a list of inputs, not a {type(inputs).__name__}.")
    return read_rows(inputs, "inputs", SampleOptions(num_samples=0)) if isinstance(inputs, Mapping) else list(inputs)


def _named_tasks(routed: "RoutedModel", tasks: Optional[str | Sequence[str]], count: int) -> Optional[list[str]]:
    """The task of each input, as `predict` or the route around it names them; None where the router decides."""
    forced = routing_state(check_present(routed)).route.get()
    if tasks is None and isinstance(forced, Named):
        tasks = forced.names
        if "static" in ([tasks] if isinstance(tasks, str) else tasks):
            raise HfEsmError("predict: the route 'static' names no head. Pass tasks=, whose experts are added, too.")
    if tasks is None:
        return None
    named = [tasks] * count if isinstance(tasks, str) else list(tasks)
    check_known(named, routed.tasks, "expert for")
    if len(named) != count:
        raise HfEsmError(f"{len(named)} tasks are given for {count} inputs. Give one each.")
    return named


def _check_router(routed: "RoutedModel", call: str) -> None:
    """Refuse a call that needs the decision of the router."""
    if routing_state(check_present(routed)).route.get() is not None:
        raise HfEsmError(f"{call} asks the router, but a route is given. Call it outside of `route`.")
    if not routed.model.has_active_enabled_adapter:
        raise HfEsmError(f"{call}: the experts are disabled, and the router with them. Enable the adapter.")
    if not routed.config.decides:
        raise HfEsmError(f"{call}: this model has no router. Name the tasks: {', '.join(routed.tasks)}.")


def _batches(
    routed: "RoutedModel", rows: list[Any], batch_size: int, options: Mapping[str, Any], with_targets: bool = False
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of inputs that do not depend on each other, each with the indices of its inputs in `rows`."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise HfEsmError(f"batch_size must be 1 or more, not {batch_size}.")
    if not rows:
        return
    model = routed.model.get_base_model()
    settings = SampleOptions(**{"num_samples": 0, **options})
    samples = encode(rows, routed.processor, model.config, "inputs", settings, with_targets)
    for sample in samples:
        sample.pop(PROMPT_MASK, None)  # what pooling leaves out, the router reads
    for indices in batches_of(model, "classes", samples, batch_size):
        yield indices, batch_for([samples[i] for i in indices], model)
