"""Upload what merge wrote: the whole folder, or an ESM++ adapter alone over a static model on the Hub."""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from ..calibration import ActivationStatistics
from ..checkpoints import HASHES_FILE, RECIPE_FILE, STATISTICS_FILE
from ..errors import HfEsmError
from ..hub import push_folder, verify_routed
from .console import Outcome
from .flags import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of the merged model")
    parser.add_argument("repo_id", help="repository to upload to; a new one is created")
    parser.add_argument("--private", action="store_true", default=None, help="create a private repository")
    parser.add_argument("--revision", help="branch to push to; a new one is created (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="make a pull request instead of a commit")
    parser.add_argument("--commit-message", help="summary of the commit or pull request")
    parser.add_argument("--adapter-over", metavar="MODEL", help="upload the adapter alone, over this static model")
    parser.add_argument(
        "--compress-statistics",
        metavar="RANK",
        type=count,
        help="upload this many rows of each factor of the statistics in the folder (smaller, lossy)",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    folder = Path(arguments.model).expanduser()
    if not (folder / RECIPE_FILE).is_file():
        raise HfEsmError(f"{arguments.model}: not a folder that `hf-esm merge` wrote.")
    if (folder / HASHES_FILE).is_file():  # what goes up can be loaded
        verify_routed(folder, arguments.model, allow_pickle=True)
    rank = arguments.compress_statistics
    with _compressed(folder, rank) if rank else nullcontext(folder) as pushed:
        commit = push_folder(
            pushed,
            arguments.repo_id,
            base_model=arguments.adapter_over,
            private=arguments.private,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            commit_message=arguments.commit_message,
        )
    link = str(commit.pr_url or commit)
    return Outcome(link, {"commit": str(commit), "pull_request": commit.pr_url, "repo_id": arguments.repo_id})


@contextmanager
def _compressed(folder: Path, rank: int) -> Iterator[Path]:
    """A folder of links to the files of `folder`, with compressed statistics."""
    if not (folder / STATISTICS_FILE).is_file():
        raise HfEsmError(f"{folder}: there is no {STATISTICS_FILE} in it. Leave `compress_statistics` out.")
    statistics = ActivationStatistics.load(folder).compress(rank)
    with TemporaryDirectory() as links:
        shutil.copytree(
            folder.resolve(),
            links,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(STATISTICS_FILE),
            copy_function=lambda source, link: Path(link).symlink_to(source),
        )
        statistics.save(links)
        yield Path(links)
