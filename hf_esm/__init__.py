"""Merge fine-tunes of one checkpoint into one multi-task model, in the Hugging Face ecosystem, without training."""

from .calibration.calibrator import calibrate
from .calibration.recorder import collect_statistics
from .calibration.statistics import ActivationStatistics
from .checkpoints.lora_export import write_lora_adapter
from .errors import HfEsmError
from .evaluation.comparison import Comparison, compare
from .evaluation.evaluator import evaluate
from .evaluation.interference import Interference, measure_interference
from .hub.cards import add_comparison, update_card
from .merging.components import essential_components
from .merging.fusion import fuse_components
from .merging.merge import MergeResult, merge_models
from .methods import (
    DARE,
    METHODS,
    TIES,
    TSVC,
    TSVM,
    ConcreteAdaMerging,
    ConcreteTaskArithmetic,
    EssentialMerge,
    IsoC,
    IsoCTS,
    Mean,
    RegMean,
    RoutedMerge,
    TaskArithmetic,
)
from .metrics.metric import Metric
from .metrics.scores import Scores
from .planning.heads import load_task_model
from .planning.plan import MergePlan
from .planning.recipe import load_recipe
from .routing.explanations import Explanation, Prediction
from .routing.model import RoutedModel
from .routing.pipeline import RoutedPipeline
from .tuners import (
    EssentialComponentsConfig,
    EssentialComponentsModel,
    RoutedExpertsConfig,
    RoutedExpertsModel,
)
from .version import __version__


__all__ = [
    "DARE",
    "METHODS",
    "TIES",
    "TSVC",
    "TSVM",
    "ActivationStatistics",
    "Comparison",
    "ConcreteAdaMerging",
    "ConcreteTaskArithmetic",
    "EssentialComponentsConfig",
    "EssentialComponentsModel",
    "EssentialMerge",
    "Explanation",
    "HfEsmError",
    "Interference",
    "IsoC",
    "IsoCTS",
    "Mean",
    "MergePlan",
    "MergeResult",
    "Metric",
    "Prediction",
    "RegMean",
    "RoutedExpertsConfig",
    "RoutedExpertsModel",
    "RoutedMerge",
    "RoutedModel",
    "RoutedPipeline",
    "Scores",
    "TaskArithmetic",
    "__version__",
    "add_comparison",
    "calibrate",
    "collect_statistics",
    "compare",
    "essential_components",
    "evaluate",
    "fuse_components",
    "load_recipe",
    "load_task_model",
    "measure_interference",
    "merge_models",
    "update_card",
    "write_lora_adapter",
]
