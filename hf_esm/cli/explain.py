"""Say for every input which expert an ESM++ model adds, and how likely every task is. One JSON object a line."""

import argparse
from dataclasses import asdict

from .console import Outcome, as_json
from .predict import add_input_arguments, routed_inputs


add_arguments = add_input_arguments


def run(arguments: argparse.Namespace) -> Outcome:
    model, rows, options = routed_inputs(arguments)
    said = [asdict(explanation) for explanation in model.explain(rows, arguments.batch_size, **options)]
    return Outcome("\n".join(map(as_json, said)), said)
