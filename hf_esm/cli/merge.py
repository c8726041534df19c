"""Merge the experts of a recipe, or those named by --base and --expert. Flags override the recipe."""

import argparse
import logging
import sys
from collections import Counter

from ..checkpoints import REPORT_FILE
from ..errors import HfEsmError
from ..merging import MergeResult, merge_models
from ..utils import plain_table
from .console import say
from .parser import CommandParser
from .requests import add_merge_arguments, merge_request


def add_arguments(parser: CommandParser) -> None:
    add_merge_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="print the folder alone, no progress, no warnings")
    parser.add_argument("--json", action="store_true", help="print the report of the merge as JSON")


def run(arguments: argparse.Namespace) -> None:
    request = merge_request(arguments)
    if not request.get("output_dir"):
        raise HfEsmError("Say where to write: --output-dir FOLDER (or output_dir in the recipe).")
    if arguments.quiet:
        logging.getLogger("hf_esm").setLevel(logging.ERROR)
        request["progress"] = False
    elif not sys.stderr.isatty():  # bars are for terminals, unless someone asks
        request.setdefault("progress", False)
    try:
        result = merge_models(**request)
    finally:
        logging.getLogger("hf_esm").setLevel(logging.NOTSET)
    if arguments.json:
        say((result.output_dir / REPORT_FILE).read_text(encoding="utf-8").rstrip())
    elif arguments.quiet:
        say(result.output_dir)
    else:
        say(result)
        if sys.stdout.isatty():
            say(closing(result))


def closing(result: MergeResult) -> str:
    """What was merged how, by kind of weight; where the model is, how it is loaded, and what to do next."""
    counts = Counter((report.kind or "other", report.how) for report in result.weights)
    rows = [[kind, how, str(count)] for (kind, how), count in sorted(counts.items())]
    task, folder = next(iter(result.plan.experts)), str(result.output_dir)
    load = f"load_task_model({folder!r}, {task!r})"
    if result.plan.method.routes:
        load = f"RoutedModel.from_pretrained({folder!r})"
    return "\n".join(
        [
            "",
            *(f"  {line}" for line in plain_table([["weights", "merged by", "number"], *rows])),
            "",
            f"  where  {folder}",
            f"  load   from hf_esm import {load.partition('(')[0].partition('.')[0]}; model = {load}",
            f"  next   hf-esm evaluate {folder} --data {task}=ROWS, or hf-esm push {folder} ME/NAME",
        ]
    )
