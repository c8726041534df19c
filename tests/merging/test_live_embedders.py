"""Live models of Sentence Transformers as base and as experts: merged as their folders are, and never changed."""

import gc
import subprocess
import sys
import tempfile

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from hf_esm import HfEsmError, calibrate, evaluate, merge_models
from support.embedders import TEXTS, texts_of, write_embedder


library = pytest.importorskip("sentence_transformers")
CALIBRATION = {"one": texts_of(1), "two": texts_of(2)}


def load(folder):
    return library.SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Folders of a base and two experts."""
    folder = tmp_path_factory.mktemp("three")
    return {
        name: write_embedder(folder / name, seed, prompts={"query": "so the "})
        for seed, name in enumerate(["base", "one", "two"])
    }


def merge(base, one, two, output, **options):
    options = {"method": "esm", "calibration": CALIBRATION, "progress": False, **options}
    return merge_models(base, {"one": one, "two": two}, output_dir=output, **options)


def same_weights(one, other):
    for name in ("model.safetensors", "2_Dense/model.safetensors"):
        found, expected = load_file(one / name), load_file(other / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("live", [("base", "one", "two"), ("base",), ("two",)], ids="-".join)
def test_live_embedders_merge_as_their_folders_do(three, tmp_path, live):
    models = {name: load(path) if name in live else path for name, path in three.items()}
    before = {name: {k: v.clone() for k, v in models[name].state_dict().items()} for name in live}
    result = merge(*models.values(), tmp_path / "live")
    folder = merge(*three.values(), tmp_path / "folders").output_dir
    same_weights(result.output_dir, folder)
    found = load(result.output_dir)
    assert found.prompts["query"] == "so the " and [type(m).__name__ for m in found] == [
        type(m).__name__ for m in load(folder)
    ]
    assert torch.allclose(torch.tensor(found.encode(TEXTS)), torch.tensor(load(folder).encode(TEXTS)), atol=1e-6)
    for name in live:
        model = models[name]
        assert model.state_dict().keys() == before[name].keys()
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
        assert not hasattr(model[0].model, "sentence_modules") and not model[0].model._forward_hooks
    assert any("passed as a live model" in warning for warning in result.warnings)


def test_what_was_changed_in_memory_counts(three, tmp_path):
    """Weights of the Transformer and of a dense module, a prompt and a length: as if the model had been saved."""
    changed = load(three["two"])
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    changed.prompts["passage"] = "a "
    changed.max_seq_length = 5
    changed.save_pretrained(str(tmp_path / "saved"))
    results = {}
    for name, two in {"live": changed, "saved": tmp_path / "saved"}.items():
        results[name] = merge(three["base"], three["one"], two, tmp_path / f"of-{name}").output_dir
    same_weights(results["live"], results["saved"])
    assert load(results["live"]).prompts == load(results["saved"]).prompts
    assert load(results["live"]).prompts["passage"] == "a "


def test_statistics_and_scores_of_live_embedders_are_those_of_their_folders(three):
    one, live = three["one"], load(three["one"])
    statistics = [calibrate(model, CALIBRATION["one"], progress=False) for model in (one, live)]
    for name in statistics[0]:
        assert torch.equal(statistics[0][name].factor, statistics[1][name].factor)
    assert statistics[1]["sentence_modules.2_Dense.linear.weight"].count == len(CALIBRATION["one"])
    rows = [{"text": a, "text_pair": b, "label": i} for i, (a, b) in enumerate(zip(texts_of(5), texts_of(6)))]
    scores = [evaluate(one, {"one": rows}, experts={"one": model}, metric="similarity") for model in (one, live)]
    assert scores[0].expert == scores[1].expert == scores[0].model
    assert not hasattr(live[0].model, "sentence_modules")


def test_the_files_of_live_modules_go_with_the_merge(three, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    merge(*map(load, three.values()), tmp_path / "merged")
    gc.collect()
    assert not list(tmp_path.glob("hf-esm-*"))


def test_adapters_inside_are_refused_until_they_are_saved(three, tmp_path):
    adapted = load(three["two"])
    adapted.add_adapter(LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    with pytest.raises(HfEsmError, match=r"expert 'two' \(SentenceTransformer\) has adapters inside"):
        merge(three["base"], three["one"], adapted, tmp_path / "m")
    adapted.save_pretrained(str(tmp_path / "two"))
    folder = merge(three["base"], three["one"], tmp_path / "two", tmp_path / "m", method="mean").output_dir
    name, stored = "encoder.layer.0.attention.self.query.weight", load_file(folder / "model.safetensors")
    delta = adapted[0].model.encoder.layer[0].attention.self.query.get_delta_weight("default")
    base, one = (load_file(three[place] / "model.safetensors")[name] for place in ("base", "one"))
    assert torch.allclose(stored[name], (base + delta + one) / 2, atol=1e-6)


def test_other_modules_at_the_beginning_are_refused(three, tmp_path):
    words = library.sentence_transformer.modules.BoW(["film", "plot"])
    with pytest.raises(HfEsmError, match=r"expert 'two' .* begins with a BoW"):
        merge(three["base"], three["one"], library.SentenceTransformer(modules=[words]), tmp_path / "m")


def test_the_library_is_imported_by_its_objects_alone(three):
    code = (
        "import sys; from hf_esm import merge_models; "
        f"merge_models({str(three['base'])!r}, {{'one': {str(three['one'])!r}}}, method='mean', progress=False); "
        "assert 'sentence_transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
