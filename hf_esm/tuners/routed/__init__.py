"""The experts of all tasks in one adapter, one of which each sample is routed to."""

from ..registration import HfEsmPeftType, register
from .config import RoutedExpertsConfig
from .layer import RoutedExpertsLayer, RoutedExpertsLinear
from .model import RoutedExpertsModel, decide, fingerprint, recording, route, routing_state
from .routing import ONE_PER_SAMPLE, Decision, Named, Route, check_separable


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
