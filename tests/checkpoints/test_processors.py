"""Tokenizers and processors: what is broken, or needs a library, is not taken for what is absent."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer, ViTImageProcessor

from hf_esm import HfEsmError, calibrate, merge_models
from hf_esm.checkpoints import find_processors, load_processor, resolve_source
from hf_esm.data import UnreadProcessor
from hf_esm.errors import DamagedFileError
from support.architectures import ARCHITECTURES
from support.helpers import perturbed, save, text_samples
from support.tiny import BERT, LLAMA, SENTENCES, forbid_calibration, save_tokenizer


@pytest.fixture
def models(tmp_path):
    """A base and two experts with equal tokenizers."""
    base = BERT.build()
    for seed, name in enumerate(("base", "left", "right")):
        save(perturbed(base, 0.02 * seed, seed), tmp_path / name)
        save_tokenizer(tmp_path / name)
    return tmp_path


def merge(folder: Path, **options):
    experts = {task: folder / task for task in ("left", "right")}
    return merge_models(folder / "base", experts, method="mean", progress=False, **options)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12\n"
BROKEN = {
    "cut": ("tokenizer.json", '{"version'),
    "empty": ("tokenizer.json", ""),
    "a pointer": ("tokenizer.json", POINTER),
    "of no tokenizer": ("tokenizer.json", "{}"),
    "config": ("tokenizer_config.json", '{"bos_token'),
    "tokens": ("special_tokens_map.json", "{"),
    "template": ("chat_template.jinja", "{% for m in messages %}{{ m.content }}"),
    "images": ("preprocessor_config.json", '{"do_resize'),
    "generation": ("generation_config.json", '{"eos'),
}


@pytest.mark.parametrize(("name", "content"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("which", ["base", "right"])
def test_a_damaged_file_is_named_and_no_other_model_serves_for_it(models, which, name, content, monkeypatch):
    forbid_calibration(monkeypatch)
    if name == "generation_config.json":
        for seed, folder in enumerate(("base", "left", "right")):
            save(perturbed(LLAMA.build(), 0.02 * seed, seed), models / folder)
    merge(models, dry_run=True)
    (models / which / name).write_text(content)
    (models / which / "vocab.txt").unlink()
    with pytest.raises(DamagedFileError) as caught:
        merge(models, dry_run=True)
    assert str(models / which / name) in str(caught.value)
    assert str(caught.value).endswith("again.") and "\n" not in str(caught.value)


def test_an_image_processor_of_no_known_kind_is_named(tmp_path):
    save(ARCHITECTURES["vit"].build(), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(DamagedFileError, match=r"preprocessor_config\.json cannot be read"):
        load_processor(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    assert isinstance(load_processor(tmp_path), transformers.ImageProcessingMixin)


def test_an_absent_tokenizer_is_lent_with_a_warning(models):
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (models / "right" / file).unlink()
    (warning,) = merge(models, dry_run=True).warnings
    assert warning.startswith("expert 'right'") and "in its folder, so that of base (" in warning
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (models / "base" / file).unlink()
    warnings = merge(models, output_dir=models / "merged").warnings
    assert [warning.partition(" (")[0] for warning in warnings] == ["base", "expert 'right'"]
    assert all("so that of expert 'left' (" in warning for warning in warnings)
    assert len(AutoTokenizer.from_pretrained(models / "merged").get_vocab()) == 20


def needing(library: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From here on, the tokenizer in this folder cannot be loaded without a library."""
    original = AutoTokenizer.from_pretrained

    def load(name, *args, **kwargs):
        if Path(name) == folder:
            raise ImportError(f"This tokenizer needs {library}.\n\nRun `pip install {library}`. Please note that …")
        return original(name, *args, **kwargs)

    for kind in ("AutoTokenizer", "AutoProcessor"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", load)


def test_a_library_that_is_lacking_is_named_only_where_rows_are_encoded(models, monkeypatch, caplog):
    AutoTokenizer.from_pretrained(models / "right", model_max_length=99).save_pretrained(models / "right")
    needing("sentencepiece", monkeypatch, models / "right")
    says = r"This tokenizer needs sentencepiece\. Run `pip install sentencepiece`\."
    assert isinstance(load_processor(models / "right"), UnreadProcessor)
    calibrate(models / "right", text_samples(1), progress=False)  # ready inputs
    assert not caplog.records
    with pytest.raises(HfEsmError, match=f"data: sample 0: the model's processor cannot be read: {says}"):
        calibrate(models / "right", SENTENCES, progress=False)
    with pytest.raises(HfEsmError, match=rf"expert 'right' .*: its tokenizer cannot be read: {says}"):
        merge(models, dry_run=True)  # its rows are matched with the others' by token


def test_files_of_a_processor_that_cannot_be_loaded_are_copied(models, monkeypatch):
    needing("tiktoken", monkeypatch, models / "base")
    for task in ("left", "right"):
        for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            (models / task / file).unlink()
    result = merge(models, output_dir=models / "merged")
    assert result.warnings == []
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        assert (models / "merged" / file).read_bytes() == (models / "base" / file).read_bytes()


def test_an_adapter_without_a_tokenizer_is_no_news(models, tmp_path):
    (tmp_path / "adapter").mkdir()
    shutil.copy(models / "left" / "config.json", tmp_path / "adapter" / "config.json")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    sources = {name: resolve_source(models / name, name) for name in ("base", "adapter")}
    processors, warnings = find_processors(sources)
    assert warnings == [] and processors["adapter"] is processors["base"]
