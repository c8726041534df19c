"""One task's essential components as an adapter: the truncated essential subspace decomposition of its update."""

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
