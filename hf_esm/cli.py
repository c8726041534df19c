"""The command line: `hf-esm merge`, `inspect`, `calibrate`, `evaluate`, `compare`, `predict`, `explain`, `export`,
`add`, `push`, `demo`.
"""

import argparse
import json
import logging
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Any, Optional

import yaml
from accelerate import PartialState
from datasets import disable_progress_bars

from .cards import update_card
from .comparison import NOT_COMPARED, compare
from .errors import HfEsmError
from .evaluation import evaluate
from .hub import RoutedModel, push_folder
from .merge import calibrate, merge_models
from .methods import METHODS
from .options import MergeOptions
from .output import RECIPE_FILE
from .proxies import ProxyOptions, read_rows
from .recipes import load_recipe
from .reports import REPORT
from .version import __version__


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 bad input."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    disable_progress_bars()
    try:
        given.run(given)
    except HfEsmError as error:
        print(f"hf-esm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-esm: stopped; nothing was written.", file=sys.stderr)
        return 130
    except Exception as error:
        if given.traceback:
            raise
        print(f"hf-esm: {type(error).__name__}: {error}\n(--traceback shows where)", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-esm", description="Merge fine-tunes of one checkpoint into one model, without training."
    )
    parser.add_argument("--version", action="version", version=f"hf_esm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    merge = _command(
        commands,
        "merge",
        _merge,
        "merge experts into one model",
        "Merge the experts of a recipe, or those named by --base and --expert. Flags override the recipe.",
        epilog=_describe_methods(),
    )
    _add_models(merge)
    _add_flags(merge, MergeOptions)

    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "check a merge without reading a weight",
        "Say from the files' headers alone whether the experts fit, what would be merged how, and what it costs.",
    )
    _add_models(inspect)
    _add_flags(inspect, MergeOptions)

    calibration = _command(
        commands,
        "calibrate",
        _calibrate,
        "collect one expert's activation statistics",
        "Run an expert over unlabelled samples and write its statistics, which serve every later merge.",
    )
    calibration.add_argument("model", help="folder or Hub id of the expert")
    calibration.add_argument("data", help="samples: JSON lines, JSON, CSV, Parquet or text")
    calibration.add_argument("-o", "--output", required=True, help="file to write (.safetensors), or a folder")
    calibration.add_argument("--base", help="the base model, if the expert is a LoRA adapter")
    calibration.add_argument(
        "--compress-rank", type=_count, help="keep this many rows of each factor (smaller, lossy)"
    )
    calibration.add_argument("--batch-size", type=_count, default=8, help="samples per batch and process (default: 8)")
    _add_flags(calibration, ProxyOptions)

    evaluation = _command(
        commands,
        "evaluate",
        _evaluate,
        "score a merged model on every task's rows",
        "Score a merged model on every task's rows, beside the experts if they are named.",
    )
    evaluation.add_argument("model", help="folder or Hub id of the merged model")
    evaluation.add_argument("--data", action="append", required=True, metavar="TASK=FILE", help="labelled rows")
    evaluation.add_argument("--expert", action="append", metavar="TASK=MODEL", help="compare with this expert")
    evaluation.add_argument(
        "--metric", default="accuracy", help="accuracy, perplexity, or a metric of the evaluate library"
    )
    evaluation.add_argument("--json", metavar="FILE", help="write the scores there too")
    evaluation.add_argument("--card", action="store_true", help="write the scores into the model's card, too")
    evaluation.add_argument("--batch-size", type=_count, default=32, help="samples per batch (default: 32)")
    _add_flags(evaluation, ProxyOptions, num_samples=0)

    evaluation.add_argument(
        "--route", choices=["routed", "oracle", "static"], default="routed", help="of an esm++ model (default: routed)"
    )

    comparison = _command(
        commands,
        "compare",
        _compare,
        "measure several methods on your experts and rows",
        "Merge by several methods, score every merged model on every task, and write a report with pictures. What was "
        "measured is kept beside the report: a second run does only what is new.",
        epilog=_describe_methods(),
    )
    _add_models(comparison)
    comparison.add_argument("--methods", nargs="+", help="names of methods (default: the recipe's, or the usual ones)")
    comparison.add_argument("--test", action="append", metavar="TASK=FILE", help="labelled rows to measure on")
    comparison.add_argument("--seeds", nargs="+", type=int, help="of the choice of proxies (default: 0)")
    comparison.add_argument("--num-test", type=int, help="test rows per task, chosen at random (default: all)")
    _add_flags(comparison, MergeOptions, leave_out=NOT_COMPARED)

    predict = _command(
        commands,
        "predict",
        _predict,
        "task and label of inputs, by an ESM++ model",
        "Let the router find every input's task, and that task's head its label. One JSON object a line.",
    )
    explain = _command(
        commands,
        "explain",
        _explain,
        "why an ESM++ model routes inputs as it does",
        "Say for every input which expert it gets, and how likely every task is. One JSON object a line.",
    )
    for command in (predict, explain):
        command.add_argument("model", help="folder or Hub id of the routed model")
        command.add_argument("data", help="inputs: JSON lines, JSON, CSV, Parquet or text")
        command.add_argument("--batch-size", type=_count, default=32, help="inputs per batch (default: 32)")
        _add_flags(command, ProxyOptions, num_samples=0)
    predict.add_argument("--task", help="the task of all inputs, where it is known")

    export = _command(
        commands,
        "export",
        _export,
        "write the experts of an ESM++ model as LoRA adapters",
        "Write every expert as an ordinary LoRA adapter, OUTPUT/TASK, over the static model.",
    )
    export.add_argument("model", help="folder or Hub id of the routed model")
    export.add_argument("-o", "--output", required=True, help="folder to write the adapters to")
    export.add_argument("--format", choices=["lora"], default="lora", help="the one there is (default: lora)")
    export.add_argument("--task", action="append", help="only this one; repeat for more")

    add = _command(
        commands,
        "add",
        _add,
        "add an expert to an ESM++ model",
        "Add a task from its expert and its statistics (hf-esm calibrate --base), without the others' data.",
    )
    add.add_argument("model", help="folder or Hub id of the routed model")
    add.add_argument("--expert", required=True, metavar="TASK=MODEL", help="the new task and its expert")
    add.add_argument("--statistics", help="its statistics (default: the file beside the expert's weights)")
    add.add_argument("-o", "--output", required=True, help="folder to write the larger model to")

    push = _command(
        commands,
        "push",
        _push,
        "upload a merged model to the Hub",
        "Upload what merge wrote: the whole folder, or an ESM++ adapter alone over a static model on the Hub.",
    )
    push.add_argument("model", help="folder of the merged model")
    push.add_argument("repo_id", help="repository to upload to; made if it is not there")
    push.add_argument("--private", action="store_true", default=None, help="make it a private one")
    push.add_argument("--adapter-over", metavar="MODEL", help="upload the adapter alone, over this static model")

    demo = _command(
        commands,
        "demo",
        _demo,
        "the whole way on embedded data, in two minutes",
        "Train a small Vision Transformer on handwritten digits, fine-tune experts, merge and compare them.",
    )
    demo.add_argument("-o", "--output", default="demo_output", help="folder to write (default: demo_output)")
    demo.add_argument("--seed", type=int, default=0)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error comes from")
    parser.set_defaults(run=run)
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="YAML file with the arguments of merge_models")
    parser.add_argument("--base", help="Hub id or folder of the base")
    parser.add_argument("--expert", action="append", metavar="TASK=MODEL", help="an expert; repeat for each")
    parser.add_argument("--calibration", action="append", metavar="TASK=FILE", help="its samples or statistics")
    parser.add_argument("--validation", action="append", metavar="TASK=FILE", help="labelled rows, for --alpha auto")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="a setting of the method; see below")


