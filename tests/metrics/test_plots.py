"""Pictures: titles, units, captions, colours, and marks where the numbers say."""

import numpy as np
import pytest

from hf_esm.metrics import drawing, plots
from hf_esm.metrics.drawing import COLOURS, colour_of, styles_of


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
CURVES = {"esm": {0.1: 0.5, 0.8: 0.9, 1.0: 0.89}, "ties": {0.1: 0.4, 1.0: 0.6}}
KEPT = {"esm": (0.9, 0.8, 0.95), "mean": (0.7, 0.6, 0.8)}
DRAW = {
    "scores": lambda path: plots.plot_task_scores(SCORES, {"a": 0.9, "b": 0.8}, path, "Title", intervals=INTERVALS),
    "kept": lambda path: plots.plot_kept_shares(KEPT, path, "Title", base=0.5),
    "alpha": lambda path: plots.plot_alpha_curves(CURVES, path, "Title", "score", chosen={"esm": 1.0, "ties": 0.1}),
    "energy": lambda path: plots.plot_energy({"essential": [(0.1, 0.5), (1.0, 1.0)]}, path, "Title"),
    "bars": lambda path: plots.plot_bars({"gamma": 0.8, "rank": 0.2}, path, "Title", "importance", "What mattered."),
    "matrix": lambda path: plots.plot_matrix([[1.0, 0.2], [0.3, 1.0]], ["a", "b"], path, "Title", "taken for", "of"),
    "curves": lambda path: plots.plot_curves(
        {"query": [(0, 1.5), (1, 2.0)]}, path, "Title", xlabel="block", ylabel="STI", caption="By block.", shares=False
    ),
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
    marks = [line.get_xydata().tolist() for line in drawn[-1].axes[0].lines if line.get_marker() == "o"]
    assert marks == [[[1.0, 0.89]], [[0.1, 0.4]]]


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
