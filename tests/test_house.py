"""The rules of the house that a machine can see: the staircase, faces, sizes, packages. A test lists all breaches."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from setuptools import find_packages


PROJECT = Path(__file__).parents[1]
ROOT = PROJECT / "hf_esm"
STEPS = [  # each wing imports only wings on lower steps
    {"errors", "version"},
    {"linalg", "architecture", "utils"},
    {"methods", "tuners", "data"},
    {"checkpoints", "metrics"},
    {"planning", "calibration", "hub"},
    {"routing"},
    {"merging"},
    {"evaluation"},
    {"cli"},
]
STEP = {wing: step for step, wings in enumerate(STEPS) for wing in wings}
FACES = {*STEP, "tuners.essential", "tuners.routed"}  # a tuner has a face of its own, as in PEFT
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
LONGEST_FILE, LONGEST_FUNCTION = 420, 70  # lines; of a function without its docstring


def wing_of(name: str) -> str:
    """The wing of a file, by its path in `hf_esm`; of `hf_esm/__init__.py` itself, the empty string."""
    return "" if name == "__init__.py" else name.removesuffix(".py").split("/")[0]


def imports(name: str) -> Iterator[tuple[str, str, str]]:
    """What one file imports of `hf_esm`: the place, the dotted module below `hf_esm`, the name taken from it."""
    parts = name.removesuffix(".py").split("/")
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("hf_esm."):
                    yield f"{name}:{node.lineno}", alias.name.removeprefix("hf_esm."), ""
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                module = parts[: len(parts) - node.level] + module
            elif module[:1] == ["hf_esm"]:
                module = module[1:]
            else:
                continue
            for alias in node.names:
                # `from . import linalg` takes a module.
                taken = [*module, alias.name] if not module or is_module([*module, alias.name]) else module
                yield f"{name}:{node.lineno}", ".".join(taken), alias.name


def is_module(parts: list[str]) -> bool:
    place = ROOT.joinpath(*parts)
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def test_a_wing_imports_only_wings_on_lower_steps():
    breaches = [name for name in TREES if wing_of(name) not in {*STEP, ""}]
    for name in TREES:
        for place, module, _ in imports(name):
            target, wing = module.split(".")[0], wing_of(name)
            if wing and target != wing and STEP.get(target, 0) >= STEP[wing]:
                breaches.append(f"{place} imports {module}")
    assert not breaches
    assert [wing for wing in STEP if not is_module([wing])] == []


def test_a_wing_imports_from_the_faces_of_other_wings():
    breaches = [
        f"{place} imports {module}"
        for name in TREES
        for place, module, _ in imports(name)
        if wing_of(name) and module.split(".")[0] != wing_of(name) and module in modules() - FACES
    ]
    assert not breaches


def modules() -> set[str]:
    return {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in TREES}


def test_underscore_names_are_used_in_their_own_file_alone():
    breaches = []
    for name in TREES:
        taken = list(imports(name))
        breaches += [f"{place} imports {what}" for place, _, what in taken if hidden(what)]
        loaded = {what for _, module, what in taken if module.split(".")[-1] == what}
        breaches += [
            f"{name}:{node.lineno} uses {node.value.id}.{node.attr}"
            for node in ast.walk(TREES[name])
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if node.value.id in loaded and hidden(node.attr)
        ]
    assert not breaches


def hidden(name: str) -> bool:
    return bool(re.match(r"_(?!_)", name))


def test_files_and_functions_are_short():
    breaches = [
        f"{name}: {text.count(chr(10))} lines" for name, text in TEXTS.items() if text.count("\n") > LONGEST_FILE
    ]
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node):
                    length -= node.body[0].end_lineno - node.body[0].lineno + 1
                if length > LONGEST_FUNCTION:
                    breaches.append(f"{name}:{node.lineno} {node.name}: {length} lines")
    assert not breaches


def test_the_face_of_a_wing_says_what_the_wing_is_for():
    breaches = []
    for name, tree in TREES.items():
        if not name.endswith("__init__.py"):
            continue
        paragraph = ast.get_docstring(tree) or ""
        if len(paragraph.split()) < (20 if name.count("/") == 1 else 5):
            breaches.append(f"{name}: its docstring is {paragraph!r}")
    assert not breaches


def test_every_package_is_in_the_wheel():
    packages = {name.rpartition("/")[0].replace("/", ".") for name in TREES}
    expected = {f"hf_esm.{package}".rstrip(".") for package in packages}
    assert expected == set(find_packages(str(PROJECT), include=["hf_esm", "hf_esm.*"]))
    assert 'find_packages(include=["hf_esm", "hf_esm.*"])' in (PROJECT / "setup.py").read_text(encoding="utf-8")
