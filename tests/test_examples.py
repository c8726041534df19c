"""Runs the `Example:` blocks of the public docstrings, as doctests, each in a fresh folder.

The working folder of an example holds toy models under the names of real ones, and the namespace holds their data:

    bert-base         a BERT without a head, with its tokenizer
    bert-sst2         a classifier tuned from it: negative, positive
    bert-mrpc         another one, which reads pairs of texts: not_equivalent, equivalent
    bert-mrpc-lora    a LoRA adapter of `bert-base` for the labels of `bert-mrpc`
    merged            `bert-sst2` and `bert-mrpc` merged by ESM
    routed            `bert-sst2` and `bert-mrpc` merged by ESM++

    sst2_texts, mrpc_pairs    lists of samples, without labels: a text each, a pair of texts each
    sst2_rows, mrpc_rows      lists of labelled rows: dictionaries with `text` (`text_pair`) and `label`

The toys know few words: of `support.tiny.WORDS`. What an example writes goes with its folder.
"""

import doctest
import shutil

import pytest
import torch

import hf_esm
from hf_esm import METHODS, merge_models
from support.routed_toys import tuned
from support.tiny import WORDS, save_tokenizer
from support.toys import base_model, classifier, lora_adapter


NAMES = [
    "ActivationStatistics",
    "EssentialComponentsConfig",
    "EssentialMerge",
    "MergeOptions",
    "Metric",
    "RoutedExpertsConfig",
    "RoutedModel",
    "calibrate",
    "collect_statistics",
    "compare",
    "evaluate",
    "load_task_model",
    "merge_models",
    "register_method",
]


def texts(seed: int, words: list[str]) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(words[i] for i in torch.randint(len(words), (6,), generator=generator)) for _ in range(12)]


SST2_TEXTS, FIRST, SECOND = texts(0, WORDS[:7]), texts(1, WORDS[7:]), texts(2, WORDS[7:])
NAMESPACE = {
    "sst2_texts": SST2_TEXTS,
    "mrpc_pairs": list(zip(FIRST, SECOND, strict=True)),
    "sst2_rows": [{"text": text, "label": i % 2} for i, text in enumerate(SST2_TEXTS)],
    "mrpc_rows": [
        {"text": first, "text_pair": second, "label": i % 2}
        for i, (first, second) in enumerate(zip(FIRST, SECOND, strict=True))
    ],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder that every example gets a copy of."""
    folder, base = tmp_path_factory.mktemp("examples"), base_model()
    base.save_pretrained(folder / "bert-base")
    for seed, task in enumerate(("sst2", "mrpc")):
        tuned(classifier(base, task), seed).save_pretrained(folder / f"bert-{task}")
    for name in ("bert-base", "bert-sst2", "bert-mrpc"):
        save_tokenizer(folder / name)
    lora_adapter(base, "mrpc", "bert-base").save_pretrained(folder / "bert-mrpc-lora", save_embedding_layers=False)
    experts = {task: folder / f"bert-{task}" for task in ("sst2", "mrpc")}
    samples = {"sst2": NAMESPACE["sst2_texts"], "mrpc": NAMESPACE["mrpc_pairs"]}
    for method, name in (("esm", "merged"), ("esm++", "routed")):
        merge_models(
            folder / "bert-base", experts, calibration=samples, method=method, output_dir=folder / name, progress=False
        )
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(models, tmp_path, monkeypatch, name):
    docstring = getattr(hf_esm, name).__doc__
    assert "Example:" in docstring
    monkeypatch.chdir(shutil.copytree(models, tmp_path / "models"))
    test = doctest.DocTestParser().get_doctest(docstring, dict(NAMESPACE), name, None, None)
    assert test.examples, f"the Example: of {name} holds no >>> line"
    said: list[str] = []
    before = dict(METHODS)
    try:
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    finally:
        METHODS.clear()
        METHODS.update(before)
    assert not said, "".join(said)
