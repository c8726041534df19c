"""Semantic segmentation: maps of classes, and mean intersection over union."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import SegformerConfig, SegformerImageProcessor, ViTConfig, ViTForImageClassification

from hf_esm import HfEsmError, compare, evaluate, merge_models, update_card
from hf_esm.data.options import SampleOptions
from hf_esm.metrics.labels import LabelledSamples, read_map
from hf_esm.metrics.metric import MEAN_IOU, load_labelled
from hf_esm.metrics.named import resolve_metric
from hf_esm.metrics.outputs import overlaps_of
from hf_esm.metrics.scores import run
from support.helpers import Architecture, perturbed, save
from support.pictures import picture
from support.reference import mean_iou
from support.tiny import BERT


EVERYTHING = SampleOptions(num_samples=0)
SETTINGS = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}
PROCESSOR = SegformerImageProcessor(size={"height": 16, "width": 16})


def segmenter(classes=4, seed=0):
    model = Architecture("SegformerForSemanticSegmentation", SETTINGS).build(num_labels=classes)
    return perturbed(model, 0.3, seed).eval()


CONFIG = SegformerConfig(num_labels=3)
CLASSES = np.array([[0, 1, 2], [2, 255, 0]], dtype=np.uint8)
PALETTE = Image.fromarray(CLASSES, "P")
EXPECTED = [[0, 1, 2], [2, -100, 0]]


@pytest.mark.parametrize(
    "label", [CLASSES, CLASSES.tolist(), torch.tensor(EXPECTED), Image.fromarray(CLASSES), PALETTE]
)
def test_a_map_is_read_from_pictures_and_arrays(label):
    assert read_map(label, CONFIG, "row").tolist() == EXPECTED


def test_what_is_not_asked_for_is_left_out():
    assert read_map([[0, 1, 3], [255, 2, -100]], CONFIG, "row", reduced=True).tolist() == [
        [-100, 0, 2],
        [-100, 1, -100],
    ]
    other = SegformerConfig(num_labels=3, semantic_loss_ignore_index=1)
    assert read_map([[0, 1, 2]], other, "row").tolist() == [[0, -100, 2]]


@pytest.mark.parametrize(
    ("label", "reduced", "says"),
    [
        (np.zeros((4, 4, 3), np.uint8), False, r"uint8 of shape \(4, 4, 3\)"),
        (np.zeros((4, 4)), False, "float64 of shape"),
        (2, False, "int64 of shape"),
        ([[0, 3]], False, "a pixel has the class 3, but the expert knows 3"),
        ([[0, -1]], False, "a pixel has the class -1"),
        ([[0, 4]], True, "a pixel has the class 3"),
        ([[0, 1], [2]], False, "row 7"),
    ],
)
def test_other_labels_are_refused(label, reduced, says):
    with pytest.raises(HfEsmError, match=says) as caught:
        read_map(label, CONFIG, "row 7", reduced)
    assert str(caught.value).startswith("row 7: ")


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@torch.no_grad()
def test_mean_iou_is_that_of_transformers_answers(batch_size):
    """Answers have the size of each map, and pixels of all rows count together; a row counts each time it is drawn."""
    model, rng = segmenter(), np.random.default_rng(torch.seed() % 2**32)
    rows = [
        {"image": picture(rng, 18 + i, 14), "label": rng.choice([0, 1, 3, 255], (9 + i, 7))}  # class 2 is in none
        for i in range(4)
    ]
    data = load_labelled(rows, PROCESSOR, model.config, "rows", EVERYTHING, MEAN_IOU)
    inputs = PROCESSOR([row["image"] for row in rows], return_tensors="pt")
    sizes = [row["label"].shape for row in rows]
    answers = PROCESSOR.post_process_semantic_segmentation(model(**inputs), sizes)
    assert len(torch.cat([answer.flatten() for answer in answers]).unique()) > 2
    outcome = run(model, data, resolve_metric("mean-iou"), batch_size)
    assert outcome.score == pytest.approx(mean_iou(answers, data.labels, 4), abs=1e-12)
    drawn = torch.tensor([3, 0, 3])
    expected = mean_iou([answers[i] for i in drawn], [data.labels[i] for i in drawn], 4)
    assert float(outcome.scores_of_draws(drawn[None])) == pytest.approx(expected, abs=1e-12)


def test_mean_iou_of_what_is_known():
    """Maps that are all right, all wrong, half ignored, and ignored."""
    model = segmenter()
    sample = {"pixel_values": torch.randn(3, 16, 16)}
    with torch.no_grad():
        logits = model(pixel_values=sample["pixel_values"][None]).logits
    right = torch.nn.functional.interpolate(logits, size=(16, 16), mode="bilinear")[0].argmax(0)

    def score(labels):
        return MEAN_IOU.score(overlaps_of(model, [sample], [labels]), None)

    assert score(right) == 1
    assert score((right + 1) % 4) == 0
    half = right.clone()
    half[:8] = -100
    assert score(half) == 1
    with pytest.raises(HfEsmError, match="no pixel has a class"):
        score(torch.full_like(right, -100))


def test_maps_that_a_processor_made_are_not_reduced_again():
    reducing = SegformerImageProcessor(size={"height": 16, "width": 16}, do_reduce_labels=True)
    rng = np.random.default_rng(0)
    image, label = picture(rng, 16, 16), rng.integers(0, 5, (16, 16)).astype(np.uint8)
    made = reducing(image, segmentation_maps=Image.fromarray(label), return_tensors="pt")
    ready = [{"pixel_values": made["pixel_values"][0], "labels": made["labels"][0]}]
    config = SegformerConfig(num_labels=4)
    found = load_labelled(ready, reducing, config, "rows", EVERYTHING, MEAN_IOU)
    raw = load_labelled([{"image": image, "label": label}], reducing, config, "rows", EVERYTHING, MEAN_IOU)
    assert torch.equal(found.labels[0], raw.labels[0]) and set(found.labels[0].unique().tolist()) == {-100, 0, 1, 2, 3}
    assert torch.equal(found.samples[0]["pixel_values"], raw.samples[0]["pixel_values"])
    assert found.samples[0].keys() == raw.samples[0].keys() == {"pixel_values"}


def test_models_and_metrics_that_do_not_fit_are_refused():
    images = ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ).eval()
    sample = {"pixel_values": torch.randn(3, 16, 16)}
    data = LabelledSamples([sample], [torch.zeros(4, 4, dtype=torch.int64)])
    with pytest.raises(HfEsmError, match="ViTForImageClassification gives no class per pixel"):
        run(images, data, MEAN_IOU)
    rows = [{**sample, "labels": torch.zeros(4, 4, dtype=torch.int64)}]
    with pytest.raises(HfEsmError, match="for classes of pixels, use the metric mean-iou"):
        load_labelled(rows, None, segmenter().config, "rows", EVERYTHING)
    config = BERT.build("BertForSequenceClassification").config
    with pytest.raises(HfEsmError, match="rows: row 0 needs a label"):
        load_labelled([{"pixel_values": sample["pixel_values"]}], None, config, "rows", EVERYTHING, MEAN_IOU)


def test_segmenters_merge_and_are_compared(tmp_path):
    """The tasks have different classes, so each keeps its own head."""
    base = segmenter()
    save(base.segformer, tmp_path / "base")
    experts, data = {}, {}
    for task, classes in (("a", 3), ("b", 4)):
        expert = segmenter(classes, ord(task))
        body = perturbed(base.segformer, 0.05, ord(task)).state_dict()
        expert.segformer.load_state_dict(body)
        experts[task] = save(expert, tmp_path / task)
        PROCESSOR.save_pretrained(tmp_path / task)
        rng = np.random.default_rng(classes)
        images = [picture(rng) for _ in range(6)]
        with torch.no_grad():
            outputs = expert(**PROCESSOR(images, return_tensors="pt"))
        maps = PROCESSOR.post_process_semantic_segmentation(outputs, [(20, 12)] * 6)
        columns = {"image": images, "label": [Image.fromarray(m.to(torch.uint8).numpy()) for m in maps]}
        data[task] = Dataset.from_dict(columns)
    merged = merge_models(
        tmp_path / "base",
        experts,
        method="task-arithmetic",
        alpha="auto",
        metric="mean-iou",
        validation=data,
        output_dir=tmp_path / "out",
        progress=False,
    )
    assert 0 < merged.alpha_scores[merged.alpha] <= 1 and len(set(merged.alpha_scores.values())) > 1
    scores = evaluate(tmp_path / "out", data, experts=experts, metric="mean-iou", processor=PROCESSOR)
    assert scores.expert == {"a": 1.0, "b": 1.0}
    assert all(0 < score < 1 for score in scores.model.values())
    update_card(tmp_path / "out", scores, data)
    assert "image-segmentation" in (tmp_path / "out" / "README.md").read_text()
    report = compare(
        tmp_path / "base",
        experts,
        methods=["task-arithmetic"],
        test=data,
        metric="mean-iou",
        processor=PROCESSOR,
        output_dir=tmp_path / "report",
        progress=False,
    )
    assert (report.metric, report.experts) == ("mean-iou", scores.expert)
    (row,) = report.rows
    assert all(0 < row.tasks[task] < 1 for task in "ab")
    calibration = {task: rows.remove_columns("label") for task, rows in data.items()}
    merge_models(
        tmp_path / "base",
        experts,
        calibration=calibration,
        method={"name": "esm++", "rank": 16},
        output_dir=tmp_path / "routed",
        progress=False,
    )
    given = evaluate(tmp_path / "routed", data, metric="mean-iou", processor=PROCESSOR, route="oracle")
    static = evaluate(tmp_path / "routed", data, metric="mean-iou", processor=PROCESSOR, route="static")
    assert given.average > static.average
