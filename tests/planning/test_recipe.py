"""Recipes: what is refused, where paths lead, and that the recipe which a merge writes repeats it."""

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import metadata_load

from hf_esm import EssentialMerge, HfEsmError, calibrate, load_recipe, merge_models
from hf_esm.checkpoints.layout import RECIPE_FILE, STATISTICS_FILE
from hf_esm.planning.options import MergeOptions
from support.helpers import text_samples
from support.toys import LABELS, texts, weights, write_models, write_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


MODELS = "base: me/base\nexperts: {a: me/a, b: me/b}\n"
REFUSED = {
    "no YAML": ("base: [me", "not a valid recipe"),
    "no mapping": ("- base", "a recipe has keys such as base"),
    "empty": ("", "a recipe has keys such as base"),
    "no experts": ("base: x", "no key 'experts'"),
    "unknown key": (MODELS + "colour: red", "there is no key 'colour'"),
    "misspelt key": ("base: me/base\nexpert: {a: me/a, b: me/b}", "no key 'expert' (did you mean 'experts'?)"),
    "misspelt key of a comparison": (MODELS + "num_tests: 3", "no key 'num_tests' (did you mean 'num_test'?)"),
    "key of another kind": (MODELS + "1: red", "there is no key 1"),
    "not for recipes": (MODELS + "callback: print", "there is no key 'callback'"),
    "later version": (MODELS + "recipe_version: 2\nhf_esm_version: 9.1", "recipe version 2, written by hf_esm 9.1"),
    "expert twice": ("base: me/base\nexperts:\n  a: me/a\n  b: me/b\n  a: me/c", "'a' is given twice"),
    "key twice": (MODELS + "alpha: 1\nalpha: 2", "'alpha' is given twice"),
    "keys of two kinds twice": (MODELS + "1: x\nalpha: 2\nalpha: 2\n1: y", "is given twice"),
    "a list for a key": ("base: me/base\nexperts: {? [a, b] : me/a}", "not a valid recipe"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_recipe_is_refused_with_its_name(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(HfEsmError) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert str(tmp_path / "recipe.yaml") in str(error.value)
    assert message in str(error.value)


def test_numbers_that_yaml_takes_for_texts_are_numbers():
    assert MergeOptions(alpha="1e0").alpha == 1.0


def test_every_command_takes_its_keys_from_one_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base: b\nexperts: {x: a, y: c}\nmethod: mean\nmethods: [esm]\ntest: {x: t}\nseeds: [1]\nnum_test: 3\n"
    )
    assert load_recipe(path) == {"base": "b", "experts": {"x": "a", "y": "c"}, "method": "mean"}
    assert load_recipe(path, "compare")["methods"] == ["esm"]
    assert load_recipe(path, "evaluate") == {
        "base": "b",
        "experts": {"x": "a", "y": "c"},
        "test": {"x": "t"},
        "num_test": 3,
    }
    assert load_recipe(path, "calibrate") == {"base": "b", "experts": {"x": "a", "y": "c"}}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("half", torch.float16), ("fp32", torch.float32)],
)
def test_short_names_of_dtypes(models, tmp_path, name, dtype):
    merge_models(
        models / "base",
        [models / "a", models / "b"],
        method="mean",
        dtype=name,
        output_dir=tmp_path / "m",
        progress=False,
    )
    assert {weight.dtype for weight in weights(tmp_path / "m").values() if weight.is_floating_point()} == {dtype}
    assert load_recipe(tmp_path / "m" / RECIPE_FILE)["dtype"] in (name, str(dtype).removeprefix("torch."))


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(HfEsmError, match=r"none\.yaml: cannot read the recipe \(No such file"):
        load_recipe(tmp_path / "none.yaml")


BAD_VALUES = {
    "num_samples": (-1, "many", 2.5, None),
    "seed": (-1,),
    "batch_size": (0,),
    "max_length": (0, "long"),
    "alpha": ("best", float("nan"), [1]),
    "max_shard_size": ("huge", "0", "-5GB"),
    "dtype": ("int8", "small"),
    "heads": ("some",),
    "method": ("best", 5, {"gamma": 1}, {"name": "esm", "gamma": "high"}, {"name": "esm", "scale_all": 1}),
}


