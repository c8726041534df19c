"""Merge by several methods, score every merged model on every task, and write a report with pictures. Measurements are
kept with the report: a second run does only what is new.
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints import RECIPE_FILE
from ..errors import HfEsmError
from ..evaluation import METHODS_COMPARED, NOT_COMPARED, PAGE, PICTURES, REPORT, add_comparison, compare
from ..methods import resolve_method
from .console import Outcome
from .flags import count
from .parser import CommandParser
from .requests import add_merge_arguments, merge_request, update_by_task
from .values import plain_or_yaml


logger = logging.getLogger(__name__)


def add_arguments(parser: CommandParser) -> None:
    add_merge_arguments(parser, leave_out=NOT_COMPARED)
    parser.add_argument(
        "--methods",
        action="extend",
        nargs="+",
        help="methods, by name or as {name: esm, gamma: 0.2} (default: the recipe's, and the usual ones)",
    )
    parser.add_argument("--test", action="append", metavar="TASK=FILE", help="labelled rows to measure on")
    parser.add_argument(
        "--seeds", action="extend", nargs="+", type=int, help="seeds of the choice of samples (default: 0)"
    )
    parser.add_argument("--num-test", type=int, help="test rows per task, chosen at random (default: all)")
    parser.add_argument("--keep", choices=["best"], help="keep the best merged model in the report's folder best/")
    parser.add_argument(
        "--pictures",
        choices=PICTURES,
        help="which pictures to draw (default: usual); all takes much longer: it also compresses the experts to "
        "several ranks, and merges the first 2, 3, … tasks by each static method",
    )
    parser.add_argument("--search", type=count, metavar="N", help="search the methods' settings with N trials each")
    parser.add_argument("--card", metavar="FOLDER", help="put the report into the card of this merged model, too")


def run(arguments: argparse.Namespace) -> Outcome:
    request = _comparison_request(arguments)
    if arguments.card and not (Path(arguments.card) / RECIPE_FILE).is_file():
        raise HfEsmError(f"--card {arguments.card}: not a folder that `hf-esm merge` wrote.")
    if not request.get("output_dir"):
        raise HfEsmError("Say where to write the report: --output-dir FOLDER (or report_dir in the recipe).")
    found = compare(**request)
    folder = Path(request["output_dir"])
    card = add_comparison(arguments.card, folder) if arguments.card else None
    files = [folder / PAGE, folder / REPORT, *filter(None, (found.kept, card))]
    best = f"hf-esm push {found.kept} ME/NAME" if found.kept else "--keep best also keeps the best model"
    return Outcome(f"{found}\n", found.as_dict(), found, where=", ".join(map(str, files)), following=best)


def _comparison_request(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `compare`, from a recipe and the flags that override it."""
    request = merge_request(arguments, "compare")
    if "seed" in request:
        request.setdefault("seeds", [request["seed"]])
    update_by_task(request, arguments, test="test")
    folder, merged = request.pop("report_dir", None), request.get("output_dir")
    if arguments.recipe and not hasattr(arguments, "output_dir") and (folder or merged):
        request["output_dir"] = folder or f"{merged}-report"  # the recipe's output_dir is that of the merged model
    if "test" not in request and not isinstance(request.get("metric"), Mapping):
        raise HfEsmError("Name the rows to measure on: --test TASK=FILE for each (or test in the recipe).")
    request["methods"] = _compared_methods(arguments, request)
    if request.get("alpha") not in (None, "auto"):
        logger.warning("compare chooses the α of every method by one rule and ignores %s.", request["alpha"])
    for name in ("seeds", "num_test", "keep", "pictures", "search"):
        if getattr(arguments, name) is not None:
            request[name] = getattr(arguments, name)
    return {name: value for name, value in request.items() if name not in NOT_COMPARED}


def _compared_methods(arguments: argparse.Namespace, request: Mapping[str, Any]) -> list[Any]:
    """The methods of --methods or the recipe; else the recipe's method and the usual ones.

    The recipe's rank is for every method with experts that names no rank itself.
    """
    methods = arguments.methods or request.get("methods")
    if methods and arguments.set:
        raise HfEsmError("--set goes with the recipe's method. In a list, write methods as {name: esm, gamma: 0.2}.")
    if not methods:
        methods = [request["method"]] if request.get("method", "auto") != "auto" else []
        already = [resolve_method(method) for method in methods]
        methods += [name for name in METHODS_COMPARED if resolve_method(name) not in already]
    methods = [plain_or_yaml(method, "--methods") if isinstance(method, str) else method for method in methods]
    if (rank := request.get("rank")) is None:
        return methods
    return [
        {"rank": rank, **({"name": method} if isinstance(method, str) else method)}
        if resolve_method(method).routes
        else method
        for method in methods
    ]
