"""What `import hf_esm` loads and hands out, and how its PEFT types are registered: in fresh processes."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_esm


pytestmark = pytest.mark.slow


ADAPTERS = Path(__file__).parent / "fixtures" / "written_by_0.1.0"
ERRORS = ("DamagedFileError", "HfEsmError", "HubError", "IncompatibleError")
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "pandas", "numpy", "yaml", "huggingface_hub")


def in_fresh_process(code, *paths, cwd=None):
    """Run code in a process that has imported nothing, with folders before all others on its path."""
    path = os.pathsep.join([*map(str, paths), str(Path(hf_esm.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_hf_esm_loads_no_library_and_looking_for_peft_loads_none_either():
    in_fresh_process(f"""
import sys
others = list(sys.meta_path)
import hf_esm, importlib.util
assert "merge_models" in dir(hf_esm) and "tuners" in dir(hf_esm)
assert hf_esm.HfEsmError and hf_esm.__version__
loader = importlib.util.find_spec("peft").loader  # as Transformers asks whether peft is installed
assert loader.get_filename("peft").endswith("__init__.py")
(finder,) = [finder for finder in sys.meta_path if finder not in others]
assert [found for found in sys.meta_path if found is not finder] == others
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
""")


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["mrge"]], ids=" ".join)
def test_the_command_line_loads_no_library_until_a_command_is_chosen(words):
    in_fresh_process(f"""
import sys
from hf_esm.cli import main
try:
    main({words})
except SystemExit as stop:
    assert stop.code == {2 if words == ["mrge"] else 0}
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
""")


def test_every_public_name_and_wing_is_an_attribute():
    for name in hf_esm.__all__:
        assert getattr(hf_esm, name) is not None
        assert name in dir(hf_esm)
    names = {}
    exec("from hf_esm import *", names)
    assert set(hf_esm.__all__) <= set(names)
    for path in Path(hf_esm.__file__).parent.iterdir():
        wing = path.stem
        if (path / "__init__.py").is_file() or (path.suffix == ".py" and not wing.startswith("_")):
            assert getattr(hf_esm, wing).__name__ == f"hf_esm.{wing}"
            assert wing in dir(hf_esm)
    with pytest.raises(AttributeError, match="module 'hf_esm' has no attribute 'merge_model'"):
        _ = hf_esm.merge_model


def test_type_checkers_see_the_names_that_are_loaded_on_first_use():
    tree = ast.parse(Path(hf_esm.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == hf_esm._WING_OF
    assert sorted(hf_esm.__all__) == sorted([*seen, *ERRORS, "__version__"])


def test_adapters_load_through_transformers_and_peft_where_only_hf_esm_was_imported():
    in_fresh_process(
        """
import sys
import hf_esm
finder = sys.meta_path[0]
others = sys.meta_path[1:]
from transformers import AutoModel
assert "peft" not in sys.modules
model = AutoModel.from_pretrained("essential_components")  # imports peft in its course
assert finder not in sys.meta_path and [found for found in sys.meta_path if found in others] == others
assert any(type(module).__name__ == "EssentialComponentsLinear" for module in model.modules())
import peft, pickle
assert type(peft.__spec__.loader) is type(peft.__loader__) is type(peft.tuners.__loader__)
config = peft.PeftConfig.from_pretrained("routed/routed")
assert isinstance(config, hf_esm.RoutedExpertsConfig)
assert pickle.loads(pickle.dumps(config)) == config
model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained("routed"), "routed", subfolder="routed")
assert isinstance(model.base_model, hf_esm.RoutedExpertsModel)
""",
        cwd=ADAPTERS,
    )


def test_adapters_load_where_peft_was_imported_before_hf_esm_and_configs_are_unpickled(tmp_path):
    path = tmp_path / "config.pickle"
    in_fresh_process(
        f"""
