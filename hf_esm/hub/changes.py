"""Changes of a card that is written already: sections, the name under which it is pushed, other experts; and of the
recipe beside it.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Optional

import yaml
from huggingface_hub import ModelCard

from ..utils import markdown_text


# What stands for the model's id in a card whose model is on no Hub.
_LOADS = re.compile(r"""^model = [\w.]+\((?:static, )?"([^"\n]+)"\)""", re.MULTILINE)


def without_section(text: str, title: str) -> str:
    """A card's text without the section of this title."""
    return re.sub(rf"## {title}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)


def with_section(text: str, title: str, body: str) -> str:
    """A card's text with a section before its limits, in place of an earlier section of this title."""
    before, limits, after = without_section(text, title).partition("## Limits")
    return f"{before.rstrip()}\n\n## {title}\n\n{body}\n\n{limits}{after}"


def pushed_card(card: str, repo_id: str) -> str:
    """A card, metadata included, whose snippets load the model from a repository, instead of where they did before."""
    if earlier := _LOADS.search(card):
        card = card.replace(f'"{earlier[1]}"', f'"{repo_id}"')
    name = repo_id.rpartition("/")[2]
    return re.sub(r"^(model-index:\n- name: ).*$", lambda found: found[1] + name, card, flags=re.MULTILINE)


def local_paths(recipe: str) -> dict[str, str]:
    """The absolute paths of models and files that a recipe names, by the keys that lead to them."""
    found: dict[str, str] = {}

    def search(value: Any, place: str) -> None:
        if isinstance(value, Mapping):
            for key, part in value.items():
                search(part, place if key == "path" else f"{place}.{key}")
        elif isinstance(value, list):
            for part in value:
                search(part, place)
        elif isinstance(value, str) and _name_of(value) != value:
            found[place] = value

    read = yaml.safe_load(recipe)
    for key in ("base", "experts", "calibration"):
        search(read.get(key), key)
    return found


def pushed_recipe(recipe: str) -> str:
    """A recipe without the paths of its owner's machine.

    Models of the Hub keep their ids. Of every other model and every file, the name is left; a comment says so.
    """
    if not (paths := local_paths(recipe)):
        return recipe
    comments = [" ".join(map(_name_of, line.split(" "))) for line in recipe.splitlines() if line.startswith("#")]
    comments.append(f"# Not on the Hub, so that only the name is left. Put the path of yours: {', '.join(paths)}.")

    def public(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: public(part) for key, part in value.items()}
        if isinstance(value, list):
            return [public(part) for part in value]
        return _name_of(value) if value in paths.values() else value

    text = yaml.safe_dump(public(yaml.safe_load(recipe)), sort_keys=False, allow_unicode=True)
    return "\n".join([*comments, text])


def pushed_report(report: str, recipe: str) -> str:
    """The report of a merge, as JSON, without the paths that its recipe names."""
    for path in sorted(local_paths(recipe).values(), key=len, reverse=True):
        report = report.replace(json.dumps(path, ensure_ascii=False)[1:-1], _name_of(path))
    return report


def _name_of(path: str) -> str:
    """The name of a file or folder by its absolute path; any other text as it is."""
    whole = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    return PureWindowsPath(path).name if whole else path  # which divides at slashes, too


def card_with_experts(
    card: str,
    tasks: Collection[str],
    note: str,
    *,
    removed: str = "",
    added: str = "",
    repo_id: Optional[str] = None,
    licence: str = "",
    labels: Collection[str] = (),
) -> str:
    """A card, metadata included, of a model whose experts changed.

    Scores and comparisons of the earlier model go. Snippets that name the removed task name the first one.

    Args:
        card: the earlier card.
        tasks: the experts now.
        note: what changed, as a sentence in Markdown.
        removed, added: the task that went, or that came.
        repo_id, licence: of the expert that came.
        labels: its labels.
    """
    parsed = ModelCard(card, ignore_metadata_errors=True)
    data, text = parsed.data, parsed.text
    data.eval_results = data.model_name = None
    earlier = re.search(r"## Changes\n\n(.*?)\n*(?=\n## |\Z)", text, flags=re.DOTALL)
    for title in ("Results", "Comparison"):
        text = without_section(text, title)
    text = with_section(text, "Changes", "\n".join(filter(None, [earlier and earlier[1], f"- {note}"])))
    if removed:
        text = text.replace(f'"{removed}"', f'"{next(iter(tasks))}"')
    head, labelled, rows = text.partition("| task | labels |\n|---|---|\n")
    if labelled:
        lines, _, rest = rows.partition("\n\n")
        kept = [line for line in lines.splitlines() if not line.startswith(f"| {markdown_text(removed)} |")]
        kept += [f"| {markdown_text(added)} | {', '.join(map(markdown_text, labels))} |"] if added and labels else []
        text = f"{head}{labelled}" + "\n".join(kept) + f"\n\n{rest}"
    if repo_id:
        named = data.base_model or []
        data.base_model = list(dict.fromkeys([*([named] if isinstance(named, str) else named), repo_id]))
        data.base_model_relation = data.get("base_model_relation") or "merge"
    if added and licence != data.license:
        data.license = data.license_name = None
    return f"---\n{data.to_yaml()}\n---\n{text}"
