"""Checks that an expert is a fine-tune of the base, from a sample of their weights: another pretraining of one
architecture has the same names and shapes.
"""

import math
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Optional

from torch import Tensor

from ..checkpoints import AdapterCheckpoint, Checkpoint, NotDownloadedError
from ..errors import IncompatibleError


# Matrices that are read of each model, and the numbers that are read of each.
_MATRICES, _NUMBERS = 16, 2**22


# Median cosine of an expert's matrices with the base's, below which the weights have nothing to do with each other.
# Measured: 0.99 or more of fine-tunes, at most 0.003 of other layers of the same model and of newly initialised ones.
# The norm of the update does not tell as much: it is above the base's where a fine-tune only scales the weights.
_UNRELATED = 0.1


# Median norm of the updates, as a share of the base's, above which a fine-tune went far: 0.02 to 0.12 on the suites
# that this was measured on.
_FAR = 0.4


def check_related(base: Checkpoint, experts: Mapping[str, Checkpoint], shared: Iterable[str]) -> list[str]:
    """Compare a fixed sample of matrices of every expert with those of the base.

    Models whose weights were not downloaded are not compared. The updates of an adapter say nothing of the model that
    it was trained on: of adapters, the matrices that they hold in full are compared; see also `check_trained`.

    Args:
        base: checkpoint of the base.
        experts: checkpoints of the experts, by task.
        shared: canonical names of the weights that are merged.

    Returns:
        A warning for each expert that is far from the base.

    Raises:
        IncompatibleError: if experts are no fine-tunes of the base.
    """
    names = [name for name in shared if base.dtype(name).is_floating_point]
    warnings, strangers = [], {}
    for expert in experts.values():
        measured = _measure(base, expert, names)
        if measured is None:
            continue
        cosine, size = measured
        if cosine < _UNRELATED:
            strangers[expert.title] = cosine
        elif size > _FAR:
            warnings.append(
                f"{expert.title}: its updates are {size:.2f} times as large as the weights of the base, in the median "
                "matrix; those of most fine-tunes are 0.02 to 0.2 times as large. Is it a fine-tune of this base?"
            )
    if strangers:
        (title, cosine), *others = strangers.items()
        more = f" ({len(strangers)} of {len(experts)} experts are not)" if others else ""
        raise IncompatibleError(
            f"{title} is not a fine-tune of {base.title}{more}: its matrices have a cosine of {cosine:.2f} with "
            "those of the base, in the median, where fine-tunes have one near 1. Pass the checkpoint that it was "
            "tuned from, with its weights loaded."
        )
    return warnings


def check_trained(base: Checkpoint, experts: Mapping[str, Checkpoint], shared: Iterable[str]) -> list[str]:
    """Return a warning if some experts are adapters, and the base looks as if it had never been trained: all of its
    norms and biases, of a fixed sample, are constant.
    """
    adapters = [expert for expert in experts.values() if isinstance(expert.stored, AdapterCheckpoint)]
    vectors = _sampled([name for name in shared if len(base.shape(name)) == 1 and name in base.trained])
    if not adapters or not vectors:
        return []
    try:
        constant = all((weight == weight[0]).all() for weight in map(base.tensor, vectors))
    except NotDownloadedError:
        return []
    if not constant:
        return []
    return [
        f"{base.title}: each of its norms and biases holds one number throughout, as in a model that was never "
        f"trained, so that {adapters[0].title} would change random weights. Were the weights of the base loaded?"
    ]


def _measure(base: Checkpoint, expert: Checkpoint, names: Iterable[str]) -> Optional[tuple[float, float]]:
    """Return the median cosine of an expert's matrices with the base's, and the median norm of the updates as a share
    of the base's; None if there is no matrix to compare.
    """
    cosines, sizes = [], []
    for name in _sampled(_comparable(base, expert, names)):
        try:
            weight, tuned = (_numbers(model.tensor(name)) for model in (base, expert))
        except NotDownloadedError:
            return None
        norm, tuned_norm, size = (float(tensor.norm()) for tensor in (weight, tuned, tuned - weight))
        if 0 < norm < math.inf and 0 < tuned_norm < math.inf:  # other values are looked for when all weights are read
            cosines.append(float(weight @ tuned) / (norm * tuned_norm))
            sizes.append(size / norm)
    return (median(cosines), median(sizes)) if cosines else None


def _comparable(base: Checkpoint, expert: Checkpoint, names: Iterable[str]) -> list[str]:
    """Return the names of the matrices that an expert holds in full: other than embeddings, if it has any, and other
    than stacks of matrices, which are large.
    """
    stored = expert.stored
    if isinstance(stored, AdapterCheckpoint):
        return [name for name in names if len(base.shape(name)) > 1 and stored.replaces(name)]
    matrices = [name for name in names if len(base.shape(name)) > 1 and name in base.trained and expert.changes(name)]
    maps = [name for name in matrices if name not in base.embeddings] or matrices
    return [name for name in maps if len(base.shape(name)) == 2] or maps


def _sampled(names: list[str]) -> list[str]:
    """Return at most so many of the names, evenly spaced."""
    step = max(1, len(names) / _MATRICES)
    return [names[int(i * step)] for i in range(min(len(names), _MATRICES))]


def _numbers(weight: Tensor) -> Tensor:
    """Return the first numbers of a weight, in float32."""
    return weight.reshape(-1)[:_NUMBERS].float()
