"""Runs the scripts in `examples/` as users run them, from a folder that holds toy models under the names of the real
ones. As those on the Hub, the experts are pickles, and their data come from `datasets.load_dataset`.
"""

import runpy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from support.pictures import picture
from support.routed_toys import tuned
from support.tiny import WORDS, save_tokenizer
from support.toys import base_model, classifier
from support.writers import save_writers


EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = 40  # of each split


def save_pickled(model, folder):
    """As checkpoints were saved before safetensors."""
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def glue(path, name, split):
    """Rows with the columns of every GLUE task that the examples read."""
    draw = np.random.default_rng(len(name) + len(split))
    words = WORDS[:7] if name == "sst2" else WORDS[7:]
    text = [" ".join(draw.choice(words, 6)) for _ in range(ROWS)]
    columns = {"sentence": text, "sentence1": text, "sentence2": text[::-1]}
    return datasets.Dataset.from_dict({**columns, "label": [i % 2 for i in range(ROWS)]})


def fewer(data, indices, *arguments, select=datasets.Dataset.select, **settings):
    """As `Dataset.select`, of the first 12 rows alone."""
    return select(data, list(indices)[:12], *arguments, **settings)


def pictures(path, split, streaming):
    draw = np.random.default_rng(len(path))
    rows = [{column: picture(draw) for column in ("image", "img")} for _ in range(40)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def texts(here, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", glue)
    monkeypatch.setattr(datasets.Dataset, "select", fewer)
    base = base_model()
    base.save_pretrained(here / "FacebookAI/roberta-base")
    save_tokenizer(here / "FacebookAI/roberta-base")
    for seed, task in enumerate(("SST-2", "MRPC", "CoLA")):
        folder = here / f"textattack/roberta-base-{task}"
        save_pickled(tuned(classifier(base, "a"), seed), folder)
        save_tokenizer(folder)


def written(path, name, split):
    """Rows with the columns of the data sets that language models are merged on."""
    draw = np.random.default_rng(len(path))
    text = [" ".join(draw.choice(WORDS, 6)) for _ in range(ROWS)]
    messages = [[{"role": "user", "content": one}, {"role": "assistant", "content": one[::-1]}] for one in text]
    return datasets.Dataset.from_dict({"messages": messages, "text": text, "code": text[::-1]})


@pytest.fixture
def writers(here, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", written)
    monkeypatch.setattr(datasets.Dataset, "select", fewer)
    save_writers(here / "Qwen", "Qwen2.5-0.5B", ["Qwen2.5-0.5B-Instruct", "Qwen2.5-Coder-0.5B"])


@pytest.fixture
def images(here, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", pictures)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = ViTConfig(**small, image_size=16, patch_size=4)
    torch.manual_seed(0)
    base = ViTModel(config, add_pooling_layer=False).eval()
    names = ["google/vit-base-patch16-224-in21k", "nateraw/vit-base-beans", "nateraw/food"]
    names.append("nateraw/vit-base-patch16-224-cifar10")
    for seed, name in enumerate(names):
        model = base
        if seed:
            model = ViTForImageClassification(ViTConfig(**small, image_size=16, patch_size=4, num_labels=3))
            model.vit.load_state_dict(base.state_dict())
            model = tuned(model.eval(), seed)
        save_pickled(model, here / name)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(here / name)


@pytest.mark.slow
def test_the_text_example_runs(texts, capsys):
    runpy.run_path(str(EXAMPLES / "merge_text.py"))
    assert "label" in capsys.readouterr().out


@pytest.mark.slow
def test_the_routed_example_runs(here, texts, capsys):
    runpy.run_path(str(EXAMPLES / "merge_routed.py"))
    assert (here / "adapters").is_dir()


@pytest.mark.slow
def test_the_example_of_a_comparison_runs(here, texts, capsys):
    runpy.run_path(str(EXAMPLES / "compare_methods.py"))
    assert (here / "comparison" / "report.md").is_file()
    assert "Best here" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_language_models_runs(here, writers, capsys):
    runpy.run_path(str(EXAMPLES / "merge_language_models.py"))
    result, _, generated = capsys.readouterr().out.partition("written  qwen-merged\n")
    assert "by agreement with the experts" in result and "refined" in result and "agrees   chat" in result
    assert len(generated.splitlines()) > 1


def test_the_vision_example_runs(images, capsys):
    runpy.run_path(str(EXAMPLES / "merge_vision.py"))
    assert "{0: 'LABEL_0'" in capsys.readouterr().out
