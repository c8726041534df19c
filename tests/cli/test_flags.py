"""Flags that are made from dataclasses, and arguments that messages name."""

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Optional

import pytest

from hf_esm.cli.flags import add_flags, in_flags, options_of


FLAGS = ("--columns", "--dtype", "--expert", "--heads", "--overwrite")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Pass `overwrite=True`.", "Pass --overwrite."),
        ("Pass `dtype='bfloat16'` or 'float32'.", "Pass --dtype bfloat16 or 'float32'."),
        ("`heads=[…]`, `columns={'text': …}`", "--heads …, --columns text=…"),
        ("`columns=`", "--columns"),
        ("`experts` has none", "--expert has none"),
        ("`score_fn`, and `expert.weight`, and overwrite", "`score_fn`, and `expert.weight`, and overwrite"),
    ],
)
def test_arguments_in_backticks_are_flags_where_there_are_such_flags(message, expected):
    assert in_flags(message, FLAGS) == expected


@dataclass
class Options:
    rate: "Optional[float | str]" = field(default=None, metadata={"help": "a number, or auto"})
    most: int | float = field(default=3, metadata={"help": "at most"})
    fast: bool = field(default=False, metadata={"help": "be fast"})
    columns: Optional[Mapping[str, str]] = field(default=None, metadata={"help": "columns"})
    heads: str | Iterable[str] = field(default="auto", metadata={"help": "heads"})
    folder: Optional[str | os.PathLike] = field(default=None, metadata={"help": "folder"})
    refine: Optional[bool | Mapping[str, str]] = field(default=None, metadata={"help": "refine"})
    left_out: int = field(default=0, metadata={"help": "no flag"})


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_flags(parser, Options, leave_out={"left_out"}, most=5)
    return parser


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("", {}),
        ("--rate 1e-1 --most 2", {"rate": 0.1, "most": 2}),
        ("--rate auto --most 2.5", {"rate": "auto", "most": 2.5}),
        ("--fast --folder x", {"fast": True, "folder": "x"}),
        ("--no-fast", {"fast": False}),
        ("--columns text=a label=b", {"columns": {"text": "a", "label": "b"}}),
        ("--refine", {"refine": []}),
        ("--refine steps=80 --refine batch_size=2", {"refine": ["steps=80", "batch_size=2"]}),
        ("--no-refine", {"refine": False}),
        ("--heads merge", {"heads": "merge"}),
        ("--heads pooler", {"heads": ["pooler"]}),
        ("--heads pooler --heads a b", {"heads": ["pooler", "a", "b"]}),
    ],
)
def test_flags_give_the_values_of_a_dataclass(parser, words, options):
    assert options_of(parser.parse_args(words.split()), Options) == options


def test_help_names_the_defaults(parser):
    said = " ".join(parser.format_help().split())
    assert "at most (default: 5)" in said and "heads (default: auto)" in said and "--no-fast be fast" in said
    assert "--refine [NAME=VALUE ...] refine; --no-refine" in said
    assert "left-out" not in said


@pytest.mark.parametrize("word", ["many", "1e"])
def test_a_text_is_no_number(parser, word, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--most", word])
    assert f"--most: '{word}' is not a whole number or a number" in capsys.readouterr().err
