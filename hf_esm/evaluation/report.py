"""The report of a comparison: one line per method with intervals, as data, as Markdown, and in pictures."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from ..errors import HfEsmError
from ..methods import MergeMethod, describe_method
from ..metrics import (
    ACCURACY,
    COLOURS,
    Outcome,
    normalised,
    plot_alpha_curves,
    plot_energy,
    plot_matrix,
    plot_task_scores,
)
from ..version import __version__
from .interference import Interference


DRAWS = 1000  # of the bootstrap


REPORT, DATA = "report.md", "report.json"


@dataclass
class Cell:
    """One method with one choice of proxies, merged and measured.

    Attributes:
        alpha: scale of the merged update.
        alpha_scores: mean validation score by α, if it was searched.
        outcomes: by task, what the merged model put out on the test rows.
        given: the same with each task's expert forced, of a model with experts and a router.
        seconds: time by stage of the merge.
        memory: growth of the process's resident memory while merging, in bytes.
        size: of the weights written, in bytes: the static model, experts, heads.
    """

    alpha: float
    alpha_scores: dict[float, float]
    outcomes: dict[str, Outcome]
    given: dict[str, Outcome]
    seconds: dict[str, float]
    memory: int
    size: int


@dataclass
class Row:
    """One method's line of the report. Shares are in [0, 1]; intervals hold 95 % of a bootstrap over test rows.

    Attributes:
        label: name of the setting.
        method: its settings.
        alphas: by seed of the proxies.
        tasks: score by task, mean over seeds.
        average: mean over tasks.
        normalised: mean over tasks of the score divided by the expert's, with its interval.
        interval: of `normalised`.
        difference: of `normalised` from that of the first row, with its interval; the draws are the same for both.
        difference_interval: of `difference`.
        by_seed: `normalised` by seed of the proxies.
        routing: share of rows whose task was found, by task.
        confusion: `[T, T]`, share of a task's rows (first index) that was taken for a task.
        alpha_scores: by seed, the mean validation score by α.
        seconds: to merge, calibration and search for α included; mean over seeds.
        memory: see `Cell`; the largest over seeds.
        size: see `Cell`.
    """

    label: str
    method: dict[str, Any]
    alphas: dict[int, float]
    tasks: dict[str, float]
    average: float
    normalised: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    by_seed: dict[int, float]
    routing: dict[str, float]
    confusion: list[list[float]]
    alpha_scores: dict[int, dict[float, float]]
    seconds: float
    memory: int
    size: int


@dataclass
class Comparison:
    """The outcome of `compare`. `print` it, or look into `report.md`, `report.json` and the pictures.

    Attributes:
        rows: one per method, and one more per method with a router, with the tasks given.
        experts: score of each task's own expert.
        metric: name of the metric.
        how: how α was chosen, on what was measured, in sentences.
        interference: between the experts.
        pictures: files by what they show.
    """

    rows: list[Row]
    experts: dict[str, float]
    metric: str
    how: list[str]
    interference: Interference
    pictures: dict[str, Path] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "hf_esm_version": __version__,
            "metric": self.metric,
            "experts": self.experts,
            "how": self.how,
            "rows": [_without_nan(asdict(row)) for row in self.rows],
            "interference": self.interference.as_dict(),
        }

    def __str__(self) -> str:
        return plain_table(self)


def summarise(
    methods: Mapping[str, MergeMethod], cells: Mapping[str, Mapping[int, Cell]], experts: Mapping[str, Outcome]
) -> list[Row]:
    """Every method's line, with intervals from the same draws of test rows."""
    tasks = list(experts)
    generator = torch.Generator().manual_seed(0)
    draws = {t: torch.randint(n, (DRAWS, n), generator=generator) for t, n in _lengths(experts).items()}
    better = next(iter(experts.values())).metric.higher_is_better
    expert_scores = {task: experts[task].score for task in tasks}
    expert_draws = {task: experts[task].scores_of_draws(draws[task]) for task in tasks}
    rows: list[Row] = []
    first: Optional[tuple[float, Tensor]] = None
    for label, method in methods.items():
        for given in (False, True):
            found = {seed: (cell.given if given else cell.outcomes) for seed, cell in cells[label].items()}
            if not all(found.values()):
                continue
            by_seed = {
                seed: normalised({t: found[seed][t].score for t in tasks}, expert_scores, better) for seed in found
            }
            by_seed = {seed: float("nan") if share is None else share for seed, share in by_seed.items()}
            drawn = torch.stack([_normalised_draws(found[s], draws, expert_draws, better) for s in found]).mean(0)
            value = sum(by_seed.values()) / len(by_seed)
            first = first or (value, drawn)
            scores = {task: sum(found[seed][task].score for seed in found) / len(found) for task in tasks}
            confusion = [] if given else _confusion(found, tasks)
            some = cells[label]
            rows.append(
                Row(
                    label=f"{label}, tasks given" if given else label,
                    method=describe_method(method),
                    alphas={seed: cell.alpha for seed, cell in some.items()} if method.tunable else {},
                    tasks=scores,
                    average=sum(scores.values()) / len(scores),
                    normalised=value,
                    interval=_interval(drawn),
                    difference=value - first[0],
                    difference_interval=_interval(drawn - first[1]),
                    by_seed=by_seed,
                    routing={task: confusion[i][i] for i, task in enumerate(tasks)} if confusion else {},
                    confusion=confusion,
                    alpha_scores={seed: cell.alpha_scores for seed, cell in some.items() if cell.alpha_scores},
                    seconds=sum(sum(cell.seconds.values()) for cell in some.values()) / len(some),
                    memory=max(cell.memory for cell in some.values()),
                    size=max(cell.size for cell in some.values()),
                )
            )
    return rows


