"""What `pictures="all"` measures: against literal computations, other merges, and the cache of the cells."""

import json
from types import SimpleNamespace

import pytest
import torch

from hf_esm import compare, evaluate, merge_models
from hf_esm.checkpoints import Access
from hf_esm.evaluation.figures import RoutesByBlock, energy_by_rank
from hf_esm.evaluation.interference import SHARES
from hf_esm.merging.contest import Scored
from hf_esm.routing import routes_by_block
from support import reference
from support.problems import exact, random_problem, seeds, shapes, streamed
from support.routed_toys import encoded, expert, inputs, logits, task_texts
from support.tiny import WORDS
from support.toys import base_model


TASKS = "abc"
METHODS = ["task-arithmetic", "esm", {"name": "esm++", "rank": 4, "label": "routed"}]


def mixed_texts(task, seed, count=24):
    """Texts of the task's own words and of other ones, whose task a router does not always find."""
    generator = torch.Generator().manual_seed(100 * TASKS.index(task) + seed)
    own = task_texts(task, seed, count)
    drawn = torch.randint(15, (count, 6), generator=generator).tolist()
    return [f"{text.split()[0]} {' '.join(WORDS[i] for i in others)}" for text, others in zip(own, drawn, strict=True)]


def rows(task, seed):
    texts = mixed_texts(task, seed)
    found = logits(expert(task), encoded(texts)).argmax(-1).tolist()
    return [{"text": text, "label": label} for text, label in zip(texts, found, strict=True)]


@pytest.fixture(scope="module")
def arguments(models):
    return {
        "base": models / "base",
        "experts": {task: models / task for task in TASKS},
        "calibration": {task: task_texts(task) for task in TASKS},
        "num_samples": 0,
        "progress": False,
    }


@pytest.fixture(scope="module")
def compared(arguments, tmp_path_factory):
    """The folder of a report with all pictures, its test rows, and the comparison."""
    folder, test = tmp_path_factory.mktemp("report"), {task: rows(task, 7) for task in TASKS}
    return folder, test, compare(**arguments, test=test, methods=METHODS, pictures="all", output_dir=folder)


@seeds
@shapes
def test_a_spectrum_is_the_cumulated_squares_of_the_shifts_singular_values(seed, shape):
    (delta, *_), (x, *_) = random_problem(seed, shape)
    squares = reference.svd(x.double() @ delta.double().T)[1].square()
    ranks = [1, 2, min(delta.shape)]
    expected = [float(squares[:rank].sum() / squares.sum()) for rank in ranks]
    for route in (exact, streamed):
        assert energy_by_rank(route(x).factor, delta, ranks) == pytest.approx(expected, rel=1e-5)
    assert energy_by_rank(x, delta * 0, ranks) == [1.0] * 3


@pytest.mark.slow
def test_the_spectrum_after_a_merge_is_that_of_the_merged_update_on_the_inputs_of_all_tasks(compared):
    *_, found = compared
    assert found.figures.spectra.keys() == {"task-arithmetic", "esm"}
    name = "encoder.layer.1.output.dense.weight"
    weight, states = base_model().state_dict()[name], [expert(task).state_dict()[f"bert.{name}"] for task in TASKS]
    x = torch.cat([inputs(task)[f"bert.{name}"] for task in TASKS])
    squares = reference.svd(x.double() @ sum(state - weight for state in states).double().T)[1].detach().square()
    side = min(weight.shape)
    expected = [float(squares[: max(round(s * side), 1)].sum() / squares.sum()) for s in SHARES]
    assert found.figures.spectra["task-arithmetic"][name] == pytest.approx(expected, rel=1e-3)
    (chart,) = [chart for chart in found.charts(every=True) if chart.name == "spectra"]
    assert [line.label for line in chart.lines] == ["the experts, before", "task-arithmetic", "esm"]
    means = [sum(of_map) / 12 for of_map in zip(*found.figures.spectra["esm"].values(), strict=True)]
    assert chart.lines[2].points == [pytest.approx(p) for p in zip(SHARES, means)][2:]  # 1/32 is one direction
    assert all(low <= high for low, high in chart.lines[2].errors.values())


@pytest.mark.slow
def test_compressed_experts_have_the_scores_of_their_own_merge(arguments, compared, tmp_path):
    _, test, found = compared
    assert list(found.figures.ranks) == [1, 4, 16]
    merge_models(**arguments, method={"name": "tsv-c", "rank": 4}, output_dir=tmp_path / "merged")
    assert found.figures.ranks[4].tasks == pytest.approx(evaluate(tmp_path / "merged", test).model)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 1])
