"""The demo at a small scale, and the pictures."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification

from hf_esm import HfEsmError, load_task_model
from hf_esm.cli import demo
from hf_esm.cli.demo import BASE, EXPERTS, reload_difference, run_demo
from hf_esm.cli.digits import TASKS, DemoSettings, load_digit_data
from hf_esm.metrics.drawing import colour_of
from hf_esm.metrics.plots import MOST_METHODS, plot_task_scores
from hf_esm.metrics.scores import accuracy
from support.processes import run_script


pytestmark = pytest.mark.slow


SMALL = DemoSettings(
    base_steps=60, expert_steps=25, train_size=300, validation_size=100, test_size=150, width=32, layers=2
)
TINY = DemoSettings(
    ("esm", "mean"), 12, 4, train_size=60, validation_size=20, test_size=60, num_samples=8, width=16, layers=1
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A finished demo: its folder, what it returned, what it said."""
    folder, said = tmp_path_factory.mktemp("demo") / "out", []
    random_state, verbosity = torch.get_rng_state(), transformers.logging.get_verbosity()
    results = run_demo(folder, seed=3, settings=SMALL, say=said.append)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert transformers.logging.get_verbosity() == verbosity
    assert transformers.logging.is_progress_bar_enabled()
    return folder, results, "\n".join(said)


def test_files_are_ordinary_checkpoints_and_results(ran):
    folder, results, _ = ran
    assert sorted(path.name for path in folder.iterdir()) == [
        "base",
        "experts",
        "merged",
        "results.json",
        "routed",
        "scores.png",
    ]
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["settings"]["width"] == 32 and results["seconds"] > 0
    assert results["splits"] == {"train": 300, "validation": 100, "test": 150}
    for task in TASKS:
        expert = AutoModelForImageClassification.from_pretrained(folder / "experts" / task.name)
        assert tuple(expert.config.id2label.values()) == task.labels
    assert_picture(folder / "scores.png")


def test_table_is_what_the_results_say(ran):
    _, results, said = ran
    columns = [*(task.name for task in TASKS), "average", "normalised"]
    header = next(line for line in said.splitlines() if line.startswith("test accuracy in %"))
    assert header.removeprefix("test accuracy in %").split() == [*columns, "alpha", "merge", "search"]
    for name, row in results["scores"].items():
        line = next(line for line in said.splitlines() if line.startswith(f"{name} ") and "%" not in line)
        shown = [float(cell) for cell in line.removeprefix(name).split()[: len(columns)]]
        experts = results["scores"][EXPERTS]["model"]
        scores = [row["model"][task.name] for task in TASKS]
        wanted = [*scores, np.mean(scores), np.mean([row["model"][task] / experts[task] for task in experts])]
        assert shown == pytest.approx([100 * value for value in wanted], abs=0.051)
        if name in results["merges"] and results["merges"][name]["alpha_scores"]:
            assert float(line.split()[len(columns) + 1]) == results["merges"][name]["alpha"]
    assert results["scores"][EXPERTS]["normalised"] == 1


def test_scores_are_those_of_the_models_in_the_folder(ran):
    folder, results, _ = ran
    data = load_digit_data(SMALL, seed=3)
    alpha = results["merges"]["esm"]["alpha"]
    validation = []
    for task in TASKS:
        expert = AutoModelForImageClassification.from_pretrained(folder / "experts" / task.name).eval()
        merged = load_task_model(folder / "merged", task.name)
        test = data.encoded(task, "test", expert.config)
        assert accuracy(expert, test) == pytest.approx(results["scores"][EXPERTS]["model"][task.name])
        assert accuracy(merged, test) == pytest.approx(results["scores"]["esm"]["model"][task.name])
        base = AutoModelForImageClassification.from_pretrained(folder / "base").eval()
        base.classifier = expert.classifier
        assert accuracy(base, test) == pytest.approx(results["scores"][BASE]["model"][task.name])
        validation.append(accuracy(merged, data.encoded(task, "validation", expert.config)))
    # The α was chosen on models in memory: those on disk have the very score that it was chosen by.
    scores = results["merges"]["esm"]["alpha_scores"]
    assert np.mean(validation) == pytest.approx(scores[str(alpha)])


