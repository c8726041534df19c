"""A few hundred damaged files of every kind, and as many killed writers, others each time;
`python tests/support/faults.py --n 10000` and `--kills 1000` for more.
"""

import json
import random
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from hf_esm import HfEsmError
from support.faults import KINDS, try_faults
from support.processes import run_script


@pytest.mark.slow
def test_a_damaged_file_is_refused_in_one_sentence_or_read_and_never_changed_unseen():
    seed = random.randrange(10**6)
    outcome = try_faults(300, seed, list(KINDS))
    assert not outcome.faults, (seed, outcome.faults)
    for kind in KINDS:
        assert sum(count for (name, _), count in outcome.counts.items() if name == kind), kind


def test_what_the_tool_calls_a_fault(monkeypatch):
    """A reader that believes everything, and one that lets exceptions of others through."""

    def broken(folder):
        if folder.name == "changed":
            raise KeyError

    for read, result in ((lambda folder: None, "silent"), (broken, "foreign: KeyError")):
        monkeypatch.setitem(KINDS, "samples", replace(KINDS["samples"], read=read))
        outcome = try_faults(5, 0, ["samples"])
        assert any(result in line for line in outcome.faults)


KILLS = """
import random, sys
sys.path[:0] = sys.argv[2:]
from support.faults import quiet
from support.kills import WRITERS, try_kills
with quiet():
    drawn = random.Random(int(sys.argv[1])).sample(sorted(WRITERS), len(WRITERS) // 3)  # another third in every run
    faults = try_kills({"folder": 200} | {name: 1 for name in drawn if name != "folder"}, int(sys.argv[1]))
assert not faults, "\\n".join(faults)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_nothing_half_written_and_nothing_at_all_after_the_next_run():
    seed, tests = random.randrange(10**6), Path(__file__).parent
    ran = run_script(KILLS, seed, tests, tests.parent, timeout=900)
    assert not ran.returncode, (seed, ran.output)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("modules.json", [3]),
        ("sentence_bert_config.json", 3),
        ("sentence_bert_config.json", {"transformer_task": 3}),
        ("1_Pooling/config.json", [3]),
        ("config_sentence_transformers.json", {"prompts": [3], "default_prompt_name": "query"}),
        ("config_sentence_transformers.json", {"prompts": {"query": "q"}, "default_prompt_name": ["query"]}),
        ("2_Dense/config.json", {"in_features": 32, "out_features": 16, "activation_function": 3}),
    ],
)
def test_settings_of_an_embedding_model_that_are_of_another_kind(tmp_path, name, content):
    """They are refused in a sentence that names the model, or not needed."""
    kind = KINDS["embedders"]
    folder = tmp_path / "model"
    folder.mkdir()
    kind.make(folder)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(HfEsmError, match=re.escape(str(folder))) if "task" not in str(content) else nullcontext():
        kind.read(folder)
