"""Data and models of the demo: handwritten digits, five tasks on them, and small Vision Transformers."""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from ..data import SampleOptions
from ..errors import HfEsmError
from ..metrics import LabelledSamples, accuracy, load_labelled


TRAIN_BATCH, EVALUATION_BATCH = 64, 256


Say = Callable[[str], Any]


@dataclass(frozen=True)
class DigitTask:
    """A task on the digits.

    Attributes:
        name: name of the expert.
        question: the task as a question, for the reader.
        labels: names of the classes.
        view: maps pictures `[N, 8, 8]` uint8 to the pictures that the task sees, of the same shape.
        classes: maps digits `[N]` to classes `[N]`.
    """

    name: str
    question: str
    labels: tuple[str, ...]
    view: Callable[[np.ndarray], np.ndarray]
    classes: Callable[[np.ndarray], np.ndarray]


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


_PATCH_ORDER = np.random.default_rng(0).permutation(16)


def _shuffle_patches(pictures: np.ndarray) -> np.ndarray:
    """Reorder the sixteen 2 x 2 patches of every picture, all pictures in the same way."""
    patches = pictures.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 2, 2)[:, _PATCH_ORDER]
    return patches.reshape(-1, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8)


def _same(values: np.ndarray) -> np.ndarray:
    return values


# Two groupings of the digits and three new views of them: every expert unlearns something that the others need.
TASKS = (
    DigitTask("parity", "is the digit even or odd?", ("even", "odd"), _same, lambda digits: digits % 2),
    DigitTask(
        "loops",
        "mirrored pictures: is there a closed loop (0, 6, 8, 9)?",
        ("open", "closed"),
        lambda pictures: pictures[:, :, ::-1],
        lambda digits: np.isin(digits, (0, 6, 8, 9)).astype(np.int64),
    ),
    DigitTask("negative", "which digit, black and white exchanged?", DIGITS, lambda pictures: 255 - pictures, _same),
    DigitTask("rotated", "which digit, turned by 90 degrees?", DIGITS, partial(np.rot90, axes=(1, 2)), _same),
    DigitTask("shuffled", "which digit, its patches in another order?", DIGITS, _shuffle_patches, _same),
)


PRETRAINING = DigitTask("base", "which digit?", DIGITS, _same, _same)


@dataclass
class DemoSettings:
    """How much is trained. The defaults take a minute on two idle cores, a merge less than a second.

    Attributes:
        methods: names of the merge methods to compare.
        base_steps: training steps of the base, on the ten digits.
        expert_steps: training steps of each expert.
        train_size: pictures to train on, of 1797.
        validation_size: labelled pictures per task to choose alpha on.
        test_size: pictures per task to test on.
        num_samples: unlabelled pictures per task for the calibration, from the training split.
        width: width of the Vision Transformer.
        layers: number of its blocks.
    """

    methods: tuple[str, ...] = ("mean", "task-arithmetic", "tsv-m", "esm", "esm++")
    base_steps: int = 600
    expert_steps: int = 200
    train_size: int = 1000
    validation_size: int = 297
    test_size: int = 500
    num_samples: int = 32
    width: int = 96
    layers: int = 4


@dataclass
class DigitData:
    """The digits, split.

    Attributes:
        pictures: `[1797, 8, 8]` uint8.
        digits: `[1797]` int64.
        splits: indices of the pictures of `train`, `validation` and `test`.
        processor: turns a picture into pixel values.
    """

    pictures: np.ndarray
    digits: np.ndarray
    splits: dict[str, np.ndarray]
    processor: ViTImageProcessorPil

    def rows(self, task: DigitTask, split: str, count: int | None = None, labelled: bool = True) -> list[dict]:
        """Rows of a task as a user has them: images, and the names of their classes unless `labelled` is false."""
        from PIL import Image

        chosen = self.splits[split][:count]
        images = [Image.fromarray(np.ascontiguousarray(view)) for view in task.view(self.pictures[chosen])]
        if not labelled:
            return [{"image": image} for image in images]
        labels = [task.labels[i] for i in task.classes(self.digits[chosen])]
        return [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]

    def encoded(self, task: DigitTask, split: str, config: Any) -> LabelledSamples:
        everything = SampleOptions(num_samples=0)
        return load_labelled(self.rows(task, split), self.processor, config, f"{split} of '{task.name}'", everything)


