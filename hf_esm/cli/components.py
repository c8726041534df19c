"""Compress one fine-tuned model to a small adapter: the essential components of its update, found on its samples."""

import argparse

from ..data import RunOptions
from ..merging import essential_components
from .console import Outcome
from .device import add_device_flag
from .flags import add_flags, count, options_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="Hub id or folder of the model that the expert was tuned from")
    parser.add_argument("expert", help="Hub id or folder of the fine-tuned model")
    parser.add_argument(
        "calibration",
        nargs="?",
        metavar="samples",
        help="its samples, or a file of its statistics (default: the statistics in the expert's folder)",
    )
    parser.add_argument("--rank", type=count, required=True, help="components per linear map")
    parser.add_argument(
        "--format",
        choices=["lora", "essential"],
        default="lora",
        help="lora: loads without hf_esm; essential: can be fused by `hf-esm fuse` (default: lora)",
    )
    parser.add_argument("--output-dir", required=True, help="folder to write; it must not exist yet")
    add_device_flag(parser)
    add_flags(parser, RunOptions, leave_out={"max_memory"})


def run(arguments: argparse.Namespace) -> Outcome:
    folder = essential_components(
        arguments.base,
        arguments.expert,
        arguments.calibration,
        rank=arguments.rank,
        output_dir=arguments.output_dir,
        as_lora=arguments.format == "lora",
        **options_of(arguments, RunOptions),
    )
    load = f"peft.PeftModel.from_pretrained(base, {str(folder)!r})"
    return Outcome("", {"output_dir": folder}, folder, where=folder, load=load)
