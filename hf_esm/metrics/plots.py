"""Pictures of scores, drawn from plain data, so that any table of results can be drawn."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import HfEsmError
from ..utils import atomic_file


# Okabe and Ito's colours, which colour-blind readers can tell apart. A picture has one colour per method.
COLOURS = ("#999999", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#F0E442", "#0072B2")


AVERAGE = "average"


BARS_WITH_NUMBERS = 48  # more bars are too narrow for a number on each


def plot_task_scores(
    scores: Mapping[str, Mapping[str, float]],
    reference: Mapping[str, float],
    path: str | os.PathLike,
    title: str,
    *,
    ylabel: str = "test accuracy",
    reference_label: str = "expert of the task",
) -> Path:
    """Draw grouped bars: a group per task and one for the average, a bar per method, the reference as a line.

    Needs matplotlib, whose global state (backend, open figures) is not changed.

    Args:
        scores: `{method: {task: score}}`, scores as shares (1 = 100 %). Every method must have a score for every task.
        reference: `{task: score}`, the best that a method could reach, such as the score of the task's expert. Groups
            have the order of its tasks.
        path: file to write; its suffix decides the format (`.png`, `.svg`, `.pdf`).
        title: title of the picture.
        ylabel: what the scores measure.
        reference_label: what the reference is.

    Returns:
        The path.

    Raises:
        HfEsmError: without matplotlib; if there is nothing to draw; if a method has no score for a task.
    """
    figure_class = require_matplotlib()
    tasks, methods = list(reference), list(scores)
    _check_scores(scores, tasks)
    places = [*range(len(tasks)), len(tasks) + 0.25]  # the average is a little apart
    numbered = len(methods) * len(places) <= BARS_WITH_NUMBERS
    inches = max(7.0, 1.6 + (0.36 if numbered else 0.2) * len(places) * max(len(methods), 3))
    figure = figure_class(figsize=(inches, 4.8), dpi=150)
    axes = figure.add_subplot()
    references, width = _with_average(reference, tasks), 0.8 / len(methods)
    for i, method in enumerate(methods):
        heights = _with_average(scores[method], tasks)
        left = [place - 0.4 + (i + 0.5) * width for place in places]
        bars = axes.bar(left, heights, 0.92 * width, color=COLOURS[i], label=method, zorder=2)
        if numbered:
            _write_numbers(axes, bars, heights, references)
    ends = [(place - 0.42, place + 0.42) for place in places]
    axes.hlines(references, *zip(*ends), color="black", lw=1.6, label=reference_label, zorder=3)
    lowest = min(0.0, *(score for by_task in scores.values() for score in by_task.values()))
    _style_score_axes(axes, places, [*tasks, AVERAGE], lowest)
    axes.set_ylabel(ylabel)
    columns = min(len(methods) + 1, int(inches / 1.9))
    rows = -(-(len(methods) + 1) // columns)
    axes.set_title(title, loc="left", fontweight="bold", pad=12 + 18 * rows)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, frameon=False, columnspacing=1.4)
    return _written(figure, path)


def _check_scores(scores: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> None:
    if not tasks or not scores:
        raise HfEsmError("There is nothing to draw: give at least one method and one task.")
    if len(scores) > len(COLOURS):
        raise HfEsmError(f"{len(scores)} methods do not fit in one picture. Draw {len(COLOURS)} at most.")
    for method, by_task in scores.items():
        if missing := [task for task in tasks if task not in by_task]:
            raise HfEsmError(
                f"Method {method!r} has no score for the task {missing[0]!r}. Measure it, or drop the task."
            )


def _write_numbers(axes: Any, bars: Any, heights: Sequence[float], references: Sequence[float]) -> None:
    """Write each bar's height in percent: in the bar, unless it is too low or the reference crosses the number."""
    for bar, height, reference in zip(bars, heights, references, strict=True):
        inside = height > 0.08 and not height - 0.06 < reference < height
        axes.annotate(
            f"{100 * height:.0f}",
            (bar.get_x() + bar.get_width() / 2, max(height, 0.0)),
            xytext=(0, -3 if inside else 2),
            textcoords="offset points",
            ha="center",
            va="top" if inside else "bottom",
            fontsize=8,
            zorder=4,
        )


