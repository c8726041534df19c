"""The command line: `hf-esm merge`, `inspect`, `calibrate`, `evaluate`, `compare`, `predict`, `explain`, `export`,
`add`, `push`, `demo`.
"""

import argparse
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Collection
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from ..data import SampleOptions
from ..evaluation import NOT_COMPARED
from ..methods import METHODS
from ..planning import MergeOptions
from ..version import __version__
from . import commands


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-esm", description="Merge fine-tunes of one checkpoint into one model, without training."
    )
    parser.add_argument("--version", action="version", version=f"hf_esm {__version__}")
    subcommands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    merge = _command(
        subcommands,
        "merge",
        commands.run_merge,
        "merge experts into one model",
        "Merge the experts of a recipe, or those named by --base and --expert. Flags override the recipe.",
        epilog=_describe_methods(),
    )
    _add_models(merge)
    _add_flags(merge, MergeOptions)

    inspection = _command(
        subcommands,
        "inspect",
        commands.run_inspect,
        "check a merge without reading a weight",
        "Say from the files' headers alone whether the experts fit, what would be merged how, and what it costs.",
        epilog=_describe_methods(),
    )
    _add_models(inspection)
    _add_flags(inspection, MergeOptions)

    calibration = _command(
        subcommands,
        "calibrate",
        commands.run_calibrate,
        "collect one expert's activation statistics",
        "Run an expert over unlabelled samples and write its statistics, which serve every later merge.",
    )
    calibration.add_argument("model", help="folder or Hub id of the expert")
    calibration.add_argument("data", help="samples: JSON lines, JSON, CSV, Parquet or text")
    calibration.add_argument("-o", "--output", required=True, help="file to write (.safetensors), or a folder")
    calibration.add_argument("--base", help="the base model: for ESM++, and where the expert is a LoRA adapter")
    calibration.add_argument(
        "--compress-rank", type=_count, help="keep this many rows of each factor (smaller, lossy)"
    )
    calibration.add_argument("--batch-size", type=_count, default=8, help="samples per batch and process (default: 8)")
    calibration.add_argument("--max-memory", help="memory to calibrate in, such as 16GB; what does not fit is on disk")
    calibration.add_argument("--no-progress", action="store_true", help="show no progress bars")
    _add_trust(calibration, pickle=True)
    _add_flags(calibration, SampleOptions)

    evaluation = _command(
        subcommands,
        "evaluate",
        commands.run_evaluate,
        "score a merged model on every task's rows",
        "Score a merged model on every task's rows, beside the experts if they are named.",
    )
    evaluation.add_argument("model", help="folder or Hub id of the merged model")
    evaluation.add_argument("--data", action="append", required=True, metavar="TASK=FILE", help="labelled rows")
    evaluation.add_argument("--expert", action="append", metavar="TASK=MODEL", help="compare with this expert")
    evaluation.add_argument("--base", help="what experts that are LoRA adapters stand on (default: what they name)")
    evaluation.add_argument(
        "--metric",
        default="accuracy",
        help="accuracy, perplexity, mean-iou, exact-match, word-f1, or a metric of the evaluate library",
    )
    evaluation.add_argument("--json", metavar="FILE", help="write the scores there too")
    evaluation.add_argument("--card", action="store_true", help="write the scores into the model's card, too")
    evaluation.add_argument(
        "--route", choices=["routed", "oracle", "static"], default="routed", help="of an esm++ model (default: routed)"
    )
    evaluation.add_argument("--batch-size", type=_count, default=32, help="samples per batch (default: 32)")
    _add_trust(evaluation, pickle=True)
    _add_flags(evaluation, SampleOptions, num_samples=0)

    comparison = _command(
        subcommands,
        "compare",
        commands.run_compare,
        "measure several methods on your experts and rows",
        "Merge by several methods, score every merged model on every task, and write a report with pictures. What was "
        "measured is kept beside the report: a second run does only what is new.",
        epilog=_describe_methods(),
    )
    _add_models(comparison)
    comparison.add_argument(
        "--methods",
        action="extend",
        nargs="+",
        help="methods, by name or as {name: esm, gamma: 0.2} (default: the recipe's, and the usual ones)",
    )
    comparison.add_argument("--test", action="append", metavar="TASK=FILE", help="labelled rows to measure on")
    comparison.add_argument(
        "--seeds", action="extend", nargs="+", type=int, help="of the choice of proxies (default: 0)"
    )
    comparison.add_argument("--num-test", type=int, help="test rows per task, chosen at random (default: all)")
    comparison.add_argument("--card", metavar="FOLDER", help="put the report into this merged model's card, too")
    _add_flags(comparison, MergeOptions, leave_out=NOT_COMPARED)

    predict = _command(
        subcommands,
        "predict",
        commands.run_predict,
        "task and label of inputs, by an ESM++ model",
        "Let the router find every input's task, and that task's head its label. One JSON object a line.",
    )
    explain = _command(
        subcommands,
        "explain",
        commands.run_explain,
        "why an ESM++ model routes inputs as it does",
        "Say for every input which expert it gets, and how likely every task is. One JSON object a line.",
    )
    for command in (predict, explain):
        command.add_argument("model", help="folder or Hub id of the routed model")
        command.add_argument("data", help="inputs: JSON lines, JSON, CSV, Parquet or text")
        command.add_argument("--batch-size", type=_count, default=32, help="inputs per batch (default: 32)")
        _add_trust(command)
        _add_flags(command, SampleOptions, num_samples=0)
    predict.add_argument("--task", help="the task of all inputs, where it is known")

    export = _command(
        subcommands,
        "export",
        commands.run_export,
        "write the experts of an ESM++ model as LoRA adapters",
        "Write every expert as an ordinary LoRA adapter, OUTPUT/TASK, over the static model.",
    )
    export.add_argument("model", help="folder or Hub id of the routed model")
    export.add_argument("-o", "--output", required=True, help="folder to write the adapters to")
    export.add_argument("--format", choices=["lora"], default="lora", help="the one there is (default: lora)")
    export.add_argument("--task", action="append", help="only this one; repeat for more")
    _add_trust(export)

    add = _command(
        subcommands,
        "add",
        commands.run_add,
        "add an expert to an ESM++ model",
        "Add a task from its expert and its statistics (hf-esm calibrate --base), without the others' data.",
    )
    add.add_argument("model", help="folder or Hub id of the routed model")
    add.add_argument("--expert", required=True, metavar="TASK=MODEL", help="the new task and its expert")
    add.add_argument("--statistics", help="its statistics (default: the file beside the expert's weights)")
    add.add_argument("--base", help="what it was tuned from (default: the base that the recipe of the model names)")
    add.add_argument("-o", "--output", required=True, help="folder to write the larger model to")
    _add_trust(add)

    push = _command(
        subcommands,
        "push",
        commands.run_push,
        "upload a merged model to the Hub",
        "Upload what merge wrote: the whole folder, or an ESM++ adapter alone over a static model on the Hub.",
    )
    push.add_argument("model", help="folder of the merged model")
    push.add_argument("repo_id", help="repository to upload to; made if it is not there")
    push.add_argument("--private", action="store_true", default=None, help="make it a private one")
    push.add_argument("--revision", help="branch to push to; made if it is not there (default: main)")
    push.add_argument("--adapter-over", metavar="MODEL", help="upload the adapter alone, over this static model")

    demo = _command(
        subcommands,
        "demo",
        commands.run_demo,
        "the whole way on embedded data, in two minutes",
        "Train a small Vision Transformer on handwritten digits, fine-tune experts, merge and compare them.",
    )
    demo.add_argument("-o", "--output", default="demo_output", help="folder to write (default: demo_output)")
    demo.add_argument("--seed", type=int, default=0)
    return parser


