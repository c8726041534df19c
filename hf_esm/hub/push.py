"""Uploads of a merged model to the Hub: the whole folder, or its routed adapter alone."""

import logging
import os
import shutil
from functools import partial
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from ..checkpoints import (
    CALIBRATION_FOLDER,
    CARD_FILE,
    EVALUATION_FOLDER,
    HEADS_FOLDER,
    PICTURES_FOLDER,
    RECIPE_FILE,
    REFINED_FOLDER,
    REPORT_FILE,
    ROUTED_FOLDER,
    ROUTER_FEATURES,
    SCORES_PICTURE,
    STATISTICS_FILE,
    read_routed_settings,
    read_settings,
)
from ..errors import HfEsmError
from ..utils import ask_hub, check_known, plain_hub_errors, reading, staging_folder
from .cards import write_adapter_card
from .changes import pushed_card, pushed_recipe, pushed_report
from .hashes import read_hashes


logger = logging.getLogger(__name__)

# Files that tell something of the samples: what they hold, and how else to push.
_REVEALING = {
    f"{ROUTED_FOLDER}/{ROUTER_FEATURES}": (
        "the mean features of every calibration sample",
        "or push the adapter alone, over the static model",
    ),
    STATISTICS_FILE: ("statistics and fingerprints of samples", "or delete the file first"),
}


# Folders whose files an earlier push may have left: of tasks that were removed, of gates that are folded by now, of
# scores that were of another model.
_STALE = (HEADS_FOLDER, ROUTED_FOLDER, REFINED_FOLDER, PICTURES_FOLDER, EVALUATION_FOLDER)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    base_model: Optional[str] = None,
    private: Optional[bool] = None,
    token: Optional[str | bool] = None,
    revision: Optional[str] = None,
    **kwargs: Any,
) -> Any:
    """Upload a merged model's folder; with `base_model`, its routed adapter alone.

    Args:
        folder: a folder that a merge wrote. Calibration samples in it are not uploaded. It is not changed: the card
            that is uploaded says how to load the model from the repository, and recipe and report name no folder
            of this machine.
        repo_id: repository on the Hub, which is created if it does not exist.
        base_model: Hub id of the static model.
        private: whether the repository is to be private.
        token: access token for the Hub.
        revision: branch, which is created if it does not exist.
        kwargs: passed to `HfApi.upload_folder`.

    Returns the result of `HfApi.upload_folder`.

    Raises:
        HfEsmError: if the Hub refuses the upload, the repository is public but a private one is wanted, or
            `base_model` is not the static model of the adapter; if both `create_pr` and `revision` are given.

    Warns:
        If files go up that tell something of the samples, and `private` is not set.
    """
    check_known(kwargs, list(signature(HfApi.upload_folder).parameters)[3:], "option", "push")
    if kwargs.get("create_pr") and revision is not None:
        raise HfEsmError("A pull request is made against the main branch: pass `create_pr` or `revision`, not both.")
    if base_model is not None:
        read_routed_settings(folder, str(folder))
    api = HfApi(token=token)
    ask = partial(ask_hub, repo_id, again="Push again.")
    if base_model is not None:
        ask(partial(_check_same_weights, api, base_model, folder))
    elif not private:
        _warn_of_samples(folder, repo_id)
    repo_id = ask(partial(api.create_repo, repo_id, private=private, exist_ok=True)).repo_id
    if private and not ask(partial(api.repo_info, repo_id)).private:
        raise HfEsmError(f"{repo_id} exists already, and is public. Make it private, or choose another name.")
    if revision is not None:
        ask(partial(api.create_branch, repo_id, branch=revision, exist_ok=True))
    with plain_hub_errors(repo_id, again="Push again."):
        upload = partial(api.upload_folder, repo_id=repo_id, revision=revision)
        if base_model is not None:
            with staging_folder(folder.parent / f"{folder.name}-adapter") as staging:
                _stage_adapter(folder, staging, base_model, repo_id)
                return upload(folder_path=staging, **kwargs)
        ignored = kwargs.pop("ignore_patterns", None) or []
        ignored = [f"{CALIBRATION_FOLDER}/*", *([ignored] if isinstance(ignored, str) else ignored)]
        stale = {"delete_patterns": [*(f"{name}/*" for name in _STALE), SCORES_PICTURE]}
        with TemporaryDirectory() as staging:
            _stage_model(folder, Path(staging) / "model", repo_id)
            return upload(folder_path=Path(staging) / "model", ignore_patterns=ignored, **stale | kwargs)


def _warn_of_samples(folder: Path, repo_id: str) -> None:
    for name, (content, remedy) in _REVEALING.items():
        if (folder / name).is_file():
            logger.warning(
                "%s: %s holds %s. If the samples are private, pass `private=True`, %s.", repo_id, name, content, remedy
            )


def _stage_model(folder: Path, staging: Path, repo_id: str) -> None:
    """Make `staging` a folder of links to the files in `folder`, with a card that names the repository, and a recipe
    and a report without paths of this machine.
    """
    shutil.copytree(folder, staging, copy_function=_link)
    changes = {CARD_FILE: partial(pushed_card, repo_id=repo_id), RECIPE_FILE: pushed_recipe}
    if (folder / RECIPE_FILE).is_file():
        recipe = (folder / RECIPE_FILE).read_text(encoding="utf-8", errors="surrogateescape")
        changes[REPORT_FILE] = partial(pushed_report, recipe=recipe)
    for name, change in changes.items():
        if (path := staging / name).is_file():
            with reading(folder / name):
                text = change(path.read_text(encoding="utf-8", errors="surrogateescape"))
            path.unlink()  # a link: the file that it leads to stays as it is
            path.write_text(text, encoding="utf-8", errors="surrogateescape")


def _link(source: str, target: str) -> None:
    try:
        os.symlink(os.path.realpath(source), target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _stage_adapter(folder: Path, staging: Path, base_model: str, repo_id: str) -> None:
    """Copy the routed adapter in `folder` to `staging`, with a card and the Hub id of its base."""
    shutil.copytree(
        folder / ROUTED_FOLDER, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(ROUTER_FEATURES)
    )
    config = read_settings(staging, str(folder))
    config.base_model_name_or_path = base_model
    config.save_pretrained(str(staging))
    model_class = (config.auto_mapping or {}).get("base_model_class", "AutoModel")
    write_adapter_card(staging, base_model, config.tasks, config.decides, model_class, repo_id)


def _check_same_weights(api: HfApi, base_model: str, folder: Path) -> None:
    """Refuse a model on the Hub that is not the static model in `folder`, as far as the hashes of its files tell."""
    try:
        files = api.model_info(base_model, files_metadata=True).siblings
    except RepositoryNotFoundError:
        raise HfEsmError(f"{base_model}: not on the Hub, or private. Push the static model there first.") from None
    except HFValidationError:
        raise HfEsmError(
            f"{base_model} is not the id of a model on the Hub. Name it as owner/name, without a revision."
        ) from None
    hosted = {file.rfilename: file.lfs and file.lfs.sha256 for file in files}
    for name, digest in read_hashes(folder, str(folder)).items():
        if name.startswith("model") and hosted.get(name, "none") not in (None, digest):
            raise HfEsmError(
                f"{base_model}: its {name} is not that of {folder}, which the experts fit. Push the static model in "
                "that folder."
            )