@pytest.mark.parametrize(
    ("option", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values]
)
def test_a_bad_value_is_refused_before_any_work(models, tmp_path, option, value):
    arguments = {"experts": {"a": models / "a", "b": models / "b"}, "calibration": {"a": ["w1"], "b": ["w2"]}}
    with pytest.raises(HfEsmError, match=r"gamma|scale_all|method" if option == "method" else option):
        merge_models(
            models / "base",
            output_dir=tmp_path / "out",
            callback=lambda *_: pytest.fail("work has begun"),
            **{**arguments, option: value},
        )
    assert not list(tmp_path.iterdir())


def test_relative_paths_lead_from_the_recipes_folder_and_nothing_else_is_a_path(tmp_path, monkeypatch):
    for name in ("base", "sst2", "train", "main", "me/a", "data"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "validation.csv"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    recipe = {
        "base": {"path": "./base", "revision": "main"},
        "experts": {"a": "me/a", "b": "me/b", "c": {"path": "sst2"}, "d": str(tmp_path / "sst2")},
        "calibration": {
            "a": "a.jsonl",
            "b": {"path": "glue", "name": "sst2", "split": "train", "data_files": "b.jsonl"},
            "c": ["sst2", "", "."],
            "d": {"text": ["train"]},
        },
        "validation": {"a": "validation.csv"},
        "heads": ["sst2"],
        "output_dir": "data",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    expected = {
        "base": {"path": str(tmp_path / "base"), "revision": "main"},
        "experts": {
            "a": str(tmp_path / "me/a"),
            "b": "me/b",
            "c": {"path": str(tmp_path / "sst2")},
            "d": str(tmp_path / "sst2"),
        },
        "calibration": {
            "a": str(tmp_path / "a.jsonl"),
            "b": {"path": "glue", "name": "sst2", "split": "train", "data_files": str(tmp_path / "b.jsonl")},
            "c": ["sst2", "", "."],
            "d": {"text": ["train"]},
        },
        "validation": {"a": str(tmp_path / "validation.csv")},
        "heads": ["sst2"],
        "output_dir": "data",
    }
    assert load_recipe("recipe.yaml") == expected
    monkeypatch.chdir(tmp_path / "data")
    assert load_recipe(tmp_path / "recipe.yaml") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["a", ["train", "b"]], ["{}/a", ["train", "{}/b"]]),
        (["me/x", ["train", "me/y@v1"]], ["me/x", ["train", "me/y@v1"]]),
    ],
)
def test_experts_may_be_a_list_of_paths_or_pairs(tmp_path, value, expected):
    for name in ("a", "b", "train"):
        (tmp_path / name).mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"base": "me/base", "experts": value, "calibration": "a"}))
    found = load_recipe(tmp_path / "recipe.yaml")
    assert found["experts"] == yaml.safe_load(yaml.safe_dump(expected).replace("{}", str(tmp_path)))
    assert found["calibration"] == str(tmp_path / "a")


def statistics_file(models, folder, task, seed):
    path = folder / f"{task}-statistics"
    calibrate(models / task, texts(seed), progress=False).save(path)
    return path / STATISTICS_FILE