def test_reload_answers_as_body_and_head_put_together_by_hand(ran):
    folder, results, said = ran
    assert results["reload"] == {"max_logit_difference": pytest.approx(0, abs=1e-6), "pictures": 5 * 150}
    assert "on 750 test pictures" in said and "differ in no logit by more than" in said
    data = load_digit_data(SMALL, seed=3)
    body = AutoModel.from_pretrained(folder / "merged", add_pooling_layer=False).eval()
    for task in TASKS:
        head = load_file(folder / "experts" / task.name / "model.safetensors")
        model = load_task_model(folder / "merged", task.name)
        pixels = torch.stack([s["pixel_values"] for s in data.encoded(task, "test", model.config).samples[:20]])
        with torch.no_grad():
            states = body(pixel_values=pixels).last_hidden_state[:, 0]
            by_hand = states @ head["classifier.weight"].T + head["classifier.bias"]
            assert (model(pixel_values=pixels).logits - by_hand).abs().max() < 1e-5


def test_reload_difference_sees_a_head_that_is_not_the_experts(ran, tmp_path):
    folder, _, _ = ran
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("base", "experts"):
        (copy / name).symlink_to(folder / name)
    for path in (folder / "merged").rglob("*"):
        if path.is_file():
            target = copy / "merged" / path.relative_to(folder / "merged")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    data = load_digit_data(SMALL, seed=3)
    assert reload_difference(copy, data) < 1e-5
    file = copy / "merged" / "heads" / "loops" / "head.safetensors"
    head = load_file(file)
    head["classifier.bias"] += 0.5
    save_file(head, file, {"format": "pt"})
    assert reload_difference(copy, data) == pytest.approx(0.5, abs=1e-3)


def test_an_answer_that_differs_is_an_error(tmp_path, monkeypatch):
    settings = replace(TINY, methods=("esm",))
    monkeypatch.setattr(demo, "reload_difference", lambda output, data: 0.1)
    with pytest.raises(HfEsmError, match="logits of the reloaded model differ"):
        run_demo(tmp_path / "out", settings=settings, say=lambda line: None)