def _style_score_axes(axes: Any, places: Sequence[float], groups: Sequence[str], lowest: float) -> None:
    axes.set_ylim(lowest, 1.05)
    axes.set_yticks([i / 5 for i in range(6)])
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlim(places[0] - 0.6, places[-1] + 0.6)
    axes.set_xticks(places, groups, rotation=30 if len(groups) > 11 else 0)
    axes.get_xticklabels()[-1].set_fontweight("bold")
    axes.grid(axis="y", color="#dddddd", lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def require_matplotlib() -> Any:
    """Function that makes matplotlib figures, which draw with Agg.

    Unlike pyplot's, these figures need no display and no backend, and are freed when nothing refers to them.

    Raises:
        HfEsmError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise HfEsmError("Drawing needs matplotlib, which is not installed: pip install hf_esm[demo]") from None

    def figure(**options: Any) -> Figure:
        new = Figure(**options)
        FigureCanvasAgg(new)
        return new

    return figure


def _with_average(scores: Mapping[str, float], tasks: list[str]) -> list[float]:
    values = [float(scores[task]) for task in tasks]
    return [*values, sum(values) / len(values)]


def plot_alpha_curves(
    curves: Mapping[str, Mapping[float, float]], path: str | os.PathLike, title: str, ylabel: str
) -> Path:
    """Draw lines: the mean validation score by α, `{method: {alpha: score}}`, with a mark at each method's best."""
    figure, axes = _axes(require_matplotlib(), title)
    for colour, (method, scores) in zip(COLOURS, curves.items(), strict=False):
        places = sorted(scores)
        axes.plot(places, [scores[alpha] for alpha in places], color=colour, lw=1.6, label=method)
        best = max(places, key=lambda alpha: scores[alpha])
        axes.plot([best], [scores[best]], "o", color=colour, ms=5)
    axes.set_xlabel("α")
    axes.set_ylabel(f"{ylabel} on validation rows")
    return _save(figure, axes, path)


def plot_energy(energies: Mapping[str, Any], path: str | os.PathLike, title: str) -> Path:
    """Draw lines: the share of the output shift's energy that is kept, `{kind: [(rank as a share, energy), …]}`."""
    figure, axes = _axes(require_matplotlib(), title)
    for colour, (kind, points) in zip(COLOURS[1:], energies.items(), strict=False):
        axes.plot(*zip(*points), "o-", color=colour, lw=1.6, ms=4, label=f"{kind} directions")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rank, as a share of the smaller side")
    axes.set_ylabel("energy kept")
    axes.set_ylim(0, 1.05)
    return _save(figure, axes, path)


def plot_matrix(
    values: Sequence[Sequence[float]],
    names: Sequence[str],
    path: str | os.PathLike,
    title: str,
    xlabel: str,
    ylabel: str,
) -> Path:
    """Draw a heat map of shares, `[T, T]` in [0, 1], first row on top, with the shares written in percent."""
    size = 2.2 + 0.62 * len(names)
    figure = require_matplotlib()(figsize=(size, size), dpi=150)
    axes = figure.add_subplot()
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color="white" if value > 0.5 else "black")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return _written(figure, path)


def _axes(figure_class: Any, title: str) -> tuple[Any, Any]:
    figure = figure_class(figsize=(7.0, 4.2), dpi=150)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, axes: Any, path: str | os.PathLike) -> Path:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return _written(figure, path)


def _written(figure: Any, path: str | os.PathLike) -> Path:
    path = Path(path)
    with atomic_file(path) as partial:
        figure.savefig(partial, bbox_inches="tight", pad_inches=0.15)
    return path
