"""The wheel and the source archive, built from a copy of the checkout, and the wheel in use without the extras."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from support.helpers import save
from support.routed_toys import tuned
from support.tiny import GPT2, save_tokenizer
from support.toys import write_models


ROOT = Path(__file__).parents[1]
SOURCES = ("README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py", "hf_esm", "model_cards")
BUILD = "from setuptools import build_meta; build_meta.build_{}('built')"
EXTRAS = ("PIL", "matplotlib", "sklearn", "torchvision", "pytest")
TEXT, LANGUAGE = "BertForSequenceClassification", "GPT2LMHeadModel"
KINDS = ("text", "language", "text-without-tokenizers", "language-without-tokenizers")


def build(kind: str, checkout: Path) -> Path:
    """The wheel or the sdist of a folder, which is built in: give a copy."""
    subprocess.run([sys.executable, "-c", BUILD.format(kind)], cwd=checkout, check=True, capture_output=True)
    return next((checkout / "built").iterdir())


def names(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is packed, and of the tests."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in (*SOURCES, "tests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build("wheel", shutil.copytree(checkout, tmp_path_factory.mktemp("wheel") / "checkout"))


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_esm").rglob("*.py")]
    cards = [f"hf_esm/model_cards/{path.name}" for path in (ROOT / "model_cards").iterdir()]
    assert names(wheel) == {*files, *cards, "hf_esm/py.typed"}


def test_the_sdist_builds_the_same_wheel_and_holds_the_tests(checkout, wheel, tmp_path):
    archive = build("sdist", shutil.copytree(checkout, tmp_path / "checkout"))
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    tests = {path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*") if path.is_file()}
    assert {path for path in tests if path.suffix != ".pyc" and not (unpacked / path).is_file()} == set()
    assert names(build("wheel", unpacked)) == names(wheel)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Text classifiers and language models, each in a folder with and one without tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder / "text")
    language = GPT2.build()
    for seed, name in enumerate(("base", "a", "b")):
        save(tuned(language, seed) if seed else language, folder / "language" / name)
        save_tokenizer(folder / "language" / name)
    for kind in ("text", "language"):
        ignored = shutil.ignore_patterns("tokenizer*", "vocab.txt", "special_tokens_map.json")
        shutil.copytree(folder / kind, folder / f"{kind}-without-tokenizers", ignore=ignored)
    return folder


MERGE = """
import json, sys
sys.modules.update(dict.fromkeys({extras!r}))  # importing one of them raises ModuleNotFoundError
import hf_esm
from hf_esm import load_task_model, merge_models

folder, output = {folder!r}, {output!r}
words = {{"a": ["the film was good", "dull plot", "bad"], "b": ["one good plot", "so so", "it is fine"]}}
numbers = {{task: [{{"input_ids": [5, 6, 7, 8, 9 + i]}} for i in range(4)] for task in "ab"}}
classes = {{}}
for kind in {kinds!r}:
    models = {{name: f"{{folder}}/{{kind}}/{{name}}" for name in ("base", "a", "b")}}
    samples = numbers if kind.endswith("without-tokenizers") else words
    merge_models(
        models.pop("base"), models, calibration=samples, output_dir=f"{{output}}/{{kind}}", progress=False
    )
    classes[kind] = type(load_task_model(f"{{output}}/{{kind}}", "a")).__name__
print(json.dumps([hf_esm.__file__, classes]))
"""


@pytest.mark.slow
def test_the_wheel_merges_text_and_language_models_without_the_extras(wheel, models, tmp_path):
    expected = {kind: TEXT if kind.startswith("text") else LANGUAGE for kind in KINDS}
    program = MERGE.format(extras=EXTRAS, folder=str(models), output=str(tmp_path), kinds=list(expected))
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    file, classes = json.loads(done.stdout.splitlines()[-1])
    assert not file.startswith(str(ROOT)), "the program imported the checkout, not the wheel"
    assert classes == expected
    for kind in expected:  # the card's template is in the wheel
        assert (tmp_path / kind / "README.md").read_text(encoding="utf-8").startswith("---")
