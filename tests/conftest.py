"""What holds for every test, and fixtures that several files share; a file's fixture of the same name comes first.

The process that starts the run imports this file and no test: it must not import torch.
"""

import gc
import logging
import os
import random
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
from filelock import FileLock


# Workers inherit the environment, so that all collect the same tests. A seed is drawn for every run.
os.environ.setdefault("HF_ESM_TEST_SEED", str(random.SystemRandom().randrange(2**32)))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; toys gain nothing from more threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.disable()  # while everything is imported: see `pytest_collection_finish`

# What Transformers and PEFT log about calls that will not work for long.
DEPRECATED = re.compile(r"deprecat|will be removed|future version", re.IGNORECASE)


def pytest_addoption(parser):
    parser.addoption("--all-cases", action="store_true", help="run all cases of tests that are marked `cases`")


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    """Draw the cases of tests that have too many for every run. Files that take long go first, so that no worker ends
    long after the other.
    """
    if not config.getoption("--all-cases"):
        config.hook.pytest_deselected(items=draw_cases(items))
    long = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("hub")}
    items.sort(key=lambda item: item.path not in long)


def draw_cases(items):
    """Keep the cases that this run draws, by its seed; return the others."""
    tests = defaultdict(list)
    for item in items:
        if marked := item.get_closest_marker("cases"):
            tests[item.nodeid.partition("[")[0], marked.args[0]].append(item)
    left_out = []
    for (name, number), cases in tests.items():
        drawn = random.Random(os.environ["HF_ESM_TEST_SEED"] + name).sample(cases, min(number, len(cases)))
        left_out += [item for item in cases if item not in drawn]
    items[:] = [item for item in items if item not in left_out]
    return left_out


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


class Deprecations(logging.Handler):
    """Keeps what a library logs about our use of it."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        if DEPRECATED.search(record.getMessage()):
            self.messages.append(f"{record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def no_deprecated_calls():
    """A test fails when Transformers or PEFT logs that a call is deprecated. What they raise as warnings are errors by
    `filterwarnings` in pyproject.toml. A test can take the list of messages, and remove what is not about our use.
    """
    handler, libraries = Deprecations(), [logging.getLogger(name) for name in ("transformers", "peft")]
    for library in libraries:
        library.addHandler(handler)
    yield handler.messages
    for library in libraries:
        library.removeHandler(handler)
    assert not handler.messages


@pytest.fixture(scope="session")
def kit(request, tmp_path_factory):
    """Folder of `base` and the classifiers `a`, `b` and `c`: written once a run for all workers, never changed."""
    from support.routed_toys import write_bert
    from support.tiny import snapshot

    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent
    folder = shared / "kit"
    with FileLock(shared / "kit.lock"):
        if not folder.exists():
            write_bert(shared / "kit.part").rename(folder)
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before, "a test wrote into the kit"


@pytest.fixture(scope="module")
def models(kit, tmp_path_factory):
    """A copy of the kit for one file of tests, which may write into it."""
    return Path(shutil.copytree(kit, tmp_path_factory.mktemp("models"), dirs_exist_ok=True))


@pytest.fixture(scope="module")
def merged(models):
    """An ESM++ model of `a` and `b`, of full rank."""
    from support.routed_toys import merge_bert

    return merge_bert(models, models / "merged")


@pytest.fixture(scope="module")
def routed(merged):
    from hf_esm import RoutedModel

    return RoutedModel.from_pretrained(merged)


@pytest.fixture(scope="module")
def statistics(models):
    """Of every expert, with what the base's blocks read."""
    from hf_esm import calibrate
    from support.routed_toys import task_texts

    return {t: calibrate(models / t, task_texts(t), base=models / "base", progress=False) for t in "abc"}


@pytest.fixture(scope="module")
def hub():
    """A local Hub that can be told to fail."""
    from support.hub import faulty_hub

    server = faulty_hub()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The home folder of the processes that use the Hub."""
    return tmp_path_factory.mktemp("home")
