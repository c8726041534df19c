"""What cannot be merged is refused before any long work, in one message that names it and says what to do."""

import inspect
import json
import shutil
import signal
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModel, DistilBertConfig, DistilBertModel

from hf_esm import ActivationStatistics, HfEsmError, calibrate, load_recipe, load_task_model, merge_models
from hf_esm.checkpoints.layout import RECIPE_FILE
from hf_esm.methods.essential import EssentialMerge
from hf_esm.methods.registry import resolve_method
from hf_esm.methods.routed import RoutedMerge
from hf_esm.methods.sparse import TIES
from hf_esm.methods.stack import InputStatistics
from hf_esm.planning import MergeOptions
from hf_esm.utils.resume import WORK_FOLDER as WORK
from support.architectures import ARCHITECTURES
from support.helpers import perturbed, save, stored_tensors, text_samples
from support.processes import run_script
from support.tiny import BERT, SENTENCES, assert_refused, forbid_calibration, save_models, save_tokenizer, snapshot


WEIGHT = "bert.encoder.layer.0.output.dense.weight"
BODY_WEIGHT = WEIGHT.removeprefix("bert.")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def models(saved, tmp_path):
    """A copy of the saved models, to damage."""
    shutil.copytree(saved.folder, tmp_path, dirs_exist_ok=True)
    return SimpleNamespace(folder=tmp_path, **{task: tmp_path / task for task in ("base", "left", "right")})


def arguments(models: SimpleNamespace, **changes: Any) -> dict[str, Any]:
    experts = {"left": models.left, "right": models.right}
    calibration = {"left": text_samples(1), "right": text_samples(2)}
    given = {"base": models.base, "experts": experts, "calibration": calibration}
    return {**given, "output_dir": str(models.folder / "merged"), **changes}


