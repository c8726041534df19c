"""Answers of a model: classes, likelihoods, texts, maps of classes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..data import Sample, batch_for, batch_indices, to_generate_from
from ..errors import HfEsmError
from .answers import batches_of
from .labels import LabelledSamples


_NO_CLASS = (
    "{kind} gives no class per sample or token; a metric of classes needs a classifier. For answers in words, use "
    "exact-match or word-f1; for anything else, give a Metric with `read`."
)


@torch.no_grad()
def classes_of(model: PreTrainedModel, samples: list[Sample], batch_size: int = 32) -> Tensor:
    """Answers of a classifier, on the CPU, in the order of the samples.

    `[N]`: the class of the highest logit, or the value of a head of one label; `[N, C]` bool: the labels with positive
    logits, where several may hold; `[N, L]`: the class of each token, padded with -100.

    Raises:
        HfEsmError: if the model is not a classifier.
    """
    if model.can_generate():
        raise HfEsmError(_NO_CLASS.format(kind=type(model).__name__))
    return _in_batches(model, samples, _classes, batches_of(model, "classes", samples, batch_size))


@torch.no_grad()
def likelihoods_of(model: PreTrainedModel, samples: list[Sample], batch_size: int = 32) -> Tensor:
    """`[N, 2]` float64: per sample, the negative log-likelihood of its tokens in nats, summed, and their number.

    Raises:
        HfEsmError: if the model is not a language model that writes text.
    """
    kind = type(model).__name__
    if kind.endswith("ForMaskedLM"):
        raise HfEsmError(f"{kind} predicts no next token; perplexity needs a model that writes text.")
    return _in_batches(model, samples, _likelihoods, batches_of(model, "tokens", samples, batch_size))


@torch.no_grad()
def readings_of(
    model: PreTrainedModel,
    samples: list[Sample],
    read: Callable[[dict[str, Tensor]], Any],
    batch_size: int = 32,
) -> list[Any]:
    """What `read` makes of each sample's output tensors, in the order of the samples.

    Only samples of one shape share a batch, so that no output holds padding. Tensors that have no row per sample are
    left out.
    """
    readings: dict[int, Any] = {}
    for indices in batch_indices(samples, batch_size):
        outputs = model(**batch_for([samples[i] for i in indices], model), return_dict=True)
        tensors = {
            name: value.cpu()
            for name, value in outputs.items()
            if isinstance(value, Tensor) and value.dim() and len(value) == len(indices)
        }
        for row, i in enumerate(indices):
            readings[i] = read({name: value[row] for name, value in tensors.items()})
    return [readings[i] for i in range(len(samples))]


def _in_batches(
    model: PreTrainedModel,
    samples: list[Sample],
    answer: Callable[[PreTrainedModel, dict[str, Tensor]], Tensor],
    batches: list[list[int]],
) -> Tensor:
    """Answers to all samples, from batches of their indices; answers of several lengths are padded with -100."""
    answers: dict[int, Tensor] = {}
    for indices in batches:
        batch = batch_for([samples[i] for i in indices], model)
        answers |= zip(indices, answer(model, batch).cpu(), strict=True)
    rows = [answers[i] for i in range(len(samples))]
    return pad_sequence(rows, True, -100) if rows[0].dim() else torch.stack(rows)


def _classes(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """`[B]` classes or values, `[B, C]` bool, or `[B, L]` classes of tokens; see `classes_of`."""
    logits, kind = getattr(model(**batch), "logits", None), type(model).__name__
    if logits is not None and logits.dim() == 3 and kind.endswith("ForTokenClassification"):
        return logits.argmax(-1)
    if logits is None or logits.dim() != 2:
        raise HfEsmError(_NO_CLASS.format(kind=kind))
    if model.config.problem_type == "multi_label_classification":
        return logits > 0
    return logits[:, 0].float() if logits.shape[1] == 1 else logits.argmax(-1)


def _likelihoods(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """`[B, 2]` float64; see `likelihoods_of`."""
    encoder_decoder = model.config.is_encoder_decoder
    labels = batch.get("labels")
    if labels is None and not encoder_decoder and "input_ids" in batch:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        labels = batch["input_ids"].masked_fill(~real, -100)
    if labels is None:
        raise HfEsmError(
            f"{type(model).__name__}: perplexity is of what the model is to write. Give it in the rows as "
            "`text_target`, or as ready `labels`."
        )
    logits = getattr(model(**batch), "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise HfEsmError(f"{type(model).__name__} gives no likelihood of tokens; perplexity needs a language model.")
    if not encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return torch.stack([loss.cpu().double().sum(1), (labels != -100).cpu().double().sum(1)], dim=1)


@torch.no_grad()
def overlaps_of(model: PreTrainedModel, samples: list[Sample], maps: list[Tensor], batch_size: int = 32) -> Tensor:
    """`[N, 3, C]` int64: pixels of each sample and class that are answered rightly, answered, and labelled.

    Logits are resized to each sample's map, as Transformers' image processors resize them.

    Raises:
        HfEsmError: if the model gives no class per pixel.
    """
    overlaps = torch.zeros(len(samples), 3, model.config.num_labels, dtype=torch.int64)
    for indices in batch_indices(samples, batch_size):
        logits = getattr(model(**batch_for([samples[i] for i in indices], model)), "logits", None)
        if logits is None or logits.dim() != 4:
            raise HfEsmError(
                f"{type(model).__name__} gives no class per pixel; mean-iou needs a model of semantic segmentation."
            )
        for i, row in zip(indices, logits.float().cpu(), strict=True):
            counts = maps[i] != -100
            resized = F.interpolate(row[None], size=counts.shape, mode="bilinear", align_corners=False)[0]
            answer, label = resized.argmax(0)[counts], maps[i][counts]
            pixels = (answer[answer == label], answer, label)
            overlaps[i] = torch.stack([torch.bincount(classes, minlength=overlaps.shape[2]) for classes in pixels])
    return overlaps


LONGEST_SPAN = 30  # tokens, as in Transformers' example of question answering


@torch.no_grad()
def texts_of(model: PreTrainedModel, data: LabelledSamples, batch_size: int = 32) -> list[str]:
    """Answers in words, in the order of the samples.

    A `…ForQuestionAnswering` answers with the likeliest span of the context (the second text of a row), or with no
    text where some rows have unanswerable questions and the first token is likelier. A model that generates writes, by
    its `generation_config` without sampling; if that sets no length, up to 1.5 times as many tokens as the longest
    right answer has.

    Raises:
        HfEsmError: if the model answers in neither way, or a question has no context.
    """
    points = type(model).__name__.endswith("ForQuestionAnswering")
    answer = (_span_answers if points else _written_answers)(model, data)
    padded = batch_indices(data.samples, batch_size, padded=True)
    texts: dict[int, str] = {}
    for indices in batches_of(model, "classes", data.samples, batch_size) if points else padded:
        texts |= {i: data.decode(tokens) for i, tokens in zip(indices, answer(indices), strict=True)}
    return [texts[i] for i in range(len(data.samples))]


def _span_answers(model: PreTrainedModel, data: LabelledSamples) -> Callable[[list[int]], list[Tensor]]:
    """Function from indices of samples to the tokens of the answers that the model points at."""
    if not data.contexts:
        raise HfEsmError(
            f"{type(model).__name__} answers questions about a text. Give rows of a question and its context, "
            "and name their columns in `columns`, such as text: question, text_pair: context, label: answers."
        )
    some_unanswerable = any("" in accepted for accepted in data.labels)

    def answer(indices: list[int]) -> list[Tensor]:
        contexts = [data.contexts[i] for i in indices]
        return _spans(model, [data.samples[i] for i in indices], contexts, some_unanswerable)

    return answer


def _spans(
    model: PreTrainedModel, samples: list[Sample], contexts: list[Tensor], some_unanswerable: bool
) -> list[Tensor]:
    """Tokens of each sample's likeliest span; none for an unanswerable question."""
    outputs = model(**batch_for(samples, model))
    starts, ends = (getattr(outputs, name, None) for name in ("start_logits", "end_logits"))
    if starts is None or ends is None:
        raise HfEsmError(f"{type(model).__name__} gives no logits of an answer's start and end; give `score_fn`.")
    spans = []
    for sample, context, start, end in zip(samples, contexts, starts.double().cpu(), ends.double().cpu(), strict=True):
        length = len(context)
        score = start[:length, None] + end[:length]
        allowed = (context[:, None] & context).triu().tril(LONGEST_SPAN - 1)
        first, last = divmod(int(score.masked_fill(~allowed, -torch.inf).argmax()), length)
        unanswered = not allowed.any() or (some_unanswerable and score[0, 0] > score[first, last])
        spans.append(sample["input_ids"][:0] if unanswered else sample["input_ids"][first : last + 1])
    return spans


