"""Merge the experts of a recipe, or those named by --base and --expert. Flags override the recipe."""

import argparse
import json
from collections import Counter

from ..checkpoints import REPORT_FILE
from ..errors import HfEsmError
from ..merging import MergeResult, merge_models
from ..utils import plain_table
from .console import Outcome
from .requests import add_merge_arguments, merge_request


add_arguments = add_merge_arguments


def run(arguments: argparse.Namespace) -> Outcome:
    request = merge_request(arguments)
    if not request.get("output_dir"):
        raise HfEsmError("Say where to write: --output-dir FOLDER (or output_dir in the recipe).")
    result = merge_models(**request)
    task, folder = next(iter(result.plan.experts)), str(result.output_dir)
    return Outcome(
        text="\n".join([*plain_table(counted(result)), "", str(result)]),
        data={"output_dir": folder, **json.loads((result.output_dir / REPORT_FILE).read_text(encoding="utf-8"))},
        result=folder,
        load=f"hf_esm.RoutedModel.from_pretrained({folder!r})"
        if result.plan.method.routes
        else f"hf_esm.load_task_model({folder!r}, {task!r})",
        following=f"hf-esm evaluate {folder} --data {task}=ROWS, or hf-esm push {folder} ME/NAME",
    )


def counted(result: MergeResult) -> list[list[str]]:
    """A table of what was merged how, by kind of weight."""
    counts = Counter((report.kind or "other", report.how) for report in result.weights)
    rows = [[kind, how, str(count)] for (kind, how), count in sorted(counts.items())]
    return [["weights", "merged by", "number"], *rows]
