"""The report of a comparison as one page of HTML, which loads nothing: tables, bars, curves and heat maps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, log2, log10
from typing import Any, Optional

from jinja2 import Environment, StrictUndefined

from ..hub import template
from ..metrics import Chart, Line, normalised, styles_of
from ..version import __version__
from .interference import Interference
from .search import Found
from .summary import Row


_STEPS = 4  # of an axis, at most
_SIDEWAYS = 2.5  # pixels between the intervals of two lines at one place
_NO_METHOD = "#56B4E9"  # the colour of bars that are no method's


@dataclass(frozen=True)
class Axis:
    """An axis with round ticks.

    Attributes:
        low, high: the ends.
        ticks: values.
        percent: whether values are shares, which are written in percent.
        log: whether the axis is logarithmic, of shares with powers of 2 as ticks, which are written as fractions.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    percent: bool = False
    log: bool = False

    @classmethod
    def of(cls, values: Iterable[float], percent: bool = False, from_zero: bool = True, whole: bool = False) -> "Axis":
        """Return the axis that shows all values; infinite ones and NaN are left out.

        Args:
            from_zero: whether the axis includes 0, as bars need.
            whole: whether all ticks are whole numbers.
        """
        known = [value for value in values if isfinite(value)] or [0.0, 1.0]
        low, high = min(known), max(known)
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            low, high = low - 0.5 * (not from_zero), high + 0.5 + 0.5 * from_zero
        step = _round_step((high - low) / _STEPS, whole)
        first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
        return cls(first * step, last * step, tuple(i * step for i in range(first, last + 1)), percent)

    @classmethod
    def of_logarithms(cls, shares: Iterable[float]) -> "Axis":
        """Return the logarithmic axis that shows all shares, which are above 0."""
        known = list(shares)
        first, last = floor(log2(min(known)) + 1e-9), ceil(log2(max(known)) - 1e-9)
        last = max(last, first + 1)
        return cls(2.0**first, 2.0**last, tuple(2.0**i for i in range(first, last + 1)), log=True)

    @property
    def labelled(self) -> tuple[float, ...]:
        """The ticks whose values fit side by side on a narrow page."""
        return self.ticks[:: 1 if len(self.ticks) < 5 else 2]

    def place(self, value: float) -> float:
        """Return where a value is, in percent of the axis; values outside are at the ends."""
        low, high, at = (log2(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        share = (at - low) / (high - low)
        return round(100 * min(max(share, 0.0), 1.0), 3)

    def shown(self, value: float, digits: int = 4) -> str:
        """Return a value as the axis writes it."""
        if self.log and value < 1:
            return f"1/{1 / value:.{digits}g}"
        value = 0.0 if abs(value) < 1e-12 else value
        return f"{100 * value:.{digits}g} %" if self.percent else f"{value:.{digits}g}"


def _round_step(least: float, whole: bool) -> float:
    """Return the smallest of 1, 2, 2.5, 5, 10 times a power of ten that is not less than `least`, or that is whole."""
    least = max(least, 1.0) if whole else least
    power = 10.0 ** floor(log10(least))
    steps = [factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if not whole or (factor * power).is_integer()]
    return next(step for step in steps if step >= least * (1 - 1e-9))


@dataclass
class Bars:
    """Horizontal bars.

    Attributes:
        title: the title.
        axis: the axis of values.
        unit: what the values are.
        bars: a bar each: `label`, `colour`, `hatched`, `value`, `interval`.
        lines: vertical lines: `name`, `value`, `dashed`, and `band`, an interval or None.
    """

    title: str
    axis: Axis
    unit: str
    bars: list[dict[str, Any]]
    lines: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Curves:
    """A chart with its axes.

    Attributes:
        chart: the lines, and what they are.
        x, y: the axes.
        lines: pairs of a line and the pixels that it is moved by, so that intervals do not hide each other.
    """

    chart: Chart
    x: Axis
    y: Axis
    lines: list[tuple[Line, float]]

    @classmethod
    def of(cls, chart: Chart) -> "Curves":
        """Return a chart with axes that show all of its points and intervals."""
        places = [x for line in chart.lines for x, _ in line.points]
        heights = [y for line in chart.lines for _, y in line.points]
        heights += [end for line in chart.lines for ends in line.errors.values() for end in ends]
        whole = all(float(x).is_integer() for x in places)
        x = Axis.of_logarithms(places) if chart.log else Axis.of(places, from_zero=False, whole=whole)
        lines = [(line, _SIDEWAYS * step) for line, step in zip(chart.lines, chart.steps, strict=True)]
        return cls(chart, x, Axis.of(heights, chart.percent, from_zero=False), lines)


@dataclass
class Heat:
    """A heat map of shares.

    Attributes:
        title, caption: the title, and what is seen.
        names: of rows and columns.
        rows, columns: what they are.
        values: `[T, T]` in [0, 1].
    """

    title: str
    caption: str
    names: list[str]
    rows: str
    columns: str
    values: list[list[float]]


def page_of(
    rows: list[Row],
    experts: Mapping[str, float],
    base: Mapping[str, float],
    interference: Interference,
    searches: Sequence[Found],
    *,
    charts: Sequence[Chart],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]],
    base_interval: Optional[tuple[float, float]],
    metric: str,
    higher_is_better: bool,
    table: list[list[str]],
    choices: list[list[str]],
    notes: list[str],
) -> str:
    """Return the page.

    Names of tasks, methods and metrics are strangers' text: the template escapes them.

    Args:
        rows: rows of the comparison.
        experts, base: scores by task.
        interference: interference between the experts.
        searches: what was found by searching settings.
        charts: charts of lines.
        intervals: of the scores of the `"experts"` and of the `"base"`, by task, as far as they are known.
        base_interval: of the base's share of the experts' scores.
        metric: name of the metric.
        table: the table of the report; the last `len(rows)` rows are those of the methods.
        choices: a table of how α was chosen; empty if it was not.
        notes: sentences below the table.
    """
    tasks, styles = list(experts), styles_of([r.label for r in rows], {r.label: r.method["name"] for r in rows})
    looks = {label: {"colour": style.colour, "hatched": bool(style.hatch)} for label, style in styles.items()}
    known = [v for by_task in (experts, *(r.tasks for r in rows)) for v in by_task.values() if isfinite(v)]
    shares = all(0 <= value <= 1 for value in known)
    kept = _kept(rows, experts, base, base_interval, higher_is_better, looks)
    return (
        _environment()
        .from_string(template("comparison.html"))
        .render(
            version=__version__,
            metric=metric,
            tasks=tasks,
            head=table[0],
            references=table[1 : len(table) - len(rows)],
            body=[(row.label, looks[row.label], cells) for row, cells in zip(rows, table[-len(rows) :], strict=True)],
            notes=notes,
            choices=choices,
            kept=kept,
            panels=[
                _panel(task, rows, _references(task, experts, base, intervals), metric, shares, looks)
                for task in tasks
            ],
            curves=list(map(Curves.of, charts)),
            heats=_heats(rows, interference, tasks),
            searches=[_importance(found) for found in searches if found.importance],
        )
    )


