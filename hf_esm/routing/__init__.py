"""A model that routes each sample to experts (ESM++, arXiv 2606.19164).

Comes in: the folder that a merge wrote. Goes out: a `RoutedModel` that generates, predicts, explains, exports its
experts, and takes one more or one less.
"""

from .experts import RoutedExperts, expert_factors, residual_update
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
    "residual_update",
]