def _lengths(outcomes: Mapping[str, Outcome]) -> dict[str, int]:
    return {task: len(found.labels) for task, found in outcomes.items()}


def _normalised_draws(
    outcomes: Mapping[str, Outcome], draws: Mapping[str, Tensor], experts: Mapping[str, Tensor], better: bool
) -> Tensor:
    parts = []
    for task, expert in experts.items():
        drawn = outcomes[task].scores_of_draws(draws[task])
        parts.append(drawn / expert if better else expert / drawn)
    return torch.stack(parts).mean(0)


def _interval(drawn: Tensor) -> tuple[float, float]:
    """Of the draws that have a score: not those on which an expert that it is divided by has none."""
    drawn = torch.where(drawn.isfinite(), drawn, torch.nan)
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _confusion(found: Mapping[int, Mapping[str, Outcome]], tasks: list[str]) -> list[list[float]]:
    """Which task each task's rows were taken for, mean over seeds; empty without a router."""
    if not all(outcome.routed_to for outcomes in found.values() for outcome in outcomes.values()):
        return []
    return [
        [
            sum(found[seed][task].routed_to.count(other) / len(found[seed][task].routed_to) for seed in found)
            / len(found)
            for other in tasks
        ]
        for task in tasks
    ]


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write `report.md`, `report.json` and, where matplotlib is installed, the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("routing-*.png"):  # there may have been more
        earlier.unlink()
    try:
        comparison.pictures = _draw(comparison, folder)
    except HfEsmError as error:  # no matplotlib
        comparison.how.append(f"No pictures: {error}")
    (folder / DATA).write_text(json.dumps(comparison.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["# Merge methods compared", "", *markdown_table(comparison), "", *comparison.how, ""]
    sti = comparison.interference.sti
    lines += [f"Singular task interference (STI) between the experts: {sti:.3g}, mean over linear maps.", ""]
    for title, path in comparison.pictures.items():
        lines += [f"## {title}", "", f"![{title}]({path.name})", ""]
    (folder / REPORT).write_text("\n".join(lines), encoding="utf-8")


def _without_nan(found: Any) -> Any:
    """With None for scores that there are none of, which JSON has no number for."""
    if isinstance(found, dict):
        return {key: _without_nan(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_without_nan(value) for value in found]
    return None if isinstance(found, float) and not isfinite(found) else found


def _percent(comparison: Comparison) -> bool:
    return comparison.metric == ACCURACY.name


def _cells(comparison: Comparison) -> list[list[str]]:
    """The table's text: head, the experts, and every row."""
    factor, digits = (100, 1) if _percent(comparison) else (1, 3)
    tasks = list(comparison.experts)
    head = ["method", "α", *tasks, "average", "normalised", f"against {comparison.rows[0].label}"]
    head += ["task found", "merge", "memory", "size"]
    average = sum(comparison.experts.values()) / len(tasks)
    best = [f"{factor * comparison.experts[task]:.{digits}f}" for task in tasks]
    table = [head, ["the experts", "", *best, f"{factor * average:.{digits}f}", "100", "", "", "", "", ""]]
    for row in comparison.rows:
        low, high = row.interval
        line = [row.label, " / ".join(f"{alpha:g}" for alpha in row.alphas.values()) or "–"]
        line += [f"{factor * row.tasks[task]:.{digits}f}" for task in tasks]
        line.append(f"{factor * row.average:.{digits}f}")
        seeds = ", ".join(f"{100 * value:.1f}" for value in row.by_seed.values()) if len(row.by_seed) > 1 else ""
        seeds = f"; seeds {seeds}" if seeds else ""
        line.append(f"**{100 * row.normalised:.1f}** ({100 * low:.1f} to {100 * high:.1f}{seeds})")
        low, high = row.difference_interval
        against = f"{100 * row.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        line.append("" if row is comparison.rows[0] else against)
        found = sum(row.routing.values()) / len(row.routing) if row.routing else None
        line.append("" if found is None else f"{100 * found:.1f} %")
        line += [f"{row.seconds:.1f} s", f"{row.memory / 1e6:.0f} MB", f"{row.size / 1e6:.0f} MB"]
        table.append(line)
    return table


def markdown_table(comparison: Comparison) -> list[str]:
    """One line per method."""
    head, *lines = _cells(comparison)
    return [_line(head), _line(["---", *["--:"] * (len(head) - 1)]), *map(_line, lines)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(re.sub(r"(?<!\w)[+-]?nan(?!\w)", "–", cell.replace("|", r"\|")) for cell in cells) + " |"


def plain_table(comparison: Comparison) -> str:
    """The same for a terminal."""
    table = [[cell.replace("**", "") for cell in line] for line in _cells(comparison)]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths)))
        for line in table
    ]
    return "\n".join([*lines, "", *comparison.how])


