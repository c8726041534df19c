"""ESM++ as a method of `merge_models`, and the `RoutedModel` that it makes: against the literal formulas of
`reference`, the static merge, the experts themselves, and PEFT alone.
"""

import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModel,
    BertModel,
    GenerationConfig,
    GPT2LMHeadModel,
    ViTForImageClassification,
    ViTModel,
)

from hf_esm import (
    HfEsmError,
    RoutedModel,
    RoutedPipeline,
    calibrate,
    load_recipe,
    load_task_model,
    merge_models,
)
from hf_esm.data.batches import batch_for, collate
from hf_esm.hub import write_hashes
from hf_esm.tuners.routed.model import Uncompiled, recording
from support.architectures import ARCHITECTURES
from support.helpers import image_samples, save, token_inputs
from support.routed_toys import (
    EXACT,
    FULL,
    VIT,
    adapter,
    assert_expert,
    encoded,
    equal,
    expert,
    inputs,
    logits,
    merge_bert,
    quiet,
    task_ids,
    task_texts,
    tuned,
)
from support.tiny import BERT, GPT2, forbid_calibration
from support.toys import LABELS, base_model, classifier, lora_adapter


pytestmark = pytest.mark.slow


QUERY = "encoder.layer.1.attention.self.query"
DOWN = "encoder.layer.0.output.dense"
CHECKED = (QUERY, DOWN, "encoder.layer.0.intermediate.dense")
MIXED = [text for pair in zip(task_texts("a", 7), task_texts("b", 8)) for text in pair]  # a, b, a, b, …


# ---- the merge


@pytest.fixture(scope="module")
def small(models):
    """An ESM++ model of rank 4 with the published router."""
    method = {"name": "esm++", "router": "prototype", "tolerance": 0}
    return merge_bert(models, models / "small", rank=4, method=method)


def test_the_static_model_is_the_plain_merge_and_the_adapter_a_plain_one(models, small):
    plain = merge_bert(models, models / "plain", rank=None, method={"name": "esm", "tolerance": 0})
    found, expected = AutoModel.from_pretrained(small), AutoModel.from_pretrained(plain)
    assert type(found) is BertModel
    assert equal(found.state_dict(), expected.state_dict())
    assert not (plain / "routed").exists()
    loaded = PeftModel.from_pretrained(found, small, subfolder="routed")
    assert loaded.peft_config["default"].tasks == ["a", "b"]
    for name, tensor in adapter(small).items():
        module, _, kind = name.rpartition(".")
        assert torch.equal(getattr(loaded.get_base_model().get_submodule(module), kind)["default"], tensor)


def test_factors_and_prototypes_are_the_literal_formulas(small):
    static, found = AutoModel.from_pretrained(small).state_dict(), adapter(small)
    for i, task in enumerate("ab"):
        own = expert(task).state_dict()
        for module in CHECKED:
            x = inputs(task)[f"bert.{module}.weight"]
            residual = own[f"bert.{module}.weight"].double() - static[f"{module}.weight"].double()
            a, b = (found[f"{module}.routed_experts_{kind}"][i] for kind in "AB")
            assert_expert(a, b, x, residual, 4)
            mean = x.mean(0) / x.mean(0).norm()
            assert torch.allclose(found[f"{module}.routed_experts_prototypes"][i].double(), mean, atol=1e-5)
    assert not any("pooler" in name for name in found)  # the tasks' own


def test_adapters_of_lora_experts_hold_what_the_merge_lost_of_them(models, tmp_path):
    adapted = lora_adapter(base_model(), "b", str(models / "base"))
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    given = {"calibration": {task: task_texts(task) for task in "ab"}, "rank": 4, "method": "esm++"}
    quiet(models / "base", {"a": models / "a", "b": tmp_path / "lora"}, output_dir=tmp_path / "out", **given)
    static, found, own = AutoModel.from_pretrained(tmp_path / "out").state_dict(), adapter(tmp_path / "out"), adapted
    own = own.merge_and_unload()
    x = token_inputs(own, encoded(task_texts("b")), BERT)
    for module in CHECKED:
        residual = own.state_dict()[f"bert.{module}.weight"].double() - static[f"{module}.weight"].double()
        update = own.state_dict()[f"bert.{module}.weight"].double() - base_model().state_dict()[f"{module}.weight"]
        a, b = (found[f"{module}.routed_experts_{kind}"][1] for kind in "AB")
        assert_expert(a, b, x[f"bert.{module}.weight"], residual, 4, update)


def test_the_recipe_repeats_the_merge(merged, tmp_path):
    again = merge_models(**load_recipe(merged / "merge_recipe.yaml"), output_dir=tmp_path / "again", progress=False)
    for name in ("model.safetensors", "routed/adapter_model.safetensors", "routed/adapter_config.json", "hashes.json"):
        assert (again.output_dir / name).read_bytes() == (merged / name).read_bytes()


