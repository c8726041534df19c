"""TSV-C keeps each task's own biases, norms and convolutions, and its compressed embeddings, beside its head."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_esm import HfEsmError, RoutedModel, evaluate, load_task_model, merge_models
from hf_esm.checkpoints.layout import BASE_WEIGHTS, BODY_WEIGHTS, HEADS_FOLDER
from support import reference
from support.architectures import ARCHITECTURES
from support.helpers import floating_weights, perturbed
from support.problems import relative_error
from support.routed_toys import encoded, logits, merge_bert, task_texts
from support.tiny import save_tokenizer
from support.toys import base_model, classifier


pytestmark = pytest.mark.slow


FULL = {"name": "tsv-c", "rank": 64}
NORM, QUERY = "encoder.layer.1.output.LayerNorm.bias", "encoder.layer.1.attention.self.query"
EMBEDDING = "embeddings.word_embeddings.weight"


def tuned_everywhere(task):
    """A classifier that differs from the base in every weight; that of `a` has the base's embeddings."""
    model = perturbed(classifier(base_model(), task), 0.1, 1 + "abc".index(task))
    if task == "a":
        model.bert.embeddings.load_state_dict(base_model().embeddings.state_dict())
    return model


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """The folder of the base and of three experts that differ from it in every weight."""
    folder = tmp_path_factory.mktemp("everywhere")
    base_model().save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    for task in "abc":
        tuned_everywhere(task).save_pretrained(folder / task)
        save_tokenizer(folder / task)
    return folder


def merged(experts, output, method="tsv-c", tasks="ab", **options):
    return merge_bert(experts, output, tasks, method=method, calibration=None, rank=None, **options)


@pytest.fixture(scope="module")
def compressed(experts):
    return merged(experts, experts / "compressed")


@pytest.fixture(scope="module")
def whole(experts):
    return merged(experts, experts / "whole", FULL)


def assert_whole(folder, task):
    samples = encoded(task_texts(task, 11))
    wanted = logits(tuned_everywhere(task), samples)
    assert torch.allclose(logits(load_task_model(folder, task), samples), wanted, atol=1e-4)


def test_a_task_model_is_the_compressed_expert(compressed):
    """Matrices are the base's with the leading triplets of the update, everything else the expert's."""
    base = floating_weights(base_model())
    for task in "ab":
        own = {name.removeprefix("bert."): w for name, w in floating_weights(tuned_everywhere(task)).items()}
        model = load_task_model(compressed, task)
        assert type(model).__name__ == "BertForSequenceClassification" and not model.training
        for name, weight in floating_weights(model).items():
            inside = name.removeprefix("bert.")
            expected = own[inside].double()
            if weight.dim() == 2 and "pooler" not in name and "classifier" not in name:
                delta = expected - base[inside].double()
                u, s, vh = reference.svd(delta)
                k = min(delta.shape) // 2
                expected = base[inside].double() + (u[:, :k] * s[:k]) @ vh[:k]
            assert relative_error(weight, expected) < 1e-6, name


def test_routed_use_averages_what_each_task_keeps(compressed):
    static = AutoModel.from_pretrained(compressed).state_dict()
    mean = sum(tuned_everywhere(task).bert.state_dict()[NORM].double() for task in "ab") / 2
    assert relative_error(static[NORM], mean) < 1e-6
    routed = RoutedModel.from_pretrained(compressed)
    model = routed.task_model("b")
    assert torch.equal(model.bert.state_dict()[NORM], static[NORM])
    assert torch.equal(static[f"{QUERY}.weight"], base_model().state_dict()[f"{QUERY}.weight"])


