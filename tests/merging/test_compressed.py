"""TSV-C: compressed experts beside the base; and TIES, which trims whole updates, through `merge_models`."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel

from hf_esm import HfEsmError, RoutedModel, calibrate, evaluate, merge_models
from hf_esm.checkpoints.layout import ROUTER_FEATURES
from hf_esm.cli.main import main
from support import reference
from support.problems import relative_error
from support.routed_toys import adapter, encoded, expert, logits, merge_bert, task_texts
from support.toys import base_model


pytestmark = pytest.mark.slow


MODULE = "encoder.layer.1.intermediate.dense"


@pytest.fixture(scope="module")
def compressed(models):
    return merge_bert(models, models / "compressed", method="tsv-c", calibration=None, rank=None)


@pytest.fixture(scope="module")
def whole(models):
    """With all triplets there are."""
    return merge_bert(models, models / "whole", method={"name": "tsv-c", "rank": 64}, calibration=None, rank=None)


def test_experts_are_the_leading_triplets_and_the_body_is_the_bases(compressed):
    base, stored = base_model().state_dict(), adapter(compressed)
    static = AutoModel.from_pretrained(compressed).state_dict()
    assert torch.equal(static[f"{MODULE}.weight"], base[f"{MODULE}.weight"])
    bias = sum(expert(task).state_dict()[f"bert.{MODULE}.bias"].double() for task in "ab") / 2
    assert relative_error(static[f"{MODULE}.bias"], bias) < 1e-6
    for place, task in enumerate("ab"):
        delta = expert(task).state_dict()[f"bert.{MODULE}.weight"].double() - base[f"{MODULE}.weight"].double()
        u, s, vh = reference.svd(delta)
        k = min(delta.shape) // 2
        found = (
            stored[f"{MODULE}.routed_experts_B"][place].double() @ stored[f"{MODULE}.routed_experts_A"][place].double()
        )
        assert relative_error(found, (u[:, :k] * s[:k]) @ vh[:k]) < 1e-4
        assert stored[f"{MODULE}.routed_experts_A"].shape[1] == k
    assert not any("prototypes" in name or "projection" in name for name in stored)


@pytest.mark.parametrize(
    ("method", "router"),
    [({"name": "tsv-c"}, False), ({"name": "esm++", "router": "oracle"}, False), ({"name": "esm++"}, True)],
)
def test_the_card_promises_no_router_where_there_is_none(models, tmp_path, method, router):
    folder = merge_bert(models, tmp_path / "out", method=method, rank=4)
    card = (folder / "README.md").read_text()
    assert [word in card for word in ("and a router", "model.predict(", "mean features of the")] == [router] * 3
    assert "without a named task, no expert is added" in card or router


def test_whole_experts_are_given_back_and_no_task_means_the_base(whole):
    routed, samples = RoutedModel.from_pretrained(whole), encoded(task_texts("b", 11))
    with routed.route("b"):
        assert torch.allclose(logits(routed.task_model("b"), samples), logits(expert("b"), samples), atol=1e-4)
    static = logits(routed.task_model("b"), samples)
    with routed.route("static"):
        assert torch.equal(logits(routed.task_model("b"), samples), static)
    assert not torch.allclose(static, logits(expert("b"), samples), atol=1e-2)


@pytest.mark.parametrize("router", ["oracle", "static"])
def test_an_esm_model_may_have_no_router(models, router, tmp_path):
    """And then it holds no features of samples."""
    folder = merge_bert(models, tmp_path / "out", method={"name": "esm++", "router": router})
    routed, samples = RoutedModel.from_pretrained(folder), encoded(task_texts("b", 11))
    with safe_open(folder / "routed" / ROUTER_FEATURES, "pt") as file:
        assert not file.keys()
    with routed.route("b"):
        assert torch.allclose(logits(routed.task_model("b"), samples), logits(expert("b"), samples), atol=1e-4)
    with pytest.raises(HfEsmError, match=r"no router\. Name the tasks: a, b"):
        routed.predict(task_texts("b"))
    if router == "oracle":
        with pytest.raises(HfEsmError, match=r"has no router\. Name the tasks"):
            logits(routed.task_model("b"), samples)
    else:
        found = logits(routed.task_model("b"), samples)
        with routed.route("static"):
            assert torch.equal(logits(routed.task_model("b"), samples), found)
    statistics = calibrate(models / "c", task_texts("c"), base=models / "base", progress=False)
    larger = routed.add_expert("c", models / "c", statistics, output_dir=tmp_path / "larger")
    with larger.route("c"):
        found = logits(larger.task_model("c"), encoded(task_texts("c", 11)))
    assert torch.allclose(found, logits(expert("c"), encoded(task_texts("c", 11))), atol=1e-4)


def test_a_model_without_a_router_asks_for_the_task(whole, models):
    routed, texts = RoutedModel.from_pretrained(whole), task_texts("a", 11)
    for ask in (routed.predict, routed.explain):
        with pytest.raises(HfEsmError, match=r"no router\. Name the tasks: a, b"):
            ask(texts)
    found = [prediction.label for prediction in routed.predict(texts, "a")]
    labels = [expert("a").config.id2label[int(i)] for i in logits(expert("a"), encoded(texts)).argmax(-1)]
    assert found == labels
    rows = {"a": [{"text": text, "label": label} for text, label in zip(texts, labels)]}
    scores = evaluate(whole, rows, experts={"a": models / "a"})
    assert scores.model == scores.expert == {"a": 1.0}
    assert not scores.routing


def test_experts_come_and_go_without_statistics(whole, models, tmp_path):
    larger = RoutedModel.from_pretrained(whole).add_expert("c", models / "c", output_dir=tmp_path / "larger")
    samples = encoded(task_texts("c", 11))
    with larger.route("c"):
        assert torch.allclose(logits(larger.task_model("c"), samples), logits(expert("c"), samples), atol=1e-4)
    fewer = larger.remove_expert("a", output_dir=tmp_path / "fewer")
    with fewer.route("c"):
        assert torch.allclose(logits(fewer.task_model("c"), samples), logits(expert("c"), samples), atol=1e-4)


def test_rank_is_a_flag_and_a_setting(models, tmp_path, monkeypatch):
    names = [f"--expert={task}={models / task}" for task in "ab"]
    given = ["merge", f"--base={models / 'base'}", *names, "--method=tsv-c", "--no-progress"]
    for flags, folder in ((["--rank=3"], "flag"), (["--set", "rank=3"], "setting")):
        assert main([*given, f"--output-dir={tmp_path / folder}", *flags]) in (None, 0)
        assert adapter(tmp_path / folder)[f"{MODULE}.routed_experts_A"].shape[:2] == (2, 3)
    with pytest.raises(HfEsmError, match="tsv-c: rank must be a whole number, at least 0"):
        merge_bert(models, tmp_path / "none", method={"name": "tsv-c", "rank": -1}, calibration=None, rank=None)
    assert {path.name for path in tmp_path.iterdir()} == {"flag", "setting"}


def test_ties_trims_whole_updates():
    """One threshold per expert over all of its weights, not one per weight."""
    base, experts = base_model(), {task: expert(task).bert for task in "abc"}
    with torch.no_grad():
        for task, model in experts.items():  # so that the layers' shares differ
            model.encoder.layer[0].attention.self.query.weight.mul_(3)
            model.encoder.layer[1].output.dense.bias.add_(0.2 * "abc".index(task))
    merged = merge_models(base, experts, method="ties", progress=False).load_model().state_dict()
    before = base.state_dict()
    names = [name for name, _ in base.named_parameters()]
    updates = [
        torch.cat([(model.state_dict()[name] - before[name]).flatten() for name in names])
        for model in experts.values()
    ]
    expected = reference.ties(updates)
    found = torch.cat([(merged[name].double() - before[name].double()).flatten() for name in names])
    assert relative_error(found, expected) < 1e-5
