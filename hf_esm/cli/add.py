"""Add a task to an ESM++ model from its expert and its samples, or its statistics (hf-esm calibrate --base), without
the data of the other tasks.
"""

import argparse

from ..data import RunOptions
from ..routing import RoutedModel
from .console import Outcome, routed_outcome
from .device import add_device_flag
from .flags import add_flags, add_trust_flags, options_of
from .values import by_task, plain_or_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of the routed model")
    parser.add_argument("--expert", required=True, metavar="TASK=MODEL", help="the new task and its expert")
    parser.add_argument("--calibration", metavar="FILE", help="unlabelled samples of the new task")
    parser.add_argument(
        "--statistics", help="statistics of the expert (default: of the samples, or else the file in its folder)"
    )
    parser.add_argument("--base", help="the base of the expert (default: the base that the model's recipe names)")
    parser.add_argument("-o", "--output", required=True, help="folder to write the larger model to")
    add_device_flag(parser)
    add_trust_flags(parser)
    add_flags(parser, RunOptions, leave_out=("allow_pickle", "trust_remote_code"))


def run(arguments: argparse.Namespace) -> Outcome:
    ((task, expert),) = by_task([arguments.expert], "--expert").items()
    model = RoutedModel.from_pretrained(
        arguments.model, allow_pickle=arguments.allow_pickle, trust_remote_code=arguments.trust_remote_code
    )
    larger = model.add_expert(
        task,
        expert,
        arguments.statistics,
        output_dir=arguments.output,
        calibration=arguments.calibration and plain_or_yaml(arguments.calibration, "--calibration"),
        base=arguments.base and plain_or_yaml(arguments.base, "--base"),
        **options_of(arguments, RunOptions),
    )
    return routed_outcome(larger.folder, larger.tasks)
