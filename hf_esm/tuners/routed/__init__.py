"""The experts of all tasks in one adapter; each sample is routed to its experts."""

from ..registration import HfEsmPeftType, register
from .config import RoutedExpertsConfig
from .frames import check_separable
from .layer import RoutedExpertsLayer, RoutedExpertsLinear
from .model import RoutedExpertsModel, decide, fingerprint, recording, route, routing_state
from .routes import ONE_PER_SAMPLE, Decision, Named, Route


__all__ = [
    "ONE_PER_SAMPLE",
    "Decision",
    "Named",
    "Route",
    "RoutedExpertsConfig",
    "RoutedExpertsLayer",
    "RoutedExpertsLinear",
    "RoutedExpertsModel",
    "check_separable",
    "decide",
    "fingerprint",
    "recording",
    "route",
    "routing_state",
]

register(HfEsmPeftType.ROUTED_EXPERTS, RoutedExpertsConfig, RoutedExpertsModel)
