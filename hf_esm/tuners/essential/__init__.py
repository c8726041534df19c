"""One task's essential components as an adapter: the truncated essential subspace decomposition of its update."""

from ..registration import HfEsmPeftType, register
from .components import essential_components
from .config import EssentialComponentsConfig
from .fusion import fuse_components
from .layer import EssentialComponentsLayer, EssentialComponentsLinear
from .model import EssentialComponentsModel


__all__ = [
    "EssentialComponentsConfig",
    "EssentialComponentsLayer",
    "EssentialComponentsLinear",
    "EssentialComponentsModel",
    "essential_components",
    "fuse_components",
]

register(HfEsmPeftType.ESSENTIAL_COMPONENTS, EssentialComponentsConfig, EssentialComponentsModel)
