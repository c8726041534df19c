"""Say for every input which expert an ESM++ model adds, and how likely every task is. One JSON object a line."""

import argparse
import json
from dataclasses import asdict

from .console import say
from .predict import add_input_arguments, routed_inputs


add_arguments = add_input_arguments


def run(arguments: argparse.Namespace) -> None:
    model, rows, options = routed_inputs(arguments)
    for explanation in model.explain(rows, arguments.batch_size, **options):
        say(json.dumps(asdict(explanation), ensure_ascii=False))
