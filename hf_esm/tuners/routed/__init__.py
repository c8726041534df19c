"""The experts of all tasks in one adapter, one of which each sample is routed to."""

from ..registration import HfEsmPeftType, register
from .config import RoutedExpertsConfig
from .layer import RoutedExpertsLayer, RoutedExpertsLinear
from .model import RoutedExpertsModel, decide, fingerprint, recording, route, routing_state
from .routing import Decision, Named, Route, routable_models


__all__ = [
    "Decision",
    "Named",
    "Route",
    "RoutedExpertsConfig",
    "RoutedExpertsLayer",
    "RoutedExpertsLinear",
    "RoutedExpertsModel",
    "decide",
    "fingerprint",
    "recording",
    "routable_models",
    "route",
    "routing_state",
]

register(HfEsmPeftType.ROUTED_EXPERTS, RoutedExpertsConfig, RoutedExpertsModel)
