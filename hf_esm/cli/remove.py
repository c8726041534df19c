"""Write an ESM++ model without one of its tasks: without its expert, its head and its part of the router."""

import argparse

from ..routing import RoutedModel
from .console import Outcome, routed_outcome
from .flags import add_trust_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of the routed model")
    parser.add_argument("task", help="the task to remove")
    parser.add_argument("-o", "--output", required=True, help="folder to write the smaller model to")
    add_trust_flags(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    model = RoutedModel.from_pretrained(
        arguments.model, allow_pickle=arguments.allow_pickle, trust_remote_code=arguments.trust_remote_code
    )
    smaller = model.remove_expert(arguments.task, output_dir=arguments.output)
    return routed_outcome(smaller.folder, smaller.tasks)
