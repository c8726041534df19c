"""Add a task to an ESM++ model from its expert and its statistics (hf-esm calibrate --base), without the data of the
other tasks.
"""

import argparse

from ..routing import RoutedModel
from .console import say
from .flags import add_trust_flags, pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of the routed model")
    parser.add_argument("--expert", required=True, metavar="TASK=MODEL", help="the new task and its expert")
    parser.add_argument("--statistics", help="statistics of the expert (default: the file in the expert's folder)")
    parser.add_argument("--base", help="the base of the expert (default: the base that the model's recipe names)")
    parser.add_argument("-o", "--output", required=True, help="folder to write the larger model to")
    add_trust_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    ((task, expert),) = pairs([arguments.expert], "--expert").items()
    model = RoutedModel.from_pretrained(
        arguments.model, allow_pickle=arguments.allow_pickle, trust_remote_code=arguments.trust_remote_code
    )
    larger = model.add_expert(task, expert, arguments.statistics, output_dir=arguments.output, base=arguments.base)
    say(f"{larger.folder}: {', '.join(larger.tasks)}")
