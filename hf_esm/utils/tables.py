"""Tables of text, for reports and terminals. The first row of each is the head; all rows are equally long."""

from collections.abc import Sequence


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
