"""The lines of a comparison's pictures, as data that both the pictures and the page draw."""

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Optional

import torch

from ..metrics import MOST_METHODS, REFERENCE, Chart, Line, colour_of, spread_colours, styles_of
from .figures import Figures, RoutesByBlock
from .interference import SHARES, Interference
from .summary import Row


SHARE = "score as a share of the expert's"
RANK = "rank, as a share of the smaller side"
ENERGY = "share of the output shift's energy"
DRAWS = "Bars: 95 % intervals of draws of the rows."
APART = "Lines are set a little apart sideways."


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that fit into one picture: the best ones, in their order."""
    best = sorted(rows, key=lambda row: -row.normalised)[:MOST_METHODS]
    return [row for row in rows if row in best]


def styles_of_rows(rows: Sequence[Row]) -> dict[str, Line]:
    """Return a line without points for each row, with the colour of its method, by label."""
    styles = styles_of([row.label for row in rows], {row.label: row.method["name"] for row in rows})
    return {label: Line(label, [], style.colour, style.line) for label, style in styles.items()}


def alpha_chart(rows: Sequence[Row], metric: str, higher_is_better: bool, percent: bool) -> Chart:
    """Scores by α, of the first seed. A routed model has those of its static model, which are drawn once."""
    lines, sign, seen = styles_of_rows(rows), 1 if higher_is_better else -1, []  # errors are searched as negatives
    for row in rows:
        seed, scores = next(iter(row.alpha_scores.items()), (None, {}))
        if scores in seen:
            continue
        seen.append(scores)
        line = lines[row.label]
        line.points = [(alpha, sign * score) for alpha, score in sorted(scores.items()) if isfinite(score)]
        errors = row.alpha_errors.get(seed, {})
        line.errors = {a: (y - 1.96 * errors[a], y + 1.96 * errors[a]) for a, y in line.points if a in errors}
        line.marked, line.default = row.alphas.get(seed), row.alpha_default
        line.note = "" if line.marked is None else f"α = {line.marked:g}"
    return Chart(
        title="Validation score by α",
        name="alpha",
        caption="Lines: scores that α was chosen by. Bars: 1.96 standard errors, from draws of the rows. Large marks: "
        f"the chosen α, as in the table. Rings: the default. {APART}",
        xlabel="α, the scale of the merged update",
        ylabel=f"{metric} on validation rows",
        lines=[line for line in lines.values() if line.points],
        percent=percent,
    )


def energy_chart(interference: Interference) -> Chart:
    """Energy that essential directions keep, and that singular ones do, by rank."""
    colours, possible = {"essential": colour_of("esm"), "singular": colour_of("tsv-m")}, _possible(interference)
    return Chart(
        title="Energy of the output shift kept, by rank",
        name="energy",
        caption="The share of the output shift's energy that the leading directions carry, mean over linear maps and "
        "tasks.",
        xlabel=RANK,
        ylabel="energy kept",
        lines=[
            Line(f"{kind} directions", [point for point in points if point[0] in possible], colours[kind])
            for kind, points in interference.energy().items()
        ],
        log=True,
    )


def _possible(interference: Interference) -> list[float]:
    """Return those of `SHARES` that are one direction or more in the widest linear map."""
    widest = max((layer.ranks[-1] for layer in interference.layers), default=0)
    return [share for share in SHARES if share * widest >= 1]


def layers_chart(interference: Interference) -> Chart:
    """STI by kind of linear map, over the blocks."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for layer in interference.layers:
        if block := re.search(r"\.(\d+)\.", layer.name):
            kind = layer.name[block.end() :].removesuffix(".weight")
            kinds.setdefault(kind, []).append((int(block[1]), layer.sti))
    colours = spread_colours(list(kinds))
    return Chart(
        title="Interference between the tasks, by block",
        name="layers",
        caption="Singular task interference (STI) of the experts' updates before the merge, a line for each linear "
        "map of a block; 0 where the tasks' singular vectors are orthogonal.",
        xlabel="block of the model",
        ylabel="STI (no unit)",
        lines=[Line(kind, sorted(points), colours[kind]) for kind, points in kinds.items()],
        percent=False,
    )


def figure_charts(figures: Figures, rows: Sequence[Row], interference: Interference) -> list[Chart]:
    """Charts of what is measured for `pictures="all"` alone, without those that have nothing to show."""
    charts = [_spectra(figures, rows, interference), _ranks(figures)]
    deciding = [row for row in rows if row.label in figures.blocks]
    charts += [_blocks(figures.blocks[row.label], row, number) for number, row in enumerate(deciding)]
    charts.append(_counts(figures, rows))
    return [chart for chart in charts if chart is not None]


