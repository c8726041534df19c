"""What a model answers: classes, likelihoods, texts, maps of classes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..data import Sample, batch_for, batch_indices, reads_singly, to_generate_from
from ..errors import HfEsmError
from .labels import LabelledSamples
from .metric import ACCURACY, PERPLEXITY, Metric


@torch.no_grad()
def outputs_of(
    model: PreTrainedModel, samples: list[Sample], metric: Metric = ACCURACY, batch_size: int = 32
) -> Tensor:
    """What a metric reads of a model, on the CPU, in the samples' order; classes of tokens padded with -100. Samples
    of like length share a batch.
    """
    order = sorted(range(len(samples)), key=lambda i: max(value.numel() for value in samples[i].values()))
    if metric is not PERPLEXITY and samples and "input_ids" in samples[0] and reads_singly(model.config):
        batch_size = 1
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = batch_for([samples[i] for i in chosen], model)
        found |= zip(chosen, (_likelihood if metric is PERPLEXITY else _answer)(model, batch).cpu(), strict=True)
    rows = [found[i] for i in range(len(samples))]
    return pad_sequence(rows, True, -100) if rows[0].dim() else torch.stack(rows)


@torch.no_grad()
def read_outputs(model: PreTrainedModel, samples: list[Sample], metric: Metric, batch_size: int = 32) -> list[Any]:
    """What `metric.read` makes of a model's outputs, in the samples' order. Samples of one shape share a batch, so
    that nothing in them is of padding.
    """
    found: dict[int, Any] = {}
    for chosen in batch_indices(samples, batch_size):
        outputs = model(**batch_for([samples[i] for i in chosen], model), return_dict=True)
        parts = {
            name: value.cpu()
            for name, value in outputs.items()
            if isinstance(value, Tensor) and value.dim() and len(value) == len(chosen)
        }
        found |= {i: metric.read({name: value[row] for name, value in parts.items()}) for row, i in enumerate(chosen)}
    return [found[i] for i in range(len(samples))]


_NO_CLASS = (
    "{kind} gives no class per sample or token; accuracy needs a classifier. Of answers in words there are "
    "exact-match and word-f1; of anything else, give a Metric with `read`."
)


def check_answers(model: PreTrainedModel, metric: Metric) -> None:
    """Refuse a model whose answers the metric cannot read."""
    kind = type(model).__name__
    if metric is PERPLEXITY:
        if kind.endswith("ForMaskedLM"):
            raise HfEsmError(f"{kind} predicts no next token; perplexity needs a model that writes text.")
    elif model.can_generate():
        raise HfEsmError(_NO_CLASS.format(kind=kind))
    elif metric is ACCURACY and model.config.num_labels == 1:
        raise HfEsmError(f"{kind} gives one value, not a class. Choose a metric of values, such as 'mse'.")


def _answer(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """`[B]`: each sample's class, or its value where the head has one label; `[B, C]` bool where several labels may
    hold; `[B, L]`: each token's class.
    """
    logits, kind = getattr(model(**batch), "logits", None), type(model).__name__
    if logits is not None and logits.dim() == 3 and kind.endswith("ForTokenClassification"):
        return logits.argmax(-1)
    if logits is None or logits.dim() != 2:
        raise HfEsmError(_NO_CLASS.format(kind=kind))
    if model.config.problem_type == "multi_label_classification":
        return logits > 0
    return logits[:, 0].float() if logits.shape[1] == 1 else logits.argmax(-1)


def _likelihood(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """`[B, 2]` float64: the negative log-likelihood of each sample's tokens, summed, and how many there are."""
    encoder_decoder = model.config.is_encoder_decoder
    labels = batch.get("labels")
    if labels is None and not encoder_decoder and "input_ids" in batch:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        labels = batch["input_ids"].masked_fill(~real, -100)
    if labels is None:
        raise HfEsmError(
            f"{type(model).__name__}: perplexity is of what the model is to write. Give it as `text_target`, or ready "
            "`labels`."
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
    """`[N, 3, C]` int64: of a sample's pixels and each class, how many are rightly found, found, and labelled. Logits
    are brought to the size of the sample's map, as Transformers' image processors do.

    Raises:
        HfEsmError: if the model gives no class per pixel.
    """
    found = torch.zeros(len(samples), 3, model.config.num_labels, dtype=torch.int64)
    for chosen in batch_indices(samples, batch_size):
        logits = getattr(model(**batch_for([samples[i] for i in chosen], model)), "logits", None)
        if logits is None or logits.dim() != 4:
            raise HfEsmError(
                f"{type(model).__name__} gives no class per pixel; mean-iou needs a model of semantic segmentation."
            )
        for i, row in zip(chosen, logits.float().cpu(), strict=True):
            asked = maps[i] != -100
            sized = F.interpolate(row[None], size=asked.shape, mode="bilinear", align_corners=False)[0]
            answer, right = sized.argmax(0)[asked], maps[i][asked]
            counted = (answer[answer == right], answer, right)
            found[i] = torch.stack([torch.bincount(part, minlength=found.shape[2]) for part in counted])
    return found


LONGEST_SPAN = 30  # tokens, as in Transformers' example of question answering


@torch.no_grad()
def texts_of(model: PreTrainedModel, data: LabelledSamples, batch_size: int = 32) -> list[str]:
    """A model's answers, in the samples' order.

    Of a `…ForQuestionAnswering`, the likeliest span of the context (the second text of a row), or no text where the
    rows have unanswerable questions and the first token is likelier; of a model that generates, what it writes, by its
    own `generation_config` but without sampling. Where that sets no length, half as many tokens again as the longest
    right answer has.

    Raises:
        HfEsmError: if the model does neither, or a question has no context.
    """
    points = type(model).__name__.endswith("ForQuestionAnswering")
    if not points and not model.can_generate():
        raise HfEsmError(f"{type(model).__name__} gives no text: it neither generates nor answers questions.")
    if points and not data.contexts:
        raise HfEsmError(
            f"{type(model).__name__} answers questions about a text. Give rows of a question and its context: "
            "columns={'text': 'question', 'text_pair': 'context', 'label': 'answers'}."
        )
    some_unanswerable = any("" in accepted for accepted in data.texts)
    limit = _length_limit(model, data) if not points else {}
    found: dict[int, str] = {}
    for chosen in batch_indices(data.samples, batch_size, padded=True):
        samples = [data.samples[i] for i in chosen]
        if points:
            contexts = [data.contexts[i] for i in chosen]
            answers = _spans(model, samples, contexts, some_unanswerable)
        else:
            answers = _written(model, samples, limit)
        found |= {i: data.read(ids) for i, ids in zip(chosen, answers, strict=True)}
    return [found[i] for i in range(len(data.samples))]


def _spans(
    model: PreTrainedModel, samples: list[Sample], contexts: list[Tensor], some_unanswerable: bool
) -> list[Tensor]:
    """The tokens of each sample's likeliest span; none for an unanswerable question."""
    outputs = model(**batch_for(samples, model))
    starts, ends = (getattr(outputs, name, None) for name in ("start_logits", "end_logits"))
    if starts is None or ends is None:
        raise HfEsmError(f"{type(model).__name__} gives no logits of an answer's start and end; give score_fn.")
    found = []
    for sample, inside, start, end in zip(samples, contexts, starts.double().cpu(), ends.double().cpu(), strict=True):
        length = len(inside)
        score = start[:length, None] + end[:length]
        allowed = (inside[:, None] & inside).triu().tril(LONGEST_SPAN - 1)
        first, last = divmod(int(score.masked_fill(~allowed, -torch.inf).argmax()), length)
        none = not allowed.any() or (some_unanswerable and score[0, 0] > score[first, last])
        found.append(sample["input_ids"][first : last + 1] if not none else sample["input_ids"][:0])
    return found


def _length_limit(model: PreTrainedModel, data: LabelledSamples) -> dict[str, int]:
    settings = model.generation_config
    if settings.max_new_tokens or settings.max_length not in (None, 20):  # 20 is what Transformers takes for none
        return {}
    longest = max(len(data.tokenizer(text).input_ids) for accepted in data.texts for text in accepted)
    return {"max_new_tokens": longest + longest // 2}


def _written(model: PreTrainedModel, samples: list[Sample], limit: dict[str, int]) -> list[Tensor]:
    """The tokens that a model writes for each sample; a prompt is left out."""
    if model.config.is_encoder_decoder:
        return list(model.generate(**to_generate_from(samples, model), do_sample=False, **limit).cpu())
    # Padding belongs before a prompt: what follows it is what is written.
    turned = [{name: _turned(value, sample) for name, value in sample.items()} for sample in samples]
    batch = to_generate_from(turned, model)
    batch = {name: _turned(value, batch) for name, value in batch.items()}
    return list(model.generate(**batch, do_sample=False, **limit).cpu()[:, batch["input_ids"].shape[1] :])


def _turned(value: Tensor, beside: dict[str, Any]) -> Tensor:
    """What there is of each token, from the last to the first; anything else as it is."""
    return value.flip(-1) if value.shape == beside["input_ids"].shape else value
