"""A model that routes each sample to experts (ESM++, arXiv 2606.19164).

Comes in: the folder that a merge wrote. Goes out: a `RoutedModel`, which generates, predicts, explains its routes,
exports its experts, and gains or loses one expert.
"""

from .by_block import routes_by_block
from .experts import RoutedExperts, expert_factors, unrouted
from .explanations import Explanation, Prediction
from .model import RoutedModel
from .pipeline import RoutedPipeline
from .router import blocks_before


__all__ = [
    "Explanation",
    "Prediction",
    "RoutedExperts",
    "RoutedModel",
    "RoutedPipeline",
    "blocks_before",
    "expert_factors",
    "routes_by_block",
    "unrouted",
]
