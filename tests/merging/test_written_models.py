"""Chosen and refined models that write, as folders: tied and transposed maps, encoder-decoders, routed models."""

import math
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hf_esm import ActivationStatistics, HfEsmError, RoutedModel, merge_models
from hf_esm.checkpoints import CARD_FILE, RECIPE_FILE, REFINED_FOLDER, ROUTED_FOLDER, ROUTER_FEATURES
from hf_esm.merging.choice import Candidate, Chosen
from hf_esm.merging.judging import TaskAgreement
from hf_esm.planning import load_recipe
from support.helpers import Architecture, perturbed
from support.refining_toys import TASKS
from support.tiny import GPT2, LLAMA
from support.toys import weights


T5 = Architecture(
    "T5ForConditionalGeneration",
    {
        "vocab_size": 60,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
)
KINDS = {
    "llama": (LLAMA, {}),
    "llama, tied": (LLAMA, {"tie_word_embeddings": True}),
    "gpt2, tied": (GPT2, {}),
    "t5": (T5, {}),
}
REFINE = {"steps": 12, "components": 8}
merge = partial(merge_models, progress=False)


def test_tasks_below_the_base_are_named():
    agreement = {"law": TaskAgreement(-0.2, 0.0), "code": TaskAgreement(0.1, 0.0), "nan": TaskAgreement(math.nan, 0)}
    chosen = Chosen(Candidate(None, None), 1.0, {}, None, agreement=agreement)
    assert [text.split(":")[0] for text in chosen.warnings()][:2] == ["'law'", "'nan'"]
    assert "The base agrees more" in chosen.warnings()[-1]
    mostly = Chosen(Candidate(None, None), 1.0, {}, None, agreement=agreement | {"nan": TaskAgreement(0.3, 0.0)})
    assert [text.split(":")[0] for text in mostly.warnings()] == ["'law'"]


def samples(seed, count=16):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 60, (4 + i % 5,), generator=generator)} for i in range(count)]


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def given(request, tmp_path_factory):
    """Arguments of a merge of two models that write, and the class of the base."""
    architecture, settings = request.param
    folder = tmp_path_factory.mktemp("models")
    base = architecture.build(**settings)
    base.save_pretrained(folder / "base")
    for seed, task in enumerate(TASKS):
        perturbed(base, 0.1, seed).save_pretrained(folder / task)
    experts = {task: folder / task for task in TASKS}
    calibration = {task: samples(seed) for seed, task in enumerate(TASKS)}
    return {"base": folder / "base", "experts": experts, "calibration": calibration}, type(base)


@torch.no_grad()
def answers(model):
    ids = samples(9, 1)[0]["input_ids"][None]
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **decoder).logits


@pytest.mark.cases(1)
def test_a_kept_adapter_answers_as_the_folded_model(given, tmp_path):
    arguments, model_class = given
    settings = {"method": "regmean", **arguments}
    folded = merge(**settings, refine=REFINE, output_dir=tmp_path / "folded")
    kept = merge(**settings, refine=REFINE | {"keep_adapter": True}, output_dir=tmp_path / "kept")
    assert not (tmp_path / "folded" / REFINED_FOLDER).exists()
    expected = answers(model_class.from_pretrained(tmp_path / "folded"))
    static = model_class.from_pretrained(tmp_path / "kept")
    assert not torch.allclose(answers(static), expected, atol=0.01)
    adapted = PeftModel.from_pretrained(static, tmp_path / "kept", subfolder=REFINED_FOLDER)
    assert torch.allclose(answers(adapted), expected, atol=1e-5)
    assert kept.agreement == folded.agreement  # measured with the gates
    assert min(folded.refined.values()) < folded.refined[0]
    assert "`refined/`" in (tmp_path / "kept" / CARD_FILE).read_text()


@pytest.mark.cases(2)
def test_the_default_is_chosen_by_agreement_and_repeated_by_its_recipe(given, tmp_path):
    arguments, _ = given
    result = merge(**arguments, refine=REFINE, output_dir=tmp_path / "first")
    assert result.chosen_by == "agreement"
    assert {place.method for place in result.standings} == {"regmean", "esm", "mean", "base"}
    assert result.agreement.keys() == set(TASKS)
    assert result.choice in str(result)
    card = (tmp_path / "first" / CARD_FILE).read_text()
    assert result.choice in card
    assert all(f"| {task} | {found.merged:.3f}" in card for task, found in result.agreement.items())
    merge(**load_recipe(tmp_path / "first" / RECIPE_FILE), output_dir=tmp_path / "again")
    found, expected = weights(tmp_path / "again"), weights(tmp_path / "first")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.cases(1)
@pytest.mark.parametrize("refine", [False, REFINE], ids=["chosen", "refined"])
@pytest.mark.parametrize("given", [KINDS["llama"], KINDS["gpt2, tied"]], ids=["llama", "gpt2"], indirect=True)
def test_the_recipe_of_a_routed_model_names_its_static_method(given, tmp_path, refine):
    arguments, _ = given
    method = {"name": "esm++", "rank": 4}
    result = merge(**arguments, method=method, refine=refine, output_dir=tmp_path / "first")
    assert result.plan.method.static_method in ("regmean", "esm", "mean")
    RoutedModel.from_pretrained(tmp_path / "first")
    card = (tmp_path / "first" / CARD_FILE).read_text()
    assert ("merged without training" in card, "merged without labels" in card) == (not refine, bool(refine))
    merge(**load_recipe(tmp_path / "first" / RECIPE_FILE), output_dir=tmp_path / "again")
    found, expected = weights(tmp_path / "again"), weights(tmp_path / "first")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(HfEsmError, match="Leave `keep_adapter` out"):
        merge(**arguments, method=method, refine={"keep_adapter": True})


@pytest.mark.parametrize("given", [KINDS["llama"]], ids=["llama"], indirect=True)
def test_the_router_of_a_model_that_reads_prompts(given, tmp_path):
    """It decides before the first block, from all samples; what it reads moved from the base on those of the
    statistics.
    """
    arguments, _ = given
    merge(**arguments, method="esm++", refine=False, output_dir=tmp_path / "out", statistics_dir=tmp_path / "known")
    model = RoutedModel.from_pretrained(tmp_path / "out")
    assert model.config.readers == ["model.layers.0.self_attn.q_proj"]
    assert model.config.mixing_temperature == 1
    stored = load_file(tmp_path / "out" / ROUTED_FOLDER / ROUTER_FEATURES)
    (reader,) = model.config.readers
    assert stored.keys() == {f"/{reader}", *(f"{task}/{reader}" for task in TASKS)}
    assert {stored[f"{task}/{reader}"].shape for task in TASKS} == {(16, 4, 16)}
    moved = []
    for task in TASKS:
        (of_base,) = [
            rows
            for name, rows in ActivationStatistics.load(tmp_path / "known" / f"{task}.safetensors").pooled.items()
            if "layers.0." in name
        ]
        assert of_base.shape == (8, 4, 16)
        apart = torch.cdist(stored[f"{task}/{reader}"].flatten(1), of_base.flatten(1))
        assert apart.argmin(0).tolist() == list(range(8))  # the samples of the statistics come first
        moved.append((stored[f"{task}/{reader}"][:8] - of_base).mean((0, 1)))
    assert torch.allclose(stored[f"/{reader}"], torch.stack(moved), atol=1e-6)
