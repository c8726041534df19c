"""The pictures of a comparison, from what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from ..checkpoints import SCORES_PICTURE
from ..metrics import (
    Chart,
    normalised,
    plot_bars,
    plot_chart,
    plot_kept_shares,
    plot_matrix,
    plot_task_scores,
)
from .charts import best_rows
from .interference import Interference
from .search import Found
from .summary import Row


ALL = "all"
PICTURES = ("usual", ALL, "none")  # what `pictures` of `compare` may be


def draw(
    rows: list[Row],
    experts: Mapping[str, float],
    base: Mapping[str, float],
    interference: Interference,
    *,
    metric: str,
    higher_is_better: bool,
    folder: Path,
    charts: Sequence[Chart],
    intervals: Optional[Mapping[str, tuple[float, float]]] = None,
    base_interval: Optional[tuple[float, float]] = None,
) -> dict[str, Path]:
    """Draw the pictures; return the files by title. Of more methods than fit, the best are drawn.

    Args:
        rows: rows of the comparison.
        experts, base: scores by task.
        metric: name of the metric.
        charts: charts of lines.
        intervals: of the experts' scores, by task.
        base_interval: of the base's share of the experts' scores.
    """
    shown = best_rows(rows)
    methods = {row.label: row.method["name"] for row in shown}
    pictures: dict[str, Path] = {}
    known = {row.label: (row.normalised, *row.interval) for row in shown if row.normalised == row.normalised}
    if known:
        title = "Share of the experts' scores that each method keeps"
        share = normalised(base, experts, higher_is_better) if base else None
        band = base_interval if share is not None and base_interval and base_interval[0] < base_interval[1] else None
        path = folder / "kept.png"
        pictures[title] = plot_kept_shares(known, path, title, base=share, base_interval=band, methods=methods)
    if all(0 <= score <= 1 for scores in (experts, *(row.tasks for row in shown)) for score in scores.values()):
        title = "Score by task"
        bars, errors = {row.label: row.tasks for row in shown}, {row.label: row.task_intervals for row in shown}
        options: dict[str, Any] = {"ylabel": f"{metric} on test rows", "intervals": errors, "methods": methods}
        options["reference_intervals"] = intervals
        pictures[title] = plot_task_scores(bars, experts, folder / SCORES_PICTURE, title, **options)
    for chart in charts:
        pictures[chart.title] = plot_chart(chart, folder / f"{chart.name}.png")
    tasks = list(experts)
    title = "Overlap of the tasks' subspaces"
    pictures[title] = plot_matrix(interference.overlap, tasks, folder / "interference.png", title, "task", "task")
    for number, row in enumerate(row for row in rows if row.confusion):
        title, path = f"Where {row.label} sends the rows of each task", folder / f"routing-{number}.png"
        pictures[title] = plot_matrix(row.confusion, tasks, path, title, "taken for", "rows of")
    return pictures


def draw_importance(searches: list[Found], folder: Path) -> dict[str, Path]:
    """Draw which settings mattered in each search; return the files by title."""
    caption = "Share of the variation of the scores that each setting explains (fANOVA)."
    pictures = {}
    for number, found in enumerate(search for search in searches if search.importance):
        title, path = f"What mattered in {found.label}", folder / f"search-{number}.png"
        pictures[title] = plot_bars(found.importance, path, title, "importance", caption)
    return pictures
