"""Writes what this version of hf_esm writes, as small as it can be, for later versions to be tested on.

    python tests/write_fixtures.py FOLDER

makes FOLDER/written_by_VERSION. Those in `tests/fixtures` were made so and are never made anew: a later version that
changes a format adds a folder of its own beside them. `test_fixtures.py` asks what it loads the same questions, by the
functions here, which use the public API only, and compares with `expected.safetensors`.

A folder holds `base` and the experts `a` (2 labels) and `b` (3 labels), BERTs of two layers of width 8; `merged`
(esm), `routed` (esm++) and `tsv_c` (tsv-c), the first two merged from texts in memory, so that they keep their samples
in `calibration`; `statistics.safetensors` of `a`, with what the base's blocks read; `samples.safetensors` of `b`;
`recipe.yaml`, a merge's own recipe, that merges from those two files; and the update of `a` as `essential_components`
and `essential_lora`. All is written from within the folder, by relative names, and the absolute paths that recipes
hold are made relative afterwards, so that nothing depends on where it was made.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from hf_esm import (
    ActivationStatistics,
    RoutedModel,
    __version__,
    calibrate,
    essential_components,
    load_recipe,
    load_task_model,
    merge_models,
)
from support.helpers import perturbed
from support.routed_toys import task_texts
from support.tiny import SPECIAL, WORDS, save_tokenizer
from support.toys import classifier


TASKS = ("a", "b")
STATISTICS, SAMPLES, RECIPE = "statistics.safetensors", "samples.safetensors", "recipe.yaml"
ADAPTERS = ("essential_components", "essential_lora")
# The router is sure of the first, of `a`, and less so of the second, of `b`; to the last, which is of both and padded,
# it adds no expert.
TEXTS = ("a film fine a bad dull", "it is not good it one", "a bad it good")


def write(folder: Path) -> None:
    """The whole of a folder, which is the working directory meanwhile: what is written names it by no path."""
    folder.mkdir(parents=True)
    folder, before = folder.absolute(), Path.cwd()
    os.chdir(folder)
    try:
        _write_models()
        experts, calibration = {task: task for task in TASKS}, {task: task_texts(task) for task in TASKS}
        merge = {"base": "base", "experts": experts, "progress": False}
        merge_models(**merge, calibration=calibration, output_dir="merged")
        merge_models(**merge, calibration=calibration, method="esm++", rank=3, output_dir="routed")
        merge_models(**merge, method="tsv-c", rank=3, output_dir="tsv_c")
        calibrate("a", calibration["a"], base="base", progress=False).save(STATISTICS)
        shutil.copy("merged/calibration/b.safetensors", SAMPLES)
        with TemporaryDirectory() as other:
            again = merge_models(
                **merge, calibration={"a": STATISTICS, "b": SAMPLES}, output_dir=Path(other) / "merged"
            )
            shutil.copy(again.output_dir / "merge_recipe.yaml", RECIPE)
        for name, rank in zip(ADAPTERS, (2, 3)):  # of one rank they would give the same
            as_lora = name == "essential_lora"
            essential_components("base", "a", STATISTICS, rank=rank, output_dir=name, as_lora=as_lora, progress=False)
        _make_relative(folder)
        encoded = AutoTokenizer.from_pretrained("base")(list(TEXTS), padding=True, return_tensors="pt")
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        Path("texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
        with TemporaryDirectory() as other:
            expected = inputs | answers(Path(), inputs, TEXTS, Path(other))
        _check_distinct(expected)
        save_file({name: tensor.clone() for name, tensor in expected.items()}, "expected.safetensors")
    finally:
        os.chdir(before)


def _write_models() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=20,
    )
    base = perturbed(BertModel(config).eval(), 0.2, 0)
    base.save_pretrained("base")
    for seed, task in enumerate(TASKS, start=1):
        perturbed(classifier(base, task), 0.15, seed).save_pretrained(task)
    for name in ("base", *TASKS):
        save_tokenizer(Path(name))


def _make_relative(folder: Path) -> None:
    """Recipes name models and data from the folder that they stand in; no hash covers them."""
    for path in folder.rglob("*.yaml"):
        up = "../" * (len(path.relative_to(folder).parts) - 1)
        path.write_text(path.read_text(encoding="utf-8").replace(f"{folder}/", up), encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file() and str(folder).encode() in path.read_bytes():
            raise SystemExit(f"{path} names the folder that it was made in")


# Those that may, or have to, give what others give.
_ALIKE = ("statistics", "recipe", "routed.static", "changed.static", "changed.forced")


def _check_distinct(expected: dict[str, Tensor]) -> None:
    """Answers that are alike would not show that a route, a head or an adapter was lost."""
    found = [(name, tensor) for name, tensor in expected.items() if tensor.is_floating_point()]
    for i, (name, tensor) in enumerate(found):
        for other, second in found[:i]:
            alike = tensor.shape == second.shape and (tensor - second).abs().max() < 1e-3
            if alike and not name.startswith(_ALIKE):
                raise SystemExit(f"{name} and {other} are alike")


def answers(folder: Path, inputs: dict[str, Tensor], texts: Sequence[str], output_dir: Path) -> dict[str, Tensor]:
    """All that a folder is asked, by its name in `expected.safetensors`."""
    found = task_answers(folder / "merged", "merged", inputs)
    routed = RoutedModel.from_pretrained(folder / "routed")
    found |= routed_answers(routed, "routed", inputs) | router_answers(routed, texts)
    found |= routed_answers(changed_model(folder, output_dir / "changed"), "changed", inputs)
    found |= compressed_answers(folder / "tsv_c", inputs)
    for name in ADAPTERS:
        found |= adapter_answers(folder, name, inputs)
    found |= statistics_answers(folder / STATISTICS)
    merge_models(**load_recipe(folder / RECIPE), output_dir=output_dir / "merged", progress=False)
    return found | task_answers(output_dir / "merged", "recipe", inputs)


@torch.no_grad()
def task_answers(folder: Path, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of a merged model with every task's head."""
    return {f"{name}.{task}": load_task_model(folder, task)(**inputs).logits for task in TASKS}


