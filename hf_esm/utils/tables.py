"""Tables of text, for reports and terminals. The first row of each is the head; all rows are equally long."""

import re
from collections.abc import Sequence
from typing import Any


_LONGEST_CELL = 200


def plain_text(text: Any) -> str:
    """Return a text of a stranger's file in one line that prints as it is, of at most 200 characters."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(text))
    line = " ".join(line.split())
    return line if len(line) <= _LONGEST_CELL else f"{line[: _LONGEST_CELL - 1]}…"


def markdown_text(text: Any) -> str:
    """Return a text of a stranger's file, such as a label, as Markdown shows it and nothing else: neither a link, an
    image, HTML nor the end of a table's cell.

    Example:
        >>> from hf_esm.utils import markdown_text
        >>> markdown_text("not_equivalent | [here](https://example.org)")
        'not_equivalent \\\\| \\\\[here\\\\](https://example.org)'
    """
    return re.sub(r"([\\`*|\[\]<>&#~]|(?<!\w)_|_(?!\w))", r"\\\1", plain_text(text))


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, with the first column aligned left and the others right."""
    head, *body = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return [_markdown_row(row) for row in (head, ["---", *["--:"] * (len(head) - 1)], *body)]


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plain_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table aligned with spaces: the first column left, the others right. Trailing spaces are cut."""
    first, *rest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(w) for cell, w in zip(row[1:], rest, strict=True))]).rstrip()
        for row in rows
    ]
