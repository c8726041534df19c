"""A whole merge in a few minutes, without network: small Vision Transformers that read handwritten digits."""

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from ..checkpoints import load_task_model, quiet_loading
from ..data import SampleOptions
from ..errors import HfEsmError
from ..merging import merge_models
from ..methods import METHODS
from ..metrics import LabelledSamples, Scores, accuracy, load_labelled, plot_task_scores, require_matplotlib
from ..version import __version__


RESULTS_FILE = "results.json"


PICTURE_FILE = "scores.png"


TRAIN_BATCH, EVALUATION_BATCH = 64, 256


EXPERTS, BASE, GIVEN = "experts", "base, experts' heads", "esm++, task given"


FOLDERS = {"esm": "merged", "esm++": "routed"}  # the methods whose models stay


FORMAT = "hf_esm.demo"


Say = Callable[[str], Any]


SAME = 1e-5  # largest difference of logits that still is the same answer, in float32


@dataclass(frozen=True)
class DigitTask:
    """A task on the digits.

    Attributes:
        name: its name as an expert.
        question: what it asks, for the reader.
        labels: names of its classes.
        view: pictures `[N, 8, 8]` uint8 to what the task sees of them, of the same shape.
        classes: digits `[N]` to classes `[N]`.
    """

    name: str
    question: str
    labels: tuple[str, ...]
    view: Callable[[np.ndarray], np.ndarray]
    classes: Callable[[np.ndarray], np.ndarray]


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


_PATCH_ORDER = np.random.default_rng(0).permutation(16)


def _shuffle_patches(pictures: np.ndarray) -> np.ndarray:
    """The sixteen 2 x 2 patches of every picture in another order, the same for all."""
    patches = pictures.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 2, 2)[:, _PATCH_ORDER]
    return patches.reshape(-1, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8)


def _same(values: np.ndarray) -> np.ndarray:
    return values


# Two groupings of the digits and three new views of them: every expert has to undo something that the others need.
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
    """How much is trained. The defaults take a minute on two idle cores; a merge takes less than a second of it.

    Attributes:
        methods: names of the merge methods that are compared.
        base_steps: training steps of the base, on the ten digits.
        expert_steps: training steps of each expert.
        train_size: pictures to train on, of 1797.
        validation_size: labelled pictures per task to choose alpha on.
        test_size: pictures per task to test on.
        num_proxies: unlabelled pictures per task for the calibration, out of those trained on.
        width: width of the Vision Transformer.
        layers: its depth.
    """

    methods: tuple[str, ...] = ("mean", "task-arithmetic", "tsv-m", "esm", "esm++")
    base_steps: int = 600
    expert_steps: int = 200
    train_size: int = 1000
    validation_size: int = 297
    test_size: int = 500
    num_proxies: int = 32
    width: int = 96
    layers: int = 4


