"""Where a model's files are: a folder, a repository of the Hub, or a folder inside one of them."""

import os
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Optional

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from ..errors import HfEsmError
from ..utils import ask_hub, check_path, plain_hub_errors
from .downloads import check_downloads
from .layout import CARD_FILE


# Everything in a repository but weights: configs, tokenizers, templates, code, the card.
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", CARD_FILE]


def whole_folder(
    spec: str | os.PathLike, title: str, revision: Optional[str] = None, token: Optional[str | bool] = None
) -> Path:
    """Return the folder that `spec` names, with all its files; a Hub repository is downloaded."""
    check_path(spec, "model")
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return folder
    repo_id, revision = hub_id(spec, title, revision)
    return snapshot(title, repo_id, revision, token)


def hub_id(spec: str | os.PathLike, title: str, revision: Optional[str]) -> tuple[str, Optional[str]]:
    """Split `me/model` or `me/model@revision` into id and revision."""
    if str(spec).startswith((".", "/", "~")) or str(spec).count("/") > 1:
        raise HfEsmError(f"{title}: there is no such folder.")
    repo_id, _, tag = str(spec).partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise HfEsmError(f"{title}: neither a folder nor a Hub id.") from None
    if revision and tag and revision != tag:
        raise HfEsmError(f"{title}: two revisions, {tag!r} and {revision!r}. Leave one out.")
    return repo_id, revision or tag or None


def snapshot(
    title: str,
    repo_id: str,
    revision: Optional[str],
    token: Optional[str | bool],
    patterns: Optional[list[str]] = None,
    inside: str = "",
) -> Path:
    """Download a repository, or the files in its root, or in one subfolder, that match one of the patterns.

    Returns the folder of the repository.

    Raises:
        HubError: if the Hub refuses it or cannot be reached.
        DamagedFileError: if a file is not the one that the Hub names, also after another download.
    """
    prefix = f"{inside}/" if inside else ""
    chosen = {
        "allow_patterns": [prefix + pattern for pattern in patterns] if patterns else None,
        "ignore_patterns": [f"{prefix}*/*"] if patterns else None,
    }
    download = partial(snapshot_download, repo_id, revision=revision, token=token, **chosen)
    folder = Path(ask_hub(title, download))
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    check_downloads(title, repo_id, folder, token, filter_repo_objects(names, **chosen))
    return folder


def files_on_hub(
    title: str, repo_id: str, revision: Optional[str], token: Optional[str | bool], inside: str
) -> tuple[str, ...]:
    """Return the names of the files in the root of a repository, or in one subfolder; none where the Hub is not asked,
    as offline.
    """
    if is_offline_mode():
        return ()
    with plain_hub_errors(title):
        paths = map(PurePosixPath, HfApi(token=token).list_repo_files(repo_id, revision=revision))
        return tuple(path.name for path in paths if path.parent == PurePosixPath(inside))


def inner_folder(subfolder: str, title: str) -> str:
    """Return the name of a folder inside a model's folder as the Hub writes it."""
    path = PurePosixPath(subfolder)
    if path.is_absolute() or ".." in path.parts:
        raise HfEsmError(f"{title}: the subfolder {subfolder!r} is not inside it. Name the folder itself as `path`.")
    return "/".join(path.parts)


def existing_folder(folder: Path, subfolder: str, title: str) -> Path:
    """Return the subfolder of a folder."""
    if not (folder / subfolder).is_dir():
        raise HfEsmError(f"{title}: there is no folder {subfolder!r} in it.")
    return folder / subfolder


def joined(*folders: str) -> str:
    """Return the relative path of folders inside each other, without those that are empty."""
    return "/".join(filter(None, folders))


def folder_above(folder: Path, inner: str) -> Path:
    """Return the folder that a folder inside it, of this relative path, is in."""
    return folder.parents[len(Path(inner).parts) - 1]
