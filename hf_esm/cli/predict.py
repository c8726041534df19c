"""Let the router of an ESM++ model find the task of every input, and the head of that task its label. One JSON object
a line, with the input, in the order of the inputs. Models that write have no labels: hf-esm chat talks to them, and
hf-esm explain says which expert each prompt gets.
"""

import argparse
from dataclasses import asdict
from typing import Any

from accelerate import PartialState

from ..data import SampleOptions, read_rows
from ..routing import RoutedModel
from .console import Outcome, as_json
from .device import add_device_flag
from .flags import add_flags, add_trust_flags, count, options_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("--task", help="the task of all inputs, if it is known")
    parser.add_argument("--probabilities", action="store_true", help="say the probabilities of all labels, too")


def run(arguments: argparse.Namespace) -> Outcome:
    model, rows, options = routed_inputs(arguments)
    every = arguments.probabilities
    found = model.predict(rows, arguments.task, batch_size=arguments.batch_size, probabilities=every, **options)
    said = [{"input": row, **asdict(prediction)} for row, prediction in zip(rows, found, strict=True)]
    if not every:
        for prediction in said:
            del prediction["probabilities"]
    return Outcome("\n".join(map(as_json, said)), said)


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `predict` and `explain` read."""
    parser.add_argument("model", help="folder or Hub id of the routed model")
    parser.add_argument("data", help="inputs: JSON lines, JSON, CSV, Parquet or text")
    parser.add_argument("--batch-size", type=count, default=32, help="inputs per batch (default: 32)")
    add_device_flag(parser)
    add_trust_flags(parser)
    add_flags(parser, SampleOptions, num_samples=0)


def routed_inputs(arguments: argparse.Namespace) -> tuple[RoutedModel, list[Any], dict[str, Any]]:
    """The model, its input rows, and the options by which it reads all of them."""
    options = {"num_samples": 0, **options_of(arguments, SampleOptions)}
    rows = read_rows(arguments.data, "inputs", SampleOptions(**options))
    model = RoutedModel.from_pretrained(
        arguments.model, allow_pickle=arguments.allow_pickle, trust_remote_code=arguments.trust_remote_code
    )
    return model.to(PartialState().device), rows, {**options, "num_samples": 0}
