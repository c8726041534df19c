"""Hooks of MkDocs (`mkdocs.yml`): what differs between the pages on a site and the same pages in the repository."""

import re
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write links to files outside of `docs/`, which the site does not hold, as the names of these files.

    Raises:
        FileNotFoundError: if there is no such file, so that the build fails.
    """

    def named(link: re.Match) -> str:
        path = link["path"]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"docs/ links to {path}, which does not exist")
        text = link["text"]
        return text if path in text else f"{text} (`{path}`)"

    return re.sub(r"\[(?P<text>[^\]]*)\]\(\.\./(?P<path>[^)#]+)(#[^)]*)?\)", named, markdown)
