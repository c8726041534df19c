"""Measuring merged models.

Comes in: folders of models, and labelled rows. Goes out: scores, a comparison of methods with intervals and pictures,
the interference between experts, and all of these in a model's card.
"""

from .card import add_comparison, update_card
from .cells import NOT_COMPARED
from .comparison import METHODS_COMPARED, compare
from .evaluator import check_by_task, evaluate
from .interference import Interference, measure_interference
from .pictures import PICTURES
from .report import PAGE, REPORT, Comparison


__all__ = [
    "METHODS_COMPARED",
    "NOT_COMPARED",
    "PAGE",
    "PICTURES",
    "REPORT",
    "Comparison",
    "Interference",
    "add_comparison",
    "check_by_task",
    "compare",
    "evaluate",
    "measure_interference",
    "update_card",
]