def test_a_merge_in_bfloat16_has_experts_in_float32(models, tmp_path):
    merge_bert(models, tmp_path / "out", dtype="bfloat16")
    found = RoutedModel.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.model.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in adapter(tmp_path / "out").values()} == {torch.float32}
    full = RoutedModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    samples = encoded(task_texts("b", 4))
    with full.route("b"):
        lost = logits(full.task_model("b"), samples) - logits(expert("b"), samples)
    assert lost.abs().max() < 0.02  # of logits of about 0.3: what rounding the static model lost


def test_a_router_of_the_base_needs_no_samples(models, statistics, tmp_path):
    """The router is the same from samples, over which the base runs, and from statistics with the base's features."""
    by_hand = {**EXACT, "router_features": "base"}
    merge_bert(models, tmp_path / "samples", method=by_hand)
    merge_bert(models, tmp_path / "statistics", calibration={t: statistics[t] for t in "ab"})
    assert equal(adapter(tmp_path / "samples"), adapter(tmp_path / "statistics"))
    found = RoutedModel.from_pretrained(tmp_path / "statistics")
    assert [p.task for p in found.predict(MIXED)] == ["a", "b"] * 16
    assert "model.predict(" in (found.folder / "README.md").read_text()


def test_a_router_never_mixes_features_of_two_models(models, statistics, tmp_path):
    """If one task has samples and one has statistics, the features of both are those of the base."""
    given = {"a": task_texts("a"), "b": statistics["b"]}
    merge_bert(models, tmp_path / "mixed", calibration=given)
    merge_bert(models, tmp_path / "expected", calibration={t: statistics[t] for t in "ab"})
    assert equal(adapter(tmp_path / "mixed"), adapter(tmp_path / "expected"))


REFUSED = {
    "a rank of no experts": ({"method": "esm", "rank": 4}, "Method 'esm' has no experts, so no rank."),
    "no pooled inputs": ({"pooled": False}, "Calibrate again with the base (`hf-esm calibrate --base`)"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_merge_that_cannot_be_routed_is_refused(models, statistics, tmp_path, changes, message):
    options = dict(changes)
    if not options.pop("pooled", True):
        options["calibration"] = {t: calibrate(models / t, task_texts(t), progress=False) for t in "ab"}
    with pytest.raises(HfEsmError) as caught:
        merge_bert(models, tmp_path / "out", **options)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_where_there_is_nothing_to_route_experts_on_it_is_said(monkeypatch):
    forbid_calibration(monkeypatch)
    base = ARCHITECTURES["resnet"].build()
    for method in ("esm++", "tsv-c"):
        with pytest.raises(HfEsmError, match="has no linear maps to route experts on"):
            merge_models(base, {"a": base, "b": base}, method=method, progress=False)


def test_a_router_over_several_texts_per_sample_is_refused(models, monkeypatch):
    forbid_calibration(monkeypatch)
    experts = {task: tuned(BERT.build("BertForMultipleChoice"), seed) for seed, task in enumerate("ab")}
    calibration = dict.fromkeys(experts, [{"input_ids": torch.randint(5, 20, (2, 6))}] * 8)
    for base in (BERT.build("BertModel"), experts["a"]):
        for dry_run in (True, False):
            arguments = {"calibration": calibration, "dry_run": dry_run, "heads": "keep", "method": "esm++"}
            with pytest.raises(HfEsmError, match="BertForMultipleChoice reads several texts for each sample"):
                merge_models(base, experts, progress=False, **arguments)


@pytest.mark.parametrize(("name", "says"), [("xlnet", "read tokens first"), ("llava", "reads text with any number")])
@pytest.mark.parametrize("router", ["discriminant", "prototype"])
def test_a_router_over_samples_that_cannot_be_told_apart_is_refused_early(monkeypatch, name, says, router):
    forbid_calibration(monkeypatch)
    base = ARCHITECTURES[name].build()
    experts = {"a": tuned(base, 1), "b": tuned(base, 2)}
    calibration = dict.fromkeys(experts, ARCHITECTURES[name].samples(0))
    for dry_run in (True, False):
        with pytest.raises(HfEsmError, match=says):
            method = {"name": "esm++", "router": router}
            merge_models(base, experts, calibration=calibration, method=method, dry_run=dry_run, progress=False)


@pytest.mark.parametrize("method", [{"name": "esm++", "router": "oracle"}, {"name": "tsv-c", "rank": 4}])
@pytest.mark.parametrize("name", ["xlnet", "longformer"])
def test_where_samples_cannot_be_told_apart_one_task_is_named_for_all(name, method, tmp_path):
    """The output is that with the expert's LoRA adapter."""
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    experts = {"a": tuned(base, 1), "b": tuned(base, 2)}
    samples = architecture.samples(0)
    calibration = dict.fromkeys(experts, samples)
    merge_models(base, experts, calibration=calibration, method=method, output_dir=tmp_path / "out", progress=False)
    routed = RoutedModel.from_pretrained(tmp_path / "out")
    adapters = routed.export_lora(tmp_path / "lora")
    batch = collate([samples[0]] * 3, base.config)

    def answer(model):
        with torch.no_grad():
            return model(**batch)[0]

    found = {"static": answer(AutoModel.from_pretrained(tmp_path / "out").eval())}
    for task in experts:
        lora = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "out"), str(adapters[task])).eval()
        found[task] = answer(lora)
    assert not torch.allclose(found["a"], found["b"], atol=1e-4)
    for task, expected in found.items():
        for given in (task, [task] * 3):
            with routed.route(given):
                assert torch.allclose(answer(routed), expected, atol=1e-5)
    with pytest.raises(HfEsmError, match="Name one task for all of a batch"), routed.route(["a", "b", "a"]):
        pass


