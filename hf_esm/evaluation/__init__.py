"""Measuring merged models.

Comes in: folders and labelled rows. Goes out: scores, a comparison of methods with intervals and pictures, and how
much experts are in each other's way.
"""

from .card import add_comparison, update_card
from .comparison import METHODS_COMPARED, NOT_COMPARED, compare
from .evaluator import evaluate
from .interference import Interference, measure_interference
from .report import REPORT, Comparison


__all__ = [
    "METHODS_COMPARED",
    "NOT_COMPARED",
    "REPORT",
    "Comparison",
    "Interference",
    "add_comparison",
    "compare",
    "evaluate",
    "measure_interference",
    "update_card",
]
