"""Draw `docs/overview.svg`, the picture of the README: what goes into a merge, and what comes out.

python docs/draw_overview.py
"""

from pathlib import Path


INK, LINE, PAPER = "#1f2933", "#7b8794", "#ffffff"
BASE, EXPERT, SAMPLE, MERGED = "#e4e7eb", "#d2e3fc", "#fde8c8", "#d3f0d8"


def box(x: int, y: int, width: int, height: int, fill: str, *lines: str) -> str:
    """A rounded box; the first line is bold."""
    drawn = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{LINE}"/>'
    top = y + height / 2 - 9 * (len(lines) - 1) + 5
    for i, line in enumerate(lines):
        style = 'font-weight="bold"' if i == 0 else f'font-size="12.5" fill="{INK}"'
        drawn += f'<text x="{x + width / 2:g}" y="{top + 18 * i:g}" text-anchor="middle" {style}>{line}</text>'
    return drawn


def arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<path d="M{x1} {y1}L{x2} {y2}" stroke="{LINE}" stroke-width="2" marker-end="url(#head)"/>'


def overview() -> str:
    """The picture as SVG."""
    parts = [
        box(20, 20, 250, 54, BASE, "base checkpoint", "bert-base-uncased"),
        box(20, 90, 250, 54, EXPERT, "expert “sst2”", "a fine-tune: full weights"),
        box(20, 160, 250, 54, EXPERT, "expert “mrpc”", "a fine-tune: a PEFT adapter"),
        box(20, 240, 250, 54, SAMPLE, "64 unlabelled samples per task", "or statistics from an earlier merge"),
        *(arrow(270, y, 338, to) for y, to in ((47, 120), (117, 140), (187, 160), (267, 180))),
        box(
            342,
            70,
            196,
            162,
            PAPER,
            "hf_esm",
            "reads one weight at a time",
            "measures what layers read",
            "merges the updates",
            "keeps each task’s head",
        ),
        arrow(538, 120, 606, 82),
        arrow(538, 180, 606, 222),
        box(610, 40, 270, 84, MERGED, "one plain model", "any AutoModel loads it", "same size and speed as the base"),
        box(
            610,
            166,
            270,
            102,
            MERGED,
            "or a routed model (ESM++)",
            "the plain model, a small expert per task,",
            "and a router that chooses per sample",
            "a PEFT adapter over the same model",
        ),
    ]
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head += f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker>'
    title = "Base, experts and samples go in; one plain model, or a routed model, comes out"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 314" role="img" aria-label="{title}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="15" fill="{INK}"><title>{title}</title>'
        f'<defs>{head}</defs><rect width="900" height="314" rx="10" fill="#f5f7fa"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    (Path(__file__).parent / "overview.svg").write_text(overview(), encoding="utf-8")
