"""Write a recipe of mergekit as a recipe of hf_esm. What differs is printed; what cannot be converted is refused."""

import argparse
from pathlib import Path

import yaml

from ..errors import HfEsmError
from ..planning import convert_mergekit
from ..utils import atomic_file
from .console import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="mergekit's YAML file")
    parser.add_argument("-o", "--output", help="file to write (default: printed)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.add_argument("--base", metavar="MODEL", help="checkpoint that all models were tuned from")


def run(arguments: argparse.Namespace) -> Outcome:
    output = Path(arguments.output).expanduser() if arguments.output else None
    if output is not None and output.exists() and not arguments.overwrite:
        raise HfEsmError(f"{output} exists. Choose another `output`, or pass `overwrite=True`.")
    recipe, notes = convert_mergekit(arguments.recipe, arguments.base)
    text = f"# Converted from {arguments.recipe}\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    data = {"recipe": recipe, "notes": notes}
    if output is None:
        return Outcome(text.rstrip(), data, notes=notes)
    with atomic_file(output) as partial:
        partial.write_text(text, encoding="utf-8")
    following = f"hf-esm merge {output} --output-dir FOLDER"
    return Outcome("", {"output": output, **data}, output, notes, where=output, following=following)
