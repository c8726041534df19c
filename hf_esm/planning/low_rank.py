"""Whether a merge of LoRA adapters can be written as one LoRA adapter."""

import math
from collections.abc import Sequence
from typing import Optional

from ..checkpoints import AdapterCheckpoint
from ..errors import HfEsmError
from ..methods import METHODS, MergeMethod
from .plan import MergePlan
from .refinement import RefineSettings


_REMEDY = "Leave `output` out, which writes a whole model"


def check_low_rank(
    plan: MergePlan, methods: Sequence[MergeMethod], refining: Optional[RefineSettings], rank: Optional[int]
) -> None:
    """Raise an error if a merge cannot be written as one LoRA adapter; note in the plan how much room it takes.

    Args:
        methods: all methods that the merge may use.
        refining: settings of refining, if the merge is refined.
        rank: largest rank of the adapter, if there is one.

    Raises:
        HfEsmError: names the method, or the expert and the weight that an adapter of linear maps cannot hold.
    """
    for method in methods:
        if not method.keeps_span or method.routes:
            able = ", ".join(name for name in METHODS if METHODS[name]().keeps_span and not METHODS[name]().routes)
            raise HfEsmError(
                f"`output='lora'`: what {method.name} makes of low-rank updates has no low rank. Use one of {able}."
            )
    if refining is not None and refining.keep_adapter:
        raise HfEsmError("`output='lora'` folds the gates of `refine` into the adapter. Leave `keep_adapter` out.")
    if plan.vocabulary is not None:
        raise HfEsmError(
            "`output='lora'`: experts bring tokens, or rows of single tokens, which a merged LoRA adapter does not "
            f"hold. {_REMEDY}."
        )
    for expert in plan.experts.values():
        if not isinstance(expert.stored, AdapterCheckpoint):
            raise HfEsmError(f"`output='lora'`: {expert.title} is not a LoRA adapter. {_REMEDY}.")
    written = scratch = 0
    for name in plan.heads.shared:
        ranks = []
        for expert in plan.experts.values():
            factors = expert.factors(name)
            if factors is None and expert.changes(name):
                raise HfEsmError(
                    f"`output='lora'`: {expert.title}, a {expert.kind}, changes '{plan.base.names[name]}' by "
                    "more than LoRA factors of a linear map (as DoRA, saved modules, biases and embeddings do). "
                    f"{_REMEDY}."
                )
            ranks.append(0 if factors is None else len(factors[0]))
        if any(ranks):
            written += 4 * min(sum(ranks), rank or math.inf) * sum(plan.base.shape(name))
            scratch += 4 * sum(ranks) * sum(plan.base.shape(name))
    plan.output, plan.output_bytes = "adapter", written
    plan.scratch_bytes = scratch