def _spectra(figures: Figures, rows: Sequence[Row], interference: Interference) -> Optional[Chart]:
    before = [values for layer in interference.layers for values in layer.essential_energy.values()]
    lines, possible = styles_of_rows(rows), _possible(interference)
    for label in figures.spectra.keys() & lines.keys():
        lines[label].points, lines[label].errors = _spread(list(figures.spectra[label].values()), possible)
    if not before or not figures.spectra:
        return None
    points, errors = _spread(before, possible)
    experts = Line("the experts, before", points, REFERENCE, "--", errors)
    return Chart(
        title="Energy spectra before and after merging",
        name="spectra",
        caption="The share of the energy of the output shift XΔᵀ that its own leading directions carry: before, of "
        "each expert's update on its own inputs; after, of the merged update on the inputs of all tasks. Lines: means "
        "over linear maps. Bars: from the 10th to the 90th percentile of the maps. A lower line spreads its energy "
        f"over more directions. {APART}",
        xlabel=RANK,
        ylabel=ENERGY,
        lines=[experts, *(line for line in lines.values() if line.points)],
        log=True,
    )


def _spread(
    values: list[list[float]], shown: list[float]
) -> tuple[list[tuple[float, float]], dict[float, tuple[float, float]]]:
    """Return the mean over maps at the last of `SHARES`, which are shown, and the 10th and 90th percentiles there."""
    table = torch.tensor(values, dtype=torch.float64)[:, len(SHARES) - len(shown) :]
    ends = table.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64), dim=0).T.tolist()
    errors = {share: (low, high) for share, (low, high) in zip(shown, ends, strict=True)}
    return list(zip(shown, table.mean(0).tolist(), strict=True)), errors


def _of_rows(rows: Mapping[int, Row]) -> tuple[list[tuple[float, float]], dict[float, tuple[float, float]]]:
    """Return the share of the experts' scores by what the rows differ in, with its intervals."""
    known = {x: row for x, row in sorted(rows.items()) if isfinite(row.normalised)}
    errors = {float(x): row.interval for x, row in known.items() if all(map(isfinite, row.interval))}
    return [(float(x), row.normalised) for x, row in known.items()], errors


def _ranks(figures: Figures) -> Optional[Chart]:
    points, errors = _of_rows(figures.ranks)
    if len(points) < 2:
        return None
    tasks = list(figures.experts)
    lines = [
        Line(task, [(x, figures.share(task, figures.ranks[int(x)].tasks[task])) for x, _ in points], colour, thin=True)
        for task, colour in spread_colours(tasks).items()
    ]
    return Chart(
        title="Score of compressed experts by rank (TSV-C)",
        name="ranks",
        caption="Experts compressed to the leading singular triplets of their updates, each on its own task. Thin "
        f"lines: tasks. Thick line: the mean. {DRAWS}",
        xlabel="rank of each expert, singular triplets per linear map",
        ylabel=SHARE,
        lines=[*lines, Line("mean over tasks", points, colour_of("tsv-c"), errors=errors)],
        log=True,
    )


def _blocks(found: RoutesByBlock, row: Row, number: int) -> Optional[Chart]:
    if not found.shares:
        return None
    lines = []
    colours = spread_colours(list(found.rows))
    for tower, by_task in found.shares.items():
        name = f" ({tower})" if tower else ""
        mean = [sum(shares) / len(shares) for shares in zip(*by_task.values(), strict=True)]
        lines += [
            Line(task + name, list(enumerate(shares)), colours[task], thin=True) for task, shares in by_task.items()
        ]
        errors = {float(k): (y - e, y + e) for k, (y, e) in enumerate(zip(mean, found.errors(tower), strict=True))}
        colour = colour_of(row.method["name"])
        mark = found.decides_after.get(tower)
        note = "" if mark is None else f"decides after {mark} blocks"
        line = Line(f"mean over tasks{name}", list(enumerate(mean)), colour, errors=errors, marked=mark, note=note)
        lines.append(line)
    return Chart(
        title=f"Rows whose task {row.label} would find, by block",
        name=f"blocks-{number}",
        caption="The share of a task's test rows that the router would send to the task, if it decided after that "
        "many blocks. Thin lines: tasks. Thick line: the mean. Bars: 1.96 standard errors over rows. Large mark: "
        "where this model decides; a router that decides in every layer has none.",
        xlabel="blocks that run before the decision",
        ylabel="task found, share of the rows",
        lines=lines,
    )


def _counts(figures: Figures, rows: Sequence[Row]) -> Optional[Chart]:
    lines = styles_of_rows(rows)
    for label in figures.counts.keys() & lines.keys():
        lines[label].points, lines[label].errors = _of_rows(figures.counts[label])
    drawn = [line for line in lines.values() if len(line.points) > 1]
    if not drawn:
        return None
    return Chart(
        title="Score by the number of merged tasks",
        name="counts",
        caption=f"Merges of the first tasks, in the order {', '.join(figures.experts)}; mean over the tasks of the "
        f"merge. {DRAWS} {APART}",
        xlabel="number of tasks merged",
        ylabel=SHARE,
        lines=drawn,
    )
