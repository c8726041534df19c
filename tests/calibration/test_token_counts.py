"""Token counts of embeddings: literal counts over the samples, whatever the batches; files and fingerprints."""

import sys
from collections import Counter
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_esm import ActivationStatistics, HfEsmError
from hf_esm.calibration import collect_statistics
from hf_esm.calibration.calibrator import calibrate_checkpoint
from hf_esm.calibration.statistics import Provenance
from hf_esm.checkpoints import open_checkpoint, resolve_source
from hf_esm.data import RunOptions, sample_fingerprint, save_samples
from hf_esm.data.samples import load_samples
from hf_esm.utils import default_accelerator
from support.architectures import ARCHITECTURES
from support.helpers import VOCABULARY, save, sequence_pairs, text_samples
from support.processes import start_script


OLD = Path(__file__).parents[1] / "fixtures" / "written_by_0.1.0" / "statistics.safetensors"


def counted(rows, size):
    """How often each row occurs, one by one."""
    found = Counter(int(row) for row in rows)
    return torch.tensor([found[row] for row in range(size)])


def tokens_of(samples, name="input_ids"):
    return [row for sample in samples for row in sample[name].tolist()]


def positions_of(samples, first=0):
    return [first + position for sample in samples for position in range(len(sample["input_ids"]))]


def collected(name, samples, batch_size=4, **settings):
    model = ARCHITECTURES[name].build(**settings)
    return collect_statistics(model, samples, batch_size=batch_size, progress=False).token_counts


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, counts in expected.items():
        assert found[name].dtype == torch.int64
        assert torch.equal(found[name], counts), name


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_words_positions_and_token_types_are_counted(batch_size):
    samples = text_samples(0)
    for i, sample in enumerate(samples):
        sample["token_type_ids"] = (torch.arange(len(sample["input_ids"])) > i).long()
    expected = {
        "embeddings.word_embeddings.weight": counted(tokens_of(samples), VOCABULARY),
        "embeddings.position_embeddings.weight": counted(positions_of(samples), 40),
        "embeddings.token_type_embeddings.weight": counted(tokens_of(samples, "token_type_ids"), 2),
    }
    same(collected("bert", samples, batch_size), expected)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_token_types_that_the_model_adds_itself_are_counted(batch_size):
    samples = text_samples(1)
    found = collected("bert", samples, batch_size)["embeddings.token_type_embeddings.weight"]
    assert found.tolist() == [len(tokens_of(samples)), 0]


@pytest.mark.parametrize(("name", "positions", "first"), [("roberta", "embeddings.position_embeddings.weight", 2),
                                                           ("opt", "decoder.embed_positions.weight", 2),
                                                           ("gpt2", "wpe.weight", 0)])  # fmt: skip
