"""Routed models to which an expert is added, or from which one is removed."""

import json
import shutil

import pytest
import torch
from transformers import AutoModel

from hf_esm import HfEsmError, RoutedModel, calibrate, load_recipe
from hf_esm.checkpoints.layout import ROUTER_FEATURES
from hf_esm.routing.discriminant import fit_discriminant
from hf_esm.routing.experts import load_experts
from hf_esm.routing.router import shift_of_task
from support.card_rules import checked_metadata
from support.helpers import perturbed, save
from support.problems import seeds
from support.routed_toys import (
    FULL,
    adapter,
    assert_expert,
    encoded,
    equal,
    expert,
    inputs,
    logits,
    quiet,
    task_texts,
)
from support.tiny import BERT, GPT2, snapshot
from support.toys import base_model, classifier, lora_adapter


CHECKED = ("encoder.layer.1.attention.self.query", "encoder.layer.0.output.dense")


@pytest.fixture(scope="module")
def larger(routed, models, statistics):
    """The model of `a` and `b` with `c`, from its statistics alone."""
    return routed.add_expert("c", models / "c", statistics["c"], output_dir=models / "larger")


def test_an_added_expert_leaves_the_others_as_they_were(merged, larger):
    before, after = adapter(merged), adapter(larger.folder)
    static = AutoModel.from_pretrained(merged).state_dict()
    assert equal(AutoModel.from_pretrained(larger.folder).state_dict(), static)
    own = expert("c").state_dict()
    for name, tensor in before.items():
        if name.endswith(("_A", "_B")):
            assert torch.equal(after[name][:2], tensor)
    for module in CHECKED:
        residual = own[f"bert.{module}.weight"].double() - static[f"{module}.weight"].double()
        a, b = (after[f"{module}.routed_experts_{kind}"][2] for kind in "AB")
        assert_expert(a, b, inputs("c")[f"bert.{module}.weight"], residual, 32)


def test_an_added_expert_is_found_and_has_its_head(larger):
    assert larger.tasks == ["a", "b", "c"]
    texts = [text for three in zip(*(task_texts(task, 11) for task in "abc")) for text in three]
    found = larger.predict(texts, batch_size=5)
    assert [p.task for p in found] == ["a", "b", "c"] * 16
    samples = encoded(task_texts("c", 11))
    with larger.route("c"):
        assert torch.allclose(logits(larger.task_model("c"), samples), logits(expert("c"), samples), atol=1e-4)


@pytest.mark.parametrize("kind", ["update", "residual"])
def test_an_added_experts_directions_are_as_the_others_and_the_routers_settings_stay(
    models, statistics, tmp_path, kind
):
    base = shutil.copytree(models / "base", tmp_path / "base")
    experts, calibration = {task: models / task for task in "ab"}, {task: task_texts(task) for task in "ab"}
    settings = {"top_k": 1, "mixing_temperature": 1.5, "confidence": 0.9}
    method = {"name": "esm++", "rank": 4, "expert_directions": kind, **settings}
    quiet(base, experts, calibration=calibration, method=method, output_dir=tmp_path / "out")
    shutil.rmtree(base)  # another machine has it elsewhere
    model, given = RoutedModel.from_pretrained(tmp_path / "out"), {}
    if kind == "update":
        for wrong, says in ((None, "Pass `base`"), (models / "c", "equals the base")):
            with pytest.raises(HfEsmError, match=says):
                model.add_expert("c", models / "c", statistics["c"], output_dir=tmp_path / "no", base=wrong)
            assert not (tmp_path / "no").exists()
        given = {"base": models / "base"}
    larger = model.add_expert("c", models / "c", statistics["c"], output_dir=tmp_path / "larger", **given)
    for routed in (model, larger):
        config = json.loads((routed.folder / "routed/adapter_config.json").read_text())
        assert {name: config[name] for name in settings} == settings
    own, before = expert("c").state_dict(), base_model().state_dict()
    static, found = AutoModel.from_pretrained(larger.folder).state_dict(), adapter(larger.folder)
    for module in CHECKED:
        weight = own[f"bert.{module}.weight"].double()
        update = weight - before[f"{module}.weight"] if kind == "update" else None
        a, b = (found[f"{module}.routed_experts_{part}"][2] for part in "AB")
        assert_expert(a, b, inputs("c")[f"bert.{module}.weight"], weight - static[f"{module}.weight"], 4, update)


