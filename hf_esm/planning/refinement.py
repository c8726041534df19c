"""The settings of refining: how gates on the experts' essential directions are trained after a merge."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Optional

from ..errors import HfEsmError
from ..utils import check_fields, check_known
from .plan import MergePlan


@dataclass(frozen=True)
class RefineSettings:
    """Settings of refining: a merged model is brought nearer to the experts' answers on unlabelled samples.

    Of every linear map and task, the leading directions of the expert's output shift get one trained factor each, a
    gate. The gates are folded into plain weights when they are trained.

    Attributes:
        components: number of gates per linear map and task; 0 for one coefficient per map and task on the expert's
            whole update (Expert Merging, ICLR 2026), which keeps the updates of all experts in memory.
        steps: steps of Adam; fewer if the samples that are held back no longer gain.
        learning_rate: of Adam.
        batch_size: samples per task and step.
        gradient_checkpointing: compute each block's activations again in the backward pass instead of keeping them.
        keep_adapter: write the gates as a PEFT adapter over the merged model instead of folding them into its weights.

    Raises:
        HfEsmError: if a value is of another kind than its field, or out of range.
    """

    components: int = field(
        default=128,
        metadata={"help": "gates per linear map and task; 0: one coefficient on the whole update", "least": 0},
    )
    steps: int = field(default=120, metadata={"help": "steps of training, at most", "least": 1})
    learning_rate: float = field(default=0.05, metadata={"help": "of the gates (Adam)", "above": 0})
    batch_size: int = field(default=3, metadata={"help": "samples per task and step", "least": 1})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "take less memory and a third more time in training"}
    )
    keep_adapter: bool = field(
        default=False, metadata={"help": "write the gates as an adapter instead of folding them into the weights"}
    )

    def __post_init__(self) -> None:
        check_fields(self, "`refine`")
        if self.keep_adapter and not self.components:
            raise HfEsmError(
                "`refine`: coefficients on whole updates (components 0) are not an adapter. Leave keep_adapter out, "
                "or give components 1 or more."
            )


def resolve_refine(refine: bool | Mapping[str, Any] | RefineSettings | None) -> Optional[RefineSettings]:
    """Return the settings that `refine` says: True for the defaults, a mapping of settings, or None for no refining.

    Raises:
        HfEsmError: on a setting that does not exist, or a value out of range.
    """
    if isinstance(refine, RefineSettings):
        return refine
    if refine is None or isinstance(refine, bool):
        return RefineSettings() if refine else None
    if not isinstance(refine, Mapping):
        raise HfEsmError(f"`refine` must be true, false or a mapping of settings, not {refine!r}.")
    check_known(refine, [setting.name for setting in fields(RefineSettings)], "setting", "`refine`")
    return RefineSettings(**refine)


def refining_bytes(plan: MergePlan, settings: RefineSettings) -> int:
    """Return the memory for refining, besides activations: the model, and what the gates multiply, float32."""
    base, tasks = plan.base, len(plan.experts)
    size = base.nbytes
    for name in plan.heads.shared:
        shape = base.shape(name)
        if name in plan.unchanged:
            continue
        if name in base.embeddings:
            size += 4 * (tasks + 1) * math.prod(shape)
        elif name in base.linear and not base.linear[name].slices:
            rank = min(settings.components, *shape)
            size += 4 * tasks * (rank * sum(shape) if rank else math.prod(shape))
    return size
