"""The experts of all tasks in one adapter; each sample is routed to its experts."""

from ..registration import HfEsmPeftType, register
from .config import RoutedExpertsConfig
from .frames import RoutingState
from .layer import RoutedExpertsLayer, RoutedExpertsLinear
from .model import RoutedExpertsModel, decide, fingerprint, prompt_length, recording, route, routing_state
from .routes import ONE_PER_SAMPLE, Decision, Decisions, Named, Route
from .separability import check_separable


__all__ = [
    "ONE_PER_SAMPLE",
    "Decision",
    "Decisions",
    "Named",
    "Route",
    "RoutedExpertsConfig",
    "RoutedExpertsLayer",
    "RoutedExpertsLinear",
    "RoutedExpertsModel",
    "RoutingState",
    "check_separable",
    "decide",
    "fingerprint",
    "prompt_length",
    "recording",
    "route",
    "routing_state",
]

register(HfEsmPeftType.ROUTED_EXPERTS, RoutedExpertsConfig, RoutedExpertsModel)