def _draw(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """The pictures, by their titles. Of more methods than there are colours, the best are drawn."""
    found: dict[str, Path] = {}
    best = sorted(comparison.rows, key=lambda row: -row.normalised)[: len(COLOURS)]
    shown = [row for row in comparison.rows if row in best]
    if _percent(comparison):
        title = "Score by task"
        bars = {row.label: row.tasks for row in shown}
        found[title] = plot_task_scores(bars, comparison.experts, folder / "scores.png", title)
    curves: dict[str, dict[float, float]] = {}
    for row in shown:
        found_scores = next(iter(row.alpha_scores.values()), None)
        if found_scores and found_scores not in curves.values():  # a routed model's are those of its static one
            curves[row.label] = found_scores
    if curves:
        title = "Validation score by α"
        found[title] = plot_alpha_curves(curves, folder / "alpha.png", title, comparison.metric)
    if energy := comparison.interference.energy():
        title = "Energy of the output shift kept, by rank"
        found[title] = plot_energy(energy, folder / "energy.png", title)
    tasks = list(comparison.experts)
    title = "Overlap of the tasks' subspaces"
    overlap = comparison.interference.overlap
    found[title] = plot_matrix(overlap, tasks, folder / "interference.png", title, "task", "task")
    for number, row in enumerate(row for row in comparison.rows if row.confusion):
        title = f"Where {row.label} sends the rows of each task"
        path = folder / f"routing-{number}.png"
        found[title] = plot_matrix(row.confusion, tasks, path, title, "taken for", "rows of")
    return found
