"""Pairs of texts, as models of embeddings see them: their cosines, and the ranks of the right documents."""

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from ..data import Sample, batch_for, sample_fingerprint
from ..errors import HfEsmError
from .answers import KINDS, batches_of, kind_by_class, kind_by_output
from .labels import LabelledSamples


@torch.no_grad()
def embeddings_of(model: PreTrainedModel, samples: list[Sample], batch_size: int = 32) -> Tensor:
    """Embeddings of length 1, `[N, d]` float64 on the CPU: what the modules of a Sentence Transformers model make, or
    without them the mean of the last hidden states.

    Raises:
        HfEsmError: if the model has a head that answers something else.
    """
    vectors: dict[int, Tensor] = {}
    for indices in batches_of(model, "vectors", samples, batch_size):
        batch = batch_for([samples[i] for i in indices], model)
        output = model(**batch)
        rows = None if kind_by_class(model) else KINDS["vectors"].rows(output, batch, model)
        if rows is None or rows.shape[1] != 1 or kind_by_output(output) != "vectors":
            raise HfEsmError(
                f"{type(model).__name__} gives no embedding of a text. Choose another metric, or a model without a "
                "head."
            )
        vectors |= zip(indices, rows[:, 0].double().cpu(), strict=True)
    return normalize(torch.stack([vectors[i] for i in range(len(samples))]), dim=1)


def cosines_of(model: PreTrainedModel, data: LabelledSamples, batch_size: int = 32) -> Tensor:
    """`[N]` float64: cosine of the embeddings of both texts of each pair."""
    first, second = (embeddings_of(model, samples, batch_size) for samples in (data.samples, data.partners))
    return (first * second).sum(1)


def ranks_of(model: PreTrainedModel, data: LabelledSamples, batch_size: int = 32) -> Tensor:
    """`[N]` int64: rank of each first text's own second text, 1 for the nearest, among the second texts of all pairs.

    Equal texts count once. A text that is as near as the right one comes before it.
    """
    places: dict[str, int] = {}
    own = torch.tensor([places.setdefault(sample_fingerprint(sample), len(places)) for sample in data.partners])
    first_of = {int(place): i for i, place in reversed(list(enumerate(own)))}
    documents = embeddings_of(model, [data.partners[first_of[place]] for place in range(len(places))], batch_size)
    ranks = []
    for query, place in zip(embeddings_of(model, data.samples, batch_size), own, strict=True):
        cosines = documents @ query
        ranks.append(int((cosines >= cosines[place]).sum()))
    return torch.tensor(ranks)


def spearman(cosines: Tensor, scores: Tensor) -> float:
    """Correlation of the ranks of cosines and scores, ties at their mean rank; NaN if either are all equal."""
    ranks = [_mean_ranks(values.double()) for values in (cosines, scores)]
    first, second = (values - values.mean() for values in ranks)
    return float((first @ second) / (first.norm() * second.norm()))


def _mean_ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]


def reciprocal_rank(ranks: Tensor, _: Tensor) -> float:
    """Mean of 1 / rank, 0 beyond the tenth."""
    return float(torch.where(ranks <= 10, 1 / ranks.double(), 0.0).mean())


def recall_at_10(ranks: Tensor, _: Tensor) -> float:
    """Share of the ranks that are 10 or better."""
    return float((ranks <= 10).double().mean())
