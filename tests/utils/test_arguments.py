"""Unknown names with suggestions, and values of dataclass fields against their annotations and metadata."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

from hf_esm import HfEsmError
from hf_esm.utils import check_fields, check_known, closest_name


KNOWN = ["mean", "esm", "esm++", "tsv-m", "task-arithmetic"]


@pytest.mark.parametrize(
    ("name", "closest"),
    [("ESM", "esm"), ("task_arithmetic", "task-arithmetic"), ("tsvm", "tsv-m"), ("quantum", None), (7, None)],
)
def test_the_closest_name_is_that_of_a_misspelt_one(name, closest):
    assert closest_name(name, KNOWN) == closest


def test_an_unknown_name_is_refused_with_the_closest_and_all_known_ones():
    check_known(["esm", "mean"], KNOWN, "method")
    with pytest.raises(HfEsmError) as error:
        check_known(["esm", "taskarithmetic"], KNOWN, "method")
    assert str(error.value) == (
        "There is no method 'taskarithmetic' (did you mean 'task-arithmetic'?); there are mean, esm, esm++, tsv-m, "
        "task-arithmetic."
    )


def test_where_a_name_was_written_begins_the_error_and_nothing_is_suggested_that_is_not_near():
    with pytest.raises(HfEsmError) as error:
        check_known(["quantum"], [], "setting", "mean")
    assert str(error.value) == "mean: there is no setting 'quantum'; there are none."


@dataclass
class Settings:
    share: float = field(default=0.5, metadata={"above": 0, "most": 1})
    tolerance: float = field(default=0.0, metadata={"least": 0, "below": 1})
    count: int = field(default=1, metadata={"least": 1})
    limit: Optional[int] = field(default=None, metadata={"most": 9})
    scale: "float | str | None" = None
    flag: bool = False
    names: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    kind: str = field(default="", metadata={"choices": ("update", "residual", "")})
    folder: Optional[str | os.PathLike] = None
    anything: Any = None


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"share": 1, "tolerance": 0, "count": 1, "limit": 9},
        {"share": 1e-9, "tolerance": 0.999, "count": 10**400, "limit": -5},
        {"share": np.float32(0.5), "count": np.int64(3)},
        {"scale": "auto", "names": ["a"], "kind": "residual", "folder": Path("x"), "anything": object()},
        {"scale": 2, "folder": "x", "limit": None, "anything": 3},
    ],
)
def test_values_of_the_annotated_type_and_in_range_are_taken(values):
    check_fields(Settings(**values))


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("share", 0, "a finite number, above 0 and at most 1, not 0."),
        ("share", 1.01, "a finite number, above 0 and at most 1, not 1.01."),
        ("share", "0.5", "a finite number, above 0 and at most 1, not '0.5'."),
        ("share", None, "a finite number, above 0 and at most 1, not None."),
        ("tolerance", 1, "a finite number, at least 0 and below 1, not 1."),
        ("tolerance", -0.1, "a finite number, at least 0 and below 1, not -0.1."),
        ("tolerance", float("nan"), "a finite number, at least 0 and below 1, not nan."),
        ("count", 0, "a whole number, at least 1, not 0."),
        ("count", True, "a whole number, at least 1, not True."),
        ("count", 1.0, "a whole number, at least 1, not 1.0."),
        ("limit", 10, "a whole number, at most 9, not 10."),
        ("scale", float("inf"), "a finite number or a text, not inf."),
        ("scale", [1], r"a finite number or a text, not \[1\]."),
        ("scale", False, "a finite number or a text, not False."),
        ("flag", 1, "true or false, not 1."),
        ("names", "q_proj", "a list, not 'q_proj'."),
        ("columns", ["text"], r"a mapping, not \['text'\]."),
        ("kind", "residuum", r"one of update, residual \(did you mean 'residual'\?\), not 'residuum'."),
        ("folder", 3, "a text or a path, not 3."),
        ("anything", float("nan"), "a finite number, not nan."),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused_in_one_sentence(setting, value, expected):
    with pytest.raises(HfEsmError, match=f"^esm: {setting} must be {expected}$"):
        check_fields(Settings(**{setting: value}), "esm")


def test_where_annotations_cannot_be_resolved_the_types_of_defaults_count():
    @dataclass
    class Unresolved:
        share: "Share" = field(default=0.5, metadata={"most": 1})  # noqa: F821
        free: "Share" = None  # noqa: F821

    check_fields(Unresolved(1, object()))
    with pytest.raises(HfEsmError, match=r"^`share` must be a finite number, at most 1, not 'all'.$"):
        check_fields(Unresolved("all"))
