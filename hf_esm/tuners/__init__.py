"""PEFT methods of this package, in PEFT's own shape: config, layer, model. They know neither files nor merging.

Comes in: a model, and the configuration of an adapter. Goes out: the model with the adapter on it. Importing this
package registers the methods with PEFT, so that PEFT and Transformers load their adapters.
"""

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
