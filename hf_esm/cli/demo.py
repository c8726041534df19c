"""Train a small Vision Transformer on handwritten digits, fine-tune experts, merge and compare them: two minutes,
without network.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel

from ..checkpoints import SCORES_PICTURE, load_task_model, quiet_loading
from ..errors import HfEsmError
from ..merging import merge_models
from ..methods import METHODS
from ..metrics import LabelledSamples, Scores, accuracy, plot_task_scores, require_matplotlib
from ..routing import RoutedModel
from ..utils import atomic_file, plain_table
from ..version import __version__
from .console import Outcome
from .digits import EVALUATION_BATCH, TASKS, DemoSettings, DigitData, Say, load_digit_data, train_models


RESULTS_FILE = "results.json"


EXPERTS, BASE, TASK_GIVEN = "experts", "base, experts' heads", "esm++, task given"  # rows that are no method's


FOLDERS = {"esm": "merged", "esm++": "routed"}  # of the methods whose models are kept


FORMAT = "hf_esm.demo"


SAME = 1e-5  # the largest difference of logits, in float32, of models that count as the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="demo_output", help="folder to write (default: demo_output)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")


def run(arguments: argparse.Namespace) -> Outcome:
    results, merged = run_demo(arguments.output, seed=arguments.seed), str(Path(arguments.output) / "merged")
    return Outcome("", results, arguments.output, load=f"hf_esm.load_task_model({merged!r}, 'parity')")


def run_demo(
    output_dir: str | os.PathLike,
    seed: int = 0,
    settings: DemoSettings | None = None,
    *,
    say: Say = print,
) -> dict[str, Any]:
    """Train a base and five experts on scikit-learn's digits, merge them by several methods, and compare.

    Writes to `output_dir`: `base` and `experts/…` (ordinary checkpoints with an image processor), `merged` (the model
    of ESM), `routed` (that of ESM++), `results.json` and `scores.png`.

    Args:
        output_dir: folder to write: a new one, an empty one, or that of an earlier demo, which is replaced.
        seed: seed of the split, the initial weights and the order of training. The same seed gives the same scores on
            one machine with the same number of threads.
        settings: how much is trained.
        say: called with every line of the account.

    Returns:
        The content of `results.json`.

    Raises:
        HfEsmError: if `output_dir` holds something else, if scikit-learn, Pillow or matplotlib are missing, or if the
            reloaded model gives other answers than the expert with the merged body.
    """
    settings, start = settings or DemoSettings(), time.perf_counter()
    if "esm" not in settings.methods or not METHODS.keys() >= set(settings.methods):
        raise HfEsmError(f"methods must be among {', '.join(METHODS)}, with 'esm' for the model that is written.")
    require_matplotlib()
    data = load_digit_data(settings, seed)
    output = _claim(Path(output_dir).expanduser())
    counts = {split: len(indices) for split, indices in data.splits.items()}
    say(f"{len(data.digits)} digits of 8 x 8 pixels: " + ", ".join(f"{n} for {split}" for split, n in counts.items()))

    # The state of torch's random numbers and Transformers' verbosity are the caller's, and stay as they are.
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
    plot_task_scores(bars, scores[EXPERTS]["model"], output / SCORES_PICTURE, title)
    results = _write_results(output, {**results, "seconds": round(time.perf_counter() - start, 1)})
    say("\n" + "\n".join(format_table(results)) + "\n")
    say(f"Reloaded: on {results['reload']['pictures']} test pictures, load_task_model and the experts with the body")
    say(f"that Transformers' AutoModel reads from 'merged' differ in no logit by more than {difference:.1e}.")
    if not difference <= SAME:
        raise HfEsmError(f"The logits of the reloaded model differ by {difference:.2g}. Please report this.")
    written = "base, experts, merged, routed, results.json and scores.png"
    say(f"{results['seconds']:.0f} s in all. Written to {output}: {written}.")
    return results


def _claim(output: Path) -> Path:
    """Make the folder, with an unfinished results file that tells a later demo that the folder may be replaced."""
    file = output / RESULTS_FILE
    known = file.is_file() and FORMAT in file.read_text(encoding="utf-8", errors="replace")
    if output.exists() and not known and not (output.is_dir() and not any(output.iterdir())):
        raise HfEsmError(f"{output} exists and is not from a demo. Choose another folder.")
    output.mkdir(parents=True, exist_ok=True)
    _write_results(output, {"seconds": None})
    return output


def _write_results(output: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Write the results file; return the results as JSON gives them back."""
    text = json.dumps({"format": FORMAT, **results}, indent=1)
    with atomic_file(output / RESULTS_FILE) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


