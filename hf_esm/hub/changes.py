"""Changes of a card that is written already: sections, the name under which it is pushed, other experts."""

import re
from collections.abc import Collection
from typing import Optional

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
