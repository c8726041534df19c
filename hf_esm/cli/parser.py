"""The parser of the command line. The file of a command is imported when that command was chosen, and no other."""

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Callable, Sequence
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
    "export": "write the experts of an ESM++ model as LoRA adapters",
    "add": "add an expert to an ESM++ model",
    "components": "compress an expert to a small adapter",
    "fuse": "fuse adapters of essential components into one",
    "push": "upload a merged model to the Hub",
    "demo": "merge and compare small models of handwritten digits, in two minutes",
}


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the words of a command. Leaves the process with status 2 and a usage message if they cannot be read.

    Returns:
        The values of the arguments; `run`, the function of the command; and `flags`, all flags that it has.
    """
    parser = build_parser()
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
        prog="hf-esm", description="Merge fine-tunes of one checkpoint into one model, without training."
    )
    parser.add_argument("--version", action="version", version=f"hf_esm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=CommandParser)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, module=name)
    return parser


class CommandParser(argparse.ArgumentParser):
    """The parser of one command, which imports the file of the command when there are words to parse.

    Attributes:
        make_epilog: makes the text at the end of the help, when the help is asked for.
    """

    def __init__(self, *, module: str, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.module: Optional[str] = module
        self.make_epilog: Optional[Callable[[], str]] = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.module is not None:
            command = import_module(f".{self.module}", __package__)
            self.module = None
            text = " ".join((inspect.getdoc(command) or "").split())
            self.description = textwrap.fill(text, shutil.get_terminal_size().columns - 2)
            command.add_arguments(self)
            self.add_argument("--traceback", action="store_true", help="show where an unexpected error comes from")
            self.set_defaults(run=command.run, flags=sorted(self._option_string_actions))
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        if self.make_epilog is not None:
            self.epilog = self.make_epilog()
        return super().format_help()
