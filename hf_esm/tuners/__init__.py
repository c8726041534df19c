"""PEFT methods of our own. Importing them registers them, so that PEFT and Transformers load their adapters."""

from .essential import EssentialComponentsConfig, EssentialComponentsModel
from .registration import HfEsmPeftType
from .routed import RoutedExpertsConfig, RoutedExpertsModel, recording, route


__all__ = [
    "EssentialComponentsConfig",
    "EssentialComponentsModel",
    "HfEsmPeftType",
    "RoutedExpertsConfig",
    "RoutedExpertsModel",
    "recording",
    "route",
]
