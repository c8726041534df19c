"""Merge the experts of a recipe, or those named by --base and --expert. Flags override the recipe."""

import argparse

from ..errors import HfEsmError
from ..merging import merge_models
from .console import say
from .requests import add_merge_arguments, merge_request


add_arguments = add_merge_arguments


def run(arguments: argparse.Namespace) -> None:
    request = merge_request(arguments)
    if not request.get("output_dir"):
        raise HfEsmError("Say where to write: --output-dir FOLDER (or output_dir in the recipe).")
    say(merge_models(**request))
