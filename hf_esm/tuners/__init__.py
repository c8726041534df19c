"""PEFT methods of our own. Importing them registers them, so that PEFT and Transformers load their adapters."""

from .essential import (
    EssentialComponentsConfig,
    EssentialComponentsModel,
    essential_components,
    fuse_components,
)
from .lora_export import write_lora_adapter
from .registration import HfEsmPeftType
from .routed import RoutedExpertsConfig, RoutedExpertsModel, recording, route


__all__ = [
    "EssentialComponentsConfig",
    "EssentialComponentsModel",
    "HfEsmPeftType",
    "RoutedExpertsConfig",
    "RoutedExpertsModel",
    "essential_components",
    "fuse_components",
    "recording",
    "route",
    "write_lora_adapter",
]
