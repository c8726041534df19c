"""What people in a hurry type, and places that do not work as they should: each is refused in one sentence."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from hf_esm import HfEsmError, calibrate, load_recipe, load_task_model, merge_models
from hf_esm.calibration import ActivationStatistics
from hf_esm.checkpoints import load_processor, open_checkpoint, read_modules, resolve_source
from hf_esm.checkpoints.configs import buildable
from hf_esm.cli.main import main
from hf_esm.data import SampleOptions, read_rows
from hf_esm.planning import read_yaml
from hf_esm.utils import atomic_file, staging_folder
from support.toys import base_model, write_models


DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("hurry"))


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(HfEsmError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def merge(models: Path, **options) -> str:
    experts = {task: models / task for task in "ab"}
    return refusal(merge_models, models / "base", experts, method="mean", progress=False, **options)


@pytest.mark.parametrize("alpha", [True, "1e39", 1e39, -1e39, 10**400, float("inf")], ids=repr)
def test_a_scale_that_is_no_number_of_a_weight_is_refused(alpha, models):
    assert "`alpha` must be a finite number or 'auto', not " in merge(models, alpha=alpha)


PATHS = {"nul": "a\0b", "a long part": "x" * 300, "a long path": "x/" * 3000, "no UTF-8": "x\udce9"}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_path_that_cannot_be_is_refused_before_the_work(path, models, tmp_path):
    says = "(has a NUL character|is too long|is not UTF-8)"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base": path.replace("\udce9", "\0"), "experts": {"a": "x"}}))
    for call in (
        lambda: merge_models(models / "base", {"a": models / "a"}, output_dir=tmp_path / path),
        lambda: merge_models(models / "base", {"a": models / "a"}, resume_dir=path),
        lambda: merge_models(path, {"a": models / "a"}),
        lambda: merge_models(models / "base", {"a": models / "a"}, calibration={"a": {"statistics": path}}),
        lambda: load_recipe(path),
        lambda: load_recipe(recipe),
        lambda: load_task_model(path, "a"),
        lambda: read_rows(path, "rows", SampleOptions()),
        lambda: read_rows({"path": path}, "rows", SampleOptions()),
        lambda: ActivationStatistics.load(path),
        lambda: ActivationStatistics({}, {}).save(path),
        lambda: calibrate(path, ["a"]),
    ):
        with pytest.raises(HfEsmError, match=says):
            call()


def test_what_is_nested_too_deeply_is_damaged(models, tmp_path):
    for name in ("config.json", "modules.json", "tokenizer.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text(DEEP)
        with pytest.raises(HfEsmError, match="nested too deeply"):
            if name == "tokenizer.json":
                load_processor(tmp_path)
            elif name == "modules.json":
                read_modules(tmp_path, "model")
            else:
                open_checkpoint(resolve_source(str(tmp_path), "model"))
        (tmp_path / name).unlink()
        if name == "modules.json":
            base_model().config.save_pretrained(tmp_path)
    (tmp_path / "recipe.yaml").write_text(DEEP)
    assert "nested too deeply" in refusal(load_recipe, tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("base: 2001-99-99\nexperts: {}")
    assert "Put the value in quotes" in refusal(load_recipe, tmp_path / "recipe.yaml")


# Keys of a config that ask for a huge model, and what is said of them.
HUGE = {
    "num_hidden_layers": "says num_hidden_layers = 2147483648",
    "num_labels": "says num_labels = 2147483648",
    "vocab_size": "its own config.json describes (2147483648, 32)",
    "max_position_embeddings": "its own config.json describes (2147483648, 32)",
    "hidden_size": "its config.json describes",
}


@pytest.fixture
def little_memory():
    """Let the process have 16 GB more than it has."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**34, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("key", HUGE)
def test_a_model_that_does_not_fit_anywhere_is_not_built(key, models, tmp_path, little_memory):
    folder = shutil.copytree(models / "a", tmp_path / "a")
    settings = json.loads((folder / "config.json").read_text()) | {key: 2**31}
    (folder / "config.json").write_text(json.dumps(settings | ({"id2label": None} if key == "num_labels" else {})))
    assert HUGE[key] in refusal(lambda: open_checkpoint(resolve_source(str(folder), "model")))


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size"])
def test_a_head_that_asks_for_a_huge_body_is_refused(key, models, tmp_path, little_memory):
    experts = {task: models / task for task in "ab"}
    merge_models(models / "base", experts, method="mean", output_dir=tmp_path / "out", progress=False)
    path = tmp_path / "out" / "heads" / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 2**31}))
    assert "weights, but the model and the head hold " in refusal(load_task_model, tmp_path / "out", "a")


