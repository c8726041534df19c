"""Updates of LoRA adapters inside the span of their factors, and the best factors of a rank of what lies in it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoints import Checkpoint
from ..linalg import RELATIVE_CUTOFF, right_singular_vectors, triangular_factor


# Share of the strongest image below which the products of inputs, in float32, do not tell directions apart.
_TOLD_APART = 1e-5


@dataclass(frozen=True)
class Span:
    """The updates `Δ_t = Q K_t` of one linear map by all experts, in a basis of the columns of their factors `B_t`.

    Attributes:
        basis: `Q [d_out, s]` float64, with orthonormal columns; `s` is the sum of the experts' ranks, or `d_out`.
        cores: `K_t [s, d_in]` float32, by expert; zero for an expert that leaves the map alone.
    """

    basis: Tensor
    cores: list[Tensor]


def rank_of(experts: Iterable[Checkpoint], name: str) -> int:
    """Return the sum of the ranks of the experts' updates of one linear map, by its canonical name."""
    return sum(len(factors[0]) for factors in (expert.factors(name) for expert in experts) if factors is not None)


def span_of(experts: Mapping[str, Checkpoint], name: str) -> Span:
    """Return the updates of one linear map, by its canonical name, which at least one expert changes."""
    known = [expert.factors(name) for expert in experts.values()]
    present = [factors for factors in known if factors is not None]
    basis, triangle = torch.linalg.qr(torch.cat([b for _, b in present], dim=1).double())
    triangles = iter(triangle.split([len(a) for a, _ in present], dim=1))
    zero = torch.zeros(len(triangle), present[0][0].shape[1])
    return Span(basis, [zero if f is None else (next(triangles) @ f[0].double()).float() for f in known])


def best_factors(core: Tensor, rank: int, inputs: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor, float]:
    """Return `U [s, k]` and `A [k, d_in]`, float64, so that `U A` of rank `k ≤ rank` is nearest to `K`, and the error.

    The norm is `‖R (K − U A)ᵀ‖`, where `R` are the stacked factors of the inputs. By Eckart–Young, the columns of `U`
    are the leading left singular vectors of `K Rᵀ`, and `A = Uᵀ K`. Where the inputs tell directions no further apart,
    those that matter most to `K` itself come next. No matrix but the inputs' has more than `s` columns.

    Args:
        core: `K [s, d_in]`.
        rank: largest rank.
        inputs: `R_t [m_t, d_in]`, float32, with the Gram matrix of each expert's inputs; without any, `R` is the
            identity.

    Returns the factors, and the error as a share of `‖R Kᵀ‖`: 0 at full rank. Products with inputs are float32.
    """
    core = core.double()
    read = core.T.float()
    images = [triangular_factor((factor @ read).double()) for factor in inputs] if inputs else [core.T]
    values, turned = right_singular_vectors(triangular_factor(torch.cat(images)))
    strong = values > _TOLD_APART * values[:1]
    directions = turned[strong].T
    if directions.shape[1] < rank:
        rest = core - directions @ (directions.T @ core)
        left_out, others = right_singular_vectors(triangular_factor(rest.T))
        kept = left_out > RELATIVE_CUTOFF * torch.linalg.norm(core)
        directions = torch.cat([directions, others[kept].T], dim=1)
    directions = torch.linalg.qr(directions[:, :rank]).Q
    error = float(values[rank:].norm() / values.norm()) if len(values) > rank and values.any() else 0.0
    return directions, directions.T @ core, error