def compare_methods(output: Path, data: DigitData, settings: DemoSettings, seed: int, say: Say) -> tuple[dict, dict]:
    """Merge by every method, and score experts, base and merged models on the test pictures.

    The models of ESM and ESM++ are written to `merged` and `routed`.

    Returns:
        The `Scores` of each row of the table as plain data; and by method its α, the validation scores that α was
        chosen by, and times in seconds.
    """
    base = output / "base"
    experts = {task.name: output / "experts" / task.name for task in TASKS}
    calibration = {task.name: data.rows(task, "train", settings.num_samples, labelled=False) for task in TASKS}
    validation = {task.name: data.rows(task, "validation") for task in TASKS}
    scores: dict[str, dict[str, float]] = {EXPERTS: {}, BASE: {}}
    test: dict[str, LabelledSamples] = {}
    for task in TASKS:
        expert = AutoModelForImageClassification.from_pretrained(experts[task.name]).eval()
        test[task.name] = data.encoded(task, "test", expert.config)
        scores[EXPERTS][task.name] = accuracy(expert, test[task.name], EVALUATION_BATCH)
        scores[BASE][task.name] = accuracy(_exchange_body(expert, base), test[task.name], EVALUATION_BATCH)

    say("Merging")
    merges: dict[str, dict[str, Any]] = {}
    for method in settings.methods:
        options: dict[str, Any] = {"progress": False, "batch_size": EVALUATION_BATCH, "seed": seed}
        if METHODS[method]().tunable:
            options |= {"alpha": "auto", "validation": validation}
        if method in FOLDERS:
            options |= {"output_dir": output / FOLDERS[method], "overwrite": True}
        if method == "esm++":  # its static model is that of ESM, and so is its α
            options |= {"alpha": merges["esm"]["alpha"], "validation": None}
        start = time.perf_counter()
        merged = merge_models(base, experts, calibration=calibration, method=method, **options)
        seconds = time.perf_counter() - start
        searched = merged.seconds["choosing"]
        merges[method] = {
            "alpha": merged.alpha,
            "alpha_scores": merged.alpha_scores,
            "merge_seconds": round(seconds - searched, 2),
            "search_seconds": round(searched, 2),
        }
        if method == "esm++":
            scores[method], scores[TASK_GIVEN], merges[method]["task_found"] = _score_routed(
                merged.load_routed(), test
            )
        else:
            models = {task: merged.load_task_model(task) for task in test}
            scores[method] = {task: accuracy(models[task], test[task], EVALUATION_BATCH) for task in test}
        say(f"  {method:16}{seconds:5.1f} s")
    return {name: Scores(by_task, scores[EXPERTS]).as_dict() for name, by_task in scores.items()}, merges


def _score_routed(
    routed: RoutedModel, test: Mapping[str, LabelledSamples]
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """By task: the accuracy with the router, the accuracy with the task named, how often the router finds the task."""
    decided, named, task_found = {}, {}, {}
    for task, rows in test.items():
        model = routed.task_model(task)
        decided[task] = accuracy(model, rows, EVALUATION_BATCH)
        with routed.route(task):
            named[task] = accuracy(model, rows, EVALUATION_BATCH)
        explanations = routed.explain(rows.samples, EVALUATION_BATCH)
        task_found[task] = sum(e.likeliest == task for e in explanations) / len(explanations)
    return decided, named, task_found


def _exchange_body(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Give the model the body that `AutoModel` loads from a folder; the classifier stays."""
    model.base_model.load_state_dict(AutoModel.from_pretrained(folder, add_pooling_layer=False).state_dict())
    return model


@torch.no_grad()
def reload_difference(output: Path, data: DigitData) -> float:
    """Largest difference of a test logit between two ways to load the merged model.

    One is `load_task_model`; the other exchanges the body of the trained expert.
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
    """The lines of a table of `results.json`, accuracies in percent, and of notes on it."""
    tasks = list(results["tasks"])
    rows = [["test accuracy in %", *tasks, "average", "normalised", "alpha", "merge", "search"]]
    for name, scores in results["scores"].items():
        shares = [*(scores["model"][task] for task in tasks), scores["average"], scores["normalised"]]
        times = ["", "", ""]
        if merge := results["merges"].get(name):
            tuned = bool(merge["alpha_scores"])
            times = [f"{merge['alpha']}" if tuned else "-", f"{merge['merge_seconds']:.1f} s"]
            times.append(f"{merge['search_seconds']:.1f} s" if tuned else "-")
        rows.append([name, *(f"{100 * share:.1f}" for share in shares), *times])
    lines, counted = plain_table(rows), results["splits"]["validation"]
    for merge in results["merges"].values():
        if task_found := merge.get("task_found"):
            share = sum(task_found.values()) / len(task_found)
            lines.append(f"The router found the task of {100 * share:.1f} % of the test pictures.")
    return [
        *lines,
        "normalised: mean over tasks of the accuracy divided by the expert's.",
        "alpha: of 0.1, 0.2 … 3.0, the nearest to the default within a standard error of the best mean accuracy on",
        f"{counted} validation pictures per task, in the time under 'search'; 'merge' is the time of everything else.",
        "The test pictures were used for this table alone.",
    ]
