"""Agreement: how near a model's answers are to an expert's, on samples without labels."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data import Sample, batch_for
from ..errors import DamagedFileError, HfEsmError
from ..utils import UNSEALED, atomic_file, check_seal, fingerprint, reading, seal, tracked
from .answers import KINDS, Answer, batches_of, kind_by_class, kind_by_output, no_probability


FORMAT = "hf_esm.answers"
FORMAT_VERSION = 1
ROUNDING = 1e-7  # a mean divergence below this is the rounding of float32


@dataclass(frozen=True)
class ExpertAnswers:
    """What an expert answers on the samples of its task.

    Attributes:
        kind: `tokens` for models that write and masked language models, `classes` for classifiers, `vectors` for all
            others, such as embedding models and bodies without a head.
        samples: `N` unbatched, unpadded model inputs.
        answers: `N` dictionaries of tensors on the CPU. All have `positions`, `[n]` int32: the tokens (or rows of the
            output) that are compared. `tokens` have `ids`, `[n, k]` int32, the most probable tokens, best first, and
            `log_probabilities`, float32: `[n, k + 1]`, the last one that of all other tokens together, or `[n, V]`
            where all tokens are listed. `classes` have `[n, C]` float32 `logits`, `label_logits` (several labels may
            hold) or `values` (regression). `vectors` have `[n, d]` float32 `vectors`.
    """

    kind: str
    samples: list[Sample]
    answers: list[Answer]

    def save(self, path: str | os.PathLike) -> Path:
        """Write the answers, without the samples, to one safetensors file, which appears when it is complete.

        Returns:
            The path of the file.
        """
        path = Path(path)
        tensors = {f"{i}.{name}": value for i, answer in enumerate(self.answers) for name, value in answer.items()}
        metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "kind": self.kind}
        with atomic_file(path) as partial:
            save_file(tensors, partial, {**metadata, "samples": fingerprint(self.samples), **UNSEALED})
            seal(partial)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike, samples: list[Sample]) -> "ExpertAnswers":
        """Read the answers on these samples from a file that `save` wrote.

        Raises:
            HfEsmError: if the file is damaged, has another format, another version of this one, or holds answers on
                other samples.
        """
        path = Path(path)
        with reading(path, remedy="Remove it."), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if metadata.get("format") != FORMAT:
            raise HfEsmError(f"{path}: no expert's answers in it. Remove the file, or name another one.")
        if metadata.get("version") != str(FORMAT_VERSION):
            raise HfEsmError(
                f"{path}: format version {metadata.get('version')}; this hf_esm reads {FORMAT_VERSION}. Remove it."
            )
        if metadata.get("samples") != fingerprint(samples):
            raise HfEsmError(f"{path}: answers on other samples. Remove the file, or give the samples that it is of.")
        starts = [f"{i}." for i in range(len(samples))]
        answers = [{k.removeprefix(s): v for k, v in tensors.items() if k.startswith(s)} for s in starts]
        broken = any(answer.keys() != answers[0].keys() or not _is_whole(answer) for answer in answers)
        if broken or metadata.get("kind") not in KINDS:
            raise DamagedFileError(f"{path}: its answers are damaged. Remove the file.")
        check_seal(path, "Remove the file.")
        return cls(metadata["kind"], samples, answers)


def _is_whole(answer: Answer) -> bool:
    """Whether all tensors are finite and have a row per position."""
    count = len(answer.get("positions", ()))
    return len(answer) > 1 and all(len(value) == count and value.isfinite().all() for value in answer.values())


@dataclass(frozen=True, eq=False)
class Agreement:
    """How near a model's answers are to an expert's on `N` samples of one task.

    Attributes:
        kind: kind of the answers; see `ExpertAnswers`.
        divergences: `[N]` float64, the divergences of each sample's answers from the expert's, summed up; see
            `divergence`.
        equals: `[N]` float64, how many of each sample's best answers equal the expert's: tokens, classes, or sets of
            labels; None for values and vectors.
        counts: `[N]` float64, numbers of answers that were compared: tokens, samples or others.
    """

    kind: str
    divergences: Tensor
    equals: Optional[Tensor]
    counts: Tensor

    @property
    def count(self) -> int:
        """Number of answers that were compared."""
        return int(self.counts.sum())

    @property
    def divergence(self) -> float:
        """Mean divergence of the model's answers from the expert's; 0 if there are none."""
        return float(self.divergences.sum()) / max(self.count, 1)

    @property
    def equal(self) -> Optional[float]:
        """Share of equal best answers, in [0, 1]; None for values and vectors, or without answers."""
        return float(self.equals.sum()) / self.count if self.equals is not None and self.count else None

    def score(self, base: "Agreement") -> float:
        """Return the number to choose models by: higher is better, and 1 is the expert itself.

        It is the share of equal answers for classes (it follows the score on labelled rows more closely than the
        divergence of their probabilities), else `gain_over(base)`.
        """
        return self.gain_over(base) if self.kind != "classes" or self.equal is None else self.equal

    def gain_over(self, base: "Agreement") -> float:
        """Return the share of the base's divergence that is gone: 1 for the expert, 0 for the base.

        It is 0 for all models if the base answers as the expert does, up to rounding: there is nothing to gain.
        """
        return 1 - self.divergence / base.divergence if base.divergence > ROUNDING else 0.0

    def scores_of_draws(self, base: "Agreement", draws: Tensor) -> Tensor:
        """Return `score` on each draw of samples: `[D]` float64, from indices `[D, M]` int64, which may repeat."""
        counts = self.counts[draws].sum(1).clamp_min(1)
        if self.kind == "classes" and self.equals is not None:
            return self.equals[draws].sum(1) / counts
        at_base = base.divergences[draws].sum(1) / counts
        gains = 1 - self.divergences[draws].sum(1) / counts / at_base
        return torch.where(at_base > ROUNDING, gains, torch.zeros_like(gains))


def collect_answers(
    model: PreTrainedModel,
    samples: list[Sample],
    *,
    batch_size: int = 8,
    top: int = 128,
    title: str = "model",
    progress: bool = True,
) -> ExpertAnswers:
    """Run an expert over samples, and keep its answers.

    Of a distribution over a vocabulary the `top` most probable tokens are kept, and the probability of all others
    together. The model's are lumped in the same way, so that the divergence is a lower bound of the full one
    (data-processing inequality), and exact if `top` is at least the size of the vocabulary. On four fine-tunes of a
    small language model (2,048 tokens) the base's divergence was too low by 1 to 27 % with 16 tokens, 0.2 to 13 %
    with 64, 0.1 to 8 % with 128, 0.1 to 4 % with 256: least where the expert is sure. What a merge has gained over
    its base changes less, since both are lumped: by 0.00 to 0.02 with 128 for merges between base and expert. A token
    needs `8 top` bytes; log-probabilities of half precision would save a quarter of them, for 1e-5 of the divergence.

    Args:
        model: the expert, on the device to run on.
        samples: unbatched, unpadded model inputs. Those of encoder-decoders need `decoder_input_ids` or `labels`.
        batch_size: samples per batch.
        top: tokens to keep of each distribution.
        title: name on the progress bar.
        progress: show a progress bar.

    Raises:
        HfEsmError: if the model gives nothing to compare.
    """
    answers: dict[int, Answer] = {}
    name = kind_by_class(model)
    if name and model.config.is_encoder_decoder and not {"decoder_input_ids", "labels"} & set().union(*samples):
        raise HfEsmError(f"{type(model).__name__}: an expert with a decoder needs `decoder_input_ids` or `labels`.")
    with _in_evaluation(model), torch.no_grad():
        groups = batches_of(model, name, samples, batch_size)
        for group in tracked(groups, f"Answers of {title}", progress, leave=False):
            chosen = [samples[i] for i in group]
            batch = _batch(model, chosen)
            output = model(**batch)
            name = name or kind_by_output(output)
            kind = KINDS[name]
            rows = kind.rows(output, batch, model)
            for row, sample, i in zip(rows, chosen, group, strict=True):
                positions = kind.positions(sample, row, model)
                answer = kind.keep(row[positions.to(row.device)], sample, model, top)
                answer = {"positions": positions.int(), **answer}
                answers[i] = {key: value.cpu().contiguous() for key, value in answer.items()}
    return ExpertAnswers(name or "vectors", samples, [answers[i] for i in range(len(samples))])


def divergence(model: PreTrainedModel, answers: ExpertAnswers, indices: Iterable[int]) -> Tensor:
    """Divergence of a model's answers from the expert's on some of the samples, which is what refining minimises.

    It is the mean over all compared answers of these samples: of tokens and classes KL(expert ‖ model) in nats, of
    several labels that may hold the sum over labels; of values the squared difference; of vectors 1 − cosine. Samples
    share batches where that changes nothing.

    Returns:
        A scalar, float32 or better, with a gradient. 0 if the samples hold nothing to compare, such as texts of one
        token.
    """
    kind, total, count = KINDS[answers.kind], torch.zeros(()), 0
    for _, rows, answer in _compared(model, answers, list(indices), None):
        total = total + kind.divergences(rows, answer).sum()
        count += len(rows)
    return total / max(count, 1)


@torch.no_grad()
def agreement_of(
    model: PreTrainedModel, answers: ExpertAnswers, indices: Optional[Sequence[int]] = None, *, batch_size: int = 8
) -> Agreement:
    """Compare a model's answers with the expert's on the samples, or on some of them."""
    kind, chosen = KINDS[answers.kind], list(range(len(answers.samples)) if indices is None else indices)
    counts, divergences, equals = (torch.zeros(len(chosen), dtype=torch.float64) for _ in range(3))
    known = True
    with _in_evaluation(model):
        for at, rows, answer in _compared(model, answers, chosen, batch_size):
            counts.index_add_(0, at, torch.ones(len(at), dtype=torch.float64))
            divergences.index_add_(0, at, kind.divergences(rows, answer).double().cpu())
            equal = kind.equal(rows, answer)
            known = known and equal is not None
            if known:
                equals.index_add_(0, at, equal.double().cpu())
    return Agreement(answers.kind, divergences, equals if known and counts.any() else None, counts)


def _compared(
    model: PreTrainedModel, answers: ExpertAnswers, indices: list[int], batch_size: Optional[int]
) -> Iterator[tuple[Tensor, Tensor, Answer]]:
    """Run the model, batch by batch, and yield places in `indices`, `[n]` int64 on the CPU, `[n, …]` rows of the
    output, and the expert's answers to them.
    """
    kind, samples = KINDS[answers.kind], [answers.samples[i] for i in indices]
    for group in batches_of(model, answers.kind, samples, batch_size or max(len(samples), 1)):
        batch = _batch(model, [samples[i] for i in group])
        rows = kind.rows(model(**batch), batch, model)
        parts = [answers.answers[indices[i]] for i in group]
        joined = {name: _joined([part[name] for part in parts]).to(rows.device) for name in parts[0]}
        at = torch.arange(len(group)).repeat_interleave(torch.tensor([len(part["positions"]) for part in parts]))
        compared = rows[at.to(rows.device), joined.pop("positions").long()]
        yield torch.tensor(group)[at], compared, joined


def _joined(tensors: list[Tensor]) -> Tensor:
    """Stack tensors of rows; logits over the tokens of samples of several lengths are padded with no probability."""
    if tensors[0].dim() == 1:
        return torch.cat(tensors)
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([F.pad(tensor, (0, width - tensor.shape[1]), value=no_probability(tensor)) for tensor in tensors])


def _batch(model: PreTrainedModel, samples: list[Sample]) -> dict[str, Tensor]:
    """Return a batch without targets, unless a decoder's inputs are to be made from them."""
    targets = model.config.is_encoder_decoder and "decoder_input_ids" not in samples[0]
    if not targets:
        samples = [{name: value for name, value in sample.items() if name != "labels"} for sample in samples]
    return batch_for(samples, model)


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
