"""Write every expert of an ESM++ model as an ordinary LoRA adapter, OUTPUT/TASK, over the static model."""

import argparse

from ..routing import RoutedModel
from .console import say
from .flags import add_trust_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of the routed model")
    parser.add_argument("-o", "--output", required=True, help="folder to write the adapters to")
    parser.add_argument("--format", choices=["lora"], default="lora", help="format of the adapters (default: lora)")
    parser.add_argument("--task", action="append", help="export only this task; repeat for more")
    add_trust_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    model = RoutedModel.from_pretrained(
        arguments.model, allow_pickle=arguments.allow_pickle, trust_remote_code=arguments.trust_remote_code
    )
    for task, folder in model.export_lora(arguments.output, arguments.task).items():
        say(f"{task}: {folder}")