# How a task's calibration can be given, as a function of the models, a folder for files, the task and a seed.
CALIBRATIONS = {
    "file": lambda models, folder, task, seed: write_rows(folder / f"{task}.jsonl", texts(seed)),
    "path": lambda models, folder, task, seed: Path(write_rows(folder / f"{task}.jsonl", texts(seed))),
    "dataset": lambda models, folder, task, seed: {
        "path": "json",
        "data_files": write_rows(folder / f"{task}.jsonl", texts(seed)),
    },
    "texts": lambda models, folder, task, seed: texts(seed),
    "pairs": lambda models, folder, task, seed: list(zip(texts(seed), texts(seed + 1))),
    "rows": lambda models, folder, task, seed: [{"label": 1, "text": text} for text in texts(seed)],
    "ready inputs": lambda models, folder, task, seed: text_samples(seed),
    "statistics file": statistics_file,
    "statistics": lambda models, folder, task, seed: calibrate(models / task, texts(seed), progress=False),
}
IN_MEMORY = ("texts", "pairs", "rows", "ready inputs", "statistics")
SETTINGS = {
    "defaults": {},
    "a preset": {"method": "esm-roberta", "alpha": 0.7, "heads": "keep"},
    "own settings": {"method": EssentialMerge(gamma=0.4, uncalibrated=("query",)), "dtype": torch.bfloat16},
    "heads by name": {"method": {"name": "tsv-m"}, "heads": ("pooler", "encoder.layer.1"), "max_shard_size": "40KB"},
    "statistics kept": {"statistics_dir": "kept"},
    "token counts alone": {"method": "tsv-m", "statistics_dir": "kept"},
    "fewer samples": {"num_samples": 4, "seed": 3, "max_length": 6, "batch_size": 2},
}
CASES = [(kind, "defaults") for kind in CALIBRATIONS] + [("texts", name) for name in SETTINGS if name != "defaults"]


@pytest.mark.cases(5)
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_the_recipe_that_a_merge_writes_repeats_it(models, tmp_path, monkeypatch, kind, settings):
    """To the last bit, from another working folder, and after its folder has moved."""
    shutil.copytree(models, tmp_path / "models")
    monkeypatch.chdir(tmp_path / "models")
    calibration = {task: CALIBRATIONS[kind](models, tmp_path, task, seed) for seed, task in enumerate(("a", "b"))}
    result = merge_models(
        "base",
        {"a": "a", "b": {"path": "b"}},
        calibration=calibration,
        output_dir=tmp_path / "first" / "merged",
        progress=False,
        **SETTINGS[settings],
    )
    monkeypatch.chdir(tmp_path)
    moved = shutil.move(tmp_path / "first", tmp_path / "moved") / "merged"
    saved = sorted(path.stem for path in moved.glob("calibration/*"))
    needed = kind in IN_MEMORY and settings != "statistics kept"
    assert saved == (["a", "b"] if needed else [])
    again = merge_models(**load_recipe(moved / RECIPE_FILE), output_dir="again", progress=False)
    found = {path.name: path.read_bytes() for path in Path("again").glob("*.safetensors")}
    assert found == {path.name: path.read_bytes() for path in moved.glob("*.safetensors")}
    assert len(found) > 1 if "max_shard_size" in SETTINGS[settings] else found.keys() == {"model.safetensors"}
    assert again.weights == result.weights
    recipes = [yaml.safe_load((folder / RECIPE_FILE).read_text()) for folder in (moved, Path("again"))]
    for recipe in recipes:
        recipe.pop("calibration", None)
    assert recipes[0] == recipes[1]
    for task in ("a", "b"):
        assert (moved / "heads" / task / "config.json").read_text() == Path(
            f"again/heads/{task}/config.json"
        ).read_text()


