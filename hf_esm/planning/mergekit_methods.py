"""The methods of mergekit, as ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional


_SPARSE = {"density_scope": "tensor"}
SIGNS = {True: "weights", False: "none"}  # our `normalize`, by mergekit's


@dataclass(frozen=True)
class KitMethod:
    """One of mergekit's methods.

    Attributes:
        name: of ours.
        settings: our settings that mergekit's formula amounts to.
        parameters: our settings by those of mergekit.
        normalize: mergekit's default of `normalize`; None if the method has none.
        signs: whether `normalize` is a setting of ours, instead of a part of α.
        on_weights: whether whole weights are merged, so that one of the models may serve mergekit as the base.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    normalize: Optional[bool] = None
    signs: bool = False
    on_weights: bool = False


_DENSITY = {"density": "density"}
METHODS = {
    "linear": KitMethod("mean", normalize=True, on_weights=True),
    "task_arithmetic": KitMethod("task-arithmetic", normalize=False),
    "ties": KitMethod("ties", {**_SPARSE, "density": 1.0}, _DENSITY, normalize=True, signs=True),
    "dare_linear": KitMethod("dare", {"density": 1.0}, _DENSITY, normalize=False),
    "dare_ties": KitMethod("dare-ties", {"density": 1.0}, _DENSITY, normalize=False, signs=True),
    "breadcrumbs": KitMethod(
        "breadcrumbs", {**_SPARSE, "density": 1.0, "gamma": 0.01}, {**_DENSITY, "gamma": "gamma"}, normalize=False
    ),
    "della": KitMethod(
        "della", {"density": 1.0, "epsilon": 0.3}, {**_DENSITY, "epsilon": "epsilon"}, normalize=True, signs=True
    ),
    "sce": KitMethod("sce", {"density": 1.0}, {"select_topk": "density"}),
    "model_stock": KitMethod("model-stock"),
    "slerp": KitMethod("slerp", parameters={"t": "t"}, on_weights=True),
    "nuslerp": KitMethod("nuslerp", on_weights=True),
    "karcher": KitMethod("karcher", parameters={"max_iter": "max_iter", "tol": "tol"}, on_weights=True),
}
REFUSED = {
    "passthrough": "it stacks layers into a model of another depth, and hf_esm merges layer by layer",
    "breadcrumbs_ties": "hf_esm has 'breadcrumbs' and 'ties', not both in one",
    "della_linear": "hf_esm has 'della', which elects signs",
    "multislerp": "hf_esm has 'slerp' and 'karcher'",
    "arcee_fusion": "hf_esm has no method like it",
    "nearswap": "hf_esm has no method like it",
    "ram": "hf_esm has no method like it",
}
