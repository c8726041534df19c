"""What a model answers, as tensors that can be compared: next tokens, classes, vectors."""

import inspect
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..architecture import towers
from ..data import Sample, batch_indices, reads_singly
from ..errors import HfEsmError


Answer = dict[str, Tensor]


def no_probability(logits: Tensor) -> float:
    """Return a logit of no probability, which unlike −∞ can be subtracted from itself."""
    return torch.finfo(logits.dtype).min / 2 if logits.is_floating_point() else 0


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model itself, without PEFT's wrapper, whose class and `forward` do not tell what it reads."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _class_name(model: PreTrainedModel) -> str:
    return type(plain_model(model)).__name__


def kind_by_class(model: PreTrainedModel) -> str:
    """Return `tokens` for a model that writes or fills in tokens, else nothing: its output will tell."""
    return "tokens" if model.can_generate() or _class_name(model).endswith("ForMaskedLM") else ""


def kind_by_output(output: Any) -> str:
    answers = ("logits", "start_logits")
    return "classes" if any(isinstance(getattr(output, name, None), Tensor) for name in answers) else "vectors"


def batches_of(model: PreTrainedModel, kind: str, samples: list[Sample], batch_size: int) -> list[list[int]]:
    """Return the indices of the samples of each batch, such that no answer depends on the other samples of its batch.

    Samples of several lengths share a batch only if they differ in tokens alone, the model takes a mask, and nothing
    reads the padding: no convolution, no pooling of the last token.

    Args:
        model: the model that answers.
        kind: kind of the answers; see `ExpertAnswers`.
        samples: unbatched, unpadded model inputs.
        batch_size: samples per batch, at most.
    """
    if not samples:
        return []
    if kind != "tokens" and "input_ids" in samples[0] and reads_singly(model.config):
        batch_size = 1
    shapes = [{n: v.shape for n, v in sample.items() if v.is_floating_point() or v.dim() != 1} for sample in samples]
    plain = plain_model(model)
    masked = "attention_mask" in inspect.signature(plain.forward).parameters
    convolved = any(isinstance(module, nn.Conv1d) for module in plain.modules())
    # The towers of SigLIP and the classifiers of XLNet pool the last token, padding or not.
    pooled = kind != "tokens" and (towers(plain) or getattr(model.config, "summary_type", "") == "last")
    padded = masked and not convolved and not pooled and all(shape == shapes[0] for shape in shapes)
    return batch_indices(samples, batch_size, padded)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _real(sample: Sample) -> Tensor:
    """`[L]` bool: which tokens of an unpadded sample its mask does not exclude."""
    tokens = sample["input_ids"] if "input_ids" in sample else sample["inputs_embeds"]
    return sample.get("attention_mask", torch.ones(len(tokens))).bool()


def _kl(expert: Tensor, model: Tensor) -> Tensor:
    """Return KL(expert ‖ model) of rows of log-probabilities, `[n]`."""
    probabilities = expert.exp()
    return torch.where(probabilities > 0, probabilities * (expert - model), 0.0).sum(-1)


