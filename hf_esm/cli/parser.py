"""The parser of the command line. The file of a command is imported when that command was chosen, and no other."""

import argparse
import inspect
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Optional

from ..version import __version__


# Each command is a file of this folder: its docstring is the description, `add_arguments` and `run` do the rest.
COMMANDS = {
    "merge": "merge experts into one model",
    "inspect": "check a merge before it is done",
    "convert": "write a recipe of mergekit as one of hf_esm",
    "calibrate": "collect one expert's activation statistics",
    "evaluate": "score a merged model on every task's rows",
    "compare": "measure several methods on your experts and rows",
    "chat": "talk to a merged model that writes",
    "predict": "task and label of inputs, by an ESM++ model",
    "explain": "why an ESM++ model routes inputs as it does",
    "methods": "the merge methods, and the settings of one",
    "export": "write the experts of an ESM++ model as LoRA adapters",
    "add": "add an expert to an ESM++ model",
    "remove": "remove an expert from an ESM++ model",
    "components": "compress an expert to a small adapter",
    "fuse": "fuse adapters of essential components into one",
    "push": "upload a merged model to the Hub",
    "demo": "merge and compare small models of handwritten digits, in two minutes",
}


EXAMPLES = """examples:
  hf-esm demo                                      a merge of small models, in two minutes
  hf-esm inspect recipe.yaml                       what would be merged how, and what that costs
  hf-esm merge recipe.yaml --output-dir merged
  hf-esm evaluate merged --data mrpc=mrpc_test.jsonl
  hf-esm merge --base bert-base-uncased --expert sst2=me/bert-sst2 --expert mrpc=me/bert-mrpc \\
      --calibration sst2=sst2.txt --calibration mrpc=mrpc.jsonl --output-dir merged

hf-esm COMMAND --help describes a command.
"""


# Lines of a command's help that a screen holds.
SCREEN = 40


# Options that are left out of a help that does not fit a screen; `--help-all` shows them.
RARE = {
    "allow_pickle",
    "batch_size", "cache_dir", "chat_template", "heads", "lines", "max_length", "max_memory", "max_shard_size",
    "overrides", "progress", "resume_dir", "seed", "statistics_dir", "statistics_samples", "tokenizer", "traceback",
    "trust_remote_code",
}  # fmt: skip


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the words of a command. Leaves the process with status 2 and a usage message if they cannot be read.

    Returns:
        The values of the arguments; `run`, the function of the command; and `flags`, all flags that it has.
    """
    parser = build_parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        parser.exit()
    command, unknown = parser.parse_known_args(arguments)
    if unknown:
        from ..utils import closest_name  # only now: the chosen command has loaded what this loads

        flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        meant = [closest for flag in flags if (closest := closest_name(flag, command.flags))]
        suggestion = f" (did you mean {', '.join(meant)}?)" if meant else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion}")
    return command


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands, which knows their names and summaries alone."""
    parser = argparse.ArgumentParser(
        prog="hf-esm",
        usage="hf-esm COMMAND …",
        description="Merge fine-tunes of one checkpoint into one model, without training.",
        epilog=EXAMPLES,
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"hf_esm {__version__}")
    commands = parser.add_subparsers(
        title="commands", prog="hf-esm", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, module=name)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """One line for most options."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        several = action.nargs in ("*", "+") and action.option_strings
        return f"{action.metavar or default_metavar} …" if several else super()._format_args(action, default_metavar)


class _HelpAll(argparse.Action):
    """`--help-all`: the help with every option."""

    def __call__(self, parser: Any, *_: Any) -> None:
        parser.hides = False
        parser.print_help()
        parser.exit()


class CommandParser(argparse.ArgumentParser):
    """The parser of one command, which imports the file of the command when there are words to parse.

    Attributes:
        hides: whether the help leaves rare options out where it does not fit a screen otherwise.
    """

    def __init__(self, *, module: str, **options: Any):
        super().__init__(formatter_class=_Formatter, **options)
        self.module: Optional[str] = module
        self.hides = True

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.module is not None:
            command = import_module(f".{self.module}", __package__)
            self.module = None
            text = " ".join((inspect.getdoc(command) or "").split())
            self.description = textwrap.fill(text, shutil.get_terminal_size().columns - 2)
            command.add_arguments(self)
            self.add_argument("--quiet", action="store_true", help="print the result alone: no progress, no warnings")
            self.add_argument("--json", action="store_true", help="print one JSON document instead of text")
            self.add_argument("--traceback", action="store_true", help="show where an unexpected error comes from")
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every option")
            places = [a.metavar or a.dest for a in self._actions if not a.option_strings and a.nargs != "?"]
            places += [f"[{a.metavar or a.dest}]" for a in self._actions if not a.option_strings and a.nargs == "?"]
            self.usage = " ".join([self.prog, *places, "[options]"])
            self.set_defaults(run=command.run, flags=sorted(self._option_string_actions))
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        whole = super().format_help()
        rare = [action for action in self._actions if action.option_strings and action.dest in RARE]
        if not self.hides or not rare or len(whole.splitlines()) <= SCREEN:
            return whole
        texts = [action.help for action in rare]
        for action in rare:
            action.help = argparse.SUPPRESS
        try:
            return f"{super().format_help()}\n--help-all shows {len(rare)} more options.\n"
        finally:
            for action, text in zip(rare, texts, strict=True):
                action.help = text
