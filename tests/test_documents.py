"""What README.md, CONTRIBUTING.md, benchmarks/README.md and docs/ name exists."""

import ast
import re
from pathlib import Path

import pytest

import hf_esm


ROOT = Path(__file__).parents[1]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *(f"docs/{name}" for name in PAGES)]
TESTS = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_tests_that_a_document_names_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"\b(?:hf_esm|tests|examples|benchmarks|docs)/[\w/.]*\w", text)
    links = [(ROOT / name).parent / link for link in re.findall(r"\]\((?!http|#)([^)#]+)", text)]
    missing = [str(path) for path in [*map(ROOT.joinpath, paths), *links] if not path.exists()]
    missing += [test for test in re.findall(r"\btest_\w+(?![\w.]*\.py)\b", text) if f"def {test}(" not in TESTS]
    assert not missing


def headings(path):
    """The anchors of a document's headings, as GitHub and MkDocs name them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_headings_that_a_document_links_to_exist(name):
    path = ROOT / name
    links = re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", path.read_text(encoding="utf-8"))
    assert not [f"{file}#{part}" for file, part in links if part not in headings(path.parent / file if file else path)]


def test_the_readme_is_short_and_the_index_names_every_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+\.md)", text)) == {*PAGES} - {"index.md"}


def test_the_picture_of_the_readme_is_what_its_script_draws():
    names = {"__file__": str(ROOT / "docs" / "draw_overview.py"), "__name__": "draw_overview"}
    exec((ROOT / "docs" / "draw_overview.py").read_text(encoding="utf-8"), names)
    assert (ROOT / "docs" / "overview.svg").read_text(encoding="utf-8") == names["overview"]()


def test_the_api_page_names_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert not set(hf_esm.__all__) - {"__version__"} - set(re.findall(r"`(\w+)`", text))


def test_every_public_name_has_a_docstring():
    lacking = [name for name in hf_esm.__all__ if name not in ("METHODS", "__version__")]
    assert not [name for name in lacking if not (getattr(hf_esm, name).__doc__ or "").strip()]


def test_the_page_of_methods_lists_every_method_and_the_readme_counts_them():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+)\|", text, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(.+?)`", row)}
    assert not set(hf_esm.METHODS) - listed
    others = sum(not name.startswith(("esm", "auto")) for name in hf_esm.METHODS)
    assert f"**{others} other methods**" in (ROOT / "README.md").read_text(encoding="utf-8")


def messages():
    """Every text in the sources, with … for what is filled in."""
    for path in (ROOT / "hf_esm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
                yield re.sub("…+", "…", "".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_that_troubleshooting_explains_are_raised():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained, raised = re.findall(r"^### (.+)", text, re.MULTILINE), "\n".join(messages())
    assert len(explained) >= 20
    assert not [message for message in explained if message not in raised]
