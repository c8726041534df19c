"""Pictures of scores, drawn from plain data, so that any table of results can be drawn.

Every picture has a title, a caption, and axes with units. A method has the same colour in all of them.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from ..errors import HfEsmError
from .drawing import REFERENCE, Chart, in_percent, moved_by, plain_axes, require_matplotlib, styles_of, written


AVERAGE = "average"


MOST_METHODS = 12  # in one picture of bars


BARS_WITH_NUMBERS = 48  # more bars are too narrow for a number on each


SIDEWAYS = 2.0  # points on paper between the intervals of two lines at one place


INTERVALS = "Bars over the ends show 95 % intervals of draws of the rows."


Interval = tuple[float, float]


def plot_task_scores(
    scores: Mapping[str, Mapping[str, float]],
    reference: Mapping[str, float],
    path: str | os.PathLike,
    title: str,
    *,
    ylabel: str = "test accuracy",
    reference_label: str = "expert of the task",
    intervals: Optional[Mapping[str, Mapping[str, Interval]]] = None,
    reference_intervals: Optional[Mapping[str, Interval]] = None,
    methods: Optional[Mapping[str, str]] = None,
    bars_are: str = "models merged by each method",
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
        intervals: `{method: {task: (low, high)}}`, drawn as error bars.
        reference_intervals: `{task: (low, high)}` of the reference, drawn as bands.
        methods: names of the methods by label, which decide the colours; by default the first word of the label.
        bars_are: what the bars show, for the caption.

    Returns:
        The path.

    Raises:
        HfEsmError: without matplotlib; if there is nothing to draw; if a method has no score for a task.
    """
    figure_class = require_matplotlib()
    tasks, labels = list(reference), list(scores)
    _check_scores(scores, tasks)
    places = [*range(len(tasks)), len(tasks) + 0.25]  # the average is a little apart
    numbered = len(labels) * len(places) <= BARS_WITH_NUMBERS and not intervals
    inches = max(7.0, 1.6 + (0.36 if numbered else 0.2) * len(places) * max(len(labels), 3))
    figure = figure_class(figsize=(min(inches, 18.0), 4.8))
    axes = figure.add_subplot()
    references, width = _with_average(reference, tasks), 0.8 / len(labels)
    styles = styles_of(labels, methods)
    for i, label in enumerate(labels):
        heights, style = _with_average(scores[label], tasks), styles[label]
        left = [place - 0.4 + (i + 0.5) * width for place in places]
        look = {"color": style.colour, "hatch": style.hatch, "edgecolor": "white", "lw": 0}
        bars = axes.bar(left, heights, 0.92 * width, label=label, zorder=2, **look)
        if intervals:
            _error_bars(axes, left, [scores[label][task] for task in tasks], [intervals[label][t] for t in tasks])
        if numbered:
            _write_numbers(axes, bars, heights, references)
    ends = [(place - 0.42, place + 0.42) for place in places]
    axes.hlines(references, *zip(*ends), color="black", lw=1.6, label=reference_label, zorder=3)
    for span, task in zip(ends, tasks):
        low, high = (reference_intervals or {}).get(task, (0.0, 0.0))
        if low < high:
            axes.fill_between(span, low, high, color=REFERENCE, alpha=0.15, lw=0, zorder=1)
    lowest = min(0.0, *(score for by_task in scores.values() for score in by_task.values()))
    _style_score_axes(axes, places, [*tasks, AVERAGE], lowest)
    axes.set_ylabel(ylabel)
    axes.set_xlabel("task")
    columns = min(len(labels) + 1, max(int(min(inches, 18.0) / 2.2), 1))
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, columnspacing=1.4)
    axes.set_title(title, loc="left", fontweight="bold")
    caption = f"Bars: {bars_are}. Lines: {reference_label}. {INTERVALS if intervals else ''}"
    caption += " Grey bands: those of the lines." if reference_intervals else ""
    return written(figure, path, caption.strip())


