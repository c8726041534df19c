"""Merge methods: each a dataclass of settings with a function of one layer's stack.

To add one, write such a dataclass, a `MergeMethod` with `name` and `merge(stack) -> Merged`, and give it a line in
`METHODS`.
"""

from .averaging import Mean, TaskArithmetic
from .concrete import ConcreteAdaMerging, ConcreteTaskArithmetic
from .essential import EssentialMerge, RoutedMerge
from .isotropic import IsoC, IsoCTS
from .registry import METHODS, ROUTED, describe_method, resolve_method
from .regression import RegMean
from .singular_vectors import TSVC, TSVM
from .sparse import DARE, TIES
from .stack import Merged, MergeMethod, Stack


__all__ = [
    "DARE",
    "METHODS",
    "ROUTED",
    "TIES",
    "TSVC",
    "TSVM",
    "ConcreteAdaMerging",
    "ConcreteTaskArithmetic",
    "EssentialMerge",
    "IsoC",
    "IsoCTS",
    "Mean",
    "MergeMethod",
    "Merged",
    "RegMean",
    "RoutedMerge",
    "Stack",
    "TaskArithmetic",
    "describe_method",
    "resolve_method",
]
