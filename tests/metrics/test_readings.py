"""Heads of any kind, scored by what the caller reads of their outputs: here, detectors of objects."""

from operator import eq

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import YolosImageProcessor
from transformers.models.yolos.modeling_yolos import YolosObjectDetectionOutput

from hf_esm import HfEsmError, Metric, compare, evaluate, merge_models
from hf_esm.data.options import SampleOptions
from hf_esm.metrics.labels import LabelledSamples
from hf_esm.metrics.metric import load_labelled
from hf_esm.metrics.scores import Outcome, run
from support.helpers import Architecture, perturbed, save
from support.pictures import picture


EVERYTHING = SampleOptions(num_samples=0)
SETTINGS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": [16, 16],
    "patch_size": 8,
    "num_detection_tokens": 5,
}
PROCESSOR = YolosImageProcessor(do_resize=True, size={"height": 16, "width": 16}, do_pad=False)


def detector(classes, seed=0):
    model = Architecture("YolosForObjectDetection", SETTINGS).build(num_labels=classes)
    return perturbed(model, 0.3, seed).eval()


def surest(outputs):
    """Class and box of the query that is surest of an object."""
    shares = outputs["logits"].softmax(-1)[:, :-1]
    query = int(shares.amax(1).argmax())
    return {"class": int(shares[query].argmax()), "box": outputs["pred_boxes"][query].tolist()}


def nearness(found, right):
    """Mean over rows of how near the boxes are, 0 where the class is wrong."""
    apart = [max(abs(x - y) for x, y in zip(f["box"], r["box"])) for f, r in zip(found, right)]
    return sum((f["class"] == r["class"]) * max(1 - d, 0) for f, r, d in zip(found, right, apart)) / len(right)


DETECTION = Metric("nearness", nearness, read=surest)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@torch.no_grad()
def test_each_row_is_read_by_itself(batch_size):
    model, generator = detector(4), torch.Generator().manual_seed(torch.seed() % 2**32)
    samples = [{"pixel_values": torch.randn(3, 16, width, generator=generator)} for width in (16, 24, 16, 24, 16)]
    seen = []

    def read(outputs):
        seen.append(outputs.keys())
        return outputs["logits"].tolist()

    metric = Metric("sums", lambda found, right: torch.tensor(found).sum(), read=read)
    references = [f"object {i}" for i in range(5)]
    outcome = run(model, LabelledSamples(samples, references), metric, batch_size)
    expected = [model(pixel_values=sample["pixel_values"][None]).logits[0] for sample in samples]
    assert all(torch.allclose(torch.tensor(f), e, atol=1e-5) for f, e in zip(outcome.outputs, expected, strict=True))
    assert outcome.labels == references
    assert all({"logits", "pred_boxes", "last_hidden_state"} <= keys for keys in seen)
    again = torch.stack([expected[i] for i in (4, 0, 4)]).sum()
    assert float(outcome.scores_of_draws(torch.tensor([[4, 0, 4]]))) == pytest.approx(float(again), rel=1e-4)


def test_outputs_that_are_of_no_row_are_left_out():
    class Stub(torch.nn.Module):
        config, dtype = detector(2).config, torch.float32

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values, return_dict):
            boxes = torch.zeros(7, 4)
            return YolosObjectDetectionOutput(loss=torch.tensor(1.0), logits=pixel_values, pred_boxes=boxes)

    samples = [{"pixel_values": torch.full((2,), float(i))} for i in range(3)]
    metric = Metric("names", lambda found, right: 0.0, read=lambda outputs: [*outputs, float(outputs["logits"][0])])
    outcome = run(Stub(), LabelledSamples(samples, [0] * 3), metric)
    assert outcome.outputs == [["logits", float(i)] for i in range(3)]


def test_labels_stay_what_they_are():
    label = [{"class": 1, "box": [0.0, 0.1, 0.2, 0.3]}]
    rows = [{"pixel_values": torch.zeros(3, 16, 16), "objects": label}]
    named = SampleOptions(num_samples=0, columns={"label": "objects"})
    found = load_labelled(rows, PROCESSOR, detector(4).config, "rows", named, DETECTION)
    assert found.labels == [label]
    assert found.samples[0].keys() == {"pixel_values"}
    with pytest.raises(HfEsmError, match="rows: row 0 needs a label"):
        load_labelled(rows, PROCESSOR, detector(4).config, "rows", EVERYTHING, DETECTION)
    with pytest.raises(HfEsmError, match="give a Metric with `read`"):
        run(detector(4), LabelledSamples(found.samples, torch.zeros(1)))


def test_shares_of_what_is_read_have_intervals():
    metric = Metric("right", lambda found, right: sum(map(eq, found, right)) / len(right), is_share=True, read=len)
    outcome = Outcome(metric, [1, 2, 3], [1, 2, 4])
    draws = torch.tensor([[0, 1, 2], [2, 2, 2], [0, 0, 0]])
    assert outcome.scores_of_draws(draws).tolist() == pytest.approx([2 / 3, 0, 1])


def test_detectors_merge_and_are_compared(tmp_path):
    """The tasks have different classes, so each keeps its own head."""
    base = detector(2)
    save(base.vit, tmp_path / "base")
    experts, data = {}, {}
    for task, classes in (("a", 3), ("b", 4)):
        expert = detector(classes, ord(task))
        expert.vit.load_state_dict(perturbed(base.vit, 0.1, ord(task)).state_dict())
        experts[task] = save(expert, tmp_path / task)
        PROCESSOR.save_pretrained(tmp_path / task)
        rng = np.random.default_rng(classes)
        images = [picture(rng) for _ in range(6)]
        with torch.no_grad():
            outputs = expert(**PROCESSOR(images, return_tensors="pt"))
        right = [surest({"logits": x, "pred_boxes": y}) for x, y in zip(outputs.logits, outputs.pred_boxes)]
        data[task] = Dataset.from_dict({"image": images, "label": right})
    shared = {"metric": DETECTION, "processor": PROCESSOR}
    calibration = {task: rows.remove_columns("label") for task, rows in data.items()}
    merged = merge_models(
        tmp_path / "base",
        experts,
        calibration=calibration,
        method={"name": "esm++", "rank": 16},
        alpha="auto",
        validation=data,
        output_dir=tmp_path / "out",
        progress=False,
        **shared,
    )
    assert 0 < merged.alpha_scores[merged.alpha] <= 1 and len(set(merged.alpha_scores.values())) > 1
    scores = evaluate(tmp_path / "out", data, experts=experts, route="static", **shared)
    assert scores.metric == "nearness" and scores.expert == {"a": pytest.approx(1), "b": pytest.approx(1)}
    assert scores.average == pytest.approx(merged.alpha_scores[merged.alpha], abs=1e-5)
    given = evaluate(tmp_path / "out", data, route="oracle", **shared)
    assert given.average > scores.average
    arguments = {"test": data, "methods": ["mean", "task-arithmetic"], "output_dir": tmp_path / "report", **shared}
    first, second = (compare(tmp_path / "base", experts, progress=False, **arguments) for _ in range(2))
    assert first.rows == second.rows and first.experts == second.experts == scores.expert
    assert all(0 <= row.tasks[task] < 1 for row in first.rows for task in "ab")
    unkept = Metric("tensors", nearness, read=lambda outputs: outputs["logits"])
    with pytest.raises(HfEsmError, match=r"the metric 'tensors' reads of outputs.* cannot be cached as JSON"):
        compare(tmp_path / "base", experts, **{**arguments, "metric": unkept, "progress": False})
