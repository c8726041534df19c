"""The smallest models, one tiny base with two experts on disk, and what a merge that is refused must look like."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModel, BertTokenizerFast

from hf_esm import HfEsmError, merge_models
from support.helpers import VOCABULARY, Architecture, perturbed, save, text_samples


BERT = Architecture(
    "BertForSequenceClassification",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "num_labels": 3,
    },
)
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
LLAMA = Architecture("LlamaForCausalLM", DECODER)
GPT2 = Architecture(
    "GPT2LMHeadModel", {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["a", "bad", "dull", "film", "fine", "good", "is", "it", "not", "one", "plot", "so", "the", "two", "was"]
SENTENCES = ["the film was good", "dull plot", "it is a fine film so fine", "bad", "one good plot is not two", "so so"]


def save_tokenizer(folder: Path) -> BertTokenizerFast:
    """A whole WordPiece tokenizer of a few words, beside the model in `folder`."""
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL, *WORDS]))
    tokenizer = BertTokenizerFast(str(vocabulary))
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_models(folder: Path) -> SimpleNamespace:
    """A bare base, two classifiers tuned from it, and arguments of `merge_models` that merge them."""
    task_model = BERT.build()
    experts = {task: save(perturbed(task_model, 0.05, i), folder / task) for i, task in enumerate(["left", "right"])}
    base = save(AutoModel.from_pretrained(save(task_model, folder / "whole")), folder / "base")
    calibration = {task: text_samples(i) for i, task in enumerate(experts)}
    arguments = {"base": base, "experts": experts, "calibration": calibration, "output_dir": str(folder / "merged")}
    return SimpleNamespace(folder=folder, base=base, experts=experts, task_model=task_model, arguments=arguments)


def forbid_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, an expert that is run over its samples fails the test."""
    monkeypatch.setattr(
        "hf_esm.calibration.calibrator.collect_statistics", lambda *_, **__: pytest.fail("calibrated before the check")
    )


def assert_refused(folder: Path, says: list[str], arguments: dict[str, Any], merge: Callable = merge_models) -> None:
    """The merge raises one `HfEsmError` that says all of this, and changes nothing below `folder`."""
    before = snapshot(folder)
    with pytest.raises(HfEsmError) as caught:
        merge(progress=False, **arguments)
    message = str(caught.value)
    assert all(part in message for part in says), message
    assert "\n" not in message
    assert snapshot(folder) == before


def snapshot(folder: Path) -> dict[str, float]:
    """Every file and folder below `folder`, with its time of change."""
    return {os.fspath(path): path.stat().st_mtime_ns for path in folder.rglob("*")}