@pytest.mark.parametrize("batch_size", [1, 7])
def test_positions_are_counted_at_the_rows_that_are_read(name, positions, first, batch_size):
    samples = text_samples(2)
    found = collected(name, samples, batch_size)[positions]
    assert torch.equal(found, counted(positions_of(samples, first), len(found)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_decoders_words_are_counted_once_whether_tied_or_not(tied, batch_size):
    samples = text_samples(3)
    found = collected("llama", samples, batch_size, tie_word_embeddings=tied)
    same(found, {"embed_tokens.weight": counted(tokens_of(samples), VOCABULARY)})


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_shared_embedding_is_read_by_encoder_and_decoder(name, batch_size):
    samples = sequence_pairs(4)
    start = ARCHITECTURES[name].settings["decoder_start_token_id"]
    written = [row for sample in samples for row in [start, *sample["labels"].tolist()[:-1]]]
    found = collected(name, samples, batch_size)["shared.weight"]
    assert torch.equal(found, counted(tokens_of(samples) + written, VOCABULARY))


@pytest.mark.cases(16)
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_counts_do_not_depend_on_the_batches(name):
    samples = ARCHITECTURES[name].samples(5)
    alone, batched = (collected(name, samples, size) for size in (1, 5))
    assert alone.keys() == batched.keys()
    for weight, counts in alone.items():
        assert torch.equal(batched[weight], counts), weight


@pytest.mark.parametrize("batch_size", [1, 8])
def test_distances_of_positions_are_counted_for_every_pair_of_a_samples_tokens(batch_size):
    """Eight texts of eight tokens: a matrix of distances has the shape of the batch."""
    samples = [{"input_ids": torch.arange(8) + i, "decoder_input_ids": torch.arange(8) + i} for i in range(8)]
    found = collected("t5", samples, batch_size)
    for side in ("encoder", "decoder"):
        assert int(found[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].sum()) == 8 * 8 * 8


def test_counts_alone_keep_no_factors(tmp_path):
    model, samples = ARCHITECTURES["bert"].build(), text_samples(6)
    full = collect_statistics(model, samples, progress=False)
    expert = open_checkpoint(resolve_source(str(save(model, tmp_path / "model")), "expert"))
    options = RunOptions(progress=False)
    counts = calibrate_checkpoint(expert, samples, options, default_accelerator(), tmp_path, "a", counts_only=True)
    assert len(counts) == len(counts.entries) == 0 < len(full)
    same(counts.token_counts, full.token_counts)
    assert counts.provenance.samples == full.provenance.samples
    assert ActivationStatistics.load(counts.save(tmp_path)).token_counts.keys() == full.token_counts.keys()


def test_two_processes_count_what_one_counts(tmp_path):
    code = """
        import sys
        import torch
        from accelerate import Accelerator
        from hf_esm.calibration import collect_statistics
        from support.architectures import ARCHITECTURES
        from support.helpers import text_samples

        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        model = ARCHITECTURES["bert"].build()
        found = collect_statistics(model, text_samples(7), accelerator=accelerator, batch_size=2, progress=False)
        torch.save((found.token_counts, found.provenance.samples), sys.argv[1])
        torch.distributed.destroy_process_group()
    """
    port = str(29500 + torch.randint(2000, ()).item())
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    common["PYTHONPATH"] = ":".join(sys.path)
    ranks = [
        start_script(
            dedent(code), tmp_path / f"{i}.pt", output=tmp_path / f"{i}.log",
            environment=common | {"RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip
    for i, rank in enumerate(ranks):
        rank.join(100)
        assert rank.exitcode == 0, (tmp_path / f"{i}.log").read_text()
    one = collect_statistics(ARCHITECTURES["bert"].build(), text_samples(7), progress=False)
    for i in range(2):
        counts, samples = torch.load(tmp_path / f"{i}.pt")
        same(counts, one.token_counts)
        assert samples == one.provenance.samples


def with_counts(counts, samples=(), model=""):
    return ActivationStatistics({}, {}, Provenance(model, samples=samples), token_counts=counts)


def test_counts_and_fingerprints_survive_a_file_and_compression(tmp_path):
    counts = {"words": torch.tensor([0, 3, 2**40]), "positions": torch.tensor([5])}
    path = with_counts(counts, ("b", "a")).save(tmp_path)
    for found in (ActivationStatistics.load(path), ActivationStatistics.load(path).compress(2)):
        same(found.token_counts, counts)
        assert found.provenance.samples == ("a", "b")
    with safe_open(path, "pt") as file:
        assert file.metadata()["version"] == "2"
        assert "whether a known sample" in file.metadata()["privacy"]
        assert set(file.keys()) == {"words.token_counts", "positions.token_counts"}


def test_a_file_of_version_1_has_no_counts():
    old = ActivationStatistics.load(OLD)
    assert len(old) > 0 and old.token_counts == {} and old.provenance.samples == ()
    old.check_fits({name: old.width(name) for name in old}, "a", {"embeddings.word_embeddings.weight": 7})


@pytest.mark.parametrize("damaged", [torch.tensor([1, -1]), torch.tensor([1.0]), torch.tensor([[1]])])
def test_damaged_counts_are_an_error_that_names_the_file(damaged, tmp_path):
    path = with_counts({"words": torch.tensor([1, 2])}).save(tmp_path / "mine.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "words.token_counts": damaged}, path, metadata)
    with pytest.raises(HfEsmError, match=r"token counts of 'words'.*Calibrate again") as error:
        ActivationStatistics.load(path)
    assert str(path) in str(error.value)
    save_file({}, path, metadata)
    with pytest.raises(HfEsmError, match="damaged"):
        ActivationStatistics.load(path)


def test_merged_parts_add_their_counts():
    one, other = {"words": torch.tensor([1, 2]), "only": torch.tensor([1])}, {"words": torch.tensor([0, 5])}
    merged = ActivationStatistics.merge([with_counts(one, ("b",)), with_counts(other, ("a", "b"))])
    same(merged.token_counts, {"words": torch.tensor([1, 7])})  # of "only", not all counts are known
    assert merged.provenance.samples == ("a", "b", "b")
    with pytest.raises(HfEsmError, match="different models"):
        ActivationStatistics.merge([with_counts(one), with_counts({"words": torch.tensor([1])})])


def test_counts_of_another_vocabulary_do_not_fit():
    statistics = with_counts({"words": torch.tensor([1, 2])})
    statistics.check_fits({}, "sst2", {"words": 2, "others": 3})
    with pytest.raises(HfEsmError, match="'sst2' have token counts of 2 rows for 'words', the base has 3"):
        statistics.check_fits({}, "sst2", {"words": 3})


def test_fingerprints_tell_samples_apart_and_survive_a_file(tmp_path):
    samples = [
        {"input_ids": torch.arange(4), "attention_mask": torch.ones(4, dtype=torch.bool)},
        {"input_ids": torch.arange(5)},
        {"input_ids": torch.arange(4)},
        {"pixel_values": torch.randn(3, 4, 4).transpose(1, 2)},
        {"pixel_values": torch.randn(3, 4, 4).bfloat16(), "label": torch.tensor(1)},
    ]
    prints = [sample_fingerprint(sample) for sample in samples]
    assert len(set(prints)) == 5
    save_samples(samples, tmp_path / "samples.safetensors")
    assert [sample_fingerprint(sample) for sample in load_samples(tmp_path / "samples.safetensors")] == prints
    assert sample_fingerprint(dict(reversed(samples[0].items()))) == prints[0]
    assert sample_fingerprint({"input_ids": torch.arange(4).reshape(2, 2)}) != prints[2]


def test_statistics_know_the_samples_that_they_were_collected_on():
    samples = text_samples(8)
    found = collect_statistics(ARCHITECTURES["llama"].build(), samples, progress=False, provenance=Provenance("me/a"))
    assert found.provenance.samples == tuple(sorted(map(sample_fingerprint, samples)))
    assert found.provenance.model == "me/a" and not any(name in repr(found) for name in found.provenance.samples)