def lumped_log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of some tokens and of all others together, `[n, k + 1]`; `[n, V]` if no others are left.

    The others' share is summed over them, never 1 minus the rest, so that a tiny share and its gradient are exact.

    Args:
        logits: `[n, V]`.
        ids: `[n, k]` int64, distinct in each row.
    """
    chosen = logits.gather(1, ids)
    if ids.shape[1] < logits.shape[1]:
        others = logits.scatter(1, ids, no_probability(logits)).logsumexp(1, keepdim=True)
        chosen = torch.cat([chosen, others], 1)
    return chosen.log_softmax(1)


def in_vocabulary(answer: Answer, ids: Tensor, size: int) -> Answer:
    """Return the answer of a model that writes with the ids of another vocabulary.

    Args:
        answer: see `ExpertAnswers`.
        ids: `[V]` int64, the id there of each token; -1 for tokens that are not there and count among the others.
        size: number of ids there.
    """
    log_probabilities, own = answer["log_probabilities"], answer["ids"].long()
    none = no_probability(log_probabilities)
    if log_probabilities.shape[1] == own.shape[1]:  # all tokens were listed
        log_probabilities = F.pad(log_probabilities, (0, 1), value=none)
    listed, others, new = log_probabilities[:, :-1], log_probabilities[:, -1:], ids[own]
    left_out = listed.masked_fill(new >= 0, none).logsumexp(1, keepdim=True)
    others = torch.logaddexp(others, left_out).clamp_min(none)
    listed = listed.masked_fill(new < 0, none)
    if own.shape[1] >= size:  # all ids are listed
        every = listed.new_full((len(new), size + 1), none).scatter(1, new.where(new >= 0, size), listed)
        listed, new = every[:, :size].log_softmax(1).sort(dim=1, descending=True)
        return {**answer, "ids": new.int(), "log_probabilities": listed}
    for row in (new < 0).any(1).nonzero()[:, 0].tolist():  # an id without probability stands for one left out
        free = torch.ones(size, dtype=torch.bool).index_fill(0, new[row][new[row] >= 0], False).nonzero()[:, 0]
        places = (new[row] < 0).nonzero()[:, 0]
        new[row, places] = free[: len(places)]
    listed, order = listed.sort(dim=1, descending=True, stable=True)
    return {**answer, "ids": new.gather(1, order).int(), "log_probabilities": torch.cat([listed, others], 1)}


class Tokens:
    """Next tokens of models that write, masked tokens of those that fill in."""

    def rows(self, output: Any, batch: dict[str, Tensor], model: PreTrainedModel) -> Tensor:
        """`[B, L, V]` logits."""
        logits = getattr(output, "logits", None)
        names = ("decoder_input_ids", "labels") if model.config.is_encoder_decoder else ("input_ids", "inputs_embeds")
        tokens = next((batch[name] for name in names if name in batch), None)
        if logits is None or tokens is None or logits.dim() != 3 or logits.shape[1] != tokens.shape[1]:
            raise HfEsmError(
                f"{_class_name(model)} gives no distribution for each token of these samples, so its answers cannot "
                "be compared. Choose method and α without agreement."
            )
        return logits

    def positions(self, sample: Sample, row: Tensor, model: PreTrainedModel) -> Tensor:
        """Positions that predict a token: of a masked language model all, of a model that writes those before a real
        token, of a decoder with its own inputs all before the end.
        """
        if model.config.is_encoder_decoder:
            if "decoder_input_ids" not in sample:
                return (sample["labels"] != -100).nonzero()[:, 0]
            ids = sample["decoder_input_ids"]
            ends = torch.isin(ids, torch.tensor(_end_tokens(model), dtype=ids.dtype))
            ends[:1] = False  # BART begins with its end-of-sequence token
            return (sample.get("decoder_attention_mask", torch.ones_like(ids)).bool() & ~ends).nonzero()[:, 0]
        real = _real(sample)
        return (real if _class_name(model).endswith("ForMaskedLM") else real[:-1] & real[1:]).nonzero()[:, 0]

    def keep(self, logits: Tensor, sample: Sample, model: PreTrainedModel, top: int) -> Answer:
        logits = _precise(logits)
        ids = logits.topk(min(top, logits.shape[1])).indices
        log_probabilities = lumped_log_probabilities(logits, ids).float()
        return {
            "ids": ids.int(),
            "log_probabilities": log_probabilities.clamp_min(no_probability(log_probabilities)),
        }

    def divergences(self, logits: Tensor, answer: Answer) -> Tensor:
        return _kl(answer["log_probabilities"], lumped_log_probabilities(_precise(logits), answer["ids"].long()))

    def equal(self, logits: Tensor, answer: Answer) -> Tensor:
        # Logits of half precision are often equal: any of the best ones counts.
        return logits.gather(1, answer["ids"][:, :1].long())[:, 0] == logits.amax(1)


def _end_tokens(model: PreTrainedModel) -> list[int]:
    settings = (getattr(model, "generation_config", None), model.config)
    ids = next((i for i in (getattr(part, "eos_token_id", None) for part in settings) if i is not None), [])
    return ids if isinstance(ids, list) else [ids]


class Classes:
    """Classes of samples, tokens, pixels; tokens where an answer starts and ends; labels that hold; values."""

    def rows(self, output: Any, batch: dict[str, Tensor], model: PreTrainedModel) -> Tensor:
        """`[B, R, C]` logits, one row per distribution."""
        logits = getattr(output, "logits", None)
        if logits is None:
            spans = torch.stack([output.start_logits, output.end_logits], 1)
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            return spans.masked_fill(~real[:, None], no_probability(spans))
        if logits.dim() == 4:
            return logits.flatten(2).mT
        return logits if logits.dim() == 3 else logits[:, None]

    def positions(self, sample: Sample, row: Tensor, model: PreTrainedModel) -> Tensor:
        """All rows; real tokens alone where there is a row per token."""
        if _class_name(model).endswith("ForTokenClassification") and "input_ids" in sample:
            return _real(sample).nonzero()[:, 0]
        return torch.arange(len(row))

    def keep(self, logits: Tensor, sample: Sample, model: PreTrainedModel, top: int) -> Answer:
        problem = model.config.problem_type
        if problem == "multi_label_classification":
            return {"label_logits": logits.float()}
        if problem == "regression" or logits.shape[1] == model.config.num_labels == 1:
            return {"values": logits.float()}
        over_tokens = _class_name(model).endswith("ForQuestionAnswering")
        return {"logits": (logits[:, : len(sample["input_ids"])] if over_tokens else logits).float()}

    def divergences(self, logits: Tensor, answer: Answer) -> Tensor:
        logits, ((name, expert),) = _precise(logits), answer.items()
        if name == "values":
            return (logits - expert).square().sum(1)
        if name == "logits":
            return _kl(expert.log_softmax(1), logits.log_softmax(1))
        pairs = (torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], -1) for z in (expert, logits))
        return _kl(*pairs).sum(1)

    def equal(self, logits: Tensor, answer: Answer) -> Optional[Tensor]:
        ((name, expert),) = answer.items()
        if name == "label_logits":
            return ((logits > 0) == (expert > 0)).all(1)
        return logits.argmax(1) == expert.argmax(1) if name == "logits" else None


class Vectors:
    """Embeddings, or the mean of the last hidden states."""

    def rows(self, output: Any, batch: dict[str, Tensor], model: PreTrainedModel) -> Tensor:
        """`[B, R, d]`, one row per embedding of a sample."""
        tensors = {name: value for name, value in output.items() if isinstance(value, Tensor)}
        if "sentence_embedding" in tensors:  # of the modules of a Sentence Transformers model
            return _precise(tensors["sentence_embedding"])[:, None]
        embeddings = [value for name, value in tensors.items() if name.endswith("_embeds") and value.dim() == 2]
        if embeddings:
            return torch.stack([_precise(value) for value in embeddings], 1)
        floating = [value for value in tensors.values() if value.is_floating_point() and value.dim() > 1]
        names = ("last_hidden_state", "pooler_output")
        vectors = next((tensors[name] for name in names if name in tensors), next(iter(floating), None))
        if vectors is None:
            raise HfEsmError(f"{_class_name(model)} gives no vectors, so its answers cannot be compared.")
        vectors = _precise(vectors)
        if vectors.dim() == 4:  # the channels of an image's places
            vectors = vectors.flatten(2).mT
        if vectors.dim() == 2:
            return vectors[:, None]
        decoded = model.config.is_encoder_decoder
        mask = batch.get("decoder_attention_mask" if decoded else "attention_mask")
        if mask is None or mask.shape != vectors.shape[:2]:
            return vectors.mean(1, keepdim=True)
        mask = mask.to(vectors.dtype)[..., None]
        return (vectors * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)

    def positions(self, sample: Sample, row: Tensor, model: PreTrainedModel) -> Tensor:
        return torch.arange(len(row))

    def keep(self, vectors: Tensor, sample: Sample, model: PreTrainedModel, top: int) -> Answer:
        return {"vectors": vectors.float()}

    def divergences(self, vectors: Tensor, answer: Answer) -> Tensor:
        return 1 - F.cosine_similarity(vectors.double(), answer["vectors"].double())

    def equal(self, vectors: Tensor, answer: Answer) -> Optional[Tensor]:
        return None


KINDS = {"tokens": Tokens(), "classes": Classes(), "vectors": Vectors()}
