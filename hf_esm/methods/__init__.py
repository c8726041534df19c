"""Merge methods: each a dataclass of settings with a function of one layer's stack.

Comes in: a `Stack`, one weight of all experts as updates of the base. Goes out: a `Merged` update. To add a method,
write a `MergeMethod` with `merge(stack) -> Merged` and register it under a name: see `register_method`.
"""

from .automatic import AutoMerge
from .averaging import Mean, TaskArithmetic
from .concrete import AdaMerging, ConcreteAdaMerging, ConcreteTaskArithmetic, LearnedMask, relaxed_mask, rescaled
from .embeddings import merge_counted_embedding, merge_embedding
from .essential import EssentialMerge, fuse_with_singular_values, share_subtracted
from .interference import CAT, WUDI
from .isotropic import IsoC, IsoCTS
from .knots import KnOTS
from .registry import METHODS, describe_method, register_method, resolve_method
from .regression import RegMean
from .routed import RoutedMerge
from .singular_vectors import TSVC, TSVM
from .sparse import DARE, TIES, magnitude_threshold
from .stack import InputStatistics, Merged, MergeMethod, Stack, WholeUpdates, buffer_stack, mean_update, weights_cancel


__all__ = [
    "CAT",
    "DARE",
    "METHODS",
    "TIES",
    "TSVC",
    "TSVM",
    "WUDI",
    "AdaMerging",
    "AutoMerge",
    "ConcreteAdaMerging",
    "ConcreteTaskArithmetic",
    "EssentialMerge",
    "InputStatistics",
    "IsoC",
    "IsoCTS",
    "KnOTS",
    "LearnedMask",
    "Mean",
    "MergeMethod",
    "Merged",
    "RegMean",
    "RoutedMerge",
    "Stack",
    "TaskArithmetic",
    "WholeUpdates",
    "buffer_stack",
    "describe_method",
    "fuse_with_singular_values",
    "magnitude_threshold",
    "mean_update",
    "merge_counted_embedding",
    "merge_embedding",
    "register_method",
    "relaxed_mask",
    "rescaled",
    "resolve_method",
    "share_subtracted",
    "weights_cancel",
]
