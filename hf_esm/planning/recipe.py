"""Recipes: the arguments of `merge_models` written down in YAML."""

import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Optional

import yaml

from ..errors import HfEsmError
from ..utils import check_known, check_path, reason_of
from .options import MergeOptions


RECIPE_VERSION = 1


_MODELS_AND_DATA = ("base", "experts", "calibration", "validation")


_COMPARED = ("methods", "test", "seeds", "num_test", "keep", "pictures", "search", "report_dir")


_EVALUATED = ("test", "num_test", "route")


# Options of a merge that other commands read, too. `compare` takes all of them, and says which have no effect there.
_RUN = ("max_length", "columns", "batch_size", "allow_pickle", "trust_remote_code", "progress")


_CALIBRATED = ("num_samples", "statistics_samples", "seed", "max_memory", "statistics_dir")


_WRITTEN_ONLY = ("recipe_version", "hf_esm_version")


_MOST_REPEATED = 10_000  # values that aliases (`*name`) stand for


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that refuses a repeated key, of which plain YAML would forget the first value, and aliases that
    stand for more values than memory, or a message, can hold.
    """

    def get_single_node(self) -> Optional[yaml.Node]:
        node = super().get_single_node()
        sizes: dict[int, float] = {}
        if node is not None and _size(node, sizes) - len(sizes) > _MOST_REPEATED:
            reason = f"its aliases stand for more than {_MOST_REPEATED} values, or for themselves"
            raise yaml.composer.ComposerError(None, None, reason, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{repeated[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Return how many values a node holds, those that aliases stand for counted each time.

    Args:
        sizes: of the nodes that are known, by their `id`; infinite inside of themselves.
    """
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for entry in inside for part in (entry if isinstance(entry, tuple) else [entry])]
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]


def read_yaml(text: str) -> Any:
    """Return what a YAML text says.

    Raises:
        YAMLError: if it is none, repeats a key, or has aliases that stand for too much.
    """
    return yaml.load(text, _StrictLoader)


def _keys_of(command: str) -> tuple[str, ...]:
    """Return the keys of recipes that a command reads."""
    options = tuple(field.name for field in fields(MergeOptions))
    return {
        "merge": (*_MODELS_AND_DATA, *options),
        "compare": (*_MODELS_AND_DATA, *options, *_COMPARED),
        "evaluate": ("base", "experts", *_EVALUATED, *_RUN, "metric", "output_dir"),
        "calibrate": ("base", "experts", "calibration", *_RUN, *_CALIBRATED),
    }[command]


def load_recipe(path: str | os.PathLike, command: str = "merge") -> dict[str, Any]:
    """Read a recipe: `merge_models(**load_recipe("recipe.yaml"))`.

    A relative path in a recipe starts at the folder of the recipe, if a file or folder exists there.

    Args:
        path: the YAML file.
        command: what the recipe is read for: `"merge"`, `"compare"`, `"evaluate"` or `"calibrate"`. Keys that only
            others of them read (such as `methods` and `test` for a merge) are left out, so that one recipe serves all.

    Raises:
        HfEsmError: if the recipe is missing, is not YAML, is of another format version, lacks a key, or has an unknown
            key.
    """
    check_path(path, "recipe")
    path = Path(path)
    recipe = read_mapping(path)
    if "merge_method" in recipe:
        raise HfEsmError(f"{path} is a recipe of mergekit. Convert it: `hf-esm convert {path}`.")
    version = recipe.get("recipe_version", RECIPE_VERSION)
    if version != RECIPE_VERSION:
        raise HfEsmError(
            f"{path}: recipe version {version}, written by hf_esm {recipe.get('hf_esm_version', '?')}; this one reads "
            f"version {RECIPE_VERSION}. Use that hf_esm."
        )
    if "hf_esm_version" in recipe and isinstance(recipe.get("method"), Mapping):
        recipe["method"] = {**_missing_settings(recipe["method"]), **recipe["method"]}
    recipe = {key: value for key, value in recipe.items() if key not in _WRITTEN_ONLY}
    check_known(recipe, dict.fromkeys([*_keys_of("compare"), *_keys_of("evaluate")]), "key", str(path))
    recipe = {key: value for key, value in recipe.items() if key in _keys_of(command)}
    if "experts" not in recipe:
        raise HfEsmError(f"{path}: the recipe has no key 'experts'. Add it.")
    recipe = {"base": None, **recipe}  # the one that all adapters name
    return {key: _from_folder(key, value, path.parent) for key, value in recipe.items()}


def _missing_settings(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a recipe written by a merge lacks because they are younger, as they were then."""
    if method.get("name") in ("iso-c", "iso-cts"):
        return {"rank": "published"}
    return {"published_embeddings": True} if "sum_subtracted" in method else {}


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        HfEsmError: if it is missing, or is something else.
    """
    try:
        recipe = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HfEsmError(f"{path}: cannot read the recipe ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise HfEsmError(f"{path} is not a text file, so it is not a recipe.") from None
    except yaml.YAMLError as error:
        raise HfEsmError(f"{path}: not a valid recipe: {error}") from None
    except RecursionError:
        raise HfEsmError(f"{path}: not a valid recipe: it is nested too deeply. Write it flat.") from None
    except Exception as error:  # such as a date that there is not
        raise HfEsmError(f"{path}: not a valid recipe: {reason_of(error)}. Put the value in quotes.") from None
    if not isinstance(recipe, dict):
        raise HfEsmError(f"{path}: a recipe has keys such as base, experts, calibration and method.")
    return recipe


def _from_folder(key: str, value: Any, folder: Path) -> Any:
    """Return the value of one key, with relative paths that start at `folder`."""
    if key == "base" or (key in ("calibration", "validation") and isinstance(value, str)):
        return absolute_path(value, folder)
    if key in (*_MODELS_AND_DATA, "test") and isinstance(value, Mapping):
        return {task: absolute_path(entry, folder) for task, entry in value.items()}
    if key == "experts" and isinstance(value, list):  # paths, or pairs of a name and a path
        return [
            [*e[:-1], absolute_path(e[-1], folder)] if isinstance(e, list) and e else absolute_path(e, folder)
            for e in value
        ]
    return value


def absolute_path(value: Any, folder: Path) -> Any:
    """Return a model or data set as recipes name it, with absolute paths for all that exist below `folder`."""
    if isinstance(value, str):
        check_path(value, "recipe")
        return str((folder / value).absolute()) if value and (folder / value).exists() else value
    if isinstance(value, Mapping):
        return {key: absolute_path(entry, folder) if key in _PATHS else entry for key, entry in value.items()}
    return value


# Keys of `{"path": …}` and `{"statistics": …, "samples": …}` that may name something on disk.
_PATHS = ("path", "data_files", "data_dir", "statistics", "samples")
