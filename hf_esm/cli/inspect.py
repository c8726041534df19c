"""Say from headers, a few matrices of local models, and one row of every data file what would be merged how, and at
what cost. What this passes, merge does not refuse for any of these reasons.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from ..checkpoints import Access, first_processor, resolve_source
from ..data import SampleOptions, read_first_row
from ..evaluation import check_by_task
from ..merging import merge_models
from ..metrics import load_labelled, resolve_metric
from ..planning import MergePlan, load_recipe, name_experts, task_weights
from ..utils import check_known
from .console import Outcome
from .requests import add_merge_arguments, merge_request


add_arguments = add_merge_arguments


def run(arguments: argparse.Namespace) -> Outcome:
    request = merge_request(arguments)
    plan = merge_models(**request, dry_run=True)
    test = load_recipe(arguments.recipe, "evaluate").get("test") if arguments.recipe else None
    if test is not None:
        _check_test(test, request, plan)
    return Outcome(plan, plan.as_dict(), following=f"hf-esm merge {arguments.recipe}" if arguments.recipe else "")


def _check_test(test: Any, request: Mapping[str, Any], plan: MergePlan) -> None:
    """Raise an error if the first row of a task's test rows cannot be scored by the recipe's metric."""
    check_by_task(test, "`test`")
    check_known(test, plan.experts, "expert", "`test`")
    access = Access(None, request.get("allow_pickle", False), request.get("trust_remote_code", False))
    options = SampleOptions(max_length=request.get("max_length"), columns=request.get("columns"))
    metric = resolve_metric(request.get("metric", "accuracy"))
    experts, _ = task_weights(name_experts(request["experts"]), None)
    for task, rows in test.items():
        title = f"data of '{task}'"
        models = [resolve_source(experts[task], title, access)]
        models += [resolve_source(request["base"], "base", access)] if request["base"] else []
        processor = first_processor(models, access.trust_remote_code)
        row = read_first_row(rows, title, options)
        load_labelled([row], processor, plan.experts[task].config, title, options, metric)
