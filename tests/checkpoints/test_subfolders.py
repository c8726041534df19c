"""Models in a folder of a repository, and mappings with keys that nothing reads."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi

from hf_esm import HfEsmError, calibrate, evaluate, load_recipe, merge_models
from hf_esm.checkpoints import model_identity, resolve_source
from hf_esm.checkpoints.layout import RECIPE_FILE, STATISTICS_FILE
from support.hub import TOKEN, process
from support.hub_server import HubServer
from support.toys import texts, weights, write_models, write_rows


CALIBRATION = {"a": texts(0)}  # those of `c` are in its statistics
TASKS = {"a": "v1/full", "c": "lora"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models in folders of their own, and one folder of all of them, whose root is another model."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, base_name="me/elsewhere")
    calibrate(folder / "c-lora", texts(2), base=folder / "base", progress=False).save(folder / "c-lora")
    zoo = Path(shutil.copytree(folder / "b", folder / "zoo"))
    for source, place in (("base", "base"), ("a", "v1/full"), ("c-lora", "lora")):
        shutil.copytree(folder / source, zoo / place)
    (zoo / "lora" / "README.md").unlink()
    (zoo / "README.md").write_text("---\nlicense: mit\n---\n")
    (zoo / "v1" / "full" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return SimpleNamespace(folder=folder, zoo=zoo)


def inside(path: str | Path) -> tuple[dict[str, str], dict[str, Any]]:
    return {"path": path, "subfolder": "base"}, {t: {"path": path, "subfolder": s} for t, s in TASKS.items()}


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    """The weights of a merge of the models in folders of their own."""
    output = tmp_path_factory.mktemp("expected") / "merged"
    experts = {"a": models.folder / "a", "c": models.folder / "c-lora"}
    merge_models(models.folder / "base", experts, calibration=CALIBRATION, output_dir=output, progress=False)
    return weights(output)


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_models_in_subfolders_merge_as_in_folders_of_their_own(models, expected, tmp_path):
    base, experts = inside(models.zoo)
    result = merge_models(base, experts, calibration=CALIBRATION, output_dir=tmp_path / "merged", progress=False)
    assert equal(weights(tmp_path / "merged"), expected)
    assert "a: apache-2.0; c: mit" in str(result.plan)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    again = load_recipe(tmp_path / "merged" / RECIPE_FILE)
    merge_models(**again, output_dir=tmp_path / "again", progress=False)
    assert equal(weights(tmp_path / "again"), expected)


def test_subfolders_of_one_repository_are_told_apart(models):
    identities = [
        model_identity(resolve_source({"path": models.zoo, "subfolder": place}, "expert"))
        for place in ("v1/full", "./v1//full/", "lora", ".")
    ]
    assert identities[0] == identities[1]
    assert len({repr(identity) for identity in identities}) == 3


def push_and_merge(zoo: Path, output: Path) -> tuple[str, list[Any], list[str]]:
    """The plan, cache keys of three sources, and what is said of a folder that is not there."""
    api = HfApi(token=TOKEN)
    api.create_repo("me/zoo")
    api.upload_folder(repo_id="me/zoo", folder_path=zoo)
    base, experts = inside("me/zoo")
    plan = merge_models(base, experts, method="mean", dry_run=True)
    merge_models(base, experts, calibration=CALIBRATION, output_dir=output, progress=False)
    sources = [
        resolve_source(spec, "expert") for spec in ("me/zoo", experts["a"], {"path": "me/zoo", "task": "v1/full"})
    ]
    rows = {"c": write_rows(output.parent / "c.jsonl", [{"text": text, "label": 0} for text in texts(9)])}
    evaluate(output, rows, experts={"c": experts["c"]}, base=base)
    said = []
    for spec in ({"path": "me/zoo", "subfolder": "v2"}, {"path": "me/zoo@v1", "revision": "main"}):
        with pytest.raises(HfEsmError) as caught:
            resolve_source(spec, "expert")
        said.append(str(caught.value))
    return str(plan), [model_identity(source) for source in sources], said


@pytest.mark.hub
def test_models_in_subfolders_of_the_hub_merge_as_in_folders_of_their_own(models, expected, tmp_path):
    server = HubServer({TOKEN: "me"}).start()
    try:
        with process(server, tmp_path / "home") as run:
            plan, identities, said = run(push_and_merge, models.zoo, tmp_path / "merged")
    finally:
        server.stop()
    assert equal(weights(tmp_path / "merged"), expected)
    assert "a: me/zoo/v1/full @" in plan
    assert "a: apache-2.0; c: mit" in plan
    assert len({repr(identity) for identity in identities}) == 3
    recipe = yaml.safe_load((tmp_path / "merged" / RECIPE_FILE).read_text())
    (commit,) = list(server.repos["me/zoo"].commits)[1:]
    recorded = {"path": "me/zoo", "revision": commit}
    assert recipe["base"] == {**recorded, "subfolder": "base"}
    assert recipe["experts"] == {task: {**recorded, "subfolder": place} for task, place in TASKS.items()}
    snapshot = next((tmp_path / "home" / "hub" / "models--me--zoo" / "snapshots").iterdir())
    assert (snapshot / "lora" / STATISTICS_FILE).is_file()
    assert not (snapshot / "model.safetensors").exists()  # of another model
    assert said[0] == "expert (me/zoo, subfolder 'v2'): there is no folder 'v2' in it."
    assert "two revisions, 'v1' and 'main'" in said[1]


REFUSED = {
    "misspelt": ({"revisions": "v1"}, "there is no key 'revisions' (did you mean 'revision'?)"),
    "misspelt subfolder": ({"sub_folder": "lora"}, "(did you mean 'subfolder'?)"),
    "number": ({"subfolder": 1.0}, "'subfolder' must be a text, not 1.0"),
    "empty": ({"subfolder": ""}, "'subfolder' must be a text"),
    "absolute": ({"subfolder": "/etc"}, "'/etc' is not inside it"),
    "outside": ({"subfolder": "v1/../../a"}, "'v1/../../a' is not inside it"),
    "absent": ({"subfolder": "v2"}, "there is no folder 'v2' in it"),
    "a file": ({"subfolder": "config.json"}, "there is no folder 'config.json' in it"),
    "revision of a folder": ({"revision": "v1"}, "a folder has no revision 'v1'. Leave `revision` out."),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("which", ["base", "a"])
def test_a_key_of_a_model_that_nothing_can_read_is_refused(models, which, keys, message):
    sources = {"base": models.folder / "base", "a": models.folder / "a", which: {"path": models.zoo, **keys}}
    with pytest.raises(HfEsmError) as caught:
        merge_models(sources.pop("base"), sources, method="mean")
    assert str(caught.value).startswith("base" if which == "base" else "expert 'a'")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