def tensors(place: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable:
    """Change the stored tensors of one model."""

    def damage(models):
        path = models.folder / place / "model.safetensors"
        stored = load_file(path)
        change(stored)
        save_file(stored, path, {"format": "pt"})

    return damage


def without(name: str) -> Callable:
    return lambda stored: stored.pop(name)


def holding(name: str, value: float) -> Callable:
    return lambda stored: stored[name].view(-1)[3:4].fill_(value)


def instead(build: Callable[[], Any]) -> Callable:
    """Another model in place of the right expert."""

    def damage(models):
        shutil.rmtree(models.right)
        save(build(), models.right)

    return damage


def resized_both(models):
    """Nothing tells which tokens the new rows are of."""
    for task in ("left", "right"):
        model = BERT.build()
        model.resize_token_embeddings(64)
        model.save_pretrained(models.folder / task)


def cut(name: str, length: int) -> Callable:
    """Keep a part of a file alone."""

    def damage(models):
        path = models.folder / name
        path.write_bytes(path.read_bytes()[:length])

    return damage


def sharded(models):
    AutoModel.from_pretrained(models.base).save_pretrained(models.base, max_shard_size="4KB")
    (models.base / "model.safetensors").unlink(missing_ok=True)


def shard_lost(models):
    sharded(models)
    sorted(models.base.glob("model-00002-of-*.safetensors"))[0].unlink()


def index_broken(models):
    sharded(models)
    (models.base / "model.safetensors.index.json").write_text("{")


def pickled(models):
    torch.save(load_file(models.right / "model.safetensors"), models.right / "pytorch_model.bin")
    (models.right / "model.safetensors").unlink()


def pickle_broken(models):
    pickled(models)
    cut("right/pytorch_model.bin", 900)(models)
    return {"allow_pickle": True}


def shallower(models):
    deeper = BERT.build(num_hidden_layers=2)
    save(deeper, models.base)
    save(perturbed(deeper, 0.1, 1), models.left)


def tokenized(**changes: Any) -> Callable:
    """Calibration samples for a tokenizer that is there."""

    def damage(models):
        save_tokenizer(models.base)
        return changes

    return damage


def data_file(text: str, **keys: Any) -> Callable:
    """Calibration samples in a file."""

    def damage(models):
        path = models.folder / "data.jsonl"
        path.write_text(text)
        return {"calibration": {"left": {"path": path, **keys} if keys else path, "right": text_samples(2)}}

    return damage


def options(**changes: Any) -> Callable:
    return lambda models: changes


def written_by_a_merge(folder: Path) -> str:
    """A folder that may be replaced."""
    folder.mkdir(exist_ok=True)
    (folder / RECIPE_FILE).touch()
    return str(folder)


def calibration(left: Any, **changes: Any) -> Callable:
    return options(calibration={"left": left, "right": text_samples(2)}, **changes)


def statistics_of(width: int, name: str = BODY_WEIGHT, counts: Any = ()) -> ActivationStatistics:
    entry = InputStatistics(torch.randn(4, width), torch.randn(width), 4)
    return ActivationStatistics({name: entry}, {name: name}, token_counts=dict(counts))


def labelled(label: Any, **changes: Any) -> Callable:
    rows = [{"input_ids": [5, 6, 7], **({} if label is None else {"label": label})}]
    return options(alpha="auto", validation={"left": rows, "right": [{"input_ids": [5], "label": 0}]}, **changes)


def full_disk(models):
    usage = shutil.disk_usage(models.folder)
    return {"monkeypatch": ("shutil.disk_usage", lambda path: usage._replace(free=1000))}


LEFT, RIGHT = "expert 'left'", "expert 'right'"
OF_LEFT = "calibration of 'left'"
NAME_RULE = "use letters, digits, '.', '_' and '-'"
REFUSED = {
    # The models.
    "another-architecture": (
        instead(
            lambda: DistilBertModel(DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=24))
        ),
        [RIGHT, "distilbert", "must be fine-tunes"],
    ),
    "other-heads": (
        instead(lambda: BERT.build(num_attention_heads=4)),
        [RIGHT, "num_attention_heads (4, base 2)", "fine-tune"],
    ),
    "other-activation": (instead(lambda: BERT.build(hidden_act="relu")), [RIGHT, "hidden_act (relu, base gelu)"]),
    "adapter-beside-a-model": (
        lambda models: (models.right / "adapter_config.json").write_text("{}") and None,
        [RIGHT, "PEFT adapter", "Take a folder without one of them"],
    ),
    "other-shapes": (instead(lambda: BERT.build(hidden_size=32)), [RIGHT, "word_embeddings", "must be fine-tunes"]),
    "deeper": (
        instead(lambda: BERT.build(num_hidden_layers=2)),
        [RIGHT, "encoder.layer.1.", "fine-tune of this base"],
    ),
    "shallower": (shallower, [RIGHT, "encoder.layer.1.", "fine-tune of this base"]),
    "rows-added-twice": (resized_both, ["'left', 'right'", "60 embeddings", "Save each expert's tokenizer"]),
    "weights-missing": (tensors("right", without(WEIGHT)), [RIGHT, BODY_WEIGHT, "save_pretrained"]),
    "head-missing": (tensors("right", without("classifier.weight")), [RIGHT, "classifier.weight", "save_pretrained"]),
    "weights-missing-in-base": (tensors("base", without(BODY_WEIGHT)), ["base (", BODY_WEIGHT, "save_pretrained"]),
    "nan": (tensors("right", holding(WEIGHT, float("nan"))), [RIGHT, WEIGHT, "NaN", "again"]),
    "infinite": (tensors("right", holding(WEIGHT, float("-inf"))), [RIGHT, WEIGHT, "infinite", "again"]),
    "nan-in-base": (tensors("base", holding(BODY_WEIGHT, float("nan"))), ["base (", BODY_WEIGHT, "again"]),
    "nan-in-head": (
        tensors("right", holding("classifier.weight", float("nan"))),
        [RIGHT, "classifier.weight", "again"],
    ),
    "too-large": (tensors("right", holding(WEIGHT, 3e38)), [RIGHT, WEIGHT, "up to 3e+38", "cannot be weights"]),
    "too-large-in-base": (tensors("base", holding(BODY_WEIGHT, -1e25)), ["base (", BODY_WEIGHT, "up to 1e+25"]),
    "too-large-in-head": (
        tensors("right", holding("classifier.weight", 1e38)),
        [RIGHT, "classifier.weight", "cannot be weights"],
    ),
    "too-large-in-float64": (
        tensors("right", lambda stored: stored.update({WEIGHT: stored[WEIGHT].double().fill_(1e200)})),
        [RIGHT, WEIGHT, "up to 1e+200"],
    ),
    **{
        f"stored-as-{dtype}": (
            tensors("right", lambda stored, dtype=dtype: stored.update({WEIGHT: stored[WEIGHT].to(dtype)})),
            [RIGHT, WEIGHT, f"is stored as {dtype}", "Merge the checkpoint"],
        )
        for dtype in (torch.int32, torch.bool, torch.uint8)
    },
    "stored-as-complex": (
        tensors("right", lambda stored: stored.update({WEIGHT: stored[WEIGHT].to(torch.complex64)})),
        [RIGHT, WEIGHT, "is stored as C64", "another dtype"],
    ),
    "equals-the-base": (
        lambda models: {"experts": {"left": models.left, "right": models.base}},
        [RIGHT, "equals the base", "Leave it out"],
    ),
    "pickle-only": (pickled, [RIGHT, "pytorch_model.bin", "allow_pickle=True"]),
    "pickle-broken": (pickle_broken, [RIGHT, "pytorch_model.bin", "again"]),
    "cut-short": (cut("right/model.safetensors", 5000), [RIGHT, "model.safetensors", "again"]),
    "cut-in-the-header": (cut("right/model.safetensors", 6), [RIGHT, "model.safetensors", "again"]),
    "empty-file": (cut("base/model.safetensors", 0), ["base (", "model.safetensors", "again"]),
    "shard-lost": (shard_lost, ["base (", "model-00002-of-", "again"]),
    "index-broken": (index_broken, ["base (", "model.safetensors.index.json", "again"]),
    "config-broken": (cut("right/config.json", 20), [RIGHT, "config.json", "cannot be used"]),
    "no-such-folder": (
        lambda models: {"experts": {"left": models.left, "right": "./nowhere"}},
        [RIGHT, "./nowhere", "no such folder"],
    ),
    "no-model-in-folder": (lambda models: {"base": models.folder}, ["base (", "no config.json"]),
    "no-model-at-all": (options(base=None), ["No expert is an adapter", "Pass `base`"]),
    # The experts.
    "no-expert": (options(experts={}, calibration={}), ["one expert or more"]),
    "weights-of-no-task": (options(weights={"lift": 1}), ["`weights`", "'lift'", "did you mean 'left'"]),
    "weights-of-no-number": (options(weights={"left": "much"}), ["`weights` of 'left'", "finite number", "'much'"]),
    "weights-not-finite": (options(weights={"left": float("inf")}), ["`weights` of 'left'", "finite number"]),
    "weights-of-truth": (options(weights={"left": True}), ["`weights` of 'left'", "finite number"]),
    "a-weight-twice": (
        lambda models: {
            "experts": {"left": {"path": models.left, "weight": 2}, "right": models.right},
            "weights": {"left": 0.5},
        },
        ["'left'", "`weight`", "`weights`", "Leave one out"],
    ),
    "weights-without-a-mean": (
        options(weights={"left": 0.3, "right": -0.3}, method="mean", calibration=None),
        ["'mean'", "0.3, -0.3", "sum to 0", "task-arithmetic"],
    ),
    "a-task-twice": (
        lambda models: {"experts": [("left", models.left), ("left", models.right)]},
        ["'left'", "a name of its own"],
    ),
    "a-folder-twice": (lambda models: {"experts": [models.left, models.left]}, ["'left'", "a name of its own"]),
    "experts-as-one-string": (options(experts="me/model"), ["experts", "'me/model'", "by task name"]),
    "live-experts-unnamed": (
        lambda models: {"experts": [AutoModel.from_pretrained(models.left), models.right]},
        ["BertModel", "by task name"],
    ),
    **{
        f"task-named-{name!r}": (
            lambda models, name=name: {"experts": {name: models.left, "right": models.right}, "calibration": {}},
            [repr(name), NAME_RULE],
        )
        for name in ("me/sst2", "", "base", "..", "a b", "a\n")
    },
    "task-of-no-text": (
        lambda models: {"experts": {1: models.left, "right": models.right}, "calibration": {}},
        ["1 cannot be the name of a task", "in YAML, put it in quotes"],
    ),
    "task-of-a-long-name": (
        lambda models: {"experts": {"a" * 200: models.left, "right": models.right}, "calibration": {}},
        ["has 200 letters", "at most 100"],
    ),
    "heads-of-no-kind": (options(heads=3), ["`heads` must be", "not 3"]),
    "processor-by-name": (options(processor="me/bert"), ["processor", "'me/bert'", "AutoProcessor.from_pretrained"]),
    "score-by-name": (options(alpha="auto", score_fn="acc"), ["score_fn` must be a function", "'acc'"]),
    "score-by-name-of-a-task": (
        options(alpha="auto", score_fn={"left": len, "right": 3}),
        ["score_fn` must be a function", "not 3"],
    ),
    "statistics-in-the-work": (
        lambda models: {
            "resume_dir": str(models.folder / "work"),
            "statistics_dir": str(models.folder / "work" / WORK / "kept"),
        },
        ["statistics_dir", "is inside the work in progress of `resume_dir`"],
    ),
    # The data.
    "calibration-of-an-unknown-task": (options(calibration={"up": text_samples(1)}), ["calibration", "'up'", "left"]),
    "validation-of-an-unknown-task": (options(validation={"up": []}), ["validation", "'up'", "left, right"]),
    "scores-of-an-unknown-task": (options(score_fn={"up": len}), ["score_fn", "'up'", "left, right"]),
    "no-calibration": (options(calibration=None), [LEFT, "unlabelled inputs", "'tsv-m'"]),
    "calibration-of-one-task": (
        options(calibration={"left": text_samples(1)}),
        [RIGHT, "unlabelled inputs", "'tsv-m'"],
    ),
    "misspelt-task": (options(calibration={"letf": text_samples(1)}), ["`calibration`", "'letf'", "mean 'left'?"]),
    "empty-calibration": (calibration([]), [OF_LEFT, "no samples"]),
    "all-padding": (
        calibration([*text_samples(1), {"input_ids": [5, 6], "attention_mask": [0, 0]}], num_samples=0),
        [OF_LEFT, "sample 7", "Leave it out"],
    ),
    "samples-of-two-kinds": (
        calibration([{"input_ids": [5, 6]}, {"input_ids": [5, 6], "token_type_ids": [0, 0]}]),
        [OF_LEFT, "sample 1", "token_type_ids"],
    ),
    "ready-inputs-and-text": (calibration([{"input_ids": [5, 6]}, "good"]), [OF_LEFT, "sample 1", "in one form"]),
    "ready-inputs-that-are-words": (calibration([{"input_ids": ["good"]}]), [OF_LEFT, "sample 0", "input_ids"]),
    "token-outside-the-vocabulary": (calibration([{"input_ids": [5, 60]}]), [OF_LEFT, "sample 0", "60", "tokenizer"]),
    "unknown-columns": (
        tokenized(calibration={task: [{"sentence": text} for text in SENTENCES] for task in ("left", "right")}),
        [OF_LEFT, "sentence", "columns="],
    ),
    "unknown-role-of-a-column": (options(columns={"txt": "sentence"}), ["columns", "'txt'", "text_pair"]),
    "tokens-in-twos": (calibration([{"input_ids": [[5, 6], [7, 8]]}]), [OF_LEFT, "sample 0", "(2, 2)", "[length]"]),
    "tokens-with-points": (calibration([{"input_ids": [5.0, 6.0]}]), [OF_LEFT, "sample 0", "float32"]),
    "several-splits": (
        calibration(DatasetDict({"train": Dataset.from_dict({"text": ["a"]})})),
        [OF_LEFT, "train", "Give one of them"],
    ),
    "misspelt-key-of-a-file": (
        data_file('{"text": "a"}', revisions="v1"),
        [OF_LEFT, "no key 'revisions'", "did you mean 'revision'?"],
    ),
    "misspelt-key-of-data": (
        data_file('{"text": "a"}', column={"text": "text"}),
        [OF_LEFT, "no key 'column'", "did you mean 'columns'?"],
    ),
    "revision-of-a-file": (data_file('{"text": "a"}', revision="v1"), [OF_LEFT, "a file has no revision"]),
    "misspelt-path-of-data": (calibration({"pth": "glue", "split": "train"}), [OF_LEFT, "did you mean 'path'?"]),
    "misspelt-key-beside-statistics": (
        calibration({"statistics": "left.safetensors", "sample": ["a"]}),
        ["`calibration`", "no key 'sample'", "did you mean 'samples'?"],
    ),
    "misspelt-key-of-statistics": (
        calibration({"statistic": ActivationStatistics({}, {}), "samples": ["a"]}),
        ["`calibration`", "no key 'statistic'", "did you mean 'statistics'?"],
    ),
    "misspelt-key-of-a-token": (
        tokenized(tokenizer={"tokens": {"good": {"source": "left", "weight": 2}}}),
        ["`tokenizer`: token 'good'", "no key 'weight'"],
    ),
    "no-such-data-set": (calibration({"path": "no/such-set"}), [OF_LEFT, "no/such-set", "cannot be read"]),
    "calibration-without-tasks": (options(calibration=[["a"], ["b"]]), ["calibration", "{'task': …}", "list"]),
    "not-a-sample": (tokenized(calibration={"left": [1, 2], "right": [3]}), [OF_LEFT, "int", "Give strings"]),
    "no-tokenizer": (calibration(SENTENCES), [OF_LEFT, "no tokenizer", "processor="]),
    "loader-without-names": (
        calibration(DataLoader(TensorDataset(torch.ones(3, 4)))),
        [OF_LEFT, "DataLoader", "model inputs by name"],
    ),
    "data-file-broken": (data_file("{'text': "), [OF_LEFT, "data.jsonl", "cannot be read"]),
    "data-file-empty": (data_file(""), [OF_LEFT, "data.jsonl"]),
    "no-such-file": (calibration("nowhere.jsonl"), [OF_LEFT, "nowhere.jsonl", "no file"]),
    "statistics-of-another-width": (calibration(statistics_of(32)), ["'left'", BODY_WEIGHT, "32", "Calibrate again"]),
    "statistics-of-another-vocabulary": (
        calibration(statistics_of(24, counts={"embeddings.word_embeddings.weight": torch.arange(59)})),
        ["'left'", "59 rows for 'embeddings.word_embeddings.weight', the base has 60", "Calibrate again"],
    ),
    "statistics-of-another-model": (calibration(statistics_of(16, "h.0.w")), ["'left'", "h.0.w", "Calibrate again"]),
    # Where it goes.
    "output-exists": (
        lambda models: (models.folder / "merged").mkdir(),
        ["merged exists", "Choose another `output_dir`", "overwrite=True"],
    ),
    "output-is-an-expert": (
        lambda models: {"output_dir": written_by_a_merge(models.right), "overwrite": True},
        [RIGHT, "output_dir", "Choose another"],
    ),
    "output-holds-the-base": (
        lambda models: {"output_dir": written_by_a_merge(models.folder), "overwrite": True},
        ["base (", "output_dir", "Choose another"],
    ),
    "output-of-somebody-else": (
        lambda models: {"output_dir": str(models.left), "overwrite": True},
        ["left was not written by a merge", "not overwritten", "Choose another"],
    ),
    "output-below-a-file": (
        lambda models: {"output_dir": str(models.left / "config.json" / "merged")},
        ["config.json", "is a file", "Choose another"],
    ),
    "output-is-where-we-are": (
        lambda models: {"output_dir": str(Path.cwd().parent), "overwrite": True},
        ["output_dir", "current folder", "Choose another"],
    ),
    "overwrite-as-a-word": (options(overwrite="false"), ["overwrite", "true or false", "'false'"]),
    "statistics-in-the-output": (
        lambda models: {"statistics_dir": str(models.folder / "merged" / "stats")},
        ["statistics_dir", "is inside `output_dir`", "Choose another"],
    ),
    "work-in-the-output": (
        lambda models: {"resume_dir": str(models.folder / "merged")},
        ["resume_dir", "is inside `output_dir`", "Choose another"],
    ),
    "samples-in-the-output": (
        lambda models: (
            {"output_dir": written_by_a_merge(models.folder / "old"), "overwrite": True}
            | {"calibration": {"left": str(models.folder / "old" / "left.jsonl"), "right": text_samples(2)}}
        ),
        [OF_LEFT, "is inside `output_dir`", "Choose another"],
    ),
    "no-space": (full_disk, ["merged", "1 kB are free", "Make room"]),
    # The options.
    "unknown-method": (options(method="magic"), ["'magic'", "tsv-m"]),
    "method-without-a-name": (options(method={"gamma": 0.1}), ["method", "need a name", "tsv-m"]),
    "unknown-setting": (options(method={"name": "esm", "gama": 1}), ["'gama'", "gamma"]),
    "unknown-alpha": (options(alpha="best"), ["'best'", "'auto'"]),
    "unknown-dtype": (options(dtype="int8"), ["'int8'", "'bfloat16'"]),
    "unknown-heads": (options(heads="none"), ["'none'", "'auto', 'merge', 'keep'"]),
    "misspelt-module": (options(heads=["poolr"]), ["heads", "'poolr'", "Did you mean 'pooler'?"]),
    "misspelt-column": (options(columns={"txt_pair": "b"}), ["columns", "'txt_pair'", "mean 'text_pair'?"]),
    "unknown-module": (options(heads=["pooler", "colour"]), ["'colour'", "heads"]),
    "auto-without-data": (
        options(alpha="auto", method="tsv-m", calibration=None),
        ["alpha='auto'", "calibration", "validation", "score_fn"],
    ),
    "auto-with-validation-of-one-task": (
        options(alpha="auto", validation={"left": [{"input_ids": [5], "label": 0}]}),
        ["validation", "'right'"],
    ),
    "auto-with-a-score-of-one-task": (
        options(alpha="auto", score_fn={"left": lambda model: 0.0}),
        ["score_fn", "'right'"],
    ),
    "auto-without-alpha": (labelled(0, method="mean", calibration=None), ["'mean'", "Leave `alpha` out"]),
    "label-out-of-range": (labelled(3), ["validation of 'left'", "label 3", "3 classes"]),
    "label-below-zero": (labelled(-1), ["validation of 'left'", "label -1", "3 classes"]),
    "label-unknown": (labelled("sad"), ["validation of 'left'", "'sad'", "LABEL_0"]),
    "label-list": (labelled([1, 2]), ["validation of 'left'", "[1, 2]", "one class"]),
    "label-missing": (labelled(None), ["validation of 'left'", "label", "columns="]),
}


