"""Calibration with little memory: weights partly on disk and factors in files give the same statistics."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_esm import HfEsmError, calibrate, merge_models
from hf_esm.calibration.collection import collect_statistics
from hf_esm.calibration.placement import available_memory, factor_bytes, needs_spill, placement
from hf_esm.calibration.recorder import FactorAccumulator
from hf_esm.checkpoints.sources import open_checkpoint, resolve_source
from hf_esm.utils.devices import fast_products
from hf_esm.utils.distributed import default_accelerator
from support.helpers import VOCABULARY, perturbed, text_samples
from support.problems import relative_error


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of 3 MB, of which no weight is large, a full expert and an adapter."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    base = perturbed(LlamaForCausalLM(config).eval(), 0.05, 0)
    base.save_pretrained(folder / "base")
    perturbed(base, 0.05, 1).save_pretrained(folder / "full")
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), settings)
    adapted.save_pretrained(folder / "lora")
    return folder


@pytest.fixture
def ran(monkeypatch):
    """Every model that was calibrated, and the folder of its factors."""
    found = []

    def spy(model, *args, **kwargs):
        found.append((getattr(model, "hf_device_map", None), kwargs["folder"]))
        return collect_statistics(model, *args, **kwargs)

    monkeypatch.setattr("hf_esm.calibration.calibrator.collect_statistics", spy)
    return found


def size(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("expert", ["full", "lora"])
def test_a_model_that_does_not_fit_is_calibrated_from_the_disk(folder, ran, expert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"base": folder / "base", "progress": False}
    expected = calibrate(folder / expert, text_samples(3), **options)
    found = calibrate(folder / expert, text_samples(3), **options, max_memory=size(folder / "base") // 2)
    (plain, in_memory), (places, spill) = ran
    assert plain is None and in_memory is None
    assert set(places.values()) == {"cpu", "disk"}
    assert not spill.exists()  # the statistics hold on to what stood there
    assert not list(Path().rglob("*.safetensors"))  # where PEFT would put a copy
    assert found.keys() == expected.keys() and len(found) == 7 * 16
    for name in expected:
        assert relative_error(found[name].factor, expected[name].factor) < 1e-5
        assert relative_error(found[name].mean, expected[name].mean) < 1e-5
        assert found[name].count == expected[name].count
    assert found.token_counts.keys() == {"embed_tokens.weight"}
    assert torch.equal(found.token_counts["embed_tokens.weight"], expected.token_counts["embed_tokens.weight"])
    assert found.pooled.keys() == expected.pooled.keys() != set()
    assert all(relative_error(found.pooled[name], rows) < 1e-5 for name, rows in expected.pooled.items())


def test_factors_that_do_not_fit_beside_the_weights_stand_in_files(folder, ran):
    expected = calibrate(folder / "full", text_samples(3), progress=False)
    found = calibrate(folder / "full", text_samples(3), progress=False, max_memory=size(folder / "full") + 10_000)
    assert [places for places, _ in ran] == [None, None]
    assert ran[1][1] is not None
    assert all(torch.equal(found[name].factor, expected[name].factor) for name in expected)


def test_a_merge_within_little_memory_is_the_merge(folder, ran, tmp_path):
    experts = {"full": folder / "full", "lora": folder / "lora"}
    calibration = {"full": text_samples(3), "lora": text_samples(4)}
    merged = []
    for memory in (None, size(folder / "base") // 2):
        result = merge_models(
            folder / "base",
            experts,
            method="esm",
            calibration=calibration,
            max_memory=memory,
            output_dir=tmp_path / str(memory),
            statistics_dir=tmp_path / f"statistics {memory}",
            progress=False,
        )
        merged.append(result.load_model().state_dict())
    assert [places is None for places, _ in ran] == [True, True, False, False]
    assert all(relative_error(merged[1][name], weight) < 1e-4 for name, weight in merged[0].items())
    assert not list(tmp_path.rglob(".*")) and not list(tmp_path.rglob("tmp*"))


def test_the_default_is_not_refined_where_memory_is_too_little(folder):
    experts, memory = {"full": folder / "full", "lora": folder / "lora"}, size(folder / "base")
    given = {
        "calibration": {task: [{"input_ids": [5, 6, i]} for i in range(7, 11)] for task in experts},
        "dry_run": True,
    }
    plan = merge_models(folder / "base", experts, max_memory=memory, **given)
    assert not plan.refining_bytes and any("is not refined" in warning for warning in plan.warnings)
    with pytest.raises(HfEsmError, match=r"refining .`refine`. needs"):
        merge_models(folder / "base", experts, max_memory=memory, refine=True, **given)


def test_what_takes_memory_is_counted(folder):
    checkpoint, accelerator = open_checkpoint(resolve_source(folder / "full", "full")), Accelerator()
    weights, sample = checkpoint.nbytes, {"input_ids": torch.zeros(50, dtype=torch.long)}
    factors = 4 * 50 * 16 * (6 * 64 + 128)
    assert placement(checkpoint, accelerator, weights, folder) == {}
    assert placement(checkpoint, accelerator, weights - 1, folder)["max_memory"] == {"cpu": weights - 1}
    assert not needs_spill(checkpoint, [sample], accelerator, weights + factors)
    assert needs_spill(checkpoint, [sample], accelerator, weights + factors - 1)
    assert needs_spill(checkpoint, [sample] * 2, accelerator, weights + factors)
    full = 4 * 16 * (6 * 64 * 128 + 128 * 256)  # twice as many rows as inputs
    shared = 4 * 50 * 16 * (64 + 64 + 128)  # attention's four maps read one width, and so do gate and up
    assert factor_bytes(checkpoint, [sample], shared=True) == shared
    for long in ([sample] * 99, [{"pixel_values": torch.zeros(3, 8, 8)}]):
        assert not needs_spill(checkpoint, long, accelerator, weights + full)
        assert needs_spill(checkpoint, long, accelerator, weights + full - 1)


@pytest.mark.parametrize(
    ("device", "limit", "expected"),
    [
        ("cuda:1", None, {1: 180, "cpu": 1000}),
        ("cuda", 300, {0: 90, "cpu": 300}),
        ("cpu", 300, {"cpu": 300}),
        ("cpu", 3000, {"cpu": 1000}),
    ],
)
def test_a_process_uses_its_own_device_and_main_memory(monkeypatch, device, limit, expected):
    monkeypatch.setattr("hf_esm.calibration.placement.get_max_memory", lambda: {0: 100, 1: 200, "cpu": 1000})
    assert available_memory(SimpleNamespace(device=torch.device(device)), limit) == expected


def test_a_disk_that_is_full_is_one_clear_error(tmp_path, monkeypatch):
    """Otherwise, writing through the mapped file would end the process."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    accumulator = FactorAccumulator(4, tmp_path / "layer.factor")
    with pytest.raises(HfEsmError, match="48 B cannot be kept there: No space left"):
        accumulator.add(torch.ones(3, 4))


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(HfEsmError, match="3 processes were started, but Accelerate takes each for the only one"):
        default_accelerator()


@pytest.fixture
def precision():
    yield
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def test_products_are_fast_only_within_a_tolerance_that_covers_it(precision):
    for set_before in ("highest", "high"):
        torch.set_float32_matmul_precision(set_before)
        for tolerance, inside in ((0.0, set_before), (1e-4, set_before), (1e-3, "medium"), (0.1, "medium")):
            with pytest.raises(ZeroDivisionError), fast_products(tolerance):
                assert torch.get_float32_matmul_precision() == inside
                raise ZeroDivisionError
            assert torch.get_float32_matmul_precision() == set_before
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    with fast_products(0.1):
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
