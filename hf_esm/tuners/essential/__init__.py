"""The essential components of one task's update as an adapter: a truncated essential subspace decomposition."""

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
