"""`ActivationStatistics` and the accumulator behind it: streaming, files, merging, compression."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_esm import ActivationStatistics, HfEsmError
from hf_esm.calibration.recorder import FactorAccumulator
from hf_esm.calibration.statistics import Provenance
from hf_esm.checkpoints.layout import STATISTICS_FILE
from hf_esm.linalg import essential_subspace
from hf_esm.methods.stack import InputStatistics
from support.problems import exact, factored, random_problem, relative_error, seeds, shapes, sharded, streamed


WIDE, TALL = (9, 20, 16, 2), (50, 20, 16, 2)  # fewer tokens than features, and more
PROVENANCE = Provenance("me/expert", "abc123", num_samples=32, seed=7)


def gram(entry):
    return entry.factor.double().T @ entry.factor.double()


def two_layers(seed=0, shape=TALL, route=streamed):
    """Statistics of q and v, which share an input, and of an MLP; and their inputs by key."""
    _, inputs = random_problem(seed, shape)
    entries = {"q": route(inputs[0]), "up": route(inputs[1])}
    statistics = ActivationStatistics(entries, {"q": "q", "v": "q", "up": "up"}, PROVENANCE)
    return statistics, dict(zip(entries, inputs))


def same_statistics(found, expected, tolerance):
    assert list(found) == list(expected)
    for weight in expected:
        assert found[weight].count == expected[weight].count
        assert relative_error(found[weight].mean, expected[weight].mean) <= tolerance
        assert relative_error(gram(found[weight]), gram(expected[weight])) <= tolerance


@seeds
@shapes
@pytest.mark.parametrize("route", [factored, streamed, sharded])
def test_statistics_of_any_route_are_those_of_all_activations(seed, shape, route):
    for x in random_problem(seed, shape)[1]:
        found = route(x)
        assert found.count == len(x)
        assert relative_error(found.mean, x.double().mean(0)) < 1e-6
        assert relative_error(gram(found), x.double().T @ x.double()) < 1e-6
        assert found.factor.dtype == found.mean.dtype == torch.float32
        assert found.factor.shape[0] <= 2 * x.shape[1]


def test_the_accumulator_never_holds_more_rows_than_twice_the_width():
    accumulator = FactorAccumulator(6)
    for rows in torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).split([1, 5, 13, 0, 80, 1, 300]):
        accumulator.add(rows)
        assert accumulator.factor.shape[0] <= 12


def test_the_accumulator_counts_no_row_that_it_was_not_given():
    accumulator = FactorAccumulator(6)
    accumulator.add(torch.zeros(0, 6))
    assert (accumulator.count, accumulator.factor.shape) == (0, (0, 6))


def test_the_accumulator_keeps_what_it_read_when_the_model_then_changes_it_in_place():
    x = torch.ones(3, 6)
    accumulator = FactorAccumulator(6)
    accumulator.add(x)
    x.zero_()
    assert torch.equal(accumulator.factor, torch.ones(3, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_any_dtype_are_summed_in_float32_or_better(dtype):
    x = (torch.randn(3000, 4, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    found = streamed(x)
    assert relative_error(found.mean, x.double().mean(0)) < 1e-6
    assert relative_error(gram(found), x.double().T @ x.double()) < 1e-5


@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("target", ["folder", "folder/mine.safetensors"])
def test_a_saved_file_is_read_back_whole(tmp_path, shape, compact, target):
    statistics, _ = two_layers(shape=shape, route=exact)  # a factor of more rows than a triangular one
    path = statistics.save(tmp_path / target, compact=compact)
    assert path == tmp_path / (target if "." in target else f"{target}/{STATISTICS_FILE}")
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    for found in (ActivationStatistics.load(path), ActivationStatistics.load(tmp_path / target)):
        same_statistics(found, statistics, 1e-6 if compact else 0)
        assert found.keys_of == statistics.keys_of
        assert found.provenance == PROVENANCE
        assert [found.width(weight) for weight in found] == [statistics.width(weight) for weight in found] == [16] * 3
        rows = min(shape[0], 16) if compact else shape[0]
        assert [len(found[weight].factor) for weight in found] == [rows] * 3


def test_statistics_print_in_one_line_without_their_numbers():
    assert repr(two_layers()[0]) == f"ActivationStatistics(3 linear maps, {PROVENANCE})"


def test_maps_with_one_input_are_stored_once(tmp_path):
    statistics, _ = two_layers()
    assert len(load_file(statistics.save(tmp_path))) == 4  # two factors, two means


def test_a_loaded_file_can_be_saved_over_itself(tmp_path):
    statistics, _ = two_layers()
    path = statistics.save(tmp_path)
    for _ in range(2):
        ActivationStatistics.load(path).save(path)
    same_statistics(ActivationStatistics.load(path), statistics, 1e-6)


@pytest.mark.parametrize("failing", ["hf_esm.calibration.statistics_file.ShardedWriter.write", "os.replace"])
def test_a_failed_save_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch, failing):
    statistics, _ = two_layers()
    first = statistics.save(tmp_path / "old")
    content = first.read_bytes()

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(failing, full)
    for folder in ("old", "new"):
        with pytest.raises(OSError, match="disk full"):
            replace(statistics, provenance=Provenance("other")).save(tmp_path / folder)
    assert first.read_bytes() == content
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [STATISTICS_FILE]


def rewritten(path, **changes):
    """The file again, with other metadata; None removes an entry."""
    tensors = load_file(path)
    header = json.dumps({"counts": {"q": 1}, "keys_of": {"q": "q"}, "provenance": {}, "pooled": []})
    metadata = {"format": "hf_esm.statistics", "version": "1", "header": header} | changes
    save_file(tensors, path, {key: value for key, value in metadata.items() if value is not None})


BROKEN = {  # what happens to the file: what the message says
    "other-format": (lambda path: rewritten(path, format="pt"), "no activation statistics"),
    "no-metadata": (lambda path: save_file(load_file(path), path), "no activation statistics"),
    "later-version": (lambda path: rewritten(path, version="3"), "version 3"),
    "no-counts": (lambda path: rewritten(path, version="2"), "damaged"),
    "no-version": (lambda path: rewritten(path, version=None), "version"),
    "bad-header": (lambda path: rewritten(path, header="{"), "statistics"),
    "truncated-data": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a readable"),
    "truncated-header": (lambda path: path.write_bytes(path.read_bytes()[:40]), "not a readable"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable"),
    "text": (lambda path: path.write_text("once upon a time, in a file far away"), "not a readable"),
    "missing": (lambda path: path.unlink(), "not a readable"),
}


@pytest.mark.parametrize(("breaks", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_read_is_named(tmp_path, breaks, message):
    path = two_layers()[0].save(tmp_path / "mine.safetensors")
    rewritten(path)
    ActivationStatistics.load(path)  # readable until it is broken
    breaks(path)
    with pytest.raises(HfEsmError, match=message) as error:
        ActivationStatistics.load(path)
    assert str(path) in str(error.value)


@seeds
@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
def test_merged_statistics_are_those_of_all_samples(seed, shape, tmp_path):
    whole, inputs = two_layers(seed, shape)
    parts = [
        ActivationStatistics(
            {key: streamed(x[rows]) for key, x in inputs.items()}, whole.keys_of, replace(PROVENANCE, num_samples=4)
        )
        for rows in (slice(0, 2), slice(2, 2), slice(2, None))
    ]
    parts[0] = ActivationStatistics.load(parts[0].save(tmp_path))
    merged = ActivationStatistics.merge(parts)
    same_statistics(merged, whole, 1e-6)
    assert merged.provenance == replace(PROVENANCE, num_samples=12)
    for key in inputs:
        assert merged[key].factor.shape[0] <= 16


def test_statistics_of_different_models_are_not_merged():
    statistics, _ = two_layers()
    other = ActivationStatistics(statistics.entries, {"q": "q", "up": "up"})
    with pytest.raises(HfEsmError, match="different models"):
        ActivationStatistics.merge([statistics, other])


@seeds
@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("rank", [1, 5, 9, 16, 40])
def test_compression_is_the_best_of_its_rank_and_states_its_error(seed, shape, rank, tmp_path):
    statistics, inputs = two_layers(seed, shape)
    small = statistics.compress(rank)
    errors = []
    for key, x in inputs.items():
        _, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
        assert small[key].factor.shape[0] <= min(rank, len(s))
        best = (s[:rank, None] * vh[:rank]).T @ (s[:rank, None] * vh[:rank])
        assert relative_error(gram(small[key]), best) < 1e-5
        errors.append(float((s[rank:].square().sum() / s.square().sum()).sqrt()))
        assert torch.equal(small[key].mean, statistics[key].mean)
        assert small[key].count == len(x)
    expected = replace(PROVENANCE, compressed_rank=rank, compression_error=small.provenance.compression_error)
    assert small.provenance == expected
    assert small.provenance.compression_error == pytest.approx(max(errors), rel=1e-4, abs=1e-6)
    assert ActivationStatistics.load(small.save(tmp_path)).provenance == expected
    assert statistics.provenance == PROVENANCE


@seeds
def test_compression_to_full_rank_changes_no_essential_subspace(seed):
    statistics, inputs = two_layers(seed, TALL)
    delta = random_problem(seed, TALL)[0][0]
    found = essential_subspace(statistics.compress(16)["q"].factor, delta, 5)
    expected = essential_subspace(inputs["q"], delta, 5)
    assert relative_error(found.directions @ found.directions.T, expected.directions @ expected.directions.T) < 1e-4


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_compression_of_zero_inputs_is_finite(rows):
    zeros = InputStatistics(torch.zeros(rows, 6), torch.zeros(6), rows)
    small = ActivationStatistics({"w": zeros}, {"w": "w"}).compress(2)
    assert relative_error(gram(small["w"]), torch.zeros(6, 6)) == 0
    assert small.provenance.compression_error == 0


@seeds
def test_the_stated_error_covers_everything_that_was_lost(seed):
    """Compressing again, or merging with exact statistics, does not make the first loss disappear."""
    statistics, inputs = two_layers(seed)
    small = statistics.compress(4)
    for found, copies in [(small.compress(8), 1), (small.compress(2), 1)] + [
        (ActivationStatistics.merge(parts), 2) for parts in ([statistics, small], [small, statistics])
    ]:
        for key, x in inputs.items():
            kept = float(found[key].factor.double().square().sum() / (copies * x.double().square().sum()))
            assert found.provenance.compression_error >= max(1 - kept, 0) ** 0.5 - 1e-4
        assert found.provenance.compressed_rank <= 4


def test_statistics_of_a_model_without_linear_maps_are_a_file_too(tmp_path):
    path = ActivationStatistics({}, {}, PROVENANCE).save(tmp_path)
    assert len(ActivationStatistics.load(path)) == 0


def test_of_mixtures_each_part_knows_the_experts_that_its_tokens_came_to():
    whole, _ = two_layers()
    named = {"mlp.down_proj.0": "mlp.down_proj.0", "mlp.down_proj.3": "mlp.down_proj.3"}
    rows = {key: streamed(torch.randn(5, 7)) for key in named}
    parts = [
        ActivationStatistics(whole.entries | {key: rows[key]}, whole.keys_of | {key: key}, PROVENANCE) for key in named
    ]
    merged = ActivationStatistics.merge(parts)
    assert merged.keys() == whole.keys() | named.keys()
    for key, alone in rows.items():
        gram = merged[key].factor.T @ merged[key].factor
        assert torch.allclose(gram, alone.factor.T @ alone.factor, atol=1e-4) and merged[key].count == 5


def test_statistics_of_two_experts_are_not_merged():
    statistics, _ = two_layers()
    other = ActivationStatistics(statistics.entries, statistics.keys_of, replace(PROVENANCE, model="me/another"))
    with pytest.raises(HfEsmError, match="different models"):
        ActivationStatistics.merge([statistics, other])
    with pytest.raises(HfEsmError, match="no statistics to merge"):
        ActivationStatistics.merge([])
    for rank in (0, -1, 1.5, "2"):
        with pytest.raises(HfEsmError, match="rank must be a whole number, 1 or more"):
            statistics.compress(rank)
