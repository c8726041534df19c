"""A few hundred damaged files of every kind, others each time; `python tests/support/faults.py --n 10000` for more."""

import random
from dataclasses import replace

import pytest

from support.faults import KINDS, try_faults


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
