"""A model that routes each sample to experts (ESM++, arXiv 2606.19164).

Comes in: the folder that a merge wrote. Goes out: a `RoutedModel`, which generates, predicts, explains its routes,
exports its experts, and gains or loses one expert.
"""

from .experts import RoutedExperts, expert_factors, unrouted
from .explanations import Explanation, Prediction
from .model import RoutedModel
from .pipeline import RoutedPipeline


__all__ = [
    "Explanation",
    "Prediction",
    "RoutedExperts",
    "RoutedModel",
    "RoutedPipeline",
    "expert_factors",
    "unrouted",
]
