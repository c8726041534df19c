"""Answers in words: the part of a text that a model points at, or what it writes."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batches import batch_for, batch_indices, to_generate_from
from ..data.samples import Sample
from ..errors import HfEsmError
from .labels import LabelledSamples


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
