"""Merge fine-tunes of one checkpoint into one multi-task model, in the Hugging Face ecosystem, without training."""

from .calibration import collect_statistics
from .errors import HfEsmError
from .heads import load_task_model
from .merge import MergeResult, merge_models
from .methods import METHODS, TSVM, EssentialMerge, Mean, TaskArithmetic
from .planning import MergePlan
from .statistics import ActivationStatistics
from .version import __version__


__all__ = [
    "METHODS",
    "TSVM",
    "ActivationStatistics",
    "EssentialMerge",
    "HfEsmError",
    "Mean",
    "MergePlan",
    "MergeResult",
    "TaskArithmetic",
    "__version__",
    "collect_statistics",
    "load_task_model",
    "merge_models",
]
