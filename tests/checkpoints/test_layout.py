"""File names of a merged model's folder: each is written once."""

import ast
from pathlib import Path

from hf_esm.checkpoints import layout


PACKAGE = Path(layout.__file__).parents[1]
FILES = {value for name, value in vars(layout).items() if name.isupper() and "." in value}


def test_no_other_module_spells_out_the_name_of_a_file_in_an_output_folder():
    spelt = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.value}"
        for path in PACKAGE.rglob("*.py")
        if path != Path(layout.__file__)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in FILES
    ]
    assert {"merge_recipe.yaml", "config.json"} <= FILES and not spelt
