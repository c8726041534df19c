"""Fuse adapters of essential components (hf-esm components --format essential) into one: the ESM merge of their
updates. No weight of the base is read.
"""

import argparse

from ..merging import fuse_adapters
from .console import Outcome
from .flags import add_trust_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="adapter", help="folder or Hub id of an adapter; two or more")
    parser.add_argument("--base", help="the base of all adapters (default: the one that they name)")
    parser.add_argument("--output-dir", required=True, help="folder to write; it must not exist yet")
    add_trust_flags(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    folder = fuse_adapters(
        arguments.adapters,
        arguments.base,
        output_dir=arguments.output_dir,
        allow_pickle=arguments.allow_pickle,
        trust_remote_code=arguments.trust_remote_code,
    )
    load = f"peft.PeftModel.from_pretrained(base, {str(folder)!r})"
    return Outcome("", {"output_dir": folder}, folder, where=folder, load=load)