def _command(
    subcommands: Any, name: str, run: Any, summary: str, text: str, epilog: str = ""
) -> argparse.ArgumentParser:
    parser = subcommands.add_parser(
        name, help=summary, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error comes from")
    parser.set_defaults(run=run, flags=parser._option_string_actions)  # a live view of all flags
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="YAML file with the arguments of merge_models")
    parser.add_argument("--base", help="Hub id or folder of the base")
    parser.add_argument("--expert", action="append", metavar="TASK=MODEL", help="an expert; repeat for each")
    parser.add_argument("--calibration", action="append", metavar="TASK=FILE", help="its samples or statistics")
    parser.add_argument("--validation", action="append", metavar="TASK=FILE", help="labelled rows, for --alpha auto")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="a setting of the method; see below")


def _add_trust(parser: argparse.ArgumentParser, pickle: bool = False) -> None:
    if pickle:
        parser.add_argument("--allow-pickle", action="store_true", help="read .bin checkpoints (can run code)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")


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
        elif field.name == "columns":
            how |= {"action": "extend", "nargs": "+", "metavar": "NAME=VALUE"}
        elif field.name == "heads":
            how |= {"action": "extend", "nargs": "+", "metavar": "MODULE"}
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


def _describe_methods() -> str:
    """Every method once with its settings, and what the presets change in them."""
    lines, width = ["methods, and their settings for --set NAME=VALUE:"], shutil.get_terminal_size().columns - 2
    for name, make in METHODS.items():
        method, plain = make(), type(make())()
        changed = [f for f in fields(method) if getattr(method, f.name) != getattr(plain, f.name)]
        if changed:
            settings = ", ".join(f"{f.name}={getattr(method, f.name)!r}" for f in changed)
            lines.append(f"  {name}: {plain.name} with {settings}")
            continue
        inherited = {f.name for parent in type(method).__bases__ if is_dataclass(parent) for f in fields(parent)}
        settings = [f for f in fields(method) if f.name not in inherited]
        also = f" Settings of {type(method).__bases__[0].name}, and:" if inherited else ""
        lines.append(
            f"  {name}: {' '.join(inspect.getdoc(type(method)).split()).partition('. ')[0].rstrip('.')}.{also}"
        )
        texts = {f.name: f.metadata.get("help", "") for f in settings}
        lines += [
            f"    {setting} = {getattr(method, setting)!r}: {text}".rstrip(": ") for setting, text in texts.items()
        ]
    return "\n".join(textwrap.fill(line, width, subsequent_indent=" " * 8) for line in lines)