def test_a_router_that_decides_elsewhere_finds_as_many_rows_as_the_figure_says(arguments, compared, tmp_path, blocks):
    _, test, found = compared
    shown = found.figures.blocks["routed"]
    method = {"name": "esm++", "rank": 4, "depth": blocks / 2}
    merge_models(**arguments, method=method, output_dir=tmp_path / "merged")
    routing = evaluate(tmp_path / "merged", test).routing
    assert min(routing.values()) < 1
    assert {task: shares[blocks] for task, shares in shown.shares[""].items()} == pytest.approx(routing)
    if blocks == shown.decides_after[""]:
        (row,) = [row for row in found.rows if row.label == "routed"]
        assert row.routing == pytest.approx(routing)


def test_a_prototype_router_finds_in_a_block_what_its_linear_maps_find():
    found = {("a", 0): "ab", ("a", 1): "aa", ("b", 0): "ba", ("b", 1): "bb"}  # by two linear maps of each block
    names = [f"encoder.layer.{block}.{name}.dense" for block in (0, 1) for name in ("intermediate", "output")]

    def explain(samples, batch_size):
        tasks = [task for sample in samples for task in found[sample, 0] + found[sample, 1]]
        return [SimpleNamespace(layers=dict(zip(names, tasks, strict=True)))]

    model = SimpleNamespace(get_base_model=base_model)
    routed = SimpleNamespace(config=SimpleNamespace(router="prototype"), model=model, explain=explain)
    shares = routes_by_block(routed, {"a": ["a"], "b": ["b"]}, Access())
    assert shares == {"": {"a": [0.5, 1.0], "b": [0.5, 1.0]}}
    errors = RoutesByBlock(shares, {}, {"a": 4, "b": 9}).errors("")
    assert errors == pytest.approx([1.96 * (0.25 / 4 + 0.25 / 9) ** 0.5 / 2, 0])


@pytest.mark.slow
def test_merges_of_fewer_tasks_are_cells_that_another_comparison_finds(arguments, compared, tmp_path, monkeypatch):
    folder, test, found = compared
    assert {label: list(rows) for label, rows in found.figures.counts.items()} == {
        "task-arithmetic": [2, 3], "esm": [2, 3],
    }  # fmt: skip
    monkeypatch.setattr(
        "hf_esm.evaluation.cells.CellStore._merge_and_measure", lambda *_: pytest.fail("measured again")
    )
    fewer = {name: {t: arguments[name][t] for t in "ab"} for name in ("experts", "calibration")}
    options = {"methods": METHODS[:2], "cache_dir": str(folder / "cache"), "output_dir": tmp_path}
    of_two = compare(**{**arguments, **fewer, **options}, test={t: test[t] for t in "ab"}).rows
    for row in of_two:
        assert found.figures.counts[row.label][2].normalised == pytest.approx(row.normalised)
    by_label = {row.label: row for row in found.rows}
    assert found.figures.counts["esm"][3].interval == by_label["esm"].interval


@pytest.mark.slow
def test_all_pictures_are_written_and_the_page_shows_their_lines(arguments, compared):
    folder, _, found = compared
    names = {"energy", "layers", "spectra", "ranks", "blocks-0", "counts"}
    assert names <= {path.stem for path in folder.glob("*.png")}
    assert {chart.name for chart in found.charts(every=True)} == names
    page, stored = (folder / "report.html").read_text(), json.loads((folder / "report.json").read_text())
    for chart in found.charts(every=True):
        assert chart.title in page and chart.title in (folder / "report.md").read_text()
        assert chart.xlabel and chart.ylabel and chart.caption.endswith(".")
    assert stored["figures"]["ranks"]["4"]["tasks"] == pytest.approx(found.figures.ranks[4].tasks)
    assert stored["figures"]["blocks"]["routed"]["shares"] == found.figures.blocks["routed"].shares
    assert page.count('class="band"') >= 3 * len(found.rows) and found.base_interval[0] < found.base_interval[1]


def test_the_standard_error_of_a_mean_is_the_one_of_theory():
    right = (torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.7).double()
    scored = Scored({"a": 400}, lambda draws: right[draws["a"]].mean(1))
    assert scored.error == pytest.approx((0.7 * 0.3 / 400) ** 0.5, rel=0.25)
    assert Scored({}, lambda draws: torch.tensor([0.5]).double()).error == 0
