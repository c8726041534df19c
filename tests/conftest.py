"""What holds for every test, and fixtures that several files share; a file's fixture of the same name comes first.

The process that starts the run imports this file and no test: it must not import torch.
"""

import os
import random

import pytest


# Workers inherit the environment, so that all collect the same tests. Two seeds are drawn for every run.
os.environ.setdefault("HF_ESM_TEST_SEED", ",".join(str(random.SystemRandom().randrange(2**32)) for _ in range(2)))
# One thread a worker: toys gain nothing from more. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`base`, and the classifiers `a`, `b` and `c` on it, whose texts tell them apart."""
    from support.routed_toys import write_bert

    return write_bert(tmp_path_factory.mktemp("models"))


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