# ---- the model


def test_a_saved_copy_gives_the_same(merged, routed, tmp_path):
    copy = routed.save_pretrained(tmp_path / "copy")
    again = RoutedModel.from_pretrained(copy)
    for task in "ab":
        samples = encoded(task_texts(task, 3))
        assert torch.equal(logits(again.task_model(task), samples), logits(routed.task_model(task), samples))
    with pytest.raises(HfEsmError, match="exists"):
        again.save_pretrained(copy)
    (copy / "stale").touch()
    assert routed.save_pretrained(copy, overwrite=True) == copy
    assert not (copy / "stale").exists()


def test_trained_experts_are_saved_and_nothing_else_is_made_of_the_old_ones(merged, models, statistics, tmp_path):
    routed = RoutedModel.from_pretrained(merged)
    with torch.no_grad():
        routed.model.get_base_model().get_submodule(QUERY).routed_experts_B["default"].mul_(1.5)
    for use in (
        lambda: routed.export_lora(tmp_path / "lora"),
        lambda: routed.push_to_hub("me/routed"),
        lambda: routed.add_expert("c", models / "c", statistics["c"], output_dir=tmp_path / "more"),
        lambda: routed.remove_expert("a", output_dir=tmp_path / "less"),
    ):
        with pytest.raises(HfEsmError, match="experts or heads were trained since they were loaded"):
            use()
    assert not list(tmp_path.iterdir())
    again = RoutedModel.from_pretrained(routed.save_pretrained(tmp_path / "trained"))
    again.export_lora(tmp_path / "lora")
    assert [path.name for path in tmp_path.iterdir()] != []
    for model, same in ((routed, True), (RoutedModel.from_pretrained(merged), False)):
        samples = encoded(task_texts("a", 3))
        with model.route("a"):
            before = logits(model.task_model("a"), samples)
        with again.route("a"):
            assert torch.equal(logits(again.task_model("a"), samples), before) == same


def test_heads_that_were_trained_are_saved(merged, tmp_path):
    routed, samples = RoutedModel.from_pretrained(merged), encoded(task_texts("a", 3))
    before = routed.predict(MIXED, tasks="b")
    with torch.no_grad():
        routed.task_model("a").classifier.bias.add_(torch.tensor([3.0, -1.0]))
    with pytest.raises(HfEsmError, match="experts or heads were trained since"):
        routed.export_lora(tmp_path / "lora")
    again = RoutedModel.from_pretrained(routed.save_pretrained(tmp_path / "trained"))
    with routed.route("a"), again.route("a"):
        assert torch.equal(logits(again.task_model("a"), samples), logits(routed.task_model("a"), samples))
    assert again.predict(MIXED, tasks="b") == before
    again.export_lora(tmp_path / "lora")  # refused if anything differed from the files
    changed = {
        p.relative_to(merged)
        for p in merged.rglob("*.safetensors")
        if p.read_bytes() != (tmp_path / "trained" / p.relative_to(merged)).read_bytes()
    }
    assert [str(path) for path in changed] == ["heads/a/head.safetensors"]