def _add_flags(
    parser: argparse.ArgumentParser, options: type, leave_out: Collection[str] = (), **defaults: Any
) -> None:
    """A flag for every field of a dataclass; what is not given stays out of the namespace."""
    hints = typing.get_type_hints(options)
    group = parser.add_argument_group("options")
    for field in (field for field in fields(options) if field.name not in leave_out):
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        default = defaults.get(field.name, _default(field))
        if default is not None and default is not False and default != {}:
            text += f" (default: {default})"
        kind = hints[field.name]
        how: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Mapping:
            how |= {"nargs": "+", "metavar": "NAME=VALUE"}
        elif field.name == "heads":
            how |= {"nargs": "+", "metavar": "MODULE"}
        elif field.name not in ("method", "metric"):
            how |= {"type": _scalar(kind), "metavar": "VALUE"}
        parser_ = group.add_argument(flag, **how)
        parser_.dest = field.name
    parser.set_defaults(_defaults=defaults)


def _default(field: Field) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()


def _scalar(kind: Any) -> Any:
    """What a flag's text is turned into: the first fitting type of an annotation such as `float | str | None`."""
    union = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    wanted = [k for k in union if k is not type(None)]

    def convert(text: str) -> Any:
        for entry in wanted:
            try:
                return entry(text)
            except ValueError:
                continue
        raise argparse.ArgumentTypeError(f"{text!r} is not {' or '.join(k.__name__ for k in wanted)}")

    return convert


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


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
        request["method"] = method | {name: _value(text) for name, text in _pairs(given.set, "--set").items()}
    return request


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise HfEsmError(f"--set: {text!r} is not a YAML value.") from None


def _merge(given: argparse.Namespace) -> None:
    request = _request(given)
    if not request.get("output_dir"):
        raise HfEsmError("Say where to write: --output-dir FOLDER (or output_dir in the recipe).")
    _say(merge_models(**request))


