"""The pictures of a comparison, from what was measured."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from ..checkpoints import SCORES_PICTURE
from ..metrics import (
    MOST_METHODS,
    normalised,
    plot_alpha_curves,
    plot_bars,
    plot_curves,
    plot_energy,
    plot_kept_shares,
    plot_matrix,
    plot_task_scores,
)
from .interference import Interference
from .search import Found
from .summary import Row


PICTURES = ("usual", "all", "none")  # what `pictures` of `compare` may be


def draw(
    rows: list[Row],
    experts: Mapping[str, float],
    base: Mapping[str, float],
    interference: Interference,
    *,
    metric: str,
    higher_is_better: bool,
    folder: Path,
    intervals: Optional[Mapping[str, tuple[float, float]]] = None,
    every: bool = False,
) -> dict[str, Path]:
    """Draw the pictures; return the files by title. Of more methods than fit, the best are drawn.

    Args:
        rows: rows of the comparison.
        experts, base: scores by task.
        metric: name of the metric.
        intervals: of the experts' scores, by task.
        every: draw all pictures, not the usual ones alone.
    """
    best = sorted(rows, key=lambda row: -row.normalised)[:MOST_METHODS]
    shown = [row for row in rows if row in best]
    methods = {row.label: row.method["name"] for row in shown}
    pictures: dict[str, Path] = {}
    known = {row.label: (row.normalised, *row.interval) for row in shown if row.normalised == row.normalised}
    if known:
        title = "Share of the experts' scores that each method keeps"
        share = normalised(base, experts, higher_is_better) if base else None
        pictures[title] = plot_kept_shares(known, folder / "kept.png", title, base=share, methods=methods)
    if all(0 <= score <= 1 for scores in (experts, *(row.tasks for row in shown)) for score in scores.values()):
        title = "Score by task"
        bars, errors = {row.label: row.tasks for row in shown}, {row.label: row.task_intervals for row in shown}
        options: dict[str, Any] = {"ylabel": f"{metric} on test rows", "intervals": errors, "methods": methods}
        options["reference_intervals"] = intervals
        pictures[title] = plot_task_scores(bars, experts, folder / SCORES_PICTURE, title, **options)
    if curves := alpha_curves(shown):
        title, chosen = "Validation score by α", {row.label: next(iter(row.alphas.values()), None) for row in shown}
        ylabel = f"{metric} on validation rows"
        pictures[title] = plot_alpha_curves(
            curves, folder / "alpha.png", title, ylabel, chosen=chosen, methods=methods
        )
    if energy := interference.energy():
        title = "Energy of the output shift kept, by rank"
        pictures[title] = plot_energy(energy, folder / "energy.png", title)
    tasks = list(experts)
    title = "Overlap of the tasks' subspaces"
    pictures[title] = plot_matrix(interference.overlap, tasks, folder / "interference.png", title, "task", "task")
    for number, row in enumerate(row for row in rows if row.confusion):
        title, path = f"Where {row.label} sends the rows of each task", folder / f"routing-{number}.png"
        pictures[title] = plot_matrix(row.confusion, tasks, path, title, "taken for", "rows of")
    if every and (layers := interference_by_block(interference)):
        title = "Interference between the tasks, by block"
        pictures[title] = plot_curves(
            layers,
            folder / "layers.png",
            title,
            xlabel="block of the model",
            ylabel="singular task interference (STI)",
            caption="STI of the experts' updates before the merge, a line for each linear map of a block; 0 where the "
            "tasks' singular vectors are orthogonal.",
            shares=False,
        )
    return pictures


def draw_importance(searches: list[Found], folder: Path) -> dict[str, Path]:
    """Draw which settings mattered in each search; return the files by title."""
    caption = "Share of the variation of the scores that each setting explains (fANOVA)."
    pictures = {}
    for number, found in enumerate(search for search in searches if search.importance):
        title, path = f"What mattered in {found.label}", folder / f"search-{number}.png"
        pictures[title] = plot_bars(found.importance, path, title, "importance", caption)
    return pictures


def alpha_curves(rows: list[Row]) -> dict[str, dict[float, float]]:
    """Scores by α of the first seed. A routed model has those of its static model, which are drawn once."""
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        scores = next(iter(row.alpha_scores.values()), None)
        if scores and scores not in curves.values():
            curves[row.label] = scores
    return curves


def interference_by_block(interference: Interference) -> dict[str, list[tuple[float, float]]]:
    """STI by kind of linear map: pairs of the block's number and the STI there, in the order of the blocks."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for layer in interference.layers:
        if block := re.search(r"\.(\d+)\.", layer.name):
            kind = layer.name[block.end() :].removesuffix(".weight")
            kinds.setdefault(kind, []).append((int(block[1]), layer.sti))
    return {kind: sorted(points) for kind, points in kinds.items()}
