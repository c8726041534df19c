"""The method that is chosen from others, for the experts at hand."""

from dataclasses import dataclass, field
from typing import ClassVar

from .stack import MergeMethod


@dataclass
class AutoMerge(MergeMethod):
    """Merge by each of several methods, and keep the model that scores best on labelled rows or, without labels, that
    agrees most with the experts on unlabelled samples.

    Where there is one candidate alone, it is taken. The choice itself is made by the merge, which has the samples.
    """

    name: ClassVar[str] = "auto"
    static_method: ClassVar[str] = "auto"
    needs_statistics: ClassVar[bool] = True
    chooses: ClassVar[bool] = True

    methods: list = field(
        default_factory=list,
        metadata={"help": "methods to choose from, names or settings; by default, those for the kind of model"},
    )