import pickle, sys
import peft
others = list(sys.meta_path)
import hf_esm
assert sys.meta_path == others
config = peft.PeftConfig.from_pretrained("essential_components")
assert isinstance(config, hf_esm.EssentialComponentsConfig)
with open({str(path)!r}, "wb") as file:
    pickle.dump(config, file)
""",
        cwd=ADAPTERS,
    )
    assert isinstance(pickle.loads(path.read_bytes()), hf_esm.EssentialComponentsConfig)


PEFT = """
import time
{first}
time.sleep(0.2)
whole = True
"""
# Stands for `hf_esm.tuners`, whose import is what registers: says whether peft was whole by then.
TUNERS = """
import sys, threading
from importlib.machinery import ModuleSpec

class Tuners:
    whole = []
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == "hf_esm.tuners" else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        import peft
        self.whole.append(hasattr(peft, "whole"))

sys.meta_path.insert(0, Tuners())
"""


@pytest.fixture
def small_peft(tmp_path):
    """Writes a package named peft that takes a moment to be imported; returns the folder that it is in."""

    def write(first=""):
        (tmp_path / "peft").mkdir(exist_ok=True)
        (tmp_path / "peft" / "__init__.py").write_text(PEFT.format(first=first))
        return tmp_path

    return write


def test_types_are_registered_once_peft_is_whole(small_peft):
    in_fresh_process(
        TUNERS
        + """
import hf_esm
finder = sys.meta_path[0]
assert Tuners.whole == []
import peft
assert Tuners.whole == [True] and finder not in sys.meta_path
""",
        small_peft(),
    )


def test_an_import_of_peft_that_fails_is_waited_out(small_peft):
    in_fresh_process(
        TUNERS
        + """
import hf_esm, pathlib
try:
    import peft
except ImportError as error:
    assert "no_such_module" in str(error)
assert Tuners.whole == []
pathlib.Path(sys.path[1], "peft", "__init__.py").write_text("whole = True")
import importlib
importlib.invalidate_caches()
import peft
assert Tuners.whole == [True]
""",
        small_peft("import no_such_module"),
    )


def test_hf_esm_can_be_imported_while_peft_is(small_peft):
    """By peft itself: then the types are registered when `hf_esm.tuners` is first used."""
    in_fresh_process(
        TUNERS
        + """
others = list(sys.meta_path)
import peft, hf_esm
assert Tuners.whole == [] and sys.meta_path == others
hf_esm.tuners
assert Tuners.whole == [True]
""",
        small_peft("import hf_esm"),
    )


@pytest.mark.parametrize("first", ["peft", "hf_esm"])
def test_threads_may_import_peft_and_hf_esm_at_once(small_peft, first):
    in_fresh_process(
        TUNERS
        + f"""
import importlib, time
failed = []
def load(name):
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=load, args=[name]) for name in ["{first}", "hf_esm", "hf_esm.tuners", "peft"] * 3]
for thread in threads:
    thread.start()
    time.sleep(0.02)
for thread in threads:
    thread.join(60)
    assert not thread.is_alive()
assert not failed, failed
assert Tuners.whole == [True], Tuners.whole
assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_PeftFinder"]
""",
        small_peft(),
    )


def test_errors_can_be_told_apart(tmp_path):
    assert all(issubclass(getattr(hf_esm, name), hf_esm.HfEsmError) for name in ERRORS)
    (tmp_path / "statistics.safetensors").write_bytes(b"cut off")
    with pytest.raises(hf_esm.DamagedFileError, match="not a readable statistics file"):
        hf_esm.ActivationStatistics.load(tmp_path / "statistics.safetensors")
    other = shutil.copytree(ADAPTERS / "b", tmp_path / "b")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(hf_esm.IncompatibleError, match="config differs from the base's in hidden_act"):
        hf_esm.merge_models(ADAPTERS / "base", {"a": ADAPTERS / "a", "b": other}, method="mean", dry_run=True)