def _compare(given: argparse.Namespace) -> None:
    request = _request(given, for_comparison=True)
    if "seed" in request:
        request.setdefault("seeds", [request["seed"]])
    if found := _pairs(given.test, "--test"):
        request["test"] = {**(request.get("test") or {}), **found}
    if "test" not in request:
        raise HfEsmError("Name the rows to measure on: --test TASK=FILE for each (or test in the recipe).")
    chosen = given.methods or request.get("methods") or ([request["method"]] if "method" in request else None)
    request |= {"methods": chosen} if chosen else {}
    for name in ("seeds", "num_test"):
        if getattr(given, name) is not None:
            request[name] = getattr(given, name)
    request = {name: value for name, value in request.items() if name not in NOT_COMPARED}
    if not request.get("output_dir"):
        raise HfEsmError("Say where to write the report: --output-dir FOLDER (or output_dir in the recipe).")
    comparison = compare(**request)
    _say(comparison)
    _say(f"\n{Path(request['output_dir']) / REPORT}")


def _inspect(given: argparse.Namespace) -> None:
    _say(merge_models(**_request(given), dry_run=True))


def _calibrate(given: argparse.Namespace) -> None:
    options = _options(given, ProxyOptions)
    statistics = calibrate(given.model, given.data, base=given.base, batch_size=given.batch_size, **options)
    if given.compress_rank:
        statistics = statistics.compress(given.compress_rank)
    if PartialState().is_main_process:
        path = statistics.save(given.output)
        lost = statistics.provenance.compression_error
        _say(
            f"{path}: {len(statistics)} linear maps, {statistics.provenance.num_samples} samples"
            + (f", compression error up to {lost:.1%}" if given.compress_rank else "")
        )


def _evaluate(given: argparse.Namespace) -> None:
    data, experts = _pairs(given.data, "--data"), _pairs(given.expert, "--expert")
    options = _options(given, ProxyOptions)
    options |= {"metric": given.metric, "route": given.route, "batch_size": given.batch_size}
    scores = evaluate(given.model, data, experts=experts, **options)
    _say(scores)
    if given.card:
        _say(update_card(given.model, scores, data))
    if given.json:
        Path(given.json).write_text(json.dumps(scores.as_dict(), indent=2) + "\n", encoding="utf-8")


def _predict(given: argparse.Namespace) -> None:
    model, rows, options = _routed_inputs(given)
    for found in model.predict(rows, given.task, batch_size=given.batch_size, **options):
        _say(json.dumps(asdict(found), ensure_ascii=False))


def _explain(given: argparse.Namespace) -> None:
    model, rows, options = _routed_inputs(given)
    for found in model.explain(rows, given.batch_size, **options):
        _say(json.dumps(asdict(found), ensure_ascii=False))


def _routed_inputs(given: argparse.Namespace) -> tuple[RoutedModel, list[Any], dict[str, Any]]:
    options = _options(given, ProxyOptions)
    rows = read_rows(given.data, "inputs", ProxyOptions(**options))
    return RoutedModel.from_pretrained(given.model), rows, {**options, "num_samples": 0}


def _export(given: argparse.Namespace) -> None:
    for task, folder in RoutedModel.from_pretrained(given.model).export_lora(given.output, given.task).items():
        _say(f"{task}: {folder}")


def _add(given: argparse.Namespace) -> None:
    ((task, expert),) = _pairs([given.expert], "--expert").items()
    model = RoutedModel.from_pretrained(given.model)
    larger = model.add_expert(task, expert, given.statistics, output_dir=given.output)
    _say(f"{larger.folder}: {', '.join(larger.tasks)}")


def _push(given: argparse.Namespace) -> None:
    folder = Path(given.model).expanduser()
    if not (folder / RECIPE_FILE).is_file():
        raise HfEsmError(f"{given.model}: not a folder that `hf-esm merge` wrote.")
    _say(push_folder(folder, given.repo_id, base_model=given.adapter_over, private=given.private))


def _demo(given: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(given.output, seed=given.seed)


def _describe_methods() -> str:
    """Every method once with its settings, and what the presets change in them."""
    lines = ["methods, and their settings for --set NAME=VALUE:"]
    for name, make in METHODS.items():
        method, plain = make(), type(make())()
        changed = [f for f in fields(method) if getattr(method, f.name) != getattr(plain, f.name)]
        if changed:
            settings = ", ".join(f"{f.name}={getattr(method, f.name)!r}" for f in changed)
            lines.append(f"  {name}: {plain.name} with {settings}")
            continue
        lines.append(f"  {name}: {type(method).__doc__.splitlines()[0]}")
        lines += [f"    {f.name} = {getattr(method, f.name)!r}: {f.metadata['help']}" for f in fields(method)]
    return "\n".join(lines)


def _say(what: Any) -> None:
    if PartialState().is_main_process:
        print(what)


if __name__ == "__main__":
    sys.exit(main())