def test_saving_replaces_what_a_merge_wrote_and_nothing_else(merged, routed, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("…")
    with pytest.raises(HfEsmError, match="was not written by a merge"):
        routed.save_pretrained(tmp_path / "mine", overwrite=True)
    (tmp_path / "link").symlink_to(merged)
    with pytest.raises(HfEsmError, match="is a link"):
        routed.save_pretrained(tmp_path / "link", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists() and (tmp_path / "link").is_symlink()
    copied = routed.save_pretrained(tmp_path / "copy")
    assert routed.save_pretrained(copied, overwrite=True) == copied


def test_a_decoder_without_a_padding_token_reads_texts_singly(tmp_path):
    base = GPT2.build("GPT2Model", n_layer=3)
    head = GPT2.build("GPT2ForSequenceClassification", n_layer=3)
    head.transformer.load_state_dict(base.state_dict())
    assert head.config.pad_token_id is None
    calibration = {task: task_ids(task) for task in "ab"}
    experts = {task: tuned(head, seed) for seed, task in enumerate("ab")}
    quiet(base, experts, calibration=calibration, rank=4, output_dir=tmp_path / "out")
    routed, rows = RoutedModel.from_pretrained(tmp_path / "out"), [*task_ids("a", 3, 4), *task_ids("b", 3, 4)]
    assert routed.predict(rows) == [routed.predict([row])[0] for row in rows]
    assert len(routed.predict(rows, tasks="a")) == len(routed.explain(rows)) == 8


@pytest.mark.parametrize("rows", [{"text": "so so"}, {"text": "so so", "text_pair": "bad"}])
def test_one_row_is_no_column(routed, rows):
    with pytest.raises(HfEsmError, match="'text' is one text, not a column"):
        routed.predict(rows)


def test_in_half_precision_experts_and_router_stay_as_they_are(merged):
    routed, exact = RoutedModel.from_pretrained(merged).to(torch.bfloat16), RoutedModel.from_pretrained(merged)
    assert routed.model.dtype == torch.bfloat16
    before = {name: tensor for name, tensor in exact.model.state_dict().items() if "routed_experts" in name}
    after = {name: tensor for name, tensor in routed.model.state_dict().items() if "routed_experts" in name}
    assert equal(after, before)
    assert [p.task for p in routed.predict(MIXED)] == ["a", "b"] * 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_are_cast_with_the_body_whenever_they_are_attached(merged, dtype):
    routed = RoutedModel.from_pretrained(merged)
    assert routed.dtype == torch.float32
    before = routed.task_model("a")
    cast = {torch.float16: routed.half, torch.bfloat16: routed.bfloat16}[dtype]
    assert cast() is routed
    assert routed.dtype == dtype
    for model in (before, routed.task_model("b")):
        kinds = {weight.dtype for name, weight in model.named_parameters() if "routed_experts" not in name}
        assert kinds == {dtype}
    kinds = {tensor.dtype for name, tensor in routed.model.state_dict().items() if "routed_experts" in name}
    assert kinds == {torch.float32}


def test_a_head_follows_the_body_that_is_cast_by_itself(merged, routed):
    cast = RoutedModel.from_pretrained(merged)
    with torch.no_grad():
        cast.task_model("a").classifier.bias.add_(1)  # as training does
        cast.model.to(torch.bfloat16)
        head = cast.task_model("a").classifier
        assert torch.equal(head.bias, (routed.task_model("a").classifier.bias + 1).bfloat16())
    assert [p.task for p in cast.predict(MIXED)] == [p.task for p in routed.predict(MIXED)]


def test_training_and_evaluation_mode_reach_the_heads_whenever_they_are_attached(merged):
    routed = RoutedModel.from_pretrained(merged)
    attached = [routed.task_model("a")]
    for mode in (True, False):
        assert (routed.train() if mode else routed.eval()) is routed
        attached.append(routed.task_model("b"))
        for model in (routed.model, *attached):
            assert {module.training for module in model.modules()} == {mode}
    late = RoutedModel.from_pretrained(merged).train()
    assert {module.training for module in late.task_model("a").modules()} == {True}
    assert {module.training for module in late.model.modules()} == {True}


def test_a_models_repr_is_one_line_that_names_its_experts(merged, routed):
    assert repr(routed) == (
        f"RoutedModel({str(merged)!r}: BertModel with experts of a, b; router: discriminant; torch.float32, cpu)"
    )


def test_a_head_that_does_not_stand_on_a_device_is_refused(merged, tmp_path):
    """Weights that are loaded over offloaded ones would silently be lost."""
    places = {"bert": "cpu", "classifier": "disk"}
    with pytest.raises(HfEsmError, match="of the head, which must be on a device"):
        load_task_model(merged, "a", device_map=places, offload_folder=str(tmp_path))


def test_task_models_of_a_model_that_accelerate_dispatched_have_their_own_heads(merged, routed):
    dispatched = RoutedModel.from_pretrained(merged)
    add_hook_to_module(dispatched.model.get_base_model(), AlignDevicesHook("cpu", io_same_device=True))
    for task in "ab":
        samples = encoded(task_texts(task, 3))
        assert torch.equal(logits(dispatched.task_model(task), samples), logits(routed.task_model(task), samples))


def test_it_is_loaded_with_all_that_belongs_to_it(merged, routed):
    assert routed.tasks == ["a", "b"]
    assert routed.processor("one so").keys() >= {"input_ids", "attention_mask"}
    half = RoutedModel.from_pretrained(merged, dtype=torch.bfloat16)
    assert half.task_model("a").dtype == half.model.dtype == torch.bfloat16
    assert half.task_model("a").classifier.weight.dtype == torch.bfloat16
    assert [p.task for p in half.predict(MIXED)] == ["a", "b"] * 16


def test_task_models_share_the_body_and_have_heads_of_their_own(routed):
    body = {name: weight.data_ptr() for name, weight in routed.model.get_base_model().named_parameters()}
    for task in "ab":
        own, trained = routed.task_model(task), expert(task)
        assert own is routed.task_model(task)
        assert own.config.id2label == dict(enumerate(LABELS[task]))
        pooled = own.bert.pooler.dense.weight
        assert torch.equal(own.classifier.weight, trained.classifier.weight)
        assert torch.equal(pooled, trained.bert.pooler.dense.weight)
        found = {name: weight.data_ptr() for name, weight in own.bert.named_parameters() if "pooler" not in name}
        assert found == {name: at for name, at in body.items() if "pooler" not in name}
        assert pooled.data_ptr() != body["pooler.dense.weight"]
        with pytest.raises(HfEsmError, match="cannot be saved by itself"):
            own.save_pretrained("anywhere")


def test_with_its_expert_of_full_rank_a_task_is_its_expert(routed):
    for task in "ab":
        samples = encoded(task_texts(task, 5))
        with routed.route(task):
            found = logits(routed.task_model(task), samples)
        expected = logits(expert(task), samples)
        assert torch.allclose(found, expected, atol=1e-4)
        with routed.route("static"):
            static = logits(routed.task_model(task), samples)
        assert not torch.allclose(static, expected, atol=1e-2)


def test_the_static_route_is_the_plain_model(merged, routed):
    plain, batch = AutoModel.from_pretrained(merged), encoded(MIXED[:1])[0]["input_ids"][None]
    with torch.no_grad(), routed.route("static"):
        assert torch.equal(routed(batch).last_hidden_state, plain(batch).last_hidden_state)
    with torch.no_grad():
        assert not torch.equal(routed(batch).last_hidden_state, plain(batch).last_hidden_state)


def test_a_base_that_is_a_task_model_keeps_its_class(models, tmp_path):
    """Its own head has two labels; the loss of a task with three is that task's."""
    whole = classifier(base_model(), "a")
    calibration = {task: task_texts(task) for task in "ab"}
    given = {task: models / task for task in "ab"}
    quiet(save(whole, tmp_path / "base"), given, calibration=calibration, rank=FULL, output_dir=tmp_path / "out")
    routed = RoutedModel.from_pretrained(tmp_path / "out")
    assert type(routed.model.get_base_model()) is type(whole)
    task_model, samples = routed.task_model("b"), encoded(task_texts("b", 5))
    with routed.route("b"):
        found = logits(task_model, samples)
        loss = task_model(**{n: v[None] for n, v in samples[0].items()}, labels=torch.tensor([2])).loss
    assert torch.allclose(found, logits(expert("b"), samples), atol=1e-4)
    assert torch.allclose(loss, -found[0].log_softmax(-1)[2])
    assert [(p.task, p.label in LABELS[p.task]) for p in routed.predict(MIXED)] == [("a", True), ("b", True)] * 16


@pytest.mark.parametrize("router", ["discriminant", "prototype"])
def test_predictions_depend_neither_on_batchmates_nor_on_order(models, router, tmp_path):
    folder = merge_bert(models, tmp_path / "out", method={"name": "esm++", "router": router})
    routed = RoutedModel.from_pretrained(folder)
    one_by_one = [routed.predict([text])[0] for text in MIXED]
    assert [p.task for p in one_by_one] == ["a", "b"] * 16
    assert all(p.label in LABELS[p.task] for p in one_by_one)
    assert len({p.label for p in one_by_one}) > 2
    for texts, expected in ((MIXED, one_by_one), (MIXED[::-1], one_by_one[::-1])):
        found = routed.predict(texts, batch_size=5)
        assert [(p.task, p.label, p.sure) for p in found] == [(p.task, p.label, p.sure) for p in expected]
        assert [p.score for p in found] == pytest.approx([p.score for p in expected], abs=1e-5)
    assert routed.predict([]) == routed.explain([]) == []


@pytest.mark.parametrize(("name", "kind"), [("bert", "Bert"), ("convbert", "ConvBert"), ("fnet", "FNet")])
def test_predictions_of_models_that_read_padding_do_not_depend_on_batchmates(name, kind, tmp_path, monkeypatch):
    architecture = ARCHITECTURES[name]
    base, head = (architecture.build(f"{kind}{suffix}") for suffix in ("Model", "ForSequenceClassification"))
    getattr(head, head.base_model_prefix).load_state_dict(base.state_dict())
    experts = {"a": tuned(head, 1), "b": tuned(head, 2)}
    calibration = {task: architecture.samples(seed) for seed, task in enumerate(experts)}
    folder = quiet(base, experts, calibration=calibration, rank=4, output_dir=tmp_path / "out").output_dir
    routed, samples = RoutedModel.from_pretrained(folder), architecture.samples(5)
    sizes = []
    monkeypatch.setattr(
        "hf_esm.routing.prediction.batch_for", lambda *args: sizes.append(len(args[0])) or batch_for(*args)
    )
    expected = [routed.predict([sample], "a")[0].score for sample in samples]
    sizes.clear()
    assert [p.score for p in routed.predict(samples, "a")] == pytest.approx(expected, abs=1e-5)
    assert max(sizes) == (len(samples) if name == "bert" else 2)  # two of them have one length


def test_predictions_by_given_tasks_are_the_experts(routed):
    tasks = ["b", "a", "b"] * 10
    texts = MIXED[: len(tasks)]
    found = routed.predict(texts, tasks, batch_size=4)
    assert [p.task for p in found] == tasks
    assert found == routed.predict(encoded(texts), tasks, batch_size=4)  # ready inputs
    own = [i for i, task in enumerate(tasks) if task == "ab"[i % 2]]  # where the text is of the task, too
    for i in own:
        scores = logits(expert(tasks[i]), encoded([texts[i]])).softmax(-1)[0]
        assert found[i].label == LABELS[tasks[i]][int(scores.argmax())]
        assert found[i].score == pytest.approx(float(scores.max()), abs=1e-4)
    assert routed.predict(texts[:2], "a") == routed.predict(texts[:2], ["a", "a"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda routed: routed.predict(MIXED, ["a"]), "1 tasks are given for 32 inputs"),
        (lambda routed: routed.predict(MIXED[:2], "c"), "no expert for 'c'; there are a, b"),
        (lambda routed: routed.task_model("c"), "no expert for 'c'; there are a, b"),
        (lambda routed: routed.predict(MIXED[:2], ["a", None]), "no expert for None; there are a, b"),
        (lambda routed: routed.predict(MIXED[:2], "static"), "no expert for 'static'; there are a, b"),
        (lambda routed: routed.predict(MIXED[:2], batch_size=0), "batch_size must be 1 or more"),
        (lambda routed: routed.predict("text"), "Give a list of inputs"),
        (lambda routed: routed.predict(None), "Give a list of inputs, not a NoneType"),
        (lambda routed: routed.export_lora("never", ["c"]), "no expert for 'c'; there are a, b"),
        (lambda routed: routed.remove_expert("c", output_dir="never"), "no expert for 'c'; there are a, b"),
    ],
)
def test_what_is_not_there_is_said(routed, call, message):
    with pytest.raises(HfEsmError, match=message):
        call(routed)


def test_a_tokenizers_batch_and_a_generator_are_inputs(routed):
    expected = routed.predict(MIXED[:5])
    assert routed.predict(routed.processor(MIXED[:5], padding=True, return_tensors="pt")) == expected
    assert routed.predict({"text": MIXED[:5]}) == routed.predict(text for text in MIXED[:5]) == expected
    assert routed.explain({"text": MIXED[:5]}) == routed.explain(MIXED[:5])


def test_a_given_route_is_the_task_of_predictions(routed):
    with routed.route("b"):
        assert routed.predict(MIXED[:4]) == routed.predict(MIXED[:4], "b")
        with pytest.raises(HfEsmError, match="explain asks the router, but a route is given"):
            routed.explain(MIXED[:4])
    with routed.route(["b", "a"]):
        assert routed.predict(MIXED[:2]) == routed.predict(MIXED[:2], ["b", "a"])
    for names in ("static", ["static", "a"]):
        with routed.route(names), pytest.raises(HfEsmError, match="the route 'static' names no head"):
            routed.predict(MIXED[:2])
    assert routed.predict(MIXED[:2], np.array(["b", "a"])) == routed.predict(MIXED[:2], (t for t in "ba"))
    with routed.model.disable_adapter(), pytest.raises(HfEsmError, match="the experts are disabled"):
        routed.predict(MIXED[:2])


def test_one_loss_is_of_one_head(routed):
    batch = routed.processor(MIXED[:2], padding=True, return_tensors="pt")
    labels = torch.tensor([0, 1])
    with routed.route(["a", "b"]):
        routed.task_model("b")(**batch)
        with pytest.raises(HfEsmError, match="Samples of 'a' are routed through the head of 'b'"):
            routed.task_model("b")(**batch, labels=labels)
    for tasks in ("b", ["b", "static"]):
        with routed.route(tasks):
            assert routed.task_model("b")(**batch, labels=labels).loss.isfinite()


def test_heads_of_one_value_and_of_several_labels(models, tmp_path):
    """As Transformers' own pipeline takes them."""
    own = {"a": {"num_labels": 1}, "b": {"num_labels": 3, "problem_type": "multi_label_classification"}}
    experts = {}
    for task, settings in own.items():
        body = base_model()
        config = {n: v for n, v in body.config.to_dict().items() if n not in ("id2label", "label2id")}
        model = type(expert(task))(type(body.config).from_dict({**config, **settings}))
        model.bert.load_state_dict(body.state_dict(), strict=False)
        experts[task] = tuned(model.eval(), 1 + "ab".index(task))
    calibration = {task: encoded(task_texts(task)) for task in "ab"}
    quiet(models / "base", experts, calibration=calibration, rank=FULL, output_dir=tmp_path / "out")
    routed = RoutedModel.from_pretrained(tmp_path / "out")
    for task, scored in (("a", lambda found: found), ("b", torch.sigmoid)):
        samples = encoded(task_texts(task, 5))
        expected = scored(logits(experts[task], samples)).max(-1).values
        assert [p.score for p in routed.predict(samples, task)] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_pipeline_takes_what_predict_takes(routed):
    expected = [asdict(found) for found in routed.predict(MIXED[:6])]
    pipe = RoutedPipeline(routed)
    assert pipe(MIXED[:6]) == pipe(Dataset.from_dict({"text": MIXED[:6]})["text"]) == expected
    assert pipe(MIXED[:6], batch_size=2)[5]["label"] == expected[5]["label"]
    assert pipe(MIXED[0]) == pipe(MIXED[:1])[0] and pipe([]) == []
    assert RoutedPipeline(routed, tasks="b")(MIXED[:2]) == pipe(MIXED[:2], tasks="b")
    assert pipe((MIXED[0], MIXED[1])) == asdict(routed.predict([(MIXED[0], MIXED[1])])[0])  # a pair of texts
    assert pipe(MIXED[:2], tasks="b") == [asdict(found) for found in routed.predict(MIXED[:2], "b")]


def test_explanations(models, routed, small, tmp_path):
    found = routed.explain(MIXED + task_texts("c"), batch_size=7)
    assert [e.task for e in found[:32]] == ["a", "b"] * 16
    reader = routed.config.readers[-1]
    for e in found:
        assert e.probabilities.keys() == {"a", "b"}
        assert sum(e.probabilities.values()) == pytest.approx(1)
        assert e.layers == {reader: e.likeliest}
        assert (e.task == "none") == (e.distance > 1)
    assert [e.task for e in found[32:]].count("none") > 12  # of a task that nobody knows
    assert not any(e.sure or e.weights for e in found if e.task == "none")
    assert {e.sure for e in found} == {True, False}
    for e in found:
        if e.task != "none":
            assert e.sure == (e.probabilities[e.task] >= routed.config.confidence)
            flatter = {task: probability**0.5 for task, probability in e.probabilities.items()}
            expected = {task: part / sum(flatter.values()) for task, part in flatter.items()}
            expected = {task: part for task, part in expected.items() if part > 1 / 512}
            assert next(iter(e.weights)) == e.task and e.weights == pytest.approx(expected, abs=1 / 500)
    votes = RoutedModel.from_pretrained(small).explain(MIXED)
    assert [e.task for e in votes] == ["a", "b"] * 16
    for e in votes:
        assert e.distance is None
        assert len(e.layers) == 12  # six linear maps a block
        shares = {task: list(e.layers.values()).count(task) / 12 for task in "ab"}
        assert e.probabilities == pytest.approx(shares)


def test_pictures_are_routed_by_what_they_show(tmp_path):
    base = VIT.build()
    pictures = {task: image_samples(i) for i, task in enumerate("ab")}
    for task, shift in (("a", 1.5), ("b", -1.5)):
        pictures[task] = [{"pixel_values": s["pixel_values"] + shift} for s in pictures[task] * 2]
    experts = {}
    for i, task in enumerate("ab"):
        torch.manual_seed(i)
        model = ViTForImageClassification(type(base.config).from_dict({**base.config.to_dict(), "num_labels": 2 + i}))
        model.vit.load_state_dict(base.state_dict(), strict=False)
        experts[task] = tuned(model.eval(), i)
    quiet(base, experts, calibration=pictures, rank=FULL, output_dir=tmp_path / "out")
    routed = RoutedModel.from_pretrained(tmp_path / "out")
    assert type(routed.model.get_base_model()) is ViTModel
    mixed = [picture for pair in zip(pictures["a"], pictures["b"]) for picture in pair]
    found = routed.predict(mixed, batch_size=4)
    assert [p.task for p in found] == ["a", "b"] * 12
    with routed.route("b"):
        assert torch.allclose(
            logits(routed.task_model("b"), pictures["b"]), logits(experts["b"], pictures["b"]), atol=1e-4
        )


# ---- a language model, and the experts as LoRA adapters


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """An ESM++ model of two language models without heads of their own."""
    folder, base = tmp_path_factory.mktemp("gpt2"), GPT2.build()
    experts = {task: tuned(base, i) for i, task in enumerate("ab")}
    calibration = {task: task_ids(task) for task in "ab"}
    quiet(save(base, folder / "base"), experts, calibration=calibration, rank=FULL, output_dir=folder / "out")
    return SimpleNamespace(experts=experts, folder=folder / "out", routed=RoutedModel.from_pretrained(folder / "out"))


def test_language_models_are_routed_by_their_prompt(language):
    routed = language.routed
    assert type(routed.model.get_base_model()) is GPT2LMHeadModel
    assert [e.likeliest for e in routed.explain([*task_ids("a", 3), *task_ids("b", 3)])] == ["a"] * 16 + ["b"] * 16
    for task in "ab":
        with routed.route(task):
            found = logits(routed.task_model(task), task_ids(task, count=2)[:1])
        assert torch.allclose(found, logits(language.experts[task], task_ids(task, count=2)[:1]), atol=1e-4)
        prompt = task_ids(task, 3)[0]["input_ids"][None]
        with routed.route(task):
            expected = routed.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
        assert torch.equal(routed.generate(input_ids=prompt, max_new_tokens=6, do_sample=False), expected)
    with pytest.raises(HfEsmError, match="has no class per sample: its model generates text"):
        routed.predict(task_ids("a"))


def test_the_prompt_decides_however_it_is_read(language, no_deprecated_calls):
    """With drafts of the answer behind it, in chunks, or again and again."""
    routed = language.routed
    prompts = [{"input_ids": row["input_ids"][:4]} for row in [*task_ids("a", 3, 6), *task_ids("b", 3, 6)]]
    greedy = {"max_new_tokens": 8, "do_sample": False}
    ways = [
        {"assistant_model": GPT2LMHeadModel.from_pretrained(language.folder)},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 2},
        {"use_cache": False},
    ]
    for prompt in prompts:
        ids = prompt["input_ids"][None]
        given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **greedy}
        expected = routed.generate(ids, **given)
        for way in ways:
            with recording(routed.model) as records:
                assert torch.equal(routed.generate(ids, **given, **way), expected), way
            assert torch.equal(routed.generate(input_ids=ids, **given, **way), expected)
            assert len({tuple(found.probabilities.flatten().tolist()) for _, _, found in records}) == 1
        settings = GenerationConfig(max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0)
        with recording(routed.model) as records:
            found = routed.generate(ids, settings, attention_mask=torch.ones_like(ids))
        assert torch.equal(found, expected)
        assert len({tuple(found.probabilities.flatten().tolist()) for _, _, found in records}) == 1
    with routed.model.disable_adapter():
        routed.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **greedy)
    batch = torch.stack([prompt["input_ids"] for prompt in prompts])
    mask = torch.ones_like(batch)
    together = routed.generate(batch, attention_mask=mask, pad_token_id=0, **greedy)
    assert torch.equal(
        routed.generate(batch, attention_mask=mask, pad_token_id=0, use_cache=False, **greedy), together
    )
    with pytest.raises(HfEsmError, match="pass attention_mask, too"):
        routed.generate(batch, use_cache=False, **greedy)
    with routed.route(["a", "b"]), pytest.raises(HfEsmError, match="2 tasks are named for 12 samples"):
        routed.generate(batch, attention_mask=mask, **greedy)
    # Transformers itself calls the assistant with a `generation_config` and arguments.
    no_deprecated_calls[:] = [
        said for said in no_deprecated_calls if "Passing `generation_config` together" not in said
    ]


