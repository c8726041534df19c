"""Score a merged model on the rows of every task, next to the experts if they are named. A recipe names all of it: the
model that it was merged into (output_dir), its base and experts, and the rows (test).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data import SampleOptions
from ..errors import HfEsmError
from ..evaluation import evaluate, update_card
from ..metrics import BUILT_IN
from ..planning import load_recipe, name_experts, task_weights
from .console import Outcome
from .device import add_device_flag
from .flags import add_flags, add_trust_flags, count, options_of
from .requests import is_recipe, update_by_task
from .values import plain_or_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of the merged model, or the recipe that it was merged by")
    parser.add_argument("--data", "--test", action="append", metavar="TASK=FILE", help="labelled rows")
    parser.add_argument("--expert", action="append", metavar="TASK=MODEL", help="compare with this expert")
    parser.add_argument(
        "--base", help="score the base, too; adapters are read over it (default: over that which they name)"
    )
    names = f"{', '.join(BUILT_IN)}, one of the evaluate library, or {{lm_eval: [TASK]}}"
    parser.add_argument("--metric", help=f"{names} (default: accuracy)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the scores to this file as JSON, too")
    parser.add_argument("--card", action="store_true", help="write the scores into the model's card, too")
    parser.add_argument(
        "--route",
        choices=["routed", "oracle", "static"],
        help="how an esm++ model picks experts (default: routed)",
    )
    parser.add_argument("--batch-size", type=count, help="samples per batch (default: 32)")
    add_device_flag(parser)
    add_trust_flags(parser)
    add_flags(parser, SampleOptions, num_samples=0)


def run(arguments: argparse.Namespace) -> Outcome:
    request = _request(arguments)
    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        raise HfEsmError(f"--output {arguments.output}: there is no such folder.")
    scores = evaluate(**request)
    card = update_card(request["model"], scores, request.get("data") or {}) if arguments.card else None
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(scores.as_dict(), indent=2) + "\n", encoding="utf-8")
    files = ", ".join(map(str, filter(None, (card, arguments.output))))
    return Outcome(scores, scores.as_dict(), where=files)


def _request(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `evaluate`, from a recipe and the flags that override it."""
    request = _of_recipe(arguments.model) if is_recipe(arguments.model) else {"model": arguments.model}
    update_by_task(request, arguments, experts="expert", data="data")
    for name in ("metric", "route", "batch_size"):
        if getattr(arguments, name) is not None:
            request[name] = getattr(arguments, name)
    if isinstance(request.get("metric"), str):
        request["metric"] = plain_or_yaml(request["metric"], "--metric")
    if "data" not in request and not isinstance(request.get("metric"), Mapping):
        raise HfEsmError("Name the rows to score on: --data TASK=FILE for each (or test in a recipe).")
    if arguments.base:
        request["base"] = plain_or_yaml(arguments.base, "--base")
    for name in ("allow_pickle", "trust_remote_code"):
        request[name] = getattr(arguments, name) or request.get(name, False)
    if hasattr(arguments, "progress"):  # under --quiet
        request["progress"] = arguments.progress
    return {**request, **options_of(arguments, SampleOptions)}


def _of_recipe(path: str) -> dict[str, Any]:
    """The arguments that a recipe holds; its experts are those of the tasks that have rows."""
    recipe = load_recipe(path, "evaluate")
    if not recipe.get("output_dir"):
        raise HfEsmError(f"{path} names no output_dir, the model to score. Name the model instead of the recipe.")
    request = {"model": recipe.pop("output_dir")}
    if "test" in recipe:
        request["data"] = recipe.pop("test")
    if "num_test" in recipe:
        request["num_samples"] = recipe.pop("num_test")
    experts, _ = task_weights(name_experts(recipe.pop("experts")), None)
    rows = request.get("data")
    request["experts"] = {t: spec for t, spec in experts.items() if isinstance(rows, Mapping) and t in rows}
    return {**request, **recipe}