def load_digit_data(settings: DemoSettings, seed: int) -> DigitData:
    """Load the digits of scikit-learn, shuffled and split with `seed`. Nothing is downloaded."""
    for module, package in (("sklearn.datasets", "scikit-learn"), ("PIL", "pillow")):
        try:
            importlib.import_module(module)
        except ImportError:
            raise HfEsmError(f"The demo needs {package}, which is not installed: pip install hf_esm[demo]") from None
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    sizes = {"train": settings.train_size, "validation": settings.validation_size, "test": settings.test_size}
    if min(sizes.values()) < 1 or sum(sizes.values()) > len(order):
        raise HfEsmError(f"There are {len(order)} digits; train_size, validation_size and test_size ask for {sizes}.")
    splits = dict(zip(sizes, np.split(order, np.cumsum(list(sizes.values())))))
    # This class needs no torchvision; `AutoImageProcessor` reads what it saves, with torchvision or without.
    size = {"height": 8, "width": 8}
    processor = ViTImageProcessorPil(do_resize=False, size=size, image_mean=[0.5], image_std=[0.5])
    pictures = (digits.images * (255 / 16)).round().astype(np.uint8)
    return DigitData(pictures, digits.target.astype(np.int64), splits, processor)


def train_models(output: Path, data: DigitData, settings: DemoSettings, seed: int, say: Say) -> None:
    """Train the base on the ten digits, fine-tune one expert per task from it, and save all by `save_pretrained`."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        intermediate_size=4 * settings.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,  # ViT's own 0.02 is meant for a width of 768
        **_label_names(PRETRAINING),
    )
    torch.default_generator.manual_seed(seed)
    base = ViTForImageClassification(config)
    say(f"Training a Vision Transformer of {base.num_parameters() / 1e6:.2f} million parameters on the ten digits")
    _train(base, data, PRETRAINING, settings, output / "base", say)
    say(f"Fine-tuning {len(TASKS)} experts from it")
    for i, task in enumerate(TASKS):
        torch.default_generator.manual_seed(1000 * (seed + 1) + i)
        options = {"ignore_mismatched_sizes": True, **_label_names(task)}
        expert = ViTForImageClassification.from_pretrained(output / "base", **options)
        _train(expert, data, task, settings, output / "experts" / task.name, say)


def _label_names(task: DigitTask) -> dict[str, Any]:
    return {"id2label": dict(enumerate(task.labels)), "label2id": {name: i for i, name in enumerate(task.labels)}}


def _train(
    model: PreTrainedModel, data: DigitData, task: DigitTask, settings: DemoSettings, folder: Path, say: Say
) -> None:
    """Train by AdamW with a short warm-up and a linear decay, and save by `save_pretrained`."""
    start = time.perf_counter()
    steps, rate = (settings.base_steps, 2e-3) if task is PRETRAINING else (settings.expert_steps, 1e-3)
    encoded = data.encoded(task, "train", model.config)
    pixels, classes = torch.stack([s["pixel_values"] for s in encoded.samples]), encoded.labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    warmup = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 1 - i / steps))
    model.train()
    for step in range(1, steps + 1):
        batch = torch.randint(len(classes), (TRAIN_BATCH,))
        loss = functional.cross_entropy(model(pixel_values=pixels[batch]).logits, classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step < steps and step % 200 == 0:
            say(f"  {task.name:9} step {step} of {steps}, {time.perf_counter() - start:.0f} s")
    score = accuracy(model.eval(), data.encoded(task, "validation", model.config), EVALUATION_BATCH)
    say(f"  {task.name:9} {task.question:56}{100 * score:6.1f} % on validation,{time.perf_counter() - start:4.0f} s")
    model.save_pretrained(folder)
    data.processor.save_pretrained(folder)
