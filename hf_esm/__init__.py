"""Merge fine-tunes of one checkpoint into one multi-task model, in the Hugging Face ecosystem, without training."""

from .calibrating import calibrate
from .calibration import collect_statistics
from .cards import add_comparison, update_card
from .comparison import Comparison, compare
from .errors import HfEsmError
from .evaluation import evaluate
from .explanations import Explanation, Prediction
from .heads import load_task_model
from .hub import RoutedModel
from .interference import Interference, measure_interference
from .merge import MergeResult, merge_models
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
from .metrics import Metric
from .pipelines import RoutedPipeline
from .planning import MergePlan
from .recipes import load_recipe
from .scores import Scores
from .statistics import ActivationStatistics
from .tuners import (
    EssentialComponentsConfig,
    EssentialComponentsModel,
    RoutedExpertsConfig,
    RoutedExpertsModel,
    essential_components,
    fuse_components,
    write_lora_adapter,
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
