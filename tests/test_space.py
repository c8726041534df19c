"""The Gradio app of `examples/space`: it shows which expert answers, how sure, and the labels or the text."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
import yaml

from hf_esm import RoutedModel, merge_models
from support.helpers import perturbed
from support.routed_toys import task_texts
from support.tiny import LLAMA, WORDS, save_tokenizer


FOLDER = Path(__file__).parents[1] / "examples" / "space"


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("gradio", reason="gradio is installed by make test-extras")
    spec = importlib.util.spec_from_file_location("space_app", FOLDER / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers(app, folder):
    """What the app calls when its button is pressed."""
    (function,) = [function for function in app.build(str(folder)).fns.values() if function.api_name == "answer"]
    return function.fn


@pytest.mark.extras
def test_a_classifier_shows_the_expert_and_all_labels(app, merged, routed):
    answer, text = answers(app, merged), task_texts("b", 21, 1)[0]
    (prediction,), (why,) = routed.predict([text], probabilities=True), routed.explain([text])
    sentence, tasks, labels = answer(text, "", app.ROUTER)
    assert sentence.startswith(f"**b** answers: the router finds it {why.probabilities['b']:.0%} likely")
    assert tasks == pytest.approx(why.probabilities) and labels == pytest.approx(prediction.probabilities)
    named, tasks, labels = answer(text, "", "a")
    (prediction,) = routed.predict([text], "a", probabilities=True)
    assert "as you asked" in named and tasks == {"a": 1.0} and labels == pytest.approx(prediction.probabilities)
    pair = answer(text, text, "a")[2]
    assert pair == pytest.approx(routed.predict([(text, text)], "a", probabilities=True)[0].probabilities) != labels
    with pytest.raises(app.gr.Error, match="something to read"):
        answer("", "", app.ROUTER)


@pytest.mark.extras
def test_a_language_model_shows_the_expert_and_its_text(app, tmp_path):
    model, samples, draw = LLAMA.build(vocab_size=len(WORDS) + 5), {}, random.Random(0)
    words = {"code": WORDS[:5], "verse": WORDS[5:10]}
    for seed, name in enumerate(("base", *words)):
        (perturbed(model, 0.5, seed) if seed else model).save_pretrained(tmp_path / name)
        tokenizer = save_tokenizer(tmp_path / name)
    for task, known in words.items():
        samples[task] = [" ".join(draw.choices(known, k=draw.randint(4, 8))) for _ in range(32)]
    options = {"method": "esm++", "rank": 8, "refine": False, "calibration": samples, "progress": False}
    experts = {task: tmp_path / task for task in words}
    merge_models(tmp_path / "base", experts, output_dir=tmp_path / "routed", **options)
    answer, routed = answers(app, tmp_path / "routed"), RoutedModel.from_pretrained(tmp_path / "routed")
    text = samples["verse"][0]
    inputs = tokenizer(text, return_tensors="pt")
    sentence, tasks, written = answer(text, "", app.ROUTER)
    (why,) = routed.explain([{"input_ids": inputs["input_ids"][0]}])
    assert f"**{why.task}** answers" in sentence and tasks == pytest.approx(why.probabilities)
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for task, found in ((None, written), ("code", answer(text, "", "code")[2])):
        with torch.no_grad():
            expected = routed.generate(**ids, tasks=task, max_new_tokens=app.LENGTH)[0, ids["input_ids"].shape[1] :]
        assert found == tokenizer.decode(expected, skip_special_tokens=True) != ""


def test_the_folder_is_one_that_the_hub_takes_for_a_space():
    front = yaml.safe_load((FOLDER / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py") and (FOLDER / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60  # as the Hub asks
    assert {"hf_esm", "pillow"} == set((FOLDER / "requirements.txt").read_text().split())