def pooled_by_hand(model, texts, modules):
    """What linear maps of a model read, one text at a time, mean over its tokens: `[N, d_in]` float64."""
    rows = {module: [] for module in modules}
    hooks = [
        model.get_submodule(m).register_forward_pre_hook(
            lambda _, args, m=m: rows[m].append(args[0][0].double().mean(0))
        )
        for m in modules
    ]
    with torch.no_grad():
        for sample in encoded(texts):
            model(input_ids=sample["input_ids"][None])
    for hook in hooks:
        hook.remove()
    return {module: torch.stack(parts) for module, parts in rows.items()}


def test_a_task_is_added_with_samples_alone(models, routed, tmp_path, caplog):
    texts = task_texts("c", count=20)
    rows = ({"text": text} for text in texts)  # may be read once
    larger = routed.add_expert("c", models / "c", calibration=rows, num_samples=0, output_dir=tmp_path / "larger")
    own = calibrate(models / "c", texts, num_samples=0, progress=False)
    given = routed.add_expert("c", models / "c", own, calibration=texts, num_samples=0, output_dir=tmp_path / "given")
    assert equal(adapter(given.folder), adapter(larger.folder))
    assert [why.likeliest for why in larger.explain(task_texts("c", 11))] == ["c"] * 16
    assert "may take" not in caplog.text


@torch.no_grad()
def test_an_added_task_that_may_not_be_found_is_warned_of(models, tmp_path, caplog):
    """The merged model reads samples otherwise than the base: the experts share a large change of the first block."""
    change = torch.randn(32, generator=torch.Generator().manual_seed(3))
    for task in "abc":
        model = expert(task)
        model.bert.encoder.layer[0].output.dense.bias += 30 * change
        save(model, tmp_path / task)
    calibration = {task: encoded(task_texts(task)) for task in "ab"}
    method = {"name": "esm++", "depth": 0.7}
    given = {task: tmp_path / task for task in "ab"}
    quiet(models / "base", given, calibration=calibration, method=method, output_dir=tmp_path / "out")
    routed = RoutedModel.from_pretrained(tmp_path / "out")
    samples = encoded(task_texts("c"))
    found = calibrate(tmp_path / "c", samples, base=models / "base", progress=False)
    routed.add_expert("c", tmp_path / "c", found, output_dir=tmp_path / "estimated")
    assert "may take its samples for those of another task" in caplog.text and "`calibration`" in caplog.text
    caplog.clear()
    larger = routed.add_expert("c", tmp_path / "c", calibration=samples, output_dir=tmp_path / "read")
    assert "may take" not in caplog.text
    found = load_experts(larger.folder)
    read = pooled_by_hand(AutoModel.from_pretrained(routed.folder), task_texts("c"), found.modules)
    assert len(read) > 1
    assert all(torch.allclose(found.features["c"][module].double(), rows, atol=1e-5) for module, rows in read.items())
    assert [why.likeliest for why in larger.explain(encoded(task_texts("c", 11)))] == ["c"] * 16


@seeds
@pytest.mark.parametrize("towers", [(), ("text", "image")])
def test_the_shift_is_measured_as_the_router_measures_tasks(seed, towers):
    generator = torch.Generator().manual_seed(seed)
    modules = [f"{tower}.block{i}" for tower in towers or ("model",) for i in range(2)]
    means = {task: 3 * torch.randn(len(modules), 5, generator=generator) for task in "abc"}
    features = {
        task: {m: means[task][i] + torch.randn(12, 5, generator=generator) for i, m in enumerate(modules)}
        for task in "abc"
    }
    shifts = {module: torch.randn(2, 5, generator=generator) for module in modules}
    ratios = []
    for tower in towers or ("",):
        read = [module for module in modules if module.startswith(tower)]
        joined = {task: torch.cat([rows[m] for m in read], 1).double() for task, rows in features.items()}
        router = fit_discriminant(joined)
        along, across = router.directions, torch.eye(10, dtype=torch.float64)
        across = across - along.T @ along
        precision = along.T @ torch.diag(router.precision[:-1]) @ along + router.precision[-1] * across
        own = joined["c"].mean(0)
        apart = min(float((joined[t].mean(0) - own) @ precision @ (joined[t].mean(0) - own)) ** 0.5 for t in "ab")
        shift = torch.cat([shifts[module].double().mean(0) for module in read])
        ratios.append(float(shift @ precision @ shift) ** 0.5 / apart)
    assert shift_of_task(features, "c", shifts, towers) == pytest.approx(max(ratios), rel=1e-9)