def test_whole_experts_are_given_back_with_all_their_weights(whole, experts):
    for task in "ab":
        assert_whole(whole, task)
    rows = {
        task: [
            {"text": text, "label": int(label)}
            for text, label in zip(
                task_texts(task, 11), logits(tuned_everywhere(task), encoded(task_texts(task, 11))).argmax(1)
            )
        ]
        for task in "ab"
    }
    assert evaluate(whole, rows).model == {"a": 1.0, "b": 1.0}
    samples = encoded(task_texts("b", 11))
    routed = RoutedModel.from_pretrained(whole)
    with routed.route("b"):
        averaged = logits(routed.task_model("b"), samples)
    assert not torch.allclose(averaged, logits(tuned_everywhere("b"), samples), atol=1e-3)
    mean = evaluate(whole, rows, route="oracle").outcomes["b"]
    assert mean.score == float(
        (averaged.argmax(1) == torch.tensor([row["label"] for row in rows["b"]])).float().mean()
    )


def test_a_task_of_a_compressed_model_is_an_expert_with_all_its_weights(whole, experts):
    spec = {"b": {"path": str(whole), "task": "b"}}
    again = merge_models(experts / "base", spec, method="mean", progress=False).load_model().state_dict()
    for name in (NORM, EMBEDDING, f"{QUERY}.weight", f"{QUERY}.bias"):
        assert relative_error(again[name], tuned_everywhere("b").bert.state_dict()[name]) < 1e-6, name


@pytest.mark.parametrize("tasks", ["ab", "aa"], ids=["changed-embeddings", "base-embeddings"])
def test_experts_come_and_go_with_all_their_weights(experts, tmp_path, tasks):
    """Also one that changes embeddings that no other changes."""
    names = dict(zip(("one", "two"), tasks, strict=True))
    found = {name: experts / task for name, task in names.items()}
    folder = merge_models(experts / "base", found, method=FULL, output_dir=tmp_path / "out", progress=False).output_dir
    assert (folder / HEADS_FOLDER / BASE_WEIGHTS).is_file() == (tasks == "ab")
    larger = RoutedModel.from_pretrained(folder).add_expert("c", experts / "c", output_dir=tmp_path / "larger")
    assert_whole(larger.folder, "c")
    fewer = larger.remove_expert("one", output_dir=tmp_path / "fewer")
    assert_whole(fewer.folder, "c")
    assert not (fewer.folder / HEADS_FOLDER / "one").exists()


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "wav2vec2", "vit"])
def test_every_kind_of_weight_is_kept(name, tmp_path):
    """Transposed maps, experts of mixtures, convolutions: whole experts are given back."""
    base = ARCHITECTURES[name].build()
    experts = {task: perturbed(base, 0.05, seed) for seed, task in enumerate("ab")}
    merge_models(base, experts, method=FULL, output_dir=tmp_path / "out", progress=False)
    for task, expert in experts.items():
        found = floating_weights(load_task_model(tmp_path / "out", task))
        wanted = floating_weights(expert)
        assert found.keys() == wanted.keys()
        for weight in wanted:
            assert relative_error(found[weight], wanted[weight]) < 1e-5, weight


def test_task_models_have_the_dtype_of_the_merged_body(experts, tmp_path):
    folder = merged(experts, tmp_path / "out", FULL, dtype="bfloat16")
    model = load_task_model(folder, "b")
    assert {weight.dtype for weight in model.state_dict().values() if weight.is_floating_point()} == {torch.bfloat16}
    own = tuned_everywhere("b").bert.state_dict()[NORM]
    assert torch.equal(model.bert.state_dict()[NORM], own.bfloat16())
    assert load_task_model(folder, "b", dtype=torch.float32).dtype == torch.float32


def test_what_a_task_keeps_is_hashed_and_no_other_method_keeps_any(compressed, experts, tmp_path):
    assert "heads/b/body.safetensors" in (compressed / "hashes.json").read_text()
    card = (compressed / "README.md").read_text()
    assert "biases, norms, convolutions, compressed embeddings" in card and "is averaged" in card
    folder = merged(experts, tmp_path / "mean", "mean")
    assert not list(folder.rglob(BODY_WEIGHTS)) and "is averaged" not in (folder / "README.md").read_text()
    path = merged(experts, tmp_path / "out") / HEADS_FOLDER / "b" / BODY_WEIGHTS
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(HfEsmError, match=r"heads/b/body\.safetensors is damaged"):
        RoutedModel.from_pretrained(tmp_path / "out")