def test_the_same_seed_gives_the_same_scores_and_replaces_the_folder(tmp_path, capfd):
    first = run_demo(tmp_path / "out", seed=1, settings=TINY)
    printed = capfd.readouterr()
    torch.manual_seed(99)
    again = run_demo(tmp_path / "out", seed=1, settings=TINY, say=lambda line: None)
    other = run_demo(tmp_path / "other", seed=2, settings=TINY, say=lambda line: None)
    assert again["scores"] == first["scores"]
    assert other["scores"] != first["scores"]
    # Nothing but the demo's own lines: no bars, no reports of libraries.
    assert "\nesm " in printed.out and "Loading weights" not in printed.out
    assert not printed.err and not any(capfd.readouterr())


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(HfEsmError, match="not from a demo"):
        run_demo(tmp_path, settings=SMALL)
    assert (tmp_path / "results.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("missing", ["matplotlib.figure", "sklearn.datasets"])
def test_a_missing_package_is_named_before_anything_is_done(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(HfEsmError, match=r"pip install hf_esm\[demo\]"):
        run_demo(tmp_path / "out", settings=SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DemoSettings(methods=("esm", "magic")), "methods must be among"),
        (DemoSettings(methods=("mean",)), "with 'esm'"),
        (DemoSettings(train_size=1700, validation_size=97, test_size=1), "There are 1797 digits"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, message):
    with pytest.raises(HfEsmError, match=message):
        run_demo(tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


def test_task_views_and_classes():
    picture = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    views = {task.name: task.view(picture)[0] for task in TASKS}
    assert (views["parity"] == picture[0]).all()
    assert (views["loops"] == np.fliplr(picture[0])).all()
    assert (views["negative"] == 255 - picture[0]).all()
    assert (views["rotated"] == np.rot90(picture[0])).all()

    def patches(view):
        return [tuple(view[i : i + 2, j : j + 2].ravel()) for i in range(0, 8, 2) for j in range(0, 8, 2)]

    assert sorted(patches(views["shuffled"])) == sorted(patches(picture[0]))
    assert sum(new == old for new, old in zip(patches(views["shuffled"]), patches(picture[0]))) < 4
    labels = {task.name: [task.labels[i] for i in task.classes(np.arange(10))] for task in TASKS}
    assert labels["parity"] == ["even", "odd"] * 5
    assert [digit for digit, label in enumerate(labels["loops"]) if label == "closed"] == [0, 6, 8, 9]
    assert labels["rotated"][3] == "three"


SCORES = {"mean": {"a": 0.5, "b": 0.02}, "esm": {"b": 0.9, "a": 0.99}}
REFERENCE = {"a": 0.97, "b": 0.95}


def test_picture_has_a_bar_for_every_score(tmp_path):
    few = assert_picture(plot_task_scores(SCORES, REFERENCE, tmp_path / "new" / "few.png", "Two methods"))
    mean, esm = (bar_heights(few, colour) for colour in map(colour_of, ("mean", "esm")))
    unit = esm[1] / 0.9
    assert esm == pytest.approx(
        [0.99 * unit, 0.9 * unit, 0.945 * unit], abs=6
    )  # 6 pixels: 1 %, the line of the reference
    assert mean == pytest.approx([0.5 * unit, 0.02 * unit, 0.26 * unit], abs=6)
    tasks = [f"task{i}" for i in range(12)]
    many = {f"method{i}": dict.fromkeys(tasks, 0.5) for i in range(MOST_METHODS)}
    wide = assert_picture(plot_task_scores(many, dict.fromkeys(tasks, 0.9), tmp_path / "many.png", "Many"))
    assert wide.shape[1] > few.shape[1]
    assert (tmp_path / "few.svg") == plot_task_scores(SCORES, REFERENCE, tmp_path / "few.svg", "Vectors")
    assert (tmp_path / "few.svg").read_text().startswith("<?xml")


def test_picture_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys; from hf_esm.metrics.plots import plot_task_scores; assert 'matplotlib' not in sys.modules;"
        f"plot_task_scores({SCORES}, {REFERENCE}, {str(tmp_path / 'a.png')!r}, 'Title');"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    ran = run_script(code)
    assert ran.returncode == 0, ran.output


def test_picture_errors_are_plain(tmp_path, monkeypatch):
    with pytest.raises(HfEsmError, match="nothing to draw"):
        plot_task_scores({}, REFERENCE, tmp_path / "a.png", "Title")
    with pytest.raises(HfEsmError, match="'mean' has no score for the task 'c'"):
        plot_task_scores(SCORES, {**REFERENCE, "c": 1.0}, tmp_path / "a.png", "Title")
    with pytest.raises(HfEsmError, match="do not fit"):
        plot_task_scores({str(i): REFERENCE for i in range(MOST_METHODS + 1)}, REFERENCE, tmp_path / "a.png", "Title")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(HfEsmError, match=r"pip install hf_esm\[demo\]"):
        plot_task_scores(SCORES, REFERENCE, tmp_path / "a.png", "Title")
    assert not any(tmp_path.iterdir())


def assert_picture(path: Path) -> np.ndarray:
    """The pixels of a PNG that is whole and not blank."""
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 500 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    return pixels


def bar_heights(pixels: np.ndarray, colour: str) -> list[int]:
    """Heights in pixels of the bars of one colour, from left to right; the legend above is left out."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    columns = (pixels[100:] == wanted).all(-1).sum(0)
    inside = np.flatnonzero(columns)
    bars = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
    return [int(columns[bar].max()) for bar in bars if len(bar) > 20]  # narrower: the edges of grey letters
