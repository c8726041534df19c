"""Merge fine-tunes of one checkpoint into one multi-task model, in the Hugging Face ecosystem, without training."""

from .calibration.calibrator import calibrate
from .calibration.collection import collect_statistics
from .calibration.statistics import ActivationStatistics
from .checkpoints.heads import load_task_model
from .checkpoints.lora_export import write_lora_adapter
from .errors import HfEsmError
from .evaluation.card import add_comparison, update_card
from .evaluation.comparison import compare
from .evaluation.evaluator import evaluate
from .evaluation.interference import Interference, measure_interference
from .evaluation.report import Comparison
from .merging.components import essential_components, fuse_components
from .merging.merge import merge_models
from .merging.result import MergeResult
from .methods.averaging import Mean, TaskArithmetic
from .methods.concrete import ConcreteAdaMerging, ConcreteTaskArithmetic
from .methods.essential import EssentialMerge, RoutedMerge
from .methods.isotropic import IsoC, IsoCTS
from .methods.registry import METHODS
from .methods.regression import RegMean
from .methods.singular_vectors import TSVC, TSVM
from .methods.sparse import DARE, TIES
from .metrics.metric import Metric
from .metrics.scores import Scores
from .planning.plan import MergePlan
from .planning.recipe import load_recipe
from .routing.explanations import Explanation, Prediction
from .routing.model import RoutedModel
from .routing.pipeline import RoutedPipeline
from .tuners.essential.config import EssentialComponentsConfig
from .tuners.essential.model import EssentialComponentsModel
from .tuners.routed.config import RoutedExpertsConfig
from .tuners.routed.model import RoutedExpertsModel
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