@pytest.mark.parametrize(("damage", "says"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_early_by_name_and_with_a_remedy(damage, says, models, monkeypatch):
    forbid_calibration(monkeypatch)
    changes = damage(models) or {}
    if "monkeypatch" in changes:
        monkeypatch.setattr(*changes.pop("monkeypatch"))
    assert_refused(models.folder, says, arguments(models, **changes))


def test_merge_models_takes_every_field_of_its_options():
    """With the names, defaults and annotations of the dataclass, each by keyword alone."""
    parameters = inspect.signature(merge_models).parameters
    hints = typing.get_type_hints(merge_models)
    assert typing.get_type_hints(MergeOptions).items() <= hints.items()
    for option in fields(MergeOptions):
        assert parameters[option.name].kind is inspect.Parameter.KEYWORD_ONLY, option.name
        assert parameters[option.name].default == option.default, option.name


def test_a_plan_and_a_result_are_one_line_and_print_as_tables(models):
    plan = merge_models(**arguments(models, method="mean", dry_run=True))
    assert repr(plan) == f"MergePlan(mean of left, right into base ({models.base}))"
    assert len(str(plan).splitlines()) > 8
    result = merge_models(**arguments(models, method="mean"), progress=False)
    assert repr(result) == f"MergeResult(mean of left, right, alpha=1, output_dir={str(models.folder / 'merged')!r})"
    assert len(str(result).splitlines()) > 3


def test_an_unknown_argument_is_a_type_error(models):
    before = snapshot(models.folder)
    with pytest.raises(TypeError, match="'num_sample'"):
        merge_models(**arguments(models, num_sample=3))
    assert snapshot(models.folder) == before


def test_activations_that_overflow_name_the_expert(models):
    block = WEIGHT.removesuffix("output.dense.weight")
    names = ("bert.embeddings.LayerNorm.weight", f"{block}attention.self.value.weight")
    for name in (*names, f"{block}attention.output.dense.weight"):  # each is a weight, and their product is too large
        tensors("right", lambda stored, name=name: stored[name].fill_(1e14))(models)
    read = BODY_WEIGHT.replace("output", "intermediate")
    says = [RIGHT, str(models.right), "on its samples", read, "NaN or infinite", "float32"]
    assert_refused(models.folder, says, arguments(models))


def test_buffers_may_hold_the_largest_numbers(tmp_path):
    """As masks do."""
    base = ARCHITECTURES["resnet"].build()
    for seed, name in enumerate(("base", "left")):
        model = perturbed(base, 0.02 * seed, seed)
        next(buffer for key, buffer in model.named_buffers() if "running_mean" in key).fill_(-3e38)
        save(model, tmp_path / name)
    merge_models(tmp_path / "base", {"left": tmp_path / "left"}, method="mean", progress=False)


def test_weights_that_float16_does_not_hold_are_refused(models):
    for folder in (models.base, models.left, models.right):
        stored = load_file(f"{folder}/model.safetensors")
        name = next(name for name in stored if name.endswith(BODY_WEIGHT))
        save_file(stored | {name: stored[name] + 1e5}, f"{folder}/model.safetensors", {"format": "pt"})
    says = [BODY_WEIGHT, "too large for float16", "dtype='bfloat16'"]
    assert_refused(models.folder, says, arguments(models, method="mean", dtype="float16"))
    for dtype in ("bfloat16", "float32"):
        result = merge_models(**arguments(models, method="mean", dtype=dtype, overwrite=True), progress=False)
        stored = load_file(result.output_dir / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}


def test_a_link_that_leads_nowhere_is_not_written_through(models):
    (models.folder / "linked").symlink_to(models.folder / "nowhere")
    for overwrite, says in ((False, "linked exists"), (True, "linked is a link, so it is not overwritten")):
        with pytest.raises(HfEsmError, match=says):
            merge_models(**arguments(models, output_dir=models.folder / "linked", overwrite=overwrite), progress=False)


def test_a_score_that_is_no_number_is_named(models):
    scored = {"alpha": "auto", "score_fn": lambda model: None, "method": "tsv-m"}
    assert_refused(models.folder, ["score_fn returned None", "a number"], arguments(models, **scored))


def test_statistics_of_one_expert_given_for_another_are_mentioned(models):
    given = {task: calibrate(getattr(models, task), text_samples(1), progress=False) for task in ("left", "right")}
    fitting = merge_models(**arguments(models, calibration=given), progress=False)
    assert not [warning for warning in fitting.warnings if "were collected on" in warning]
    elsewhere = calibrate(
        shutil.copytree(models.left, models.folder / "checkpoint-7"), text_samples(1), progress=False
    )
    moved = merge_models(**arguments(models, calibration=given | {"left": elsewhere}, overwrite=True), progress=False)
    assert not [warning for warning in moved.warnings if "were collected on" in warning]
    swapped = {"left": given["right"], "right": given["left"]}
    again = merge_models(**arguments(models, calibration=swapped, overwrite=True), progress=False)
    assert [warning for warning in again.warnings if "'left': its statistics were collected on" in warning]


def test_extra_weights_are_mentioned(models):
    tensors("right", lambda stored: stored.update({"bert.colour": torch.ones(2)}))(models)
    result = merge_models(**arguments(models, method="mean", calibration=None), progress=False)
    (warning,) = result.warnings
    assert RIGHT in warning
    assert "'bert.colour'" in warning


def test_a_pickled_expert_is_merged_where_that_is_allowed(models):
    expected = merge_models(**arguments(models, method="mean", output_dir=None), progress=False)
    pickled(models)
    found = merge_models(**arguments(models, method="mean", allow_pickle=True), progress=False)
    merged, literal = stored_tensors(found.output_dir), stored_tensors(expected.output_dir)
    assert all(torch.equal(merged[name], literal[name]) for name in literal)


def test_an_existing_output_is_replaced_where_that_is_allowed(models):
    given = arguments(models, method="mean", calibration=None, overwrite=True)
    written_by_a_merge(models.folder / "merged")
    (models.folder / "merged" / "old.txt").write_text("old")
    before = {path.name for path in models.folder.iterdir()}
    merge_models(**given, progress=False)
    assert not (models.folder / "merged" / "old.txt").exists()
    assert load_task_model(models.folder / "merged", "left").config.num_labels == 3
    assert {path.name for path in models.folder.iterdir()} == before


def test_a_merge_is_repeated_over_itself_with_the_samples_that_stand_in_it(models):
    merge_models(**arguments(models), progress=False)
    out = models.folder / "merged"
    expected, kept = stored_tensors(out), {p.name: p.read_bytes() for p in (out / "calibration").iterdir()}
    for _ in range(2):
        merge_models(
            **{**load_recipe(out / RECIPE_FILE), "output_dir": str(out), "overwrite": True, "progress": False}
        )
        assert all(torch.equal(tensor, expected[name]) for name, tensor in stored_tensors(out).items())
        assert {p.name: p.read_bytes() for p in (out / "calibration").iterdir()} == kept


@pytest.mark.parametrize("settings", [{"foo": {0: "x"}}, {"layerdrop": 0.1, "is_decoder": True}])
def test_settings_that_make_no_other_function_are_merged(models, settings):
    right = AutoModel.from_pretrained(models.right)
    for name, value in settings.items():
        setattr(right.config, name, value)
    experts = {"left": models.left, "right": right}
    merge_models(**arguments(models, experts=experts, method="mean", calibration=None), progress=False)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (EssentialMerge, {"rank_share": "0.5"}),
        (EssentialMerge, {"gamma": None}),
        (EssentialMerge, {"scale_all": 1}),
        (EssentialMerge, {"uncalibrated": "query"}),
        (RoutedMerge, {"rank": 8.0}),
        (RoutedMerge, {"top_k": True}),
        (RoutedMerge, {"router": None}),
        (TIES, {"density": True}),
    ],
)
def test_settings_of_another_kind_are_refused(method, settings):
    with pytest.raises(
        HfEsmError, match=f"{method.name}: {next(iter(settings))} must be (a|true|one) ".replace("+", r"\+")
    ):
        method(**settings)
    made = method()
    setattr(made, *next(iter(settings.items())))
    with pytest.raises(HfEsmError, match=f"{next(iter(settings))} must be "):
        resolve_method(made)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_that_are_no_finite_numbers_are_refused(value):
    for made in (lambda: EssentialMerge(factor=value), lambda: resolve_method({"name": "esm", "gamma": value})):
        with pytest.raises(HfEsmError, match=r"esm: (factor|gamma) must be a finite number"):
            made()


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", b"\xff\xfe\x00"])
def test_a_card_that_cannot_be_read_states_no_licence(models, card):
    (Path(models.left) / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert merge_models(**arguments(models), dry_run=True).licences["left"] == "not stated"


def test_more_tasks_than_directions_are_merged(saved):
    base = AutoModel.from_pretrained(saved.base)
    experts = {f"t{i}": perturbed(base, 0.1, i) for i in range(base.config.hidden_size + 2)}
    statistics = calibrate(base, text_samples(0), progress=False)
    result = merge_models(base, experts, calibration=dict.fromkeys(experts, statistics), progress=False)
    merged, before = stored_tensors(result.output_dir), base.state_dict()
    assert all(tensor.isfinite().all() for tensor in merged.values())
    assert all(not torch.equal(merged[name], before[name]) for name in merged if name.endswith("dense.weight"))


KILLED = """
import json, os, signal, sys
from hf_esm import merge_models

given, stages = json.loads(sys.argv[1]), []

def kill(stage, done, total):
    stages.append(stage)
    if stage == "Merging" and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

for overwrite in (False, True):
    if not (child := os.fork()):
        output = given["output_dir"] + "-old" * overwrite
        merge_models(**{**given, "output_dir": output, "overwrite": overwrite}, callback=kill, progress=False)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def test_a_killed_merge_leaves_nothing_under_the_outputs_name(models):
    old = models.folder / "merged-old"
    written_by_a_merge(old)
    (old / "old.txt").write_text("old")
    given = arguments(
        models, method="mean", calibration=None, experts={"left": str(models.left), "right": str(models.right)}
    )
    given["base"] = str(models.base)
    ran = run_script(KILLED, json.dumps(given))
    assert ran.output.split()[-2:] == [str(int(signal.SIGKILL))] * 2, ran.output
    assert not (models.folder / "merged").exists()
    assert {path.name for path in old.iterdir()} == {"old.txt", RECIPE_FILE}
    merge_models(**given, progress=False)
    assert Path(given["output_dir"], "model.safetensors").is_file()