def run_demo(
    output_dir: str | os.PathLike,
    seed: int = 0,
    settings: DemoSettings | None = None,
    *,
    say: Say = print,
) -> dict[str, Any]:
    """Train a base and five experts on scikit-learn's digits, merge them by several methods, and compare.

    Leaves in `output_dir`: `base` and `experts/…` (ordinary checkpoints with an image processor), `merged` (ESM's
    model), `results.json` and `scores.png`.

    Args:
        output_dir: folder to write: a new one, an empty one, or an earlier demo's, which is replaced.
        seed: of the split, the initial weights and the order of training. The same seed gives the same scores on one
            machine with one number of threads.
        settings: how much is trained.
        say: called with every line of the account.

    Returns what `results.json` holds.

    Raises:
        HfEsmError: if `output_dir` holds something else, if scikit-learn, Pillow or matplotlib are missing, or if the
            reloaded model does not answer as it should.
    """
    settings, start = settings or DemoSettings(), time.perf_counter()
    if "esm" not in settings.methods or not METHODS.keys() >= set(settings.methods):
        raise HfEsmError(f"methods must be among {', '.join(METHODS)}, with 'esm' for the model that is written.")
    require_matplotlib()
    data = load_digit_data(settings, seed)
    output = _claim(Path(output_dir).expanduser())
    counts = {split: len(indices) for split, indices in data.splits.items()}
    say(f"{len(data.digits)} digits of 8 x 8 pixels: " + ", ".join(f"{n} for {split}" for split, n in counts.items()))

    # Nothing of the caller's is changed: neither the state of torch's random numbers nor Transformers' verbosity.
    with quiet_loading(), torch.random.fork_rng(devices=[]):
        train_models(output, data, settings, seed, say)
        scores, merges = compare_methods(output, data, settings, seed, say)
        difference = reload_difference(output, data)
    results = {
        "seed": seed,
        "settings": asdict(settings),
        "versions": {"hf_esm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "splits": counts,
        "tasks": {task.name: task.question for task in TASKS},
        "scores": scores,
        "merges": merges,
        "reload": {"max_logit_difference": difference, "pictures": counts["test"] * len(TASKS)},
    }
    bars = {method: scores[method]["model"] for method in settings.methods}
    title = "Five fine-tunes of a small Vision Transformer in one model (handwritten digits)"
    plot_task_scores(bars, scores[EXPERTS]["model"], output / PICTURE_FILE, title)
    results = _write_results(output, {**results, "seconds": round(time.perf_counter() - start, 1)})
    say("\n" + "\n".join(format_table(results)) + "\n")
    say(f"Reloaded: on {results['reload']['pictures']} test pictures, load_task_model and the experts with the body")
    say(f"that Transformers' AutoModel reads from 'merged' differ in no logit by more than {difference:.1e}.")
    if not difference <= SAME:
        raise HfEsmError(f"The reloaded model answers differently, by {difference:.2g}. Please report this.")
    written = "base, experts, merged, routed, results.json and scores.png"
    say(f"{results['seconds']:.0f} s in all. Written to {output}: {written}.")
    say(f"Go on with: hf_esm.load_task_model({str(output / 'merged')!r}, 'parity')")
    return results


def _claim(output: Path) -> Path:
    """The folder, with an unfinished results file in it by which a later demo knows that it may be replaced."""
    file = output / RESULTS_FILE
    known = file.is_file() and FORMAT in file.read_text(encoding="utf-8", errors="replace")
    if output.exists() and not known and not (output.is_dir() and not any(output.iterdir())):
        raise HfEsmError(f"{output} exists and is not from a demo. Choose another folder.")
    output.mkdir(parents=True, exist_ok=True)
    _write_results(output, {"seconds": None})
    return output


def _write_results(output: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Write the results file, and return what reading it gives."""
    text = json.dumps({"format": FORMAT, **results}, indent=1)
    (output / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


@dataclass
class DigitData:
    """The digits, split.

    Attributes:
        pictures: `[1797, 8, 8]` uint8.
        digits: `[1797]` int64.
        splits: indices by the name of the split, `train`, `validation` and `test`.
        processor: turns a picture into pixel values.
    """

    pictures: np.ndarray
    digits: np.ndarray
    splits: dict[str, np.ndarray]
    processor: ViTImageProcessorPil

    def rows(self, task: DigitTask, split: str, count: int | None = None, labelled: bool = True) -> list[dict]:
        """What a user has of a task: images, and the names of their classes."""
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
    """Scikit-learn's digits, shuffled and split with `seed`. They come with the package; nothing is fetched."""
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
    # The class that needs no torchvision; `AutoImageProcessor` reads what it saves with or without.
    size = {"height": 8, "width": 8}
    processor = ViTImageProcessorPil(do_resize=False, size=size, image_mean=[0.5], image_std=[0.5])
    pictures = (digits.images * (255 / 16)).round().astype(np.uint8)
    return DigitData(pictures, digits.target.astype(np.int64), splits, processor)


def train_models(output: Path, data: DigitData, settings: DemoSettings, seed: int, say: Say) -> None:
    """Train the base on the ten digits and one expert per task from it, and save them as any model is saved."""
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
    """Train by AdamW with a short warm-up and a linear decay, and save as any model is saved."""
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


def compare_methods(output: Path, data: DigitData, settings: DemoSettings, seed: int, say: Say) -> tuple[dict, dict]:
    """Merge by every method, and score experts, base and merged models on the test pictures.

    Returns by row of the table its `Scores` as plain data, and by method its α, the scores that α was chosen by, and
    times in seconds. The models of ESM and ESM++ stay, in `merged` and `routed`.
    """
    base = output / "base"
    experts = {task.name: output / "experts" / task.name for task in TASKS}
    calibration = {task.name: data.rows(task, "train", settings.num_proxies, labelled=False) for task in TASKS}
    validation = {task.name: data.rows(task, "validation") for task in TASKS}
    found: dict[str, dict[str, float]] = {EXPERTS: {}, BASE: {}}
    test: dict[str, LabelledSamples] = {}
    for task in TASKS:
        expert = AutoModelForImageClassification.from_pretrained(experts[task.name]).eval()
        test[task.name] = data.encoded(task, "test", expert.config)
        found[EXPERTS][task.name] = accuracy(expert, test[task.name], EVALUATION_BATCH)
        found[BASE][task.name] = accuracy(_exchange_body(expert, base), test[task.name], EVALUATION_BATCH)

    say("Merging")
    merges: dict[str, dict[str, Any]] = {}
    for method in settings.methods:
        options: dict[str, Any] = {"progress": False, "batch_size": EVALUATION_BATCH, "seed": seed}
        if METHODS[method]().tunable:
            options |= {"alpha": "auto", "validation": validation}
        if method in FOLDERS:
            options |= {"output_dir": output / FOLDERS[method], "overwrite": True}
        if method == "esm++":  # its static model is the one before: the α is the same
            options |= {"alpha": merges["esm"]["alpha"], "validation": None}
        start = time.perf_counter()
        merged = merge_models(base, experts, calibration=calibration, method=method, **options)
        seconds = time.perf_counter() - start
        if method == "esm++":
            routed, task_found = merged.load_routed(), {}
            found[method], found[GIVEN] = {}, {}
            for task, rows in test.items():
                model = routed.task_model(task)
                found[method][task] = accuracy(model, rows, EVALUATION_BATCH)
                with routed.route(task):
                    found[GIVEN][task] = accuracy(model, rows, EVALUATION_BATCH)
                why = routed.explain(rows.samples, EVALUATION_BATCH)
                task_found[task] = sum(e.likeliest == task for e in why) / len(why)
        else:
            models = {task: merged.load_task_model(task) for task in test}
            found[method] = {task: accuracy(models[task], test[task], EVALUATION_BATCH) for task in test}
        searched = merged.seconds["choosing alpha"]
        merges[method] = {
            "alpha": merged.alpha,
            "alpha_scores": merged.alpha_scores,
            "merge_seconds": round(seconds - searched, 2),
            "search_seconds": round(searched, 2),
            **({"task_found": task_found} if method == "esm++" else {}),
        }
        say(f"  {method:16}{seconds:5.1f} s")
    return {name: Scores(scores, found[EXPERTS]).as_dict() for name, scores in found.items()}, merges


def _exchange_body(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the body that `AutoModel` finds in a folder; its classifier stays."""
    model.base_model.load_state_dict(AutoModel.from_pretrained(folder, add_pooling_layer=False).state_dict())
    return model


@torch.no_grad()
def reload_difference(output: Path, data: DigitData) -> float:
    """Largest difference of any test logit between two ways to put the merged model together from its files.

    One is `load_task_model`; the other takes the expert as it was trained and exchanges its body.
    """
    differences = []
    for task in TASKS:
        reloaded = load_task_model(output / "merged", task.name)
        expert = AutoModelForImageClassification.from_pretrained(output / "experts" / task.name).eval()
        samples = data.encoded(task, "test", expert.config).samples
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        expected = _exchange_body(expert, output / "merged")(pixel_values=pixels).logits
        differences.append(float((reloaded(pixel_values=pixels).logits - expected).abs().max()))
    return max(differences)


def format_table(results: Mapping[str, Any]) -> list[str]:
    """The table of `results.json` as lines, accuracies in percent, with what has to be known to read it."""
    tasks = list(results["tasks"])
    head = f"{'test accuracy in %':22}" + "".join(f"{task:>10}" for task in tasks)
    lines = [f"{head}{'average':>10}{'normalised':>12}{'alpha':>7}{'merge':>8}{'search':>8}"]
    for name, found in results["scores"].items():
        line = f"{name:22}" + "".join(f"{100 * found['model'][task]:10.1f}" for task in tasks)
        line += f"{100 * found['average']:10.1f}{100 * found['normalised']:12.1f}"
        if merge := results["merges"].get(name):
            tuned = bool(merge["alpha_scores"])
            line += f"{merge['alpha'] if tuned else '-':>7}{merge['merge_seconds']:6.1f} s"
            line += f"{merge['search_seconds']:6.1f} s" if tuned else f"{'-':>8}"
        lines.append(line)
    counted = results["splits"]["validation"]
    for merge in results["merges"].values():
        if found := merge.get("task_found"):
            share = sum(found.values()) / len(found)
            lines.append(f"The router found the task of {100 * share:.1f} % of the test pictures.")
    return [
        *lines,
        "normalised: mean over tasks of the accuracy divided by the expert's.",
        "alpha: of 0.1, 0.2 … 3.0, the nearest to the default within a standard error of the best mean accuracy on",
        f"{counted} validation pictures per task, found in the time under 'search'; 'merge' is the rest. The test",
        "pictures were used for this table alone.",
    ]