def test_a_recipe_writes_down_every_setting_and_the_chosen_alpha(models, tmp_path):
    rows = {task: [{"text": text, "label": i % 2} for i, text in enumerate(texts(5))] for task in ("a", "b")}
    result = merge_models(
        models / "base",
        {task: models / task for task in ("a", "b")},
        method="esm-vit",
        calibration={task: texts(1) for task in ("a", "b")},
        validation=rows,
        alpha="auto",
        output_dir=tmp_path / "merged",
        progress=False,
    )
    recipe = yaml.safe_load((tmp_path / "merged" / RECIPE_FILE).read_text())
    assert recipe["recipe_version"] == 1
    assert recipe["alpha"] == result.alpha
    assert result.alpha in result.alpha_scores
    settings = {field.name: getattr(EssentialMerge.vit(), field.name) for field in fields(EssentialMerge)}
    settings["uncalibrated"] = list(settings["uncalibrated"])
    assert recipe["method"] == {"name": "esm", **settings}
    assert settings != {field.name: field.default for field in fields(EssentialMerge)}
    again = merge_models(
        **load_recipe(tmp_path / "merged" / RECIPE_FILE), output_dir=tmp_path / "again", progress=False
    )
    assert again.alpha == result.alpha
    first, second = weights(tmp_path / "merged"), weights(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_card_says_what_was_merged(models, tmp_path):
    few = calibrate(models / "b", texts(2, count=5), progress=False)
    experts = {task: tmp_path / task for task in ("a", "b")}
    for task, licence in (("a", "mit"), ("b", "apache-2.0")):
        shutil.copytree(models / task, experts[task])
        (experts[task] / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    result = merge_models(
        models / "base", experts, calibration={"a": texts(1), "b": few}, output_dir=tmp_path / "merged", progress=False
    )
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "from 5 to 9 unlabelled samples per task" in card
    assert "license:" not in card.split("---")[1]
    assert "The licences differ (apache-2.0, mit). All of them apply to this model." in card
    assert any("licences differ (apache-2.0, mit)" in warning for warning in result.warnings)
    for task, licence in (("a", "mit"), ("b", "apache-2.0")):
        assert f"| {task} | `{task}` | BertForSequenceClassification | {licence} |" in card
        assert f"| {task} | {', '.join(LABELS[task])} |" in card


@pytest.mark.parametrize(
    ("licences", "expected"), [(("mit", "mit", "mit"), "mit"), (("mit", None, "mit"), None), ((None,) * 3, None)]
)
def test_the_merged_model_has_a_licence_if_all_models_have_the_same(models, tmp_path, licences, expected):
    folders = [tmp_path / name for name in ("base", "a", "b")]
    for folder, licence in zip(folders, licences):
        shutil.copytree(models / folder.name, folder)
        if licence:
            (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    merge_models(folders[0], folders[1:], method="mean", output_dir=tmp_path / "merged", progress=False)
    assert metadata_load(tmp_path / "merged" / "README.md").get("license") == expected


def test_the_callback_counts_every_stage_up_to_its_end(models, tmp_path):
    seen: dict[str, list[tuple[int, int]]] = {}
    merge_models(
        models / "base",
        {task: models / task for task in LABELS},
        calibration={task: texts(1) for task in LABELS},
        output_dir=tmp_path / "merged",
        callback=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
        progress=False,
    )
    assert list(seen) == ["Checking weights", "Calibrating", "Merging", "Writing"]
    for stage, counts in seen.items():
        assert counts == [(i + 1, len(counts)) for i in range(len(counts))], stage
    assert len(seen["Calibrating"]) == len(LABELS)


def test_a_recipe_that_a_merge_wrote_before_embeddings_were_counted_repeats_that_merge(tmp_path):
    path = tmp_path / "recipe.yaml"
    written = MODELS + "hf_esm_version: 0.1.0\nmethod: {name: esm, sum_subtracted: 0.13}\n"
    path.write_text(written, encoding="utf-8")
    assert load_recipe(path)["method"]["published_embeddings"] is True
    path.write_text(written.replace("{name", "{published_embeddings: false, name"), encoding="utf-8")
    assert load_recipe(path)["method"]["published_embeddings"] is False
    path.write_text(written.replace("hf_esm_version: 0.1.0\n", ""), encoding="utf-8")  # written by hand
    assert "published_embeddings" not in load_recipe(path)["method"]


@pytest.mark.parametrize("name", ["iso-c", "iso-cts"])
def test_a_recipe_that_an_isotropic_merge_wrote_before_it_counted_directions_repeats_that_merge(tmp_path, name):
    path, written = tmp_path / "recipe.yaml", MODELS + f"hf_esm_version: 0.1.0\nmethod: {{name: {name}}}\n"
    path.write_text(written, encoding="utf-8")
    assert load_recipe(path)["method"] == {"name": name, "rank": "published"}
    path.write_text(written.replace("hf_esm_version: 0.1.0\n", ""), encoding="utf-8")
    assert load_recipe(path)["method"] == {"name": name}
