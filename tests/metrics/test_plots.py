"""Pictures: titles, units, captions, colours, and marks where the numbers say."""

from dataclasses import replace

import numpy as np
import pytest

from hf_esm.metrics import drawing, plots
from hf_esm.metrics.drawing import COLOURS, Chart, Line, colour_of, spread_colours, styles_of


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The last figure that was written."""
    figures = []
    write = drawing.written

    def watched(figure, path, caption):
        figures.append(figure)
        return write(figure, path, caption)

    monkeypatch.setattr(plots, "written", watched)
    return figures


SCORES = {"mean": {"a": 0.5, "b": 0.25}, "esm (gamma 0.2)": {"a": 0.75, "b": 0.5}, "mine": {"a": 0.6, "b": 0.4}}
INTERVALS = {label: {t: (s - 0.1, s + 0.2) for t, s in by_task.items()} for label, by_task in SCORES.items()}
ESM = Line("esm", [(0.1, 0.5), (0.8, 0.9), (1.0, 0.89)], colour_of("esm"), errors={0.8: (0.7, 1.1)}, marked=1.0)
TIES = Line("ties", [(0.1, 0.4), (1.0, 0.6)], colour_of("ties"), errors={0.1: (0.3, 0.6)}, marked=0.1, note="α = 0.1")
CHART = Chart("Title", "alpha", "Scores by α.", "α", "score", [ESM, TIES], percent=False)
KEPT = {"esm": (0.9, 0.8, 0.95), "mean": (0.7, 0.6, 0.8)}
DRAW = {
    "scores": lambda path: plots.plot_task_scores(SCORES, {"a": 0.9, "b": 0.8}, path, "Title", intervals=INTERVALS),
    "kept": lambda path: plots.plot_kept_shares(KEPT, path, "Title", base=0.5),
    "alpha": lambda path: plots.plot_chart(CHART, path),
    "log": lambda path: plots.plot_chart(replace(CHART, percent=True, log=True), path),
    "bars": lambda path: plots.plot_bars({"gamma": 0.8, "rank": 0.2}, path, "Title", "importance", "What mattered."),
    "matrix": lambda path: plots.plot_matrix([[1.0, 0.2], [0.3, 1.0]], ["a", "b"], path, "Title", "taken for", "of"),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAW)
def test_every_picture_has_a_title_a_caption_and_labels_on_both_axes(name, drawn, tmp_path):
    path = DRAW[name](tmp_path / f"{name}.png")
    (axes,) = drawn[-1].axes
    assert path.is_file()
    assert "Title" in (axes.get_title(loc="left"), drawn[-1].get_suptitle())
    assert axes.get_xlabel() and axes.get_ylabel()
    (caption,) = [text.get_text() for text in drawn[-1].texts if text.get_fontsize() == 8]
    assert caption.endswith(".")


def test_the_mark_of_a_curve_is_at_the_chosen_alpha_not_at_the_best(drawn, tmp_path):
    DRAW["alpha"](tmp_path / "a.png")
    axes = drawn[-1].axes[0]
    marks = [line.get_xydata().tolist() for line in axes.lines if line.get_markeredgecolor() == "black"]
    assert marks == [[[1.0, 0.89]], [[0.1, 0.4]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["esm", "ties: α = 0.1"]


def test_intervals_of_lines_are_where_the_numbers_say_and_none_hides_another(drawn, tmp_path):
    DRAW["alpha"](tmp_path / "a.png")
    axes = drawn[-1].axes[0]
    bars = [line for line in axes.lines if line.get_marker() == "_"]
    assert [bar.get_xydata().tolist() for bar in bars] == [[[0.8, 0.7], [0.8, 1.1]], [[0.1, 0.3], [0.1, 0.6]]]
    assert axes.get_ylim()[1] > 1.1
    at = [bar.get_transform().transform((0.5, 0.5))[0] for bar in bars]
    assert at[1] - at[0] == pytest.approx(plots.SIDEWAYS / 72 * drawn[-1].dpi)
    assert replace(CHART, lines=[replace(ESM, errors={}), TIES, ESM]).steps == [0, -0.5, 0.5]


def test_the_interval_of_the_base_is_a_band(drawn, tmp_path):
    plots.plot_kept_shares(KEPT, tmp_path / "a.png", "Title", base=0.5, base_interval=(0.4, 0.65))
    (band,) = drawn[-1].axes[0].patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((0.4, 0.65))


def test_bars_and_their_intervals_are_where_the_numbers_say(drawn, tmp_path):
    DRAW["scores"](tmp_path / "a.png")
    axes = drawn[-1].axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers if hasattr(bars[0], "get_height")]
    assert heights == [pytest.approx([*s.values(), sum(s.values()) / 2]) for s in SCORES.values()]
    ends = np.concatenate([c.get_segments() for c in axes.collections if len(c.get_segments()) == 1])
    spans = {(round(float(low), 6), round(float(high), 6)) for (_, low), (_, high) in ends}
    assert spans == {(round(s - 0.1, 6), round(s + 0.2, 6)) for by_task in SCORES.values() for s in by_task.values()}


def test_the_interval_of_a_reference_is_a_band(drawn, tmp_path):
    known = {"a": (0.7, 0.95), "b": (float("nan"), float("nan"))}
    plots.plot_task_scores(SCORES, {"a": 0.9, "b": 0.8}, tmp_path / "a.png", "Title", reference_intervals=known)
    (band,) = [part for part in drawn[-1].axes[0].collections if type(part).__name__ != "LineCollection"]
    assert sorted(set(band.get_paths()[0].vertices[:, 1].tolist())) == [0.7, 0.95]


def test_a_method_has_one_colour_in_every_picture(drawn, tmp_path):
    DRAW["alpha"](tmp_path / "a.png")
    assert drawn[-1].axes[0].lines[0].get_color() == colour_of("esm") == COLOURS["esm"]
    tasks = spread_colours([f"task {i}" for i in range(20)])
    assert len(set(tasks.values()) | set(COLOURS.values())) == 20 + len(COLOURS)
    DRAW["kept"](tmp_path / "b.png")
    assert drawn[-1].axes[0].lines[0].get_color() == colour_of("esm")
    outsiders = {colour_of(f"mine-{i}") for i in range(20)}
    assert len(outsiders) > 15 and colour_of("mine-3") == colour_of("mine-3")
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_rows_of_one_method_differ_by_pattern_alone():
    styles = styles_of(["esm", "esm (gamma 0.2)", "routed", "routed, tasks given"], {"routed": "esm++"})
    assert styles["esm"].colour == styles["esm (gamma 0.2)"].colour == colour_of("esm")
    assert (
        styles["esm"].hatch != styles["esm (gamma 0.2)"].hatch and styles["esm"].line != styles["esm (gamma 0.2)"].line
    )
    assert styles["routed"].colour == colour_of("esm++")
