"""Methods from outside: registered, or offered by an installed package."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import partial

import pytest
import torch
import yaml

from hf_esm import (
    METHODS,
    EssentialMerge,
    HfEsmError,
    Merged,
    MergeMethod,
    Stack,
    compare,
    merge_models,
    register_method,
)
from hf_esm.cli.main import main
from hf_esm.evaluation.cells import Inputs
from hf_esm.methods.registry import describe_method, resolve_method
from hf_esm.methods.sparse import magnitude_threshold
from support.toys import texts, weights, write_models, write_rows


@dataclass
class Median(MergeMethod):
    """The element-wise median of the experts' updates."""

    strength: float = field(default=1.0, metadata={"help": "multiplies the median", "above": 0})
    by_size: bool = False

    def merge(self, stack: Stack) -> Merged:
        return Merged(self.strength * torch.stack(stack.updates).quantile(0.5, dim=0), "median")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Toy models, and labelled rows of every task."""
    folder = write_models(tmp_path_factory.mktemp("models"))
    for seed, task in enumerate("ab"):
        write_rows(folder / f"{task}.jsonl", [{"text": t, "label": i % 2} for i, t in enumerate(texts(seed))])
    return folder


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """METHODS as they are, for a test to add to."""
    monkeypatch.setattr(METHODS, "data", dict(METHODS.data))
    if "name" in vars(Median):
        monkeypatch.delattr(Median, "name")
    register_method("median", Median)


def arguments(models, **changes):
    return {"base": models / "base", "experts": {task: models / task for task in "ab"}, "progress": False, **changes}


def expected_weight(models, name, strength):
    """By the literal formula; the base of the toys is a body, which the experts wrap."""
    base = weights(models / "base")[name]
    tuned = [weights(models / task)[f"bert.{name}"] for task in "ab"]
    return base + strength * torch.stack([found - base for found in tuned]).quantile(0.5, dim=0)


NAME = "encoder.layer.0.attention.self.query.weight"


def test_a_registered_method_merges_in_python_from_a_recipe_and_on_the_command_line(models, tmp_path, capsys):
    half = {"name": "median", "strength": 0.5}
    merge_models(**arguments(models), method=half, output_dir=tmp_path / "python")
    torch.testing.assert_close(weights(tmp_path / "python")[NAME], expected_weight(models, NAME, 0.5))

    written = yaml.safe_load((tmp_path / "python" / "merge_recipe.yaml").read_text())
    assert written["method"] == {"name": "median", "strength": 0.5, "by_size": False}
    card = (tmp_path / "python" / "README.md").read_text()
    assert "median" in card

    recipe = {**arguments(models), "base": "base", "experts": {"a": "a", "b": "b"}, "method": half}
    (models / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(models / "recipe.yaml"), "--output-dir", str(tmp_path / "recipe")]) == 0
    flags = ["merge", "--base", str(models / "base"), "--method", "median", "--set", "strength=0.5", "--no-progress"]
    flags += [part for task in "ab" for part in ("--expert", f"{task}={models / task}")]
    assert main([*flags, "--output-dir", str(tmp_path / "flags")]) == 0
    for folder in ("recipe", "flags"):
        assert torch.equal(weights(tmp_path / folder)[NAME], weights(tmp_path / "python")[NAME])

    capsys.readouterr()
    assert main(["methods", "median"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "median: The element-wise median of the experts' updates." in shown
    assert "strength = 1.0: multiplies the median" in shown and "by_size = False" in shown


def test_a_registered_method_is_compared(models, tmp_path):
    test = {task: str(models / f"{task}.jsonl") for task in "ab"}
    found = compare(**arguments(models), test=test, methods=["mean", "median"], output_dir=tmp_path / "report")
    assert [row.label for row in found.rows] == ["mean", "median"]


def test_a_comparison_by_depth_scales_the_methods_that_have_an_alpha(models, tmp_path, monkeypatch):
    test, given = {task: str(models / f"{task}.jsonl") for task in "ab"}, []
    merge = Inputs.merge_arguments
    monkeypatch.setattr(Inputs, "merge_arguments", lambda *args: given.append(merge(*args)) or given[-1])
    found = compare(
        **arguments(models), test=test, methods=["mean", "task-arithmetic"], lines=True, output_dir=tmp_path / "report"
    )
    assert [row.label for row in found.rows] == ["mean", "task-arithmetic"]
    assert {(merged["method"].name, merged["lines"]) for merged in given} == {
        ("mean", None),
        ("task-arithmetic", True),
    }


@pytest.mark.slow
def test_an_installed_package_offers_a_method(models, tmp_path):
    """In a process of its own, with the package's metadata as pip leaves it."""
    package = tmp_path / "site" / "halves"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import torch\n"
        "from hf_esm import Merged, MergeMethod\n"
        "class Halves(MergeMethod):\n"
        "    def merge(self, stack):\n"
        "        return Merged(torch.stack(stack.updates).sum(0) / 2, 'half')\n"
    )
    metadata = tmp_path / "site" / "halves-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[hf_esm.methods]\nhalves = halves:Halves\nesm = halves:Halves\nbroken = halves:Missing\n"
    )
    script = f"""
import json, sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import hf_esm, hf_esm.methods
from hf_esm import METHODS, EssentialMerge, HfEsmError
from hf_esm.methods import resolve_method
before = "halves" in sys.modules
listed = "halves" in list(METHODS) and "halves" not in sys.modules
hf_esm.merge_models({str(models / "base")!r}, {{task: {str(models)!r} + "/" + task for task in "ab"}},
                    method="halves", output_dir={str(tmp_path / "merged")!r}, progress=False)
try:
    resolve_method("broken")
except HfEsmError as error:
    broken = str(error)
print(json.dumps([before, listed, METHODS["esm"] is EssentialMerge, resolve_method("halves").name, broken]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, listed, esm_stays, name, broken = json.loads(done.stdout.splitlines()[-1])
    assert (before, listed, esm_stays, name) == (False, True, True, "halves")
    assert broken.startswith("Method 'broken': halves:Missing cannot be loaded (AttributeError")
    assert "'esm' of halves:Halves is ignored: the name is taken" in done.stderr
    torch.testing.assert_close(weights(tmp_path / "merged")[NAME], expected_weight(models, NAME, 1.0))


@pytest.mark.parametrize("name", ["esm", "median", "", 3])
def test_a_name_that_is_taken_or_is_no_text_is_refused(name):
    with pytest.raises(HfEsmError, match=r"already a method|name is a text"):
        register_method(name, Median)
    assert METHODS["esm"] is EssentialMerge


def test_a_class_without_a_name_gets_the_one_it_is_registered_under():
    @register_method("tweaked")
    @dataclass
    class Tweaked(EssentialMerge):
        extra: float = 0.5

    register_method("tweaked-more", lambda: Tweaked(extra=2.0))
    assert describe_method(resolve_method("tweaked"))["name"] == "tweaked"
    assert describe_method(resolve_method("tweaked-more")) == {
        "name": "tweaked",
        **asdict(Tweaked(extra=2.0)),
        "uncalibrated": [],
    }
    assert EssentialMerge.name == "esm"


@pytest.mark.parametrize("made", [3, type("Nameless", (MergeMethod,), {})])
def test_a_factory_of_something_else_is_named(made):
    register_method("odd", lambda: made() if isinstance(made, type) else made)
    with pytest.raises(HfEsmError, match=r"Method 'odd': its factory made .* not a MergeMethod whose name"):
        resolve_method("odd")


def test_an_instance_of_a_nameless_class_asks_for_a_name():
    class Nameless(MergeMethod):
        pass

    with pytest.raises(HfEsmError, match=r"Nameless has no name. Register it"):
        resolve_method(Nameless())


@pytest.mark.parametrize("strength", [0.0, -1.0, "much", float("nan")])
def test_ranges_of_settings_are_checked(strength):
    with pytest.raises(HfEsmError, match="median: strength must be a finite number, above 0, not"):
        resolve_method({"name": "median", "strength": strength})


@pytest.mark.parametrize(
    ("method", "meant"),
    [
        ("medain", "There is no method 'medain' .did you mean 'median'"),
        ({"name": "esm", "gama": 0.2}, "Method 'esm': there is no setting 'gama' .did you mean 'gamma'"),
        ({"name": "esm++", "router": "prototyp"}, "esm..: router must be one of .* .did you mean 'prototype'"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_likeliest(method, meant):
    with pytest.raises(HfEsmError, match=meant):
        resolve_method(method)


def test_capabilities_are_those_of_the_settings():
    routed = {name: resolve_method({"name": "esm++", "router": name}) for name in ("discriminant", "oracle")}
    assert (routed["discriminant"].routes, routed["discriminant"].decides, routed["discriminant"].needs_features) == (
        True, True, True,
    )  # fmt: skip
    assert (routed["oracle"].routes, routed["oracle"].decides, routed["oracle"].needs_features) == (True, False, False)
    assert [name for name in METHODS if resolve_method(name).routes] == [
        "tsv-c",
        "esm++",
        "esm++-roberta",
        "esm++-vit",
    ]
    assert [name for name in METHODS if resolve_method(name).stacks_shared_inputs] == ["esm-vit", "esm++-vit"]
    assert resolve_method("tsv-c").with_rank(3).rank == 3
    for name in ("esm", "median"):
        with pytest.raises(HfEsmError, match=f"Method '{name}' has no experts, so no rank"):
            resolve_method(name).with_rank(3)


@pytest.mark.parametrize(
    ("router", "reads_prompts", "expected"),
    [
        ("discriminant", False, (1 / 3, 2.0, "update")),
        ("discriminant", True, (0.0, 1.0, "residual")),
        ("prototype", False, (1 / 3, 2.0, "residual")),
    ],
)
def test_settings_of_routed_experts_that_are_not_given_follow_from_the_kind_of_model(router, reads_prompts, expected):
    method = resolve_method({"name": "esm++", "router": router})
    settled = method.for_model(reads_prompts)
    assert (settled.depth, settled.mixing_temperature, settled.directions) == expected
    given = {"depth": 0.5, "mixing_temperature": 3.0, "expert_directions": "update"}
    method = resolve_method({"name": "esm++", "router": router, **given})
    assert method.for_model(reads_prompts) == method
    assert resolve_method("esm").for_model(reads_prompts) == resolve_method("esm")


def test_methods_see_the_base_the_depth_and_the_whole_updates(models, tmp_path):
    seen, means = {}, {}

    @register_method("looking")
    @dataclass
    class Looking(MergeMethod):
        def prepare(self, whole):
            return [magnitude_threshold(partial(whole.read, task), 1.0) + i for i, task in enumerate(whole.tasks)]

        def merge(self, stack):
            seen[stack.name] = stack
            means[stack.name] = torch.stack(stack.updates).mean(0)  # the updates are not to be kept
            return Merged(means[stack.name] - stack.base, "looked")

    merge_models(**arguments(models), method="looking", output_dir=tmp_path / "out")
    base = weights(models / "base")
    assert NAME in seen and seen.keys() <= base.keys()
    for name, stack in seen.items():
        assert torch.equal(stack.base, base[name].float()) and stack.base.dtype == torch.float32
        assert stack.weights == [1.0, 1.0]
        assert stack.thresholds[1] >= 1 > stack.thresholds[0] >= 0
    layers = {name: stack.depth for name, stack in seen.items() if ".layer." in name}
    assert all(depth == (int(name.split(".")[2]), 2) for name, depth in layers.items())
    assert {stack.depth for name, stack in seen.items() if name not in layers} == {None}
    torch.testing.assert_close(weights(tmp_path / "out")[NAME], means[NAME])


def test_a_stack_made_by_hand_says_that_it_has_no_base():
    with pytest.raises(HfEsmError, match=r"dense: this stack was made without the base's weight. Pass read_base"):
        _ = Stack("dense", "dense", [torch.ones(2)]).base