def test_an_added_lora_expert_stands_on_its_own_base(models, routed, tmp_path):
    adapted = lora_adapter(base_model(), "c", str(models / "base"))
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    found = calibrate(tmp_path / "lora", task_texts("c"), base=models / "base", progress=False)
    larger = routed.add_expert("c", tmp_path / "lora", found, output_dir=tmp_path / "out")
    samples, own = encoded(task_texts("c", 11)), adapted.merge_and_unload()
    with larger.route("c"):
        assert torch.allclose(logits(larger.task_model("c"), samples), logits(own, samples), atol=1e-4)


def test_a_larger_model_is_loaded_as_the_one_before(models, merged, statistics, tmp_path):
    routed = RoutedModel.from_pretrained(merged, dtype=torch.bfloat16)
    larger = routed.add_expert("c", models / "c", statistics["c"], output_dir=tmp_path / "larger")
    assert larger.model.dtype == larger.remove_expert("a", output_dir=tmp_path / "b").model.dtype == torch.bfloat16


def test_an_added_expert_keeps_its_head_where_its_labels_are_the_bases(models, statistics, tmp_path):
    """The merged model then has a head with these labels, which is not that of the expert."""
    base = save(perturbed(classifier(base_model(), "c"), 0.1, 5), tmp_path / "base")
    calibration = {task: statistics[task] for task in "ab"}
    given = {task: models / task for task in "ab"}
    quiet(base, given, calibration=calibration, rank=FULL, output_dir=tmp_path / "out")
    routed = RoutedModel.from_pretrained(tmp_path / "out")
    larger = routed.add_expert("c", models / "c", statistics["c"], output_dir=tmp_path / "larger")
    assert torch.equal(larger.task_model("c").classifier.weight, expert("c").classifier.weight)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Models that do not fit: `wide` has other widths, `gpt2` is another architecture, `nan` is broken."""
    folder = tmp_path_factory.mktemp("others")
    model = BERT.build("BertForSequenceClassification", hidden_size=64, num_hidden_layers=2, vocab_size=64)
    save(model, folder / "wide")
    save(GPT2.build(), folder / "gpt2")
    model = expert("c")
    model.bert.encoder.layer[0].attention.self.query.weight.data[0, 0] = float("nan")
    save(model, folder / "nan")
    return folder


NOT_ADDED = {
    "a name that is taken": ("a", "c", "c", "There is an expert for 'a' already"),
    "a name that leaves the folder": ("../c", "c", "c", "'../c' cannot be the name of a task"),
    "no pooled inputs": ("c", "c", "bare", "calibrate again with the base (`hf-esm calibrate --base`)"),
    "no statistics": ("c", "c", None, "esm_statistics.safetensors: not a readable statistics file"),
    "other widths": ("c", "wide", "c", "in the base it is"),
    "another architecture": ("c", "gpt2", "c", "is a gpt2 model, but the base is a bert"),
    "statistics of another model": ("c", "c", "wide", "they are of another model. Calibrate again"),
    "a broken weight": ("c", "nan", "c", "holds NaN or infinite values"),
}


@pytest.mark.parametrize(("name", "model", "given", "message"), NOT_ADDED.values(), ids=NOT_ADDED)
def test_an_expert_that_does_not_fit_is_refused(
    models, routed, others, statistics, tmp_path, name, model, given, message
):
    if given in ("bare", "wide"):
        folder = others if given == "wide" else models
        given = calibrate(folder / {"bare": "c"}.get(given, given), encoded(task_texts("c")), progress=False)
    spec = others / model if (others / model).is_dir() else models / model
    before = snapshot(models)
    with pytest.raises(HfEsmError) as caught:
        routed.add_expert(
            name, spec, statistics[given] if isinstance(given, str) else given, output_dir=tmp_path / "out"
        )
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert snapshot(models) == before


def test_a_live_expert_needs_statistics_and_no_folder(routed, statistics, tmp_path):
    with pytest.raises(HfEsmError, match="statistics"):
        routed.add_expert("c", expert("c"), output_dir=tmp_path / "out")
    larger = routed.add_expert("c", expert("c"), statistics["c"], output_dir=tmp_path / "out")
    assert larger.tasks == ["a", "b", "c"]


def test_a_removed_expert_is_gone_and_the_rest_is_as_it_was(merged, larger, models, tmp_path):
    fewer = larger.remove_expert("c", output_dir=tmp_path / "fewer")
    assert fewer.tasks == ["a", "b"]
    for name in ("README.md", "merge_recipe.yaml"):
        lines = (fewer.folder / name).read_text().splitlines()
        added, removed = (line for line in lines if "After this merge" in line)
        source = "`c`" if name == "README.md" else models / "c"  # a card tells no folder of this machine
        assert f"'c' was added, from {source} (licence: not stated); the experts now: a, b, c." in added
        assert "'c' was removed; the experts now: a, b." in removed
    checked_metadata((fewer.folder / "README.md").read_text(), models)
    (fewer.folder / "comparison").mkdir()  # what a card's pictures, or a download, leave there
    (fewer.folder / "comparison" / "a.png").write_text("")
    (fewer.folder / ".cache").mkdir()
    RoutedModel.from_pretrained(fewer.folder).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / ".cache").exists() and RoutedModel.from_pretrained(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    assert load_recipe(fewer.folder / "merge_recipe.yaml")["experts"].keys() == {"a", "b"}
    assert equal(adapter(fewer.folder), adapter(merged))
    assert not (fewer.folder / "heads" / "c").exists()
    without = larger.remove_expert("a", output_dir=tmp_path / "without")
    assert [p.task for p in without.predict([*task_texts("b"), *task_texts("c")])] == ["b"] * 16 + ["c"] * 16
    last = without.remove_expert("b", output_dir=tmp_path / "last")
    assert [p.task for p in last.predict(task_texts("c"))] == ["c"] * 16
    with pytest.raises(HfEsmError, match="last"):
        last.remove_expert("c", output_dir=tmp_path / "none")
    with pytest.raises(HfEsmError, match="exists"):
        larger.remove_expert("a", output_dir=tmp_path / "fewer")
    assert {path.name for path in tmp_path.iterdir()} == {"fewer", "without", "last"}


def test_a_task_may_be_named_as_a_folder_of_ours(models, statistics, tmp_path):
    """`routed` and `calibration` are also names of folders. Heads of such tasks are saved, with hashes."""
    given = {"routed": models / "a", "calibration": models / "b"}
    calibration = {"routed": task_texts("a"), "calibration": task_texts("b")}
    quiet(models / "base", given, calibration=calibration, output_dir=tmp_path / "calibration")
    recorded = json.loads((tmp_path / "calibration" / "hashes.json").read_text())
    heads = {f"heads/{task}/head.safetensors" for task in given}
    assert (
        heads | {"model.safetensors", "routed/adapter_model.safetensors", f"routed/{ROUTER_FEATURES}"}
        <= recorded.keys()
    )
    assert not any(name.startswith("calibration/") for name in recorded)
    routed = RoutedModel.from_pretrained(tmp_path / "calibration")
    larger = routed.add_expert("c", models / "c", statistics["c"], output_dir=tmp_path / "larger")
    assert all(larger.task_model(task).config.num_labels == n for task, n in zip(larger.tasks, (2, 3, 4)))


def test_half_of_a_change_is_never_left(routed, models, statistics, tmp_path, monkeypatch):
    """The disk fills up with the last file of the larger model."""

    def fail(folder):
        assert (folder / "routed" / "adapter_model.safetensors").is_file()
        raise OSError("no space left")

    monkeypatch.setattr("hf_esm.routing.editing.write_hashes", fail)
    with pytest.raises(OSError, match="no space"):
        routed.add_expert("c", models / "c", statistics["c"], output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())
