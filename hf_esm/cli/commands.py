"""What each command of the command line does with what it was given."""

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Optional

import yaml
from accelerate import PartialState

from ..calibration import calibrate
from ..checkpoints import RECIPE_FILE
from ..data import SampleOptions, read_rows
from ..errors import HfEsmError
from ..evaluation import METHODS_COMPARED, NOT_COMPARED, REPORT, add_comparison, compare, evaluate, update_card
from ..hub import push_folder
from ..merging import merge_models
from ..methods import METHODS, resolve_method
from ..planning import MergeOptions, load_recipe
from ..routing import RoutedModel


logger = logging.getLogger(__name__)


def _options(given: argparse.Namespace, options: type) -> dict[str, Any]:
    """The flags that were given, as the dataclass takes them."""
    found = {f.name: getattr(given, f.name) for f in fields(options) if hasattr(given, f.name)}
    if "columns" in found:
        found["columns"] = _pairs(found["columns"], "--columns")
    if "heads" in found and len(found["heads"]) == 1 and found["heads"][0] in ("auto", "merge", "keep"):
        found["heads"] = found["heads"][0]
    return {**given._defaults, **found}


def _pairs(items: Optional[list[str]], flag: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise HfEsmError(f"{flag} takes NAME=VALUE, not {item!r}.")
        if name in pairs:
            raise HfEsmError(f"{flag} names {name!r} twice.")
        pairs[name] = value
    return pairs


def _request(given: argparse.Namespace, for_comparison: bool = False) -> dict[str, Any]:
    """The arguments of `merge_models`, from a recipe and the flags that override it."""
    request = load_recipe(given.recipe, for_comparison) if given.recipe else {}
    if given.base:
        request["base"] = given.base
    for name, flag in (("experts", "expert"), ("calibration", "calibration"), ("validation", "validation")):
        if found := _pairs(getattr(given, flag), f"--{flag}"):
            before = request.get(name) or {}
            if not isinstance(before, Mapping):
                raise HfEsmError(f"--{flag}: the recipe gives {name} as {before!r}; name them there one by one.")
            request[name] = {**before, **found}
    if "base" not in request or "experts" not in request:
        raise HfEsmError("Name a recipe, or --base and at least two --expert TASK=MODEL.")
    request |= _options(given, MergeOptions)
    if given.set:
        method = request.get("method", "esm")
        method = {"name": method} if isinstance(method, str) else dict(method)
        request["method"] = method | {name: _value(text, "--set") for name, text in _pairs(given.set, "--set").items()}
    return request


def _value(text: str, flag: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise HfEsmError(f"{flag}: {text!r} is not a YAML value.") from None


def run_merge(given: argparse.Namespace) -> None:
    request = _request(given)
    if not request.get("output_dir"):
        raise HfEsmError("Say where to write: --output-dir FOLDER (or output_dir in the recipe).")
    _say(merge_models(**request))


def run_compare(given: argparse.Namespace) -> None:
    request = _request(given, for_comparison=True)
    if "seed" in request:
        request.setdefault("seeds", [request["seed"]])
    if found := _pairs(given.test, "--test"):
        request["test"] = {**(request.get("test") or {}), **found}
    if "test" not in request:
        raise HfEsmError("Name the rows to measure on: --test TASK=FILE for each (or test in the recipe).")
    request["methods"] = _compared_methods(given, request)
    if request.get("alpha") not in (None, "auto"):
        logger.warning(
            "compare chooses every method's α by one rule; the recipe's %s is left aside.", request["alpha"]
        )
    for name in ("seeds", "num_test"):
        if getattr(given, name) is not None:
            request[name] = getattr(given, name)
    request = {name: value for name, value in request.items() if name not in NOT_COMPARED}
    if given.card and not (Path(given.card) / RECIPE_FILE).is_file():
        raise HfEsmError(f"--card {given.card}: not a folder that `hf-esm merge` wrote.")
    if not request.get("output_dir"):
        raise HfEsmError("Say where to write the report: --output-dir FOLDER (or output_dir in the recipe).")
    comparison = compare(**request)
    _say(comparison)
    _say(f"\n{Path(request['output_dir']) / REPORT}")
    if given.card:
        _say(add_comparison(given.card, request["output_dir"]))


def _compared_methods(given: argparse.Namespace, request: Mapping[str, Any]) -> list[Any]:
    """Those that are named; else the recipe's own and the usual ones. The recipe's rank is for all with experts."""
    listed = given.methods or request.get("methods")
    if listed and given.set:
        raise HfEsmError("--set goes with the recipe's method. In a list, write methods as {name: esm, gamma: 0.2}.")
    if not listed:
        own = [request["method"]] if "method" in request else []
        made = [resolve_method(method) for method in own]
        listed = [*own, *(name for name in METHODS_COMPARED if resolve_method(name) not in made)]
    methods = [
        _value(entry, "--methods") if isinstance(entry, str) and entry.startswith("{") else entry for entry in listed
    ]
    if (rank := request.get("rank")) is None:
        return methods
    settings = [{"name": entry} if isinstance(entry, str) else entry for entry in methods]
    names = [str(entry.get("name")) if isinstance(entry, Mapping) else "" for entry in settings]
    routed = [name in METHODS and METHODS[name]().routes for name in names]
    return [{"rank": rank, **one} if has else m for one, m, has in zip(settings, methods, routed, strict=True)]


def run_inspect(given: argparse.Namespace) -> None:
    _say(merge_models(**_request(given), dry_run=True))


def run_calibrate(given: argparse.Namespace) -> None:
    options = _options(given, SampleOptions)
    options |= {"batch_size": given.batch_size, "max_memory": given.max_memory, "progress": not given.no_progress}
    options |= {"allow_pickle": given.allow_pickle, "trust_remote_code": given.trust_remote_code}
    statistics = calibrate(given.model, given.data, base=given.base, **options)
    if given.compress_rank:
        statistics = statistics.compress(given.compress_rank)
    if PartialState().is_main_process:
        path = statistics.save(given.output)
        lost = statistics.provenance.compression_error
        _say(
            f"{path}: {len(statistics)} linear maps, {statistics.provenance.num_samples} samples"
            + (f", compression error up to {lost:.1%}" if given.compress_rank else "")
        )


def run_evaluate(given: argparse.Namespace) -> None:
    data, experts = _pairs(given.data, "--data"), _pairs(given.expert, "--expert")
    if given.json and not Path(given.json).absolute().parent.is_dir():
        raise HfEsmError(f"--json {given.json}: there is no such folder.")
    options = _options(given, SampleOptions)
    options |= {name: getattr(given, name) for name in ("base", "metric", "route", "batch_size")}
    options |= {name: getattr(given, name) for name in ("allow_pickle", "trust_remote_code")}
    scores = evaluate(given.model, data, experts=experts, **options)
    _say(scores)
    if given.card:
        _say(update_card(given.model, scores, data))
    if given.json:
        Path(given.json).write_text(json.dumps(scores.as_dict(), indent=2) + "\n", encoding="utf-8")


def run_predict(given: argparse.Namespace) -> None:
    model, rows, options = _routed_inputs(given)
    for found in model.predict(rows, given.task, batch_size=given.batch_size, **options):
        _say(json.dumps(asdict(found), ensure_ascii=False))


def run_explain(given: argparse.Namespace) -> None:
    model, rows, options = _routed_inputs(given)
    for found in model.explain(rows, given.batch_size, **options):
        _say(json.dumps(asdict(found), ensure_ascii=False))


def _routed_inputs(given: argparse.Namespace) -> tuple[RoutedModel, list[Any], dict[str, Any]]:
    options = _options(given, SampleOptions)
    rows = read_rows(given.data, "inputs", SampleOptions(**options))
    return _load_routed(given), rows, {**options, "num_samples": 0}


def _load_routed(given: argparse.Namespace) -> RoutedModel:
    return RoutedModel.from_pretrained(given.model, trust_remote_code=given.trust_remote_code)


def run_export(given: argparse.Namespace) -> None:
    for task, folder in _load_routed(given).export_lora(given.output, given.task).items():
        _say(f"{task}: {folder}")


def run_add(given: argparse.Namespace) -> None:
    ((task, expert),) = _pairs([given.expert], "--expert").items()
    model = _load_routed(given)
    larger = model.add_expert(task, expert, given.statistics, output_dir=given.output, base=given.base)
    _say(f"{larger.folder}: {', '.join(larger.tasks)}")


def run_push(given: argparse.Namespace) -> None:
    folder = Path(given.model).expanduser()
    if not (folder / RECIPE_FILE).is_file():
        raise HfEsmError(f"{given.model}: not a folder that `hf-esm merge` wrote.")
    options = {"base_model": given.adapter_over, "private": given.private, "revision": given.revision}
    _say(push_folder(folder, given.repo_id, **options))


def run_demo(given: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(given.output, seed=given.seed)


def _say(what: Any) -> None:
    if PartialState().is_main_process:
        print(what)
