"""What README.md, CONTRIBUTING.md, benchmarks/README.md and docs/ name exists."""

import re
from pathlib import Path

import pytest

import hf_esm


ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
DOCUMENTS += [f"docs/{name}.md" for name in ("results", "language_models", "evaluation")]
TESTS = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_tests_that_a_document_names_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"\b(?:hf_esm|tests|examples|benchmarks|docs)/[\w/.]*\w", text)
    links = [(ROOT / name).parent / link for link in re.findall(r"\]\((?!http|#)([^)#]+)", text)]
    missing = [str(path) for path in [*map(ROOT.joinpath, paths), *links] if not path.exists()]
    missing += [test for test in re.findall(r"\btest_\w+(?![\w.]*\.py)\b", text) if f"def {test}(" not in TESTS]
    assert not missing


def test_the_readme_names_every_public_name():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Python API")[1]
    named = set(re.findall(r"`(\w+)`", text.split("\n## ")[0]))
    assert not set(hf_esm.__all__) - {"__version__"} - named


def test_the_readme_lists_and_counts_every_method():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## How a merge works")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+)\|", table, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(.+?)`", row)}
    assert not set(hf_esm.METHODS) - listed
    assert f"**{sum(not name.startswith(('esm', 'auto')) for name in hf_esm.METHODS)} other methods**" in text
