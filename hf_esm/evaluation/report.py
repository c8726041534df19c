"""The report of a comparison: a table in plain text, Markdown and HTML, data as JSON, and pictures."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Optional

from ..errors import HfEsmError
from ..metrics import ACCURACY, Chart, normalised
from ..utils import atomic_file, markdown_table, plain_table, without_nan
from ..version import __version__
from .charts import alpha_chart, best_rows, energy_chart, figure_charts, layers_chart
from .figures import Figures
from .interference import Interference
from .page import page_of
from .pictures import ALL, draw, draw_importance
from .search import Found
from .summary import Row


REPORT, PAGE, DATA = "report.md", "report.html", "report.json"


@dataclass
class Comparison:
    """What `compare` measured. Print it for a table, or open `report.html` (one page, which loads nothing),
    `report.md`, `report.json` and the pictures.

    Attributes:
        rows: one per method, and a second one, with the tasks given, per method whose router decides.
        experts: score of each task's expert.
        metric: name of the metric.
        how: sentences that say how α was chosen and on what was measured.
        interference: interference between the experts.
        pictures: files by the titles of the pictures.
        base: score of the base on each task, with the task's head; empty if the base has no answers.
        num_rows: number of test rows by task.
        higher_is_better: False for errors, such as perplexity.
        searches: what was found by searching settings.
        kept: folder of the model that was kept, if any.
        intervals: 95 % intervals of the scores of the `"experts"` and of the `"base"`, by task.
        base_interval: 95 % interval of the share of the experts' scores that the base has; NaN if it has none.
        figures: what is measured for `pictures="all"` alone.
    """

    rows: list[Row]
    experts: dict[str, float]
    metric: str
    how: list[str]
    interference: Interference
    pictures: dict[str, Path] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)
    num_rows: dict[str, int] = field(default_factory=dict)
    higher_is_better: bool = True
    kept: Optional[Path] = None
    searches: list[Found] = field(default_factory=list)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    base_interval: Optional[tuple[float, float]] = None
    figures: Optional[Figures] = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "hf_esm_version": __version__,
            "metric": self.metric,
            "experts": self.experts,
            "base": self.base,
            "intervals": without_nan(self.intervals),
            "base_interval": without_nan(self.base_interval),
            "num_rows": self.num_rows,
            "how": self.how,
            "rows": [without_nan(asdict(row)) for row in self.rows],
            "interference": self.interference.as_dict(),
            "searches": [found.as_dict() for found in self.searches],
            **({"figures": without_nan(self.figures.as_dict())} if self.figures else {}),
        }

    def charts(self, every: bool) -> list[Chart]:
        """Return the charts of lines that have something to show.

        Args:
            every: with those that `pictures="all"` draws alone.
        """
        scores = [score for by_task in (self.experts, *(row.tasks for row in self.rows)) for score in by_task.values()]
        percent = all(0 <= score <= 1 for score in scores if isfinite(score))
        rows = best_rows(self.rows)
        charts = [alpha_chart(rows, self.metric, self.higher_is_better, percent), energy_chart(self.interference)]
        if every:
            charts.append(layers_chart(self.interference))
        if self.figures is not None:
            charts += figure_charts(self.figures, rows, self.interference)
        return [chart for chart in charts if any(len({x for x, _ in line.points}) > 1 for line in chart.lines)]

    def __str__(self) -> str:
        table = [[cell.replace("**", "") for cell in row] for row in _cells(self)]
        return "\n".join([*plain_table(table), "", *self.how, *self.below_base()])

    def below_base(self) -> list[str]:
        """Return a sentence that names the tasks on which a merged model is worse than the base, if there are any."""
        sign = 1 if self.higher_is_better else -1
        worse = {
            row.label: [task for task, base in self.base.items() if not sign * row.tasks[task] >= sign * base]
            for row in self.rows
        }
        named = [f"{label} on {', '.join(tasks)}" for label, tasks in worse.items() if tasks]
        return [f"Worse than the base: {'; '.join(named)}."] if named else []

    def __repr__(self) -> str:
        return (
            f"Comparison({self.metric}; tasks {', '.join(self.experts)}; {', '.join(row.label for row in self.rows)})"
        )


def write_report(comparison: Comparison, folder: Path, pictures: str = "usual") -> None:
    """Write `report.md`, `report.html`, `report.json` and, if matplotlib is installed, the `pictures`: `usual`,
    `all` or `none`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("*.png"):  # an earlier report may have had more of them
        earlier.unlink()
    if pictures != "none":
        try:
            comparison.pictures = draw(
                comparison.rows,
                comparison.experts,
                comparison.base,
                comparison.interference,
                metric=comparison.metric,
                higher_is_better=comparison.higher_is_better,
                folder=folder,
                intervals=comparison.intervals.get("experts"),
                base_interval=comparison.base_interval,
                charts=comparison.charts(every=pictures == ALL),
            )
            comparison.pictures |= draw_importance(comparison.searches, folder)
        except HfEsmError as error:  # without matplotlib
            comparison.how.append(f"No pictures: {error}")
    data = json.dumps(comparison.as_dict(), indent=1, ensure_ascii=False)
    _write(folder / DATA, data + "\n")
    lines = [
        "# Merge methods compared",
        "",
        *comparison_table(comparison),
        "",
        *comparison.how,
        *comparison.below_base(),
        "",
    ]
    sti = comparison.interference.sti
    sti = f"Singular task interference (STI) between the experts: {sti:.3g}, mean over linear maps."
    lines += [sti, ""]
    if choices := _alpha_cells(comparison.rows):
        lines += ["## How α was chosen", "", *markdown_table(choices), ""]
    for found in comparison.searches:
        table = [["setting", "found", "importance"]]
        table += [[n, f"{v:.4g}", f"{100 * found.importance.get(n, 0):.0f} %"] for n, v in found.settings.items()]
        lines += [f"## What was found for {found.label}", "", *markdown_table(table), ""]
    for title, path in comparison.pictures.items():
        lines += [f"## {title}", "", f"![{title}]({path.name})", ""]
    _write(folder / REPORT, "\n".join(lines))
    page = page_of(
        comparison.rows,
        comparison.experts,
        comparison.base,
        comparison.interference,
        comparison.searches,
        charts=comparison.charts(every=True),
        intervals=comparison.intervals,
        base_interval=comparison.base_interval,
        metric=comparison.metric,
        higher_is_better=comparison.higher_is_better,
        table=[[_known(cell).replace("**", "") for cell in row] for row in _cells(comparison)],
        choices=choices,
        notes=[*comparison.how, *comparison.below_base(), sti],
    )
    _write(folder / PAGE, page)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def comparison_table(comparison: Comparison) -> list[str]:
    """Lines of a Markdown table with the experts and every method; scores that do not exist are dashes."""
    return markdown_table([list(map(_known, row)) for row in _cells(comparison)])


