"""Models of Sentence Transformers: read, merged with their modules, written, and refused where they differ."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, BertForMaskedLM

from hf_esm import IncompatibleError, RoutedModel, calibrate, evaluate, load_task_model, merge_models
from hf_esm.architecture import LinearMap, is_routable
from hf_esm.checkpoints import open_checkpoint, resolve_source
from hf_esm.metrics import collect_answers
from support import reference
from support.embedders import (
    TEXTS,
    copy_without_modules,
    dense_weights,
    embeddings_by_hand,
    mean_of,
    pooled,
    projected,
    texts_of,
    token_states,
    write_embedder,
)
from support.helpers import perturbed, save
from support.problems import relative_error
from support.tiny import BERT, assert_refused


DENSE = "sentence_modules.2_Dense.linear.weight"
CALIBRATION = {"one": texts_of(1), "two": texts_of(2)}
quiet = partial(merge_models, progress=False)


def write_three(folder: Path, **settings) -> dict:
    """A base and two experts, as arguments of a merge."""
    names = dict(enumerate(["base", "one", "two"]))
    paths = {name: write_embedder(folder / name, seed, **settings) for seed, name in names.items()}
    return {"base": paths.pop("base"), "experts": paths, "output_dir": folder / "merged"}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return write_three(tmp_path_factory.mktemp("three"))


def cosines(found: Tensor, expected: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(torch.as_tensor(found).double(), expected, dim=1)


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- what is written


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean", ["cls", "mean"]])
def test_the_library_gives_the_embeddings_of_the_merged_modules(tmp_path, pooling, old):
    library = pytest.importorskip("sentence_transformers")
    arguments = write_three(tmp_path, pooling=pooling, old=old, **({} if old else {"prompts": {"query": "so the "}}))
    quiet(method="mean", **arguments)
    experts, inside = list(arguments["experts"].values()), "0_Transformer" if old else "."
    body = mean_of([path / inside / "model.safetensors" for path in experts])
    dense = mean_of([path / "2_Dense" / "model.safetensors" for path in experts])
    model, modes = library.SentenceTransformer(str(tmp_path / "merged"), device="cpu"), [pooling]
    for prompt in ["", *([] if old else ["so the "])]:
        states = token_states(arguments["base"], [prompt + text for text in TEXTS], body)
        expected = projected(pooled(states, *(pooling if isinstance(pooling, list) else modes)), dense)
        found = torch.tensor(model.encode(TEXTS, **({"prompt_name": "query"} if prompt else {})))
        assert cosines(found, expected).min() > 1 - 1e-5
        assert torch.allclose(found.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-5)
    assert model.max_seq_length == 24


@pytest.mark.parametrize("method", ["esm", "regmean", "tsv-m", "ties"])
def test_every_method_writes_a_model_that_the_library_reads(three, tmp_path, method):
    library = pytest.importorskip("sentence_transformers")
    folder = quiet(**{**three, "output_dir": tmp_path / "merged"}, method=method, calibration=CALIBRATION).output_dir
    found = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert cosines(found, embeddings_by_hand(folder, TEXTS, "mean")).min() > 1 - 1e-5
    # Not the modules of the base, nor those of an expert:
    stored = load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"]
    others = [
        load_file(path / "2_Dense" / "model.safetensors") for path in (three["base"], *three["experts"].values())
    ]
    assert all((stored - other["linear.weight"]).abs().max() > 1e-3 for other in others)


def test_dense_modules_are_merged_on_the_pooled_embeddings_that_they_read(three, tmp_path):
    method = {"name": "regmean"}
    folder = quiet(**{**three, "output_dir": tmp_path / "m"}, method=method, calibration=CALIBRATION).output_dir
    inputs = [pooled(token_states(path, CALIBRATION[task]), "mean") for task, path in three["experts"].items()]
    paths = [path / "2_Dense" / "model.safetensors" for path in (three["base"], *three["experts"].values())]
    base, *tuned = (load_file(path) for path in paths)
    merged = load_file(folder / "2_Dense" / "model.safetensors")
    deltas = [weights["linear.weight"] - base["linear.weight"] for weights in tuned]
    assert relative_error(merged["linear.weight"] - base["linear.weight"], reference.regmean(deltas, inputs)) < 1e-4
    biases = [weights["linear.bias"] - base["linear.bias"] for weights in tuned]
    assert relative_error(merged["linear.bias"] - base["linear.bias"], reference.mean(biases)) < 1e-4


def test_statistics_of_a_dense_module_are_of_one_embedding_per_text(three):
    path = three["experts"]["one"]
    found = calibrate(path, CALIBRATION["one"], progress=False, num_samples=0)[DENSE]
    expected = pooled(token_states(path, CALIBRATION["one"]), "mean")
    assert found.count == len(expected)
    assert relative_error(found.factor.double().T @ found.factor.double(), expected.T @ expected) < 1e-5


def test_texts_are_cut_as_the_library_cuts_them(three):
    found = calibrate(three["experts"]["one"], ["so " * 40], progress=False)
    assert found["encoder.layer.0.attention.self.query.weight"].count == 24


def test_the_recipe_repeats_the_merge_and_the_card_says_how_to_embed(three, tmp_path):
    folder = quiet(**{**three, "output_dir": tmp_path / "merged"}, method="mean", dtype="float16").output_dir
    assert load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"].dtype == torch.float16
    card = (folder / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "SentenceTransformer(" in card
    names = {line["name"] for line in json.loads((folder / "merge_report.json").read_text())["weights"]}
    assert DENSE in names and not any("sentence_modules" in name for name in load_file(folder / "model.safetensors"))


# ---- what is read


MODES = [["cls"], ["mean"], ["max"], ["mean_sqrt_len_tokens"], ["weightedmean"], ["lasttoken"], ["lasttoken", "max"]]


@pytest.mark.parametrize("modes", MODES, ids="+".join)
@torch.no_grad()
def test_a_loaded_model_answers_with_the_embeddings_of_its_modules(tmp_path, modes):
    folder = write_embedder(tmp_path / "one", 1, pooling=modes if len(modes) > 1 else modes[0])
    model = open_checkpoint(resolve_source(folder, "one")).load_model()
    samples = [{"input_ids": torch.tensor(ids)} for ids in ([2, 5, 6, 3], [2, 7, 3], [2, 9, 9, 10, 11, 3])]
    answers = collect_answers(model, samples, progress=False, batch_size=3)
    with torch.no_grad():
        states = [model(s["input_ids"][None]).last_hidden_state[0].double() for s in samples]
    expected = projected(pooled(states, *modes), load_file(folder / "2_Dense" / "model.safetensors"))
    for answer, vector in zip(answers.answers, expected / expected.norm(dim=1, keepdim=True)):
        assert torch.allclose(answer["vectors"][0].double(), vector, atol=1e-5)


def test_residual_dense_modules_and_norms_are_computed_as_the_library_does(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    folder = write_embedder(tmp_path / "one", 1, normalised=False)
    change_json(folder / "2_Dense" / "config.json", use_residual=True)
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    weights["residual.weight"] = torch.randn(8, 16)
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    (folder / "3_LayerNorm").mkdir()
    (folder / "3_LayerNorm" / "config.json").write_text(json.dumps({"dimension": 8}))
    save_file({"norm.weight": torch.randn(8), "norm.bias": torch.randn(8)}, folder / "3_LayerNorm/model.safetensors")
    listed = json.loads((folder / "modules.json").read_text())
    kind = "sentence_transformers.sentence_transformer.modules.LayerNorm"
    listed.append({"idx": 3, "name": "3", "path": "3_LayerNorm", "type": kind})
    (folder / "modules.json").write_text(json.dumps(listed))
    expected = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True).double()
    model = open_checkpoint(resolve_source(folder, "one")).load_model()
    with torch.no_grad():
        tokenizer = library.SentenceTransformer(str(folder), device="cpu").tokenizer
        found = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).sentence_embedding
    assert relative_error(found, expected) < 1e-5


def test_an_expert_without_modules_and_an_adapter_are_merged_with_those_of_the_base(three, tmp_path):
    bare = copy_without_modules(three["experts"]["one"], tmp_path / "bare")
    model = get_peft_model(AutoModel.from_pretrained(three["base"]), LoraConfig(target_modules=["query"], r=2))
    torch.nn.init.normal_(model.base_model.model.encoder.layer[0].attention.self.query.lora_B.default.weight)
    model.save_pretrained(tmp_path / "lora")
    experts = {"one": bare, "two": tmp_path / "lora"}
    folder = quiet(three["base"], experts, method="esm", calibration=CALIBRATION, output_dir=tmp_path / "m").output_dir
    stored = load_file(folder / "2_Dense" / "model.safetensors")
    assert all(torch.equal(stored[name], weight) for name, weight in dense_weights(0).items())


def test_an_adapter_with_a_dense_module_of_its_own_changes_that_module(three, tmp_path):
    model = get_peft_model(AutoModel.from_pretrained(three["base"]), LoraConfig(target_modules=["query"], r=2))
    torch.nn.init.normal_(model.base_model.model.encoder.layer[0].attention.self.query.lora_B.default.weight)
    shutil.copytree(three["experts"]["two"], tmp_path / "lora", ignore=shutil.ignore_patterns("model.s*", "config.j*"))
    for name in ("1_Pooling", "2_Dense"):
        shutil.copytree(three["experts"]["two"] / name, tmp_path / "lora" / name, dirs_exist_ok=True)
    model.save_pretrained(tmp_path / "lora")
    experts = {"one": three["experts"]["one"], "two": tmp_path / "lora"}
    folder = quiet(three["base"], experts, method="mean", output_dir=tmp_path / "merged").output_dir
    expected = mean_of([three["experts"][task] / "2_Dense" / "model.safetensors" for task in experts])
    assert (
        relative_error(load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"], expected["linear.weight"])
        < 1e-6
    )


def test_a_masked_language_model_is_read_as_the_body_that_the_library_loads(three, tmp_path):
    masked = BertForMaskedLM(BERT.build("BertForMaskedLM").config)
    masked.bert.load_state_dict(BERT.build("BertModel").state_dict(), strict=False)
    base = save(masked, tmp_path / "base")
    folder = quiet(base, three["experts"], method="mean", output_dir=tmp_path / "merged").output_dir
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    expected = mean_of([path / "model.safetensors" for path in three["experts"].values()])
    stored = load_file(folder / "model.safetensors")
    assert all(relative_error(stored[name], expected[name]) < 1e-6 for name in stored)


# ---- what the base lacks


def test_a_base_without_modules_gets_those_of_the_experts(three, tmp_path):
    bare = copy_without_modules(three["base"], tmp_path / "bare")
    result = quiet(bare, three["experts"], method="mean", output_dir=tmp_path / "merged")
    assert any("no dense modules" in warning for warning in result.warnings)
    expected = mean_of([path / "2_Dense" / "model.safetensors" for path in three["experts"].values()])
    stored = load_file(result.output_dir / "2_Dense" / "model.safetensors")
    assert relative_error(stored["linear.weight"], expected["linear.weight"]) < 1e-6
    live = AutoModel.from_pretrained(bare)
    again = quiet(live, three["experts"], method="mean", output_dir=tmp_path / "live").output_dir
    assert torch.equal(load_file(again / "2_Dense" / "model.safetensors")["linear.weight"], stored["linear.weight"])
    assert not hasattr(live, "sentence_modules") and not live._forward_hooks


PROMPTS = [
    ({"query": "a: "}, {"query": "b: "}, {"query": "b: "}, {"query": "a: "}, 1),
    ({"query": ""}, {"query": "b: "}, {"query": "b: "}, {"query": "b: "}, 0),
    ({}, {"query": "b: "}, {"query": "c: ", "document": ""}, {"document": ""}, 1),
    ({"query": "a: "}, {}, {"query": "a: ", "document": "d: "}, {"query": "a: ", "document": "d: "}, 0),
]


@pytest.mark.parametrize("base, one, two, expected, warned", PROMPTS)
def test_prompts_are_those_of_the_base_or_of_the_experts_that_agree(tmp_path, base, one, two, expected, warned):
    arguments = write_three(tmp_path)
    for folder, prompts in zip([arguments["base"], *arguments["experts"].values()], [base, one, two]):
        change_json(folder / "config_sentence_transformers.json", prompts=prompts)
    result = quiet(method="mean", **arguments)
    stored = json.loads((result.output_dir / "config_sentence_transformers.json").read_text())
    assert stored["prompts"] == expected and stored["similarity_fn_name"] == "cosine"
    assert sum("its prompt" in warning for warning in result.warnings) == warned


# ---- what cannot be merged


CHANGED = [
    ("1_Pooling", {"pooling_mode": "cls"}, "pooling by cls", "pooling by mean"),
    ("1_Pooling", {"include_prompt": False}, "without prompts", "pooling by mean"),
    ("2_Dense", {"activation_function": "torch.nn.ReLU"}, "(ReLU)", "(Tanh)"),
]


@pytest.mark.parametrize("place, changes, one, other", CHANGED)
def test_experts_that_embed_otherwise_are_refused(tmp_path, place, changes, one, other):
    arguments = write_three(tmp_path)
    change_json(arguments["experts"]["two"] / place / "config.json", **changes)
    assert_refused(tmp_path, ["expert 'two'", one, other], {**arguments, "method": "mean"})
    bare = copy_without_modules(arguments["base"], tmp_path / "bare")
    with pytest.raises(IncompatibleError, match="expert 'two'"):
        quiet(**{**arguments, "base": bare}, method="mean")


def test_an_expert_that_does_not_normalise_is_refused(tmp_path):
    arguments = write_three(tmp_path)
    shutil.rmtree(arguments["experts"]["one"])
    write_embedder(arguments["experts"]["one"], 1, normalised=False)
    assert_refused(tmp_path, ["expert 'one'", "normalisation"], {**arguments, "method": "mean"})


def test_modules_outside_of_the_folder_and_modules_that_cannot_be_read_are_refused(tmp_path):
    arguments = write_three(tmp_path)
    path = arguments["experts"]["two"] / "modules.json"
    listed = json.loads(path.read_text())
    listed[2]["path"] = "../one/2_Dense"
    path.write_text(json.dumps(listed))
    assert_refused(tmp_path, ["'../one/2_Dense'"], {**arguments, "method": "mean"})
    path.write_text("[{}]")
    assert_refused(tmp_path, ["modules.json is damaged"], {**arguments, "method": "mean"})
    listed[2]["path"] = "2_Dense"
    path.write_text(json.dumps(listed))
    (path.parent / "2_Dense" / "model.safetensors").unlink()
    assert_refused(tmp_path, ["no model.safetensors", "2_Dense"], {**arguments, "method": "mean"})


def test_gates_of_dense_modules_are_folded_and_refused_in_an_adapter(three, tmp_path):
    samples = {task: texts_of(seed, 20) for seed, task in enumerate(three["experts"])}
    arguments = {**three, "output_dir": tmp_path / "refined", "calibration": samples}
    says = ["dense modules", "Leave `keep_adapter` out"]
    assert_refused(tmp_path, says, {**arguments, "refine": {"keep_adapter": True}})
    refined = quiet(**arguments, refine={"steps": 4})
    plain = quiet(**{**arguments, "output_dir": tmp_path / "plain"})
    found, other = (load_file(r.output_dir / "2_Dense" / "model.safetensors") for r in (refined, plain))
    assert refined.refined and not torch.equal(found["linear.weight"], other["linear.weight"])


def add_module(folder: Path, kind: str, config: dict) -> None:
    """A module of a kind that is not known here."""
    listed = json.loads((folder / "modules.json").read_text())
    path = f"{len(listed)}_{kind}"
    (folder / path).mkdir()
    (folder / path / "config.json").write_text(json.dumps(config))
    listed.append({"idx": len(listed), "name": path, "path": path, "type": f"sentence_transformers.models.{kind}"})
    (folder / "modules.json").write_text(json.dumps(listed))


def test_other_modules_are_carried_where_they_are_equal_and_refused_where_not(tmp_path):
    arguments = write_three(tmp_path)
    for folder in (arguments["base"], *arguments["experts"].values()):
        add_module(folder, "WordWeights", {"weights": [1, 2]})
    folder = quiet(method="esm", calibration=CALIBRATION, **arguments).output_dir
    assert json.loads((folder / "4_WordWeights" / "config.json").read_text()) == {"weights": [1, 2]}
    assert len(json.loads((folder / "modules.json").read_text())) == 5
    change_json(arguments["experts"]["two"] / "4_WordWeights" / "config.json", weights=[2, 2])
    arguments["output_dir"] = tmp_path / "again"
    assert_refused(tmp_path, ["expert 'two'", "WordWeights"], {**arguments, "method": "mean"})


def test_cross_encoders_are_classifiers_as_any_other(tmp_path):
    for seed, name in enumerate(["base", "one", "two"]):
        save(perturbed(BERT.build(num_labels=1), 0.1 * bool(seed), seed), tmp_path / name)
        kind = "sentence_transformers.base.modules.transformer.Transformer"
        (tmp_path / name / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
        settings = json.dumps({"transformer_task": "sequence-classification"})
        (tmp_path / name / "sentence_bert_config.json").write_text(settings)
    experts = {task: tmp_path / task for task in ("one", "two")}
    folder = quiet(tmp_path / "base", experts, method="mean", output_dir=tmp_path / "merged").output_dir
    head = load_task_model(folder, "one").classifier.weight
    assert torch.equal(head, load_file(tmp_path / "one" / "model.safetensors")["classifier.weight"])


# ---- what is measured


def test_agreement_is_of_the_embeddings_and_alpha_is_searched_by_it(three, tmp_path):
    samples = {task: texts_of(seed, 20) for seed, task in enumerate(three["experts"])}
    result = quiet(
        **{**three, "output_dir": tmp_path / "m"}, method="task-arithmetic", alpha="auto", calibration=samples
    )
    assert result.chosen_by == "agreement" and max(result.alpha_scores.values()) > 0.1

    def divergence(folder: Path) -> float:
        pairs = [(embeddings_by_hand(folder, texts, "mean"), task) for task, texts in samples.items()]
        own = {t: embeddings_by_hand(three["experts"][t], texts, "mean") for t, texts in samples.items()}
        return sum(float((1 - (found * own[task]).sum(1)).mean()) for found, task in pairs)

    assert divergence(result.output_dir) < divergence(three["base"])


@pytest.fixture(scope="module")
def routed(three, tmp_path_factory):
    output = tmp_path_factory.mktemp("routed") / "model"
    method = {"name": "esm++", "expert_directions": "residual"}
    return quiet(**{**three, "output_dir": output}, method=method, rank=64, calibration=CALIBRATION).output_dir


def test_a_routed_model_embeds_inside_the_library(three, routed, tmp_path):
    pytest.importorskip("sentence_transformers")
    model = RoutedModel.from_pretrained(routed)
    assert not any("sentence_modules" in name for name in load_file(routed / "routed" / "adapter_model.safetensors"))
    assert not is_routable(DENSE, LinearMap(DENSE, DENSE.removesuffix(".weight")))
    embedder = model.sentence_transformer()
    dense = load_file(routed / "2_Dense" / "model.safetensors")
    for task, path in three["experts"].items():
        body = {
            n: w for n, w in load_file(path / "model.safetensors").items() if n.endswith("weight") and w.dim() == 2
        }
        static = load_file(routed / "model.safetensors")
        expert = static | {n: w for n, w in body.items() if "embeddings" not in n and "pooler" not in n}
        with model.route(task):
            found = embedder.encode(TEXTS, batch_size=3)
        assert cosines(found, projected(pooled(token_states(routed, TEXTS, expert), "mean"), dense)).min() > 1 - 1e-5
    with torch.no_grad():
        texts = [*CALIBRATION["one"][:3], *CALIBRATION["two"][:3]]
        alone = [model(**model.processor(t, return_tensors="pt")).last_hidden_state[0].double() for t in texts]
    assert cosines(embedder.encode(texts), projected(pooled(alone, "mean"), dense)).min() > 1 - 1e-5
    with pytest.raises(Exception, match=r"RoutedModel\.save_pretrained"):
        embedder.save(str(tmp_path / "saved"))


def test_a_saved_copy_of_a_routed_model_embeds_the_same(routed, tmp_path):
    pytest.importorskip("sentence_transformers")
    copy = RoutedModel.from_pretrained(routed).save_pretrained(tmp_path / "copy")
    assert {path.relative_to(copy) for path in copy.rglob("*")} == {p.relative_to(routed) for p in routed.rglob("*")}
    first, second = (RoutedModel.from_pretrained(folder).sentence_transformer() for folder in (routed, copy))
    assert torch.equal(*(torch.tensor(model.encode(TEXTS)) for model in (first, second)))


def test_a_model_of_a_task_embeds_too(routed, three):
    model, static = RoutedModel.from_pretrained(routed), load_task_model(routed, "one")
    inputs = model.processor(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad(), model.route("static"):
        expected = static(**inputs).sentence_embedding
        assert relative_error(model.task_model("one")(**inputs).sentence_embedding, expected) < 1e-5
    assert cosines(expected, embeddings_by_hand(routed, TEXTS, "mean")).min() > 1 - 1e-5


def test_pairs_score_merged_routed_and_expert_models(routed, three, tmp_path):
    rows = [{"text": a, "text_pair": b, "label": i} for i, (a, b) in enumerate(zip(texts_of(5), texts_of(6)))]
    data = dict.fromkeys(three["experts"], rows)
    scores = evaluate(routed, data, experts=three["experts"], metric="similarity")
    assert scores.model.keys() == scores.expert.keys() == data.keys() and scores.routing
    for task, path in three["experts"].items():
        first, second = (embeddings_by_hand(path, [row[c] for row in rows], "mean") for c in ("text", "text_pair"))
        order = (first * second).sum(1).argsort().argsort().double()
        expected = torch.corrcoef(torch.stack([order, torch.arange(len(rows)).double()]))[0, 1]
        assert scores.expert[task] == pytest.approx(float(expected), abs=1e-6)
    found = evaluate(routed, data, metric="mrr@10", route="static").model["one"]
    first, second = (embeddings_by_hand(routed, [row[c] for row in rows], "mean") for c in ("text", "text_pair"))
    ranks = (first @ second.T >= (first * second).sum(1, keepdim=True) - 1e-12).sum(1)
    assert found == pytest.approx(float(sum(1 / r if r <= 10 else 0 for r in ranks.tolist()) / len(rows)), abs=1e-6)
