"""Essential components of updates as an adapter: of one task, or of several tasks with gates that are trained."""

from ..registration import HfEsmPeftType, register
from .config import EssentialComponentsConfig
from .layer import EssentialComponentsLayer, EssentialComponentsLinear
from .model import EssentialComponentsModel


__all__ = [
    "EssentialComponentsConfig",
    "EssentialComponentsLayer",
    "EssentialComponentsLinear",
    "EssentialComponentsModel",
]

register(HfEsmPeftType.ESSENTIAL_COMPONENTS, EssentialComponentsConfig, EssentialComponentsModel)
