"""Score a merged model on the rows of every task, next to the experts if they are named."""

import argparse
import json
from pathlib import Path

from ..data import SampleOptions
from ..errors import HfEsmError
from ..evaluation import evaluate, update_card
from ..metrics import BUILT_IN
from .console import say
from .flags import add_flags, add_trust_flags, count, options_of, pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of the merged model")
    parser.add_argument("--data", action="append", required=True, metavar="TASK=FILE", help="labelled rows")
    parser.add_argument("--expert", action="append", metavar="TASK=MODEL", help="compare with this expert")
    parser.add_argument(
        "--base", help="score the base, too; adapters are read over it (default: over that which they name)"
    )
    parser.add_argument(
        "--metric", default="accuracy", help=f"{', '.join(BUILT_IN)}, or a metric of the evaluate library"
    )
    parser.add_argument("--json", metavar="FILE", help="write the scores to this file, too")
    parser.add_argument("--card", action="store_true", help="write the scores into the model's card, too")
    parser.add_argument(
        "--route",
        choices=["routed", "oracle", "static"],
        default="routed",
        help="how an esm++ model picks experts (default: routed)",
    )
    parser.add_argument("--batch-size", type=count, default=32, help="samples per batch (default: 32)")
    add_trust_flags(parser)
    add_flags(parser, SampleOptions, num_samples=0)


def run(arguments: argparse.Namespace) -> None:
    data, experts = pairs(arguments.data, "--data"), pairs(arguments.expert, "--expert")
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise HfEsmError(f"--json {arguments.json}: there is no such folder.")
    scores = evaluate(
        arguments.model,
        data,
        experts=experts,
        base=arguments.base,
        metric=arguments.metric,
        route=arguments.route,
        batch_size=arguments.batch_size,
        allow_pickle=arguments.allow_pickle,
        trust_remote_code=arguments.trust_remote_code,
        **{"num_samples": 0, **options_of(arguments, SampleOptions)},
    )
    say(scores)
    if arguments.card:
        say(update_card(arguments.model, scores, data))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(scores.as_dict(), indent=2) + "\n", encoding="utf-8")
