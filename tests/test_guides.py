"""Runs the blocks of the guides in `docs/`, in their order and in one folder, as a reader would.

Blocks of `python` share a namespace. Blocks of `yaml` are files, which their first line names. Blocks of `bash` are
commands of `hf-esm`. A block of `text` after one of these is what that block prints, but for numbers. The folder holds
toy models under the names of the guide, and the namespace their data.
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from hf_esm.cli.main import main
from support.tiny import WORDS
from support.writers import save_writers


DOCS = Path(__file__).parents[1] / "docs"


def blocks(guide):
    """Language and text of every block of a guide."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / guide).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def without_numbers(text):
    return [re.sub(r"-?\d+(\.\d+)?( [kKMG]?B\b)?", "#", line) for line in text.strip().splitlines()]


def sentences(seed, count):
    draw = np.random.default_rng(seed)
    words = WORDS[:7] if seed % 2 else WORDS[7:]  # each task has words of its own
    return [" ".join(draw.choice(words, 8)) for _ in range(count)]


@pytest.fixture
def language_models(tmp_path, monkeypatch):
    """The folder of the guide on language models; returns the namespace."""
    monkeypatch.chdir(tmp_path)
    save_writers(tmp_path / "me", "llama", ["llama-code", "llama-verse"])
    texts = {task: sentences(seed, 24) for seed, task in enumerate(("code", "verse"))}
    for task, lines in texts.items():
        (tmp_path / f"{task}.txt").write_text("\n".join(lines))
    others = {task: sentences(seed, 8) for seed, task in enumerate(("code", "verse"), start=10)}
    return {"code_texts": texts["code"], "verse_texts": texts["verse"], "other_texts": others}


@pytest.mark.slow
def test_the_guide_on_language_models_runs_and_prints_what_it_says(language_models, capsys):
    printed, compared = "", 0
    for language, block in blocks("language_models.md"):
        if language == "python":
            exec(compile(block, "docs/language_models.md", "exec"), language_models)
        elif language == "bash":
            for line in block.splitlines():
                command, *arguments = shlex.split(line, comments=True)
                assert (command, main(arguments)) == ("hf-esm", 0)
        elif language == "yaml":
            Path(block.splitlines()[0].removeprefix("# ")).write_text(block)
        elif language == "text" and printed:
            assert without_numbers(printed) == without_numbers(block)
            printed, compared = "", compared + 1
        if language in ("python", "bash"):
            printed = capsys.readouterr().out
    assert compared == 3
