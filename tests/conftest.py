"""Fixtures that several files share; a file with a fixture of the same name uses its own."""

import pytest

from hf_esm import RoutedModel, calibrate
from support.routed_toys import merge_bert, task_texts, write_bert


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`base`, and the classifiers `a`, `b` and `c` on it, whose texts tell them apart."""
    return write_bert(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def merged(models):
    """An ESM++ model of `a` and `b`, of full rank."""
    return merge_bert(models, models / "merged")


@pytest.fixture(scope="module")
def routed(merged):
    return RoutedModel.from_pretrained(merged)


@pytest.fixture(scope="module")
def statistics(models):
    """Of every expert, with what the base's blocks read."""
    return {t: calibrate(models / t, task_texts(t), base=models / "base", progress=False) for t in "abc"}