def _written_answers(model: PreTrainedModel, data: LabelledSamples) -> Callable[[list[int]], list[Tensor]]:
    """Function from indices of samples to the tokens that the model writes for them."""
    if not model.can_generate():
        raise HfEsmError(f"{type(model).__name__} gives no text: it neither generates nor answers questions.")
    limit = _length_limit(model, data)

    def answer(indices: list[int]) -> list[Tensor]:
        return _written(model, [data.samples[i] for i in indices], limit)

    return answer


def _length_limit(model: PreTrainedModel, data: LabelledSamples) -> dict[str, int]:
    settings = model.generation_config
    if settings.max_new_tokens or settings.max_length not in (None, 20):  # 20 is Transformers' value of "not set"
        return {}
    longest = max(len(data.tokenizer(text).input_ids) for accepted in data.labels for text in accepted)
    return {"max_new_tokens": longest + longest // 2}


def _written(model: PreTrainedModel, samples: list[Sample], limit: dict[str, int]) -> list[Tensor]:
    """Tokens that a model writes for each sample, without the prompt."""
    if model.config.is_encoder_decoder:
        return list(model.generate(**to_generate_from(samples, model), do_sample=False, **limit).cpu())
    # Batches are padded on the right, but a prompt must be padded on the left: reversed samples make a reversed batch.
    reversed_samples = [_reversed_tokens(sample) for sample in samples]
    batch = _reversed_tokens(to_generate_from(reversed_samples, model))
    return list(model.generate(**batch, do_sample=False, **limit).cpu()[:, batch["input_ids"].shape[1] :])


def _reversed_tokens(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with everything that there is one of per token in reverse order."""
    shape = inputs["input_ids"].shape
    return {name: value.flip(-1) if value.shape == shape else value for name, value in inputs.items()}