def test_parts_without_end_are_not_built(monkeypatch):
    """Of whatever name the setting is that asks for them."""
    with pytest.raises(HfEsmError, match=r"x: its config.json asks for more than 20 weights"), buildable("x"):
        monkeypatch.setattr("hf_esm.checkpoints.configs._MOST_WEIGHTS", 20)
        torch.nn.ModuleList(torch.nn.LayerNorm(1, device="meta") for _ in range(2**31))
    torch.nn.ModuleList(torch.nn.LayerNorm(1) for _ in range(30))


LAUGHS = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, 12))]
ALIASES = {
    "many": [*LAUGHS, "method: *a11"],
    "merged": [*LAUGHS, "method: {<<: {x: *a11}}"],
    "own": ["base: &a {x: *a}"],
}


@pytest.mark.parametrize("lines", ALIASES.values(), ids=ALIASES)
def test_aliases_that_stand_for_more_than_memory_holds_are_refused(lines, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("\n".join([*lines, "experts: {}"]))
    with pytest.raises(HfEsmError, match="its aliases stand for more than 10000 values") as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert len(str(caught.value)) < 400
    text = "{a: &a [x, x], b: [*a, *a]}"
    assert read_yaml(text) == {"a": ["x", "x"], "b": [["x", "x"]] * 2}
    assert main(["merge", "--base", "x", "--expert", "a=b/c", "--alpha", "{a: &a [*a]}"]) == 2
    assert "is not a YAML value" in capsys.readouterr().err


def run(*words: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, **options.pop("environment", {})}
    command = [sys.executable, "-m", "hf_esm.cli", *words]
    return subprocess.run(command, capture_output=True, env=environment, check=False, **options)


def test_help_is_printed_where_letters_are_ascii():
    done = run("merge", "--help", environment={"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr
    assert rb"\u" in done.stdout


def test_a_reader_that_leaves_stops_neither_work_nor_status(models, tmp_path):
    words = f"merge --base {models}/base --expert a={models}/a --method mean --no-progress --output-dir {tmp_path}/out"
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    command = [sys.executable, "-m", "hf_esm.cli", *words.split()]
    done = subprocess.run(command, stdout=writing_end, stderr=subprocess.PIPE, check=False)
    os.close(writing_end)
    assert done.returncode == 0, done.stderr
    assert b"BrokenPipe" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.fixture
def as_nobody():
    """Run as a user without rights, where the tests run as one who may read everything."""
    if not hasattr(os, "geteuid"):
        pytest.skip("Windows has other permissions")
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


LOCKED = {
    "config.json": lambda folder: open_checkpoint(resolve_source(str(folder), "model")),
    "model.safetensors": lambda folder: open_checkpoint(resolve_source(str(folder), "model")),
    "modules.json": lambda folder: read_modules(folder, "model"),
    "tokenizer.json": load_processor,
}


@pytest.mark.parametrize("name", LOCKED)
def test_a_file_that_may_not_be_read_is_not_missing(name, models, request):
    with tempfile.TemporaryDirectory() as place:  # unlike that of pytest, others may look into it
        folder = Path(shutil.copytree(models / "a", Path(place) / "a"))
        (folder / "modules.json").touch()
        (folder / name).chmod(0)
        Path(place).chmod(0o755)
        if name != "modules.json":
            (folder / "modules.json").unlink()
        request.getfixturevalue("as_nobody")
        assert f"{name} may not be read by this user. Change the permissions of " in refusal(LOCKED[name], folder)
        os.seteuid(os.getuid())


def test_a_full_disk_is_named_with_the_file(tmp_path, capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    for block in (atomic_file(tmp_path / "statistics.safetensors"), staging_folder(tmp_path / "out")):
        says = r"(statistics\.safetensors|out) cannot be written: No space left on device"
        with pytest.raises(HfEsmError, match=says), block:
            full()
    assert not list(tmp_path.iterdir())


def test_a_mistake_shows_no_class_name_and_a_fault_does(models, tmp_path, capsys, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("base: x\nexperts: {a: [1, {}]}")
    (tmp_path / "config.json").write_text('{"model_type": 3}')
    for words in (["merge", str(tmp_path / "recipe.yaml")], ["inspect", "--base", str(tmp_path), "--expert", "a=b/c"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "Error" not in error
        assert "internal" not in error
    monkeypatch.setattr("hf_esm.cli.inspect.merge_models", lambda **_: {}["k"])
    assert main(["inspect", "--base", "x", "--expert", "a=b/c"]) == 1
    assert capsys.readouterr().err == "hf-esm: internal error (KeyError: 'k')\n(--traceback shows where)\n"
