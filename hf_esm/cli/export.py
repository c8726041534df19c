"""Write the experts of an ESM++ model as ordinary LoRA adapters over the static model: OUTPUT/TASK, with heads."""

import argparse

from ..routing import RoutedModel
from .console import Outcome
from .flags import add_trust_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of the routed model")
    parser.add_argument("-o", "--output", required=True, help="folder to write the adapters to")
    parser.add_argument("--format", choices=["lora"], default="lora", help="format of the adapters (default: lora)")
    parser.add_argument("--task", action="append", help="export only this task; repeat for more")
    parser.add_argument(
        "--no-heads",
        dest="heads",
        action="store_false",
        help="adapters of the static model's class, instead of each task's class with its head",
    )
    parser.add_argument(
        "--base-model", help="Hub id of the static model, which the adapters name as their base (default: MODEL)"
    )
    add_trust_flags(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    model = RoutedModel.from_pretrained(
        arguments.model, allow_pickle=arguments.allow_pickle, trust_remote_code=arguments.trust_remote_code
    )
    adapters = model.export_lora(
        arguments.output, arguments.task, heads=arguments.heads, base_model=arguments.base_model
    )
    return Outcome(
        "\n".join(f"{task}: {folder}" for task, folder in adapters.items()),
        adapters,
        arguments.output,
        load=f"peft.PeftModel.from_pretrained(model, {str(next(iter(adapters.values())))!r})",
    )