@torch.no_grad()
def routed_answers(model: RoutedModel, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of every head where the router decides, where its task is named, and without experts."""
    found = {f"{name}.decided.{task}": model.task_model(task)(**inputs).logits for task in TASKS}
    for task in TASKS:
        with model.route(task):
            found[f"{name}.forced.{task}"] = model.task_model(task)(**inputs).logits
        with model.route("static"):
            found[f"{name}.static.{task}"] = model.task_model(task)(**inputs).logits
    return found


def router_answers(model: RoutedModel, texts: Sequence[str]) -> dict[str, Tensor]:
    """What the router makes of texts, which the model's own tokenizer reads."""
    found = model.explain(list(texts))
    return {
        "router.probabilities": torch.tensor([[one.probabilities[task] for task in TASKS] for one in found]),
        "router.weights": torch.tensor([[one.weights.get(task, 0.0) for task in TASKS] for one in found]),
        "router.distance": torch.tensor([one.distance for one in found]),
        "router.sure": torch.tensor([one.sure for one in found]),
    }


def changed_model(folder: Path, output_dir: Path) -> RoutedModel:
    """The routed model without the expert of `a`, and with it again, from its statistics. Its router is another: it is
    made of what the base's blocks read, not those of the merged model.
    """
    model = RoutedModel.from_pretrained(folder / "routed").remove_expert("a", output_dir=output_dir / "smaller")
    options = {"base": folder / "base", "output_dir": output_dir / "larger"}
    return model.add_expert("a", folder / "a", folder / STATISTICS, **options)


@torch.no_grad()
def compressed_answers(folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of a model of compressed experts, which has no router, with the task named."""
    model, found = RoutedModel.from_pretrained(folder), {}
    for task in TASKS:
        with model.route(task):
            found[f"tsv_c.forced.{task}"] = model.task_model(task)(**inputs).logits
    return found


@torch.no_grad()
def adapter_answers(folder: Path, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hidden states of the base, which has no head, with an adapter over it."""
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder / "base"), folder / name).eval()
    return {name: model(**inputs).last_hidden_state}


def statistics_answers(path: Path) -> dict[str, Tensor]:
    """Second moments, mean and count of every map's inputs: a factor itself may be any that has these moments."""
    statistics, found = ActivationStatistics.load(path), {}
    for weight, entry in statistics.items():
        found[f"statistics.{weight}.moments"] = entry.factor.T @ entry.factor / entry.count
        found[f"statistics.{weight}.mean"] = entry.mean
        found[f"statistics.{weight}.count"] = torch.tensor(entry.count)
    return found | {f"statistics.{weight}.pooled": rows for weight, rows in statistics.pooled.items()}


if __name__ == "__main__":
    write(Path(sys.argv[1]) / f"written_by_{__version__}")