def test_task_models_generate_as_the_merged_model_is_set(language, tmp_path):
    shutil.copytree(language.folder, tmp_path / "model")
    settings = GenerationConfig(max_new_tokens=3, repetition_penalty=1.7)
    settings.save_pretrained(tmp_path / "model")
    write_hashes(tmp_path / "model")
    found = RoutedModel.from_pretrained(tmp_path / "model").task_model("a").generation_config
    assert (found.max_new_tokens, found.repetition_penalty) == (3, 1.7)


def test_compiling_is_as_it_was_after_threads_that_explain(merged):
    """They leave in the order in which they came; torch has one stance for all."""
    first, second = Uncompiled.__enter__, Uncompiled.__exit__
    stances, shared = [], Uncompiled()
    for step in (first, first, second, second, first, second):
        step(shared, *((None,) * 3 if step is second else ()))
        stances.append(torch._dynamo.eval_frame._stance.stance)
    assert stances == ["force_eager"] * 3 + ["default", "force_eager", "default"]


def test_compiled_models_predict_and_explain(merged, routed):
    compiled = RoutedModel.from_pretrained(merged)
    compiled.model.compile(fullgraph=True, backend="eager")
    assert compiled.predict(MIXED[:4]) == routed.predict(MIXED[:4])
    assert compiled.explain(MIXED[:4]) == routed.explain(MIXED[:4])


@torch.no_grad()
def test_task_models_have_the_hidden_states_of_one_pass(merged):
    """Whichever ran before, though they share their blocks."""
    routed = RoutedModel.from_pretrained(merged)
    whole, samples = routed.model.get_base_model(), encoded(task_texts("a", 3))
    batch = collate(samples, whole.config)
    with routed.route("a"):
        for model in (routed.task_model("a"), whole, routed.task_model("b"), routed.task_model("a")):
            found = model(**batch, output_hidden_states=True)
            assert len(found.hidden_states) == whole.config.num_hidden_layers + 1
            torch.testing.assert_close(found.hidden_states[-1], whole(**batch).last_hidden_state)
        assert whole(**batch).hidden_states is None
