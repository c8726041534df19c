"""What all pictures share: figures without a display, one colour a method, captions, files; and charts as data."""

import colorsys
import hashlib
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from ..errors import HfEsmError
from ..utils import atomic_file


# The colour of a method in every picture: Okabe and Ito's, which colour-blind readers can tell apart, for the methods
# that are compared most, and shades between them for the others.
COLOURS = {
    "mean": "#999999",
    "task-arithmetic": "#56B4E9",
    "esm": "#0072B2",
    "tsv-m": "#009E73",
    "ties": "#E69F00",
    "regmean": "#D55E00",
    "iso-cts": "#CC79A7",
    "iso-c": "#F0E442",
    "esm++": "#332288",
    "tsv-c": "#44AA99",
    "auto": "#000000",
    "dare": "#B8860B",
    "esm-roberta": "#4477AA",
    "esm-vit": "#77AADD",
    "concrete-task-arithmetic": "#882255",
    "concrete-adamerging": "#AA4499",
    "adamerging": "#DD77AA",
    "wudi": "#661100",
    "cat": "#117733",
    "knots": "#999933",
}
REFERENCE = "#222222"  # of lines that are no method


@dataclass(frozen=True)
class Style:
    """How one row is drawn: the method's colour, and what tells rows of one method apart.

    Attributes:
        colour: `#RRGGBB`.
        hatch: pattern of bars.
        line: style of lines.
    """

    colour: str
    hatch: str = ""
    line: str = "-"


def colour_of(method: str) -> str:
    """The colour of a method by its name, always the same; a name that is not listed has one made of its letters."""
    if method in COLOURS:
        return COLOURS[method]
    digest = hashlib.sha256(method.encode()).digest()
    red, green, blue = colorsys.hls_to_rgb(digest[0] / 256, 0.35 + 0.3 * digest[1] / 256, 0.65)
    return "#" + "".join(f"{round(255 * part):02X}" for part in (red, green, blue))


def styles_of(labels: Iterable[str], methods: Optional[Mapping[str, str]] = None) -> dict[str, Style]:
    """Styles by label. Rows of one method have its colour, and differ by hatching and dashes.

    Args:
        methods: name of the method by label; by default the label up to its first space or comma.
    """
    marks, seen = [("", "-"), ("///", "--"), ("...", ":"), ("xxx", "-.")], {}
    styles = {}
    for label in labels:
        method = (methods or {}).get(label) or label.replace(",", " ").split(" ")[0]
        number = seen[method] = seen.get(method, -1) + 1
        styles[label] = Style(colour_of(method), *marks[number % len(marks)])
    return styles


def spread_colours(names: Sequence[str]) -> dict[str, str]:
    """Colours of lines that are no method's, such as tasks or kinds of linear maps: hues far apart, light and dark."""
    colours = {}
    for i, name in enumerate(names):
        red, green, blue = colorsys.hls_to_rgb(i / len(names), 0.66 if i % 2 else 0.5, 0.6)
        colours[name] = "#" + "".join(f"{round(255 * part):02X}" for part in (red, green, blue))
    return colours


@dataclass
class Line:
    """A line of a chart.

    Attributes:
        label: its name.
        points: pairs of x and y, in the order of x.
        colour: `#RRGGBB`.
        dashes: style of the line, as of `Style`.
        errors: by x, the ends of the interval of y, as far as they are known.
        marked: x of a point that is marked, such as the chosen one; None for none.
        default: x of a point with a ring around it, such as that of a default; None for none.
        note: what the legend says after the label, such as the x of that point.
        thin: whether it is one of many that a thicker line is the mean of.
    """

    label: str
    points: list[tuple[float, float]]
    colour: str
    dashes: str = "-"
    errors: dict[float, tuple[float, float]] = field(default_factory=dict)
    marked: Optional[float] = None
    default: Optional[float] = None
    note: str = ""
    thin: bool = False

    @property
    def name(self) -> str:
        """The label and the note, for the legend."""
        return f"{self.label}: {self.note}" if self.note else self.label


@dataclass
class Chart:
    """Lines of numbers over numbers, as data.

    Attributes:
        title: the title.
        name: name of its file, without a suffix.
        caption: what is seen.
        xlabel, ylabel: what the axes measure, with the unit.
        lines: the lines.
        percent: whether y are shares, which are written in percent.
        log: whether the axis of x is logarithmic, to the base of 2.
    """

    title: str
    name: str
    caption: str
    xlabel: str
    ylabel: str
    lines: list[Line]
    percent: bool = True
    log: bool = False

    @property
    def steps(self) -> list[float]:
        """By how many steps each line is drawn sideways, so that no interval hides another; without intervals, 0."""
        barred = [i for i, line in enumerate(self.lines) if line.errors]
        middle = (len(barred) - 1) / 2
        return [barred.index(i) - middle if i in barred else 0.0 for i in range(len(self.lines))]


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
        new = Figure(layout="constrained", dpi=150, **options)
        FigureCanvasAgg(new)
        return new

    return figure


def plain_axes(title: str, size: tuple[float, float] = (7.0, 4.2)) -> tuple[Any, Any]:
    """A figure and its axes with a title, a grid, and no box."""
    figure = require_matplotlib()(figsize=size)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def moved_by(points: float, figure: Any) -> Any:
    """A transform that moves what is drawn to the right, by points on paper."""
    from matplotlib.transforms import ScaledTranslation

    return ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)


def in_percent(axis: Any) -> None:
    """Label the ticks of an axis of shares in percent."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def written(figure: Any, path: str | os.PathLike, caption: str) -> Path:
    """Write a figure with its caption below; the file's suffix decides the format."""
    path = Path(path)
    width = max(int(12.5 * figure.get_figwidth()), 40)
    figure.text(0.01, -0.01, textwrap.fill(caption, width), ha="left", va="top", fontsize=8, color="#444444")
    with atomic_file(path) as partial:
        figure.savefig(partial, bbox_inches="tight", pad_inches=0.15)
    return path