def _known(cell: str) -> str:
    """A cell with a dash for a score that does not exist."""
    return re.sub(r"(?<!\w)[+-]?nan(?!\w)", "–", cell)


def _in_percent(comparison: Comparison) -> bool:
    return comparison.metric == ACCURACY.name


def _cells(comparison: Comparison) -> list[list[str]]:
    """The table's text: the head, the numbers of rows, the experts, the base, and every row."""
    tasks, first = list(comparison.experts), comparison.rows[0]
    factor, digits = (100, 1) if _in_percent(comparison) else (1, 3)
    head = ["method", "α", *tasks, "average", "normalised", f"against {first.label}"]
    head += ["task found", "merge", "memory", "size"]

    def shown(by_task: Mapping[str, float]) -> list[str]:
        scores = [by_task[task] for task in tasks]
        return [f"{factor * score:.{digits}f}" for score in (*scores, sum(scores) / len(scores))]

    table = [head, ["the experts", "", *shown(comparison.experts), "100", "", "", "", "", ""]]
    if comparison.num_rows:
        table.insert(1, ["test rows", "", *(str(comparison.num_rows[task]) for task in tasks), *[""] * 7])
    if comparison.base:
        share = normalised(comparison.base, comparison.experts, comparison.higher_is_better)
        of_experts = "" if share is None else f"{100 * share:.1f}"
        table.append(["the base", "", *shown(comparison.base), of_experts, "", "", "", "", ""])
    for row in comparison.rows:
        scores = [f"{factor * score:.{digits}f}" for score in (*(row.tasks[task] for task in tasks), row.average)]
        chosen = {seed: f" ({method})" for seed, method in row.chosen.items()}
        alphas = " / ".join(f"{alpha:g}{chosen.get(seed, '')}" for seed, alpha in row.alphas.items()) or "–"
        against = "" if row is first else _difference(row)
        table.append([row.label, alphas, *scores, _normalised(row), against, *_costs(row)])
    return table


def _alpha_cells(rows: list[Row]) -> list[list[str]]:
    """The text of a table of how α was chosen, by seed, and what that cost; empty if α was not searched."""
    table: list[list[str]] = []
    seen: list[Any] = [{}]
    for row in rows:
        if row.alpha_scores in seen:  # a routed model has a second row
            continue
        seen.append(row.alpha_scores)
        for seed, scores in row.alpha_scores.items():
            models, seconds = row.choosing.get(seed, (None, 0.0))
            table.append(
                [
                    row.label + (f", seed {seed}" if len(row.alpha_scores) > 1 else ""),
                    "–" if row.alpha_default is None else f"{row.alpha_default:g}",
                    f"{row.alphas[seed]:g}" if seed in row.alphas else "–",
                    f"{max(scores, key=lambda alpha: scores[alpha]):g}",
                    str(len(scores)),
                    *(("–", "–") if models is None else (str(models), f"{seconds:.1f} s")),
                ]
            )
    head = ["method", "default α", "chosen α", "best α", "α tried", "models scored", "time"]
    return [head, *table] if table else []


def _normalised(row: Row) -> str:
    """Normalised score in percent with its interval and, if there are several, the scores of the seeds."""
    low, high = row.interval
    seeds = ", ".join(f"{100 * share:.1f}" for share in row.by_seed.values())
    seeds = f"; seeds {seeds}" if len(row.by_seed) > 1 else ""
    return f"**{100 * row.normalised:.1f}** ({100 * low:.1f} to {100 * high:.1f}{seeds})"


def _difference(row: Row) -> str:
    low, high = row.difference_interval
    return f"{100 * row.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _costs(row: Row) -> list[str]:
    """Share of rows whose task was found, time, memory and size."""
    share = sum(row.routing.values()) / len(row.routing) if row.routing else None
    routed = "" if share is None else f"{100 * share:.1f} %"
    return [routed, f"{row.seconds:.1f} s", f"{row.memory / 1e6:.0f} MB", f"{row.size / 1e6:.0f} MB"]