def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _line(
    name: str, value: Optional[float], band: Optional[tuple[float, float]] = None, dashed: bool = False
) -> list[dict[str, Any]]:
    known = value is not None and isfinite(value)
    band = _interval(band) if band else None
    return [{"name": name, "value": value, "band": band, "dashed": dashed}] if known else []


def _ends(lines: list[dict[str, Any]]) -> list[float]:
    """Return all values of vertical lines and their bands."""
    return [value for line in lines for value in (line["value"], *(line["band"] or ()))]


def _kept(
    rows: list[Row],
    experts: Any,
    base: Any,
    base_interval: Optional[tuple[float, float]],
    higher: bool,
    looks: Mapping[str, Any],
) -> Optional[Bars]:
    """Return bars of the share of the experts' scores that each method keeps; None if no method has one."""
    known = [row for row in rows if isfinite(row.normalised)]
    if not known:
        return None
    share = normalised(base, experts, higher) if base else None
    lines = [*_line("the experts", 1.0), *_line("the base", share, base_interval, dashed=True)]
    values = [value for row in known for value in (row.normalised, *row.interval)] + _ends(lines)
    bars = [
        {"label": row.label, **looks[row.label], "value": row.normalised, "interval": _interval(row.interval)}
        for row in known
    ]
    unit = "score as a share of the expert's, mean over tasks"
    return Bars("Share of the experts' scores that each method keeps", Axis.of(values, True), unit, bars, lines)


def _references(task: str, experts: Any, base: Any, intervals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of a task's expert and of the base."""
    of_expert, of_base = (intervals.get(name, {}).get(task) for name in ("experts", "base"))
    return [*_line("its expert", experts[task], of_expert), *_line("the base", base.get(task), of_base, dashed=True)]


def _panel(
    task: str,
    rows: list[Row],
    lines: list[dict[str, Any]],
    metric: str,
    shares: bool,
    looks: Mapping[str, Any],
) -> Bars:
    """Return bars of one task's scores."""
    bars = [
        {
            "label": row.label,
            **looks[row.label],
            "value": row.tasks[task],
            "interval": _interval(row.task_intervals[task]),
        }
        for row in rows
    ]
    ends = [1.0] if shares else []
    values = [value for bar in bars for value in (bar["value"], *(bar["interval"] or ()))]
    axis = Axis.of([*values, *ends, *_ends(lines)], shares)
    return Bars(task, axis, f"{metric} on test rows", bars, lines)


def _interval(interval: tuple[float, float]) -> Optional[tuple[float, float]]:
    return interval if all(map(isfinite, interval)) else None


def _heats(rows: list[Row], interference: Interference, tasks: list[str]) -> list[Heat]:
    heats = []
    if interference.layers:
        caption = "Percent of one task's subspace that lies in the other's, mean over linear maps."
        overlap = interference.overlap
        heats.append(Heat("Overlap of the tasks' subspaces", caption, interference.tasks, "task", "task", overlap))
    for row in rows:
        if row.confusion:
            caption = "Percent of a task's test rows, by the likeliest task."
            title = f"Where {row.label} sends the rows of each task"
            heats.append(Heat(title, caption, tasks, "rows of", "taken for", row.confusion))
    return heats


def _importance(found: Found) -> Bars:
    bars = [
        {"label": name, "colour": _NO_METHOD, "hatched": False, "value": share, "interval": None}
        for name, share in sorted(found.importance.items(), key=lambda pair: -pair[1])
    ]
    axis = Axis.of([*(bar["value"] for bar in bars), 1.0], percent=True)
    return Bars(f"What mattered in {found.label}", axis, "importance (fANOVA): share of the variation", bars)
