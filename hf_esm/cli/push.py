"""Upload what merge wrote: the whole folder, or an ESM++ adapter alone over a static model on the Hub."""

import argparse
from pathlib import Path

from ..checkpoints import RECIPE_FILE
from ..errors import HfEsmError
from ..hub import push_folder
from .console import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of the merged model")
    parser.add_argument("repo_id", help="repository to upload to; a new one is created")
    parser.add_argument("--private", action="store_true", default=None, help="create a private repository")
    parser.add_argument("--revision", help="branch to push to; a new one is created (default: main)")
    parser.add_argument("--adapter-over", metavar="MODEL", help="upload the adapter alone, over this static model")


def run(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.model).expanduser()
    if not (folder / RECIPE_FILE).is_file():
        raise HfEsmError(f"{arguments.model}: not a folder that `hf-esm merge` wrote.")
    say(
        push_folder(
            folder,
            arguments.repo_id,
            base_model=arguments.adapter_over,
            private=arguments.private,
            revision=arguments.revision,
        )
    )
