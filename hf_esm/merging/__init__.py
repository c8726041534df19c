"""The merge itself.

Comes in: a base, experts, samples, options. Goes out: the folder of a merged model, and a `MergeResult` that says what
was done.
"""

from .components import essential_components, fuse_adapters, fuse_components
from .expert_statistics import STATISTICS_SAMPLES, statistics_and_samples
from .measuring import statistics_of_experts, updates_merged_by
from .merge import merge_models
from .planned import PlannedRun
from .result import MergeResult
from .updates import MergedUpdates


__all__ = [
    "STATISTICS_SAMPLES",
    "MergeResult",
    "MergedUpdates",
    "PlannedRun",
    "essential_components",
    "fuse_adapters",
    "fuse_components",
    "merge_models",
    "statistics_and_samples",
    "statistics_of_experts",
    "updates_merged_by",
]
