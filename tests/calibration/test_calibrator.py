"""`calibrate`: its parameters."""

import inspect
from dataclasses import fields

from hf_esm import calibrate
from hf_esm.data import RunOptions


def test_calibrate_spells_out_the_options_of_a_run_with_their_types_and_defaults():
    parameters = inspect.signature(calibrate).parameters
    options = {field.name: (field.type, field.default) for field in fields(RunOptions)}
    assert {name: (p.annotation, p.default) for name, p in parameters.items() if name in options} == options