def _check_scores(scores: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> None:
    if not tasks or not scores:
        raise HfEsmError("There is nothing to draw: give at least one method and one task.")
    if len(scores) > MOST_METHODS:
        raise HfEsmError(f"{len(scores)} methods do not fit in one picture. Draw {MOST_METHODS} at most.")
    for method, by_task in scores.items():
        if missing := [task for task in tasks if task not in by_task]:
            raise HfEsmError(
                f"Method {method!r} has no score for the task {missing[0]!r}. Measure it, or drop the task."
            )


def _error_bars(axes: Any, places: Sequence[float], values: Sequence[float], intervals: Sequence[Interval]) -> None:
    """Draw vertical intervals, as far as they are known."""
    for place, value, (low, high) in zip(places, values, intervals):
        if low == low and high == high:
            errors = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
            look = {"ecolor": REFERENCE, "elinewidth": 0.9, "capsize": 1.5, "zorder": 4}
            axes.errorbar([place], [value], errors, fmt="none", **look)


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
    in_percent(axes.yaxis)
    axes.set_xlim(places[0] - 0.6, places[-1] + 0.6)
    axes.set_xticks(places, groups, rotation=30 if len(groups) > 11 else 0)
    axes.get_xticklabels()[-1].set_fontweight("bold")
    axes.grid(axis="y", color="#dddddd", lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _with_average(scores: Mapping[str, float], tasks: list[str]) -> list[float]:
    values = [float(scores[task]) for task in tasks]
    return [*values, sum(values) / len(values)]


def plot_kept_shares(
    shares: Mapping[str, tuple[float, float, float]],
    path: str | os.PathLike,
    title: str,
    *,
    base: Optional[float] = None,
    base_interval: Optional[Interval] = None,
    methods: Optional[Mapping[str, str]] = None,
) -> Path:
    """Draw a mark per method with its interval: `{label: (share, low, high)}`, the mean share of the experts' scores;
    the experts and the base are lines, the base's interval is a band.
    """
    figure, axes = plain_axes(title, (7.0, 1.6 + 0.32 * len(shares)))
    styles = styles_of(shares, methods)
    for place, (label, (share, low, high)) in enumerate(shares.items()):
        known = [[max(share - low, 0.0)], [max(high - share, 0.0)]] if low == low and high == high else None
        colour = styles[label].colour
        axes.errorbar([share], [place], xerr=known, fmt="o", color=colour, ecolor=colour, capsize=2.5, label=label)
    axes.axvline(1.0, color=REFERENCE, lw=1.2, label="the experts")
    if base is not None:
        axes.axvline(base, color=REFERENCE, lw=1.2, ls="--", label="the base")
    if base_interval is not None:
        axes.axvspan(*base_interval, color=REFERENCE, alpha=0.12, lw=0, zorder=0)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    in_percent(axes.xaxis)
    axes.set_xlabel("score as a share of the expert's, mean over tasks")
    axes.set_ylabel("method")
    band = ", the band its interval" if base_interval is not None else ""
    lines = "The line is the experts" + (f"; the dashed line is the base{band}." if base is not None else ".")
    return written(figure, path, f"Marks: merged models, with 95 % intervals of draws of the rows. {lines}")


def plot_chart(chart: Chart, path: str | os.PathLike) -> Path:
    """Draw lines with marks and intervals, the legend beside them.

    Lines with intervals are set apart sideways by a few points on paper, so that no interval hides another.
    """
    figure, axes = plain_axes(chart.title)
    for line, step in zip(chart.lines, chart.steps, strict=True):
        place = axes.transData + moved_by(SIDEWAYS * step, figure)
        look = {"color": line.colour, "transform": place, "zorder": 2 if line.thin else 3}
        width, size = (1.0, 2.5) if line.thin else (1.8, 4)
        axes.plot(*zip(*line.points), "o", ls=line.dashes, lw=width, ms=size, label=line.name, **look)
        for x, y in line.points:
            if x in line.errors:
                axes.plot([x, x], line.errors[x], "_-", lw=0.9, ms=4, **look)
            if x == line.default:
                axes.plot([x], [y], "o", ms=12, fillstyle="none", markeredgewidth=1.0, **look)
            if x == line.marked:
                axes.plot([x], [y], "o", ms=8, markeredgecolor="black", markeredgewidth=1.2, **look)
        axes.update_datalim(line.points)  # which matplotlib does not do for lines that are moved
        axes.update_datalim([(x, y) for x, ends in line.errors.items() for y in ends])
    if chart.log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
        axes.minorticks_off()
    elif all(x == int(x) for line in chart.lines for x, _ in line.points):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if chart.percent:
        in_percent(axes.yaxis)
    axes.set_xlabel(chart.xlabel)
    axes.set_ylabel(chart.ylabel)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return written(figure, path, chart.caption)


def plot_bars(values: Mapping[str, float], path: str | os.PathLike, title: str, xlabel: str, caption: str) -> Path:
    """Draw horizontal bars of shares, `{name: share}`, the largest on top."""
    figure, axes = plain_axes(title, (7.0, 1.4 + 0.32 * len(values)))
    names = sorted(values, key=lambda name: values[name])
    axes.barh(range(len(names)), [values[name] for name in names], color="#56B4E9", zorder=2)
    axes.set_yticks(range(len(names)), names)
    in_percent(axes.xaxis)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("setting")
    return written(figure, path, caption)


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
    figure = require_matplotlib()(figsize=(size, size))
    axes = figure.add_subplot()
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color="white" if value > 0.5 else "black")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return written(figure, path, "Shares in percent; darker is more.")
