"""Calibration data in every form that users have it in: the same samples give the same statistics."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast, ViTImageProcessor, Wav2Vec2FeatureExtractor

from hf_esm import ActivationStatistics, HfEsmError, MergePlan, calibrate, merge_models
from hf_esm.checkpoints import FolderCheckpoint, LiveCheckpoint
from hf_esm.checkpoints.layout import RECIPE_FILE
from hf_esm.checkpoints.processors import differing_processors, find_processors
from hf_esm.checkpoints.shards import TensorFile
from hf_esm.checkpoints.sources import ModelSource
from hf_esm.data.options import SampleOptions
from hf_esm.data.rows import read_rows
from hf_esm.data.samples import encode, load_samples, save_samples
from hf_esm.metrics.labels import LabelledSamples
from hf_esm.metrics.scores import run
from hf_esm.utils.fingerprints import data_identity
from support.architectures import ARCHITECTURES
from support.helpers import perturbed, save, text_samples
from support.problems import relative_error
from support.tiny import BERT, SENTENCES, SPECIAL, WORDS, save_models, save_tokenizer, snapshot


PAIRS = list(zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True))
ROWS = [{"sentence1": first, "sentence2": second, "label": i % 3, "idx": i} for i, (first, second) in enumerate(PAIRS)]
COLUMNS = {"text": "sentence1", "text_pair": "sentence2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tiny models, with a tokenizer beside one expert."""
    models = save_models(tmp_path_factory.mktemp("models"))
    models.expert = models.experts["left"]
    models.tokenizer = save_tokenizer(Path(models.expert))
    return models


def same_statistics(found: ActivationStatistics, expected: ActivationStatistics) -> bool:
    """Return whether both were collected on the same tokens, in whatever batches."""
    return (
        found.keys_of == expected.keys_of
        and found.provenance.num_samples == expected.provenance.num_samples
        and all(
            found[name].count == entry.count
            and relative_error(found[name].mean, entry.mean) < 1e-5
            and relative_error(found[name].factor.T @ found[name].factor, entry.factor.T @ entry.factor) < 1e-5
            for name, entry in expected.items()
        )
    )


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def csv_file(path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def json_lines(path: Path) -> Path:
    return written(path, "".join(json.dumps(row) + "\n" for row in ROWS))


def saved(samples: list, path: Path) -> Path:
    save_samples(samples, path)
    return path


def encoded(tokenizer, texts=SENTENCES, kind=None) -> list[dict]:
    return [dict(tokenizer(*text) if isinstance(text, tuple) else tokenizer(text)) for text in texts]


def as_tensors(samples: list[dict]) -> list[dict]:
    return [{name: torch.tensor(value) for name, value in sample.items()} for sample in samples]


def padded(tokenizer, texts, **options):
    return tokenizer(list(texts), padding=True, return_tensors="pt", **options)


TEXT_FORMS = {  # the data, from a tokenizer and a folder, and the columns
    "tuple": (lambda t, folder: tuple(SENTENCES), {}),
    "generator": (lambda t, folder: (text for text in SENTENCES), {}),
    "rows": (lambda t, folder: [{"text": text, "label": 0} for text in SENTENCES], {}),
    "rows-with-named-columns": (lambda t, folder: ROWS, {"text": "sentence1"}),
    "columns": (lambda t, folder: {"text": SENTENCES, "label": [0] * len(SENTENCES)}, {}),
    "dataset": (lambda t, folder: datasets.Dataset.from_list(ROWS), {"text": "sentence1"}),
    "iterable-dataset": (
        lambda t, folder: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        {"text": "sentence1"},
    ),
    "loader-of-strings": (lambda t, folder: DataLoader(SENTENCES, batch_size=4), {}),
    "loader-of-rows": (lambda t, folder: DataLoader(ROWS, batch_size=4), {"text": "sentence1"}),
    "loader-of-padded-batches": (
        lambda t, folder: DataLoader(SENTENCES, 4, collate_fn=lambda texts: padded(t, texts)),
        {},
    ),
    "text-file": (lambda t, folder: written(folder / "data.txt", "\n".join(SENTENCES)), {}),
    "ready-lists": (lambda t, folder: encoded(t), {}),
    "ready-tensors": (lambda t, folder: as_tensors(encoded(t)), {}),
    "ready-arrays": (lambda t, folder: [{"input_ids": np.array(s["input_ids"])} for s in encoded(t)], {}),
    "ready-ids-alone": (lambda t, folder: [{"input_ids": sample["input_ids"]} for sample in encoded(t)], {}),
    "ready-with-labels": (lambda t, folder: [{**s, "labels": 1, "label": 2, "id": "x"} for s in encoded(t)], {}),
    "ready-in-batches-of-one": (lambda t, folder: [t(text, return_tensors="pt") for text in SENTENCES], {}),
    "loader-of-ids-and-labels": (
        lambda t, folder: DataLoader([(torch.tensor(s["input_ids"]), 1) for s in encoded(t)], batch_size=1),
        {},
    ),
    "ready-and-padded": (lambda t, folder: padded(t, SENTENCES), {}),
    "ready-and-padded-on-the-left": (lambda t, folder: padded(t, SENTENCES, padding_side="left"), {}),
    "ready-dataset": (lambda t, folder: datasets.Dataset.from_list(encoded(t)), {}),
    "saved-samples": (lambda t, folder: saved(as_tensors(encoded(t)), folder / "samples.safetensors"), {}),
}
PAIR_FORMS = {
    "lists": (lambda t, folder: [list(pair) for pair in PAIRS], {}),
    "rows": (lambda t, folder: [{"text": first, "text_pair": second} for first, second in PAIRS], {}),
    "rows-with-named-columns": (lambda t, folder: ROWS, COLUMNS),
    "loader-of-pairs": (lambda t, folder: DataLoader(PAIRS, batch_size=4), {}),
    "dataset": (lambda t, folder: datasets.Dataset.from_list(ROWS), COLUMNS),
    "data-frame": (lambda t, folder: pd.DataFrame(ROWS), COLUMNS),
    "json-lines-with-columns-of-their-own": (
        lambda t, folder: {"path": str(json_lines(folder / "data.jsonl")), "columns": COLUMNS},
        {},
    ),
    "load_dataset-with-columns-of-its-own": (
        lambda t, folder: {"path": "csv", "data_files": str(csv_file(folder / "data.csv")), "columns": COLUMNS},
        {"text": "elsewhere", "text_pair": "sentence1"},
    ),
    "json-lines": (lambda t, folder: json_lines(folder / "data.jsonl"), COLUMNS),
    "json-lines-by-name": (lambda t, folder: str(json_lines(folder / "data.jsonl")), COLUMNS),
    "csv": (lambda t, folder: csv_file(folder / "data.csv"), COLUMNS),
    "load_dataset": (lambda t, folder: {"path": "csv", "data_files": str(csv_file(folder / "data.csv"))}, COLUMNS),
    "ready": (lambda t, folder: encoded(t, PAIRS), {}),
    "ready-and-padded": (lambda t, folder: t(*zip(*PAIRS), padding=True, return_tensors="pt"), {}),
}


@pytest.fixture(scope="module")
def expected(models):
    """Statistics of strings, and of pairs of strings."""
    return {id(kind): calibrate(models.expert, kind, progress=False) for kind in (SENTENCES, PAIRS)}


@pytest.mark.parametrize(
    ("plain", "form", "columns"),
    [pytest.param(SENTENCES, *form, id=f"texts-{name}") for name, form in TEXT_FORMS.items()]
    + [pytest.param(PAIRS, *form, id=f"pairs-{name}") for name, form in PAIR_FORMS.items()],
)
def test_the_same_texts_in_any_form_give_the_same_statistics(models, expected, tmp_path, plain, form, columns):
    data = form(models.tokenizer, tmp_path)
    found = calibrate(models.expert, data, columns=columns, batch_size=4, progress=False)
    assert same_statistics(found, expected[id(plain)])
    assert not same_statistics(found, expected[id(PAIRS if plain is SENTENCES else SENTENCES)])


def image_forms(folder: Path) -> SimpleNamespace:
    image = pytest.importorskip("PIL.Image")
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    arrays = np.random.default_rng(0).integers(0, 255, (5, 20, 24, 3), dtype=np.uint8)
    pictures = [image.fromarray(array) for array in arrays]
    dataset = datasets.Dataset.from_dict({"image": pictures}, datasets.Features({"image": datasets.Image()}))
    ready = [processor(picture, return_tensors="pt")["pixel_values"][0] for picture in pictures]
    forms = [
        (list(arrays), {}),
        ([{"image": picture, "label": 0} for picture in pictures], {}),
        ([{"picture": picture} for picture in pictures], {"image": "picture"}),
        (dataset, {}),
        ([{"pixel_values": values} for values in ready], {}),
        ({"pixel_values": torch.stack(ready)}, {}),
        (DataLoader([(values, 1) for values in ready], batch_size=2), {}),
        ([{"pixel_values": values[None]} for values in ready], {}),
        (DataLoader([{"pixel_values": values} for values in ready], batch_size=2), {}),
    ]
    return SimpleNamespace(model="vit", processor=processor, plain=pictures, forms=forms)


def sound_forms(folder: Path) -> SimpleNamespace:
    processor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    waves = [
        np.random.default_rng(i).normal(size=length).astype(np.float32) for i, length in enumerate((400, 520, 440))
    ]
    rows = [{"audio": {"array": wave, "sampling_rate": 16_000}} for wave in waves]
    ready = [processor(wave, sampling_rate=16_000, return_tensors="pt")["input_values"][0] for wave in waves]
    forms = [
        ([{"sound": row["audio"]} for row in rows], {"audio": "sound"}),
        ([{"input_values": values} for values in ready], {}),
    ]
    return SimpleNamespace(model="wav2vec2", processor=processor, plain=rows, forms=forms)


def test_grey_and_transparent_pictures_are_read_in_colour(tmp_path):
    given = image_forms(tmp_path)
    config = ARCHITECTURES["vit"].build().config
    for mode in ("L", "RGBA", "1"):
        pictures = [picture.convert(mode) for picture in given.plain]
        found = encode(pictures, given.processor, config, "data", SampleOptions())
        coloured = [picture.convert("RGB") for picture in pictures]
        expected = encode(coloured, given.processor, config, "data", SampleOptions())
        assert all(torch.equal(f["pixel_values"], e["pixel_values"]) for f, e in zip(found, expected))
    with pytest.raises(
        HfEsmError, match="data: sample 0: this model reads no text; its processor is a ViTImageProcessor"
    ):
        encode(["a"], given.processor, config, "data", SampleOptions())


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"text": ["a", "b"], "text_pair": ["a"]}, "the column 'text_pair' is not as long as 'text'"),
        ({"path": ["a", "b"], "text": 3}, "the column 'text' is not as long as 'path'"),
        ({"path": "csv", "data_files": "{}/data.csv", "columns": {"text": "no"}}, "data: row 0 has no column 'no'"),
        ({"path": "csv", "data_files": "{}/data.csv", "columns": {"words": "a"}}, "no kind of column 'words'"),
        ("{}/empty.txt", "empty.txt is empty"),
        ([{"text": ["a"]}, {"text": []}], "data: sample 1 has no words"),
        ([{"input_ids": [5, 6, 7], "attention_mask": [1] * 5}], "has 3 tokens, but an attention_mask of 5"),
        ([{"input_ids": [5, 6, 7], "attention_mask": [1]}], "has 3 tokens, but an attention_mask of 1"),
    ],
)
def test_data_that_do_not_hold_together_are_refused(models, tmp_path, data, says):
    csv_file(tmp_path / "data.csv")
    (tmp_path / "empty.txt").touch()
    if isinstance(data, dict) and "data_files" in data:
        data = {**data, "data_files": data["data_files"].format(tmp_path)}
    data = data.format(tmp_path) if isinstance(data, str) else data
    with pytest.raises(HfEsmError, match=says):
        options = SampleOptions()
        encode(read_rows(data, "data", options), models.tokenizer, BERT.build().config, "data", options)


def test_a_cache_that_cannot_be_written_is_named_and_another_one_serves(tmp_path, monkeypatch):
    path = json_lines(tmp_path / "data.jsonl")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "cache")  # in a file
    with pytest.raises(HfEsmError, match=r"cannot make its cache in .*data\.jsonl.* Set .* HF_DATASETS_CACHE"):
        read_rows(str(path), "data", SampleOptions())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert read_rows(str(path), "data", SampleOptions()) == ROWS


def test_columns_of_one_source_leave_its_others_alone(tmp_path):
    named = {"path": str(json_lines(tmp_path / "data.jsonl")), "columns": {"text": "sentence1"}}
    (row, *_), first = read_rows(named, "data", SampleOptions()), ROWS[0]
    assert row == {("text" if name == "sentence1" else name): value for name, value in first.items()}


def test_a_files_own_arguments_reach_datasets(tmp_path):
    path = str(json_lines(tmp_path / "data.jsonl"))
    assert read_rows({"path": path, "split": "train[:2]"}, "data", SampleOptions()) == ROWS[:2]
    (tmp_path / "semicolons.csv").write_text("text;label\nso so;1\n")
    named = {"path": str(tmp_path / "semicolons.csv"), "delimiter": ";"}
    assert read_rows(named, "data", SampleOptions()) == [{"text": "so so", "label": 1}]
    with pytest.raises(HfEsmError, match=r"data: there is no key 'delimeter' for .*data\.jsonl"):
        read_rows({"path": path, "delimeter": ";"}, "data", SampleOptions())


def test_a_file_that_changed_is_other_data(tmp_path):
    path = json_lines(tmp_path / "data.jsonl")
    named = {"path": str(path), "columns": {"text": "sentence1"}}
    before = data_identity(named)
    assert data_identity(dict(named)) == before != data_identity({**named, "columns": {}})
    ways = [
        {"path": "json", "data_files": str(path)},
        {"path": "json", "data_files": [str(path)]},
        {"path": "json", "data_files": {"train": str(path), "test": [str(path)]}},
    ]
    ways_before = [data_identity(way) for way in ways]
    path.write_text(path.read_text() + "\n")
    assert data_identity(named) != before
    assert all(data_identity(way) != then for way, then in zip(ways, ways_before))


def test_what_lacks_in_a_data_frame_is_missing(models):
    frame = pd.DataFrame([{"text": "so so", "text_pair": "bad"}, {"text": "bad"}])
    rows = read_rows(frame, "data", SampleOptions())
    assert rows == [{"text": "so so", "text_pair": "bad"}, {"text": "bad", "text_pair": None}]


def test_files_below_home_are_found(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "data.txt", "so so")
    assert read_rows("~/data.txt", "data", SampleOptions()) == [{"text": "so so"}]
    assert read_rows({"path": "~/data.txt"}, "data", SampleOptions()) == [{"text": "so so"}]


class Undecoded(list):
    """Rows whose decoder is not installed; the error is that of `datasets`."""

    def __getitem__(self, index):
        raise ImportError("To support decoding audio data, please install\n 'torchcodec'.")


def test_a_library_that_decodes_a_data_set_is_asked_for_in_one_sentence():
    with pytest.raises(HfEsmError, match=r"^data: To support decoding audio data, please install 'torchcodec'\.$"):
        read_rows(Undecoded(ROWS), "data", SampleOptions())


def test_pictures_of_more_than_8_bits_are_refused(tmp_path):
    given, config = image_forms(tmp_path), ARCHITECTURES["vit"].build().config
    deep = Image.fromarray(np.full((16, 16), 1000, dtype=np.uint16))
    with pytest.raises(HfEsmError, match="an image of mode 'I;16' has more than 8 bits"):
        encode([deep], given.processor, config, "data", SampleOptions())


# One word more is nothing that is merged with another; another word in its place is.
VOCABULARIES = (("base", ["a", "b", "c"]), ("more", ["a", "b", "c", "d"]), ("other", ["a", "b", "d"]))


def test_processors_that_read_otherwise_are_mentioned(tmp_path):
    """Words that the merged model lacks; and, where no tokens are matched, ids that are of other words."""
    words = [*SPECIAL, *WORDS]
    made = save_models(tmp_path)
    orders = {"base": words, "left": [*words, "new"], "right": [*SPECIAL, *reversed(WORDS)]}
    for name, order in orders.items():
        (tmp_path / "vocab.txt").write_text("\n".join(order))
        BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(made.experts.get(name, made.base))
    warned = merge_models(**made.arguments, progress=False).warnings
    (said,) = [warning for warning in warned if "tokens" in warning]
    assert said.startswith("'left': the merged model lacks 1 of its tokens, such as 'new'.")
    numbered = {
        name: SimpleNamespace(get_vocab=lambda w=w: {token: i for i, token in enumerate(w)})
        for name, w in VOCABULARIES
    }
    assert [said.partition(",")[0] for said in differing_processors(numbered, ["more", "other"])] == [
        "'other': its tokenizer gives 1 tokens other ids than the base's"
    ]
    resized = {"base": ViTImageProcessor(), "a": ViTImageProcessor(do_resize=False, resample=0)}
    assert differing_processors(resized, "a") == [
        "'a': its images are prepared differently from the base's (resample, do_resize)."
    ]
    sounds = {"base": Wav2Vec2FeatureExtractor(), "a": Wav2Vec2FeatureExtractor(do_normalize=False)}
    assert not differing_processors(sounds, "a")
    picture = {
        name: ViTImageProcessor(image_mean=[mean] * 3) for name, mean in (("base", 0.5), ("a", 0.4), ("b", 0.5))
    }
    assert differing_processors(picture, "ab") == [
        "'a': its images are prepared differently from the base's (image_mean)."
    ]


@pytest.mark.parametrize("make", [image_forms, sound_forms])
def test_the_same_images_and_sounds_in_any_form_give_the_same_statistics(make, tmp_path):
    given = make(tmp_path)
    save(ARCHITECTURES[given.model].build(), tmp_path)
    given.processor.save_pretrained(tmp_path)
    expected = calibrate(tmp_path, given.plain, progress=False)
    assert len(expected) > 5
    assert expected.provenance.num_samples == len(given.plain)
    for i, (data, columns) in enumerate(given.forms):
        assert same_statistics(calibrate(tmp_path, data, columns=columns, progress=False), expected), i


def test_a_sound_of_another_sampling_rate_is_refused(tmp_path):
    given = sound_forms(tmp_path)
    save(ARCHITECTURES[given.model].build(), tmp_path)
    given.plain[1]["audio"]["sampling_rate"] = 8_000
    with pytest.raises(HfEsmError, match=r"data: sample 1: Wav2Vec2FeatureExtractor does not take .*16000"):
        calibrate(tmp_path, given.plain, processor=given.processor, progress=False)


def test_samples_are_chosen_by_their_number_and_the_seed():
    rows = [f"text {i}" for i in range(100)]

    def chosen(data=rows, **options) -> list[str]:
        return read_rows(data, "data", SampleOptions(**options))

    assert len(chosen()) == 32
    some = chosen(num_samples=10, seed=1)
    assert some == chosen(num_samples=10, seed=1)
    assert some == [row["text"] for row in chosen(datasets.Dataset.from_dict({"text": rows}), num_samples=10, seed=1)]
    assert some != chosen(num_samples=10, seed=2)
    assert len(set(some)) == 10
    assert some == sorted(some, key=rows.index)  # in the data's own order
    assert some != rows[:10]
    assert chosen(num_samples=0) == chosen(num_samples=100) == chosen(num_samples=200) == rows
    # What comes as a stream is not read to its end: the first samples are taken.
    assert chosen(DataLoader(rows, batch_size=7), num_samples=10) == rows[:10]
    stream = datasets.Dataset.from_dict({"text": rows}).to_iterable_dataset()
    assert [row["text"] for row in chosen(stream, num_samples=10)] == rows[:10]


def test_the_number_of_samples_and_the_seed_are_recorded(models, tmp_path):
    rows = read_rows(SENTENCES, "data", SampleOptions(num_samples=3, seed=5))
    expected = calibrate(models.expert, rows, progress=False)
    result = merge_models(
        models.base,
        models.experts,
        calibration=dict.fromkeys(models.experts, SENTENCES),
        num_samples=3,
        seed=5,
        statistics_dir=str(tmp_path / "statistics"),
        progress=False,
    )
    found = ActivationStatistics.load(tmp_path / "statistics" / "left.safetensors")
    assert same_statistics(found, expected)
    assert found.provenance.seed == 5
    assert found.provenance.model == models.expert
    recipe = yaml.safe_load((result.output_dir / RECIPE_FILE).read_text())
    assert (recipe["num_samples"], recipe["seed"]) == (3, 5)


@pytest.mark.parametrize(("max_length", "longest"), [(None, 32), (6, 6), (40, 32)])
def test_texts_are_cut_to_what_the_model_takes_or_to_what_is_asked(models, max_length, longest):
    texts = ["film " * 50, "good film"]
    config = models.task_model.config
    samples = encode(texts, models.tokenizer, config, "data", SampleOptions(max_length=max_length))
    assert [len(sample["input_ids"]) for sample in samples] == [longest, 4]
    assert len(calibrate(models.expert, texts, max_length=max_length, progress=False))


def test_what_a_roberta_takes_is_less_than_its_positions(models):
    config = ARCHITECTURES["roberta"].build(max_position_embeddings=20, pad_token_id=1).config
    for options in (SampleOptions(), SampleOptions(max_length=19)):
        (sample,) = encode(["film " * 50], models.tokenizer, config, "data", options)
        assert len(sample["input_ids"]) == 18


def test_a_text_may_have_a_target(models):
    rows = [{"text": "good film", "summary": "good"}]
    options = SampleOptions(columns={"text_target": "summary"})
    (sample,) = encode(rows, models.tokenizer, ARCHITECTURES["t5"].build().config, "data", options)
    assert sample["labels"].tolist() == models.tokenizer("good")["input_ids"]
    (sample,) = encode(rows, models.tokenizer, models.task_model.config, "data", options)
    assert "labels" not in sample  # an encoder writes nothing


def test_a_decoder_that_knows_no_padding_classifies_all_the_same():
    model = ARCHITECTURES["gpt2"].build("GPT2ForSequenceClassification", pad_token_id=None)
    samples = [{"input_ids": torch.randint(1, 40, (n,))} for n in (3, 5, 3, 5, 4)]
    found = calibrate(model, samples, progress=False)
    assert model.config.pad_token_id is None and found["h.0.mlp.c_fc.weight"].count == 20
    data = LabelledSamples(samples, torch.zeros(5, dtype=torch.int64))
    with torch.no_grad():
        alone = [int(model(input_ids=s["input_ids"][None]).logits.argmax()) for s in samples]
    assert run(model.eval(), data).outputs.tolist() == alone


def test_a_tokenizer_that_stands_beside_several_models_is_read_once(tmp_path):
    """Labels make no difference; any other file that a tokenizer reads does, and so do folders in the folder."""
    for name, settings in (("a", {"label2id": {"x": 0}}), ("b", {}), ("cased", {}), ("typed", {"model_type": "x"})):
        (tmp_path / name).mkdir()
        save_tokenizer(tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "bert", **settings}))
    (tmp_path / "cased" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "pad_token": "[X]"}'
    )
    shutil.copytree(tmp_path / "a", tmp_path / "deep")
    (tmp_path / "deep" / "additional_chat_templates").mkdir()
    names = ("base", "a", "b", "cased", "typed", "deep")
    sources = {name: ModelSource(title=name, folder=tmp_path / name) for name in names if name != "base"}
    sources["base"] = ModelSource(title="base", folder=shutil.copytree(tmp_path / "a", tmp_path / "base"))
    found, warnings = find_processors(sources, None)
    assert warnings == []
    assert found["a"] is found["b"] is found["base"]
    assert len({id(found[name]) for name in ("a", "cased", "typed", "deep")}) == 4
    assert found["cased"].pad_token == "[X]" != found["a"].pad_token


def test_code_of_a_processor_is_not_run_unasked(models, tmp_path):
    shutil.copytree(models.expert, tmp_path, dirs_exist_ok=True)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    calibrate(tmp_path, encoded(models.tokenizer), progress=False)
    assert not (tmp_path / "ran").exists()


def test_a_model_without_a_tokenizer_is_not_given_an_empty_one(models):
    """Transformers makes up a tokenizer from the model's type, which knows no word."""
    with pytest.raises(HfEsmError, match="no tokenizer"):
        calibrate(models.base, SENTENCES, progress=False)
    found = calibrate(models.base, SENTENCES, processor=models.tokenizer, progress=False)
    assert same_statistics(found, calibrate(models.base, encoded(models.tokenizer), progress=False))
    experts = {"right": models.experts["right"], "live": perturbed(models.task_model, 0.1, 5)}
    merged = merge_models(models.base, experts, method="mean", progress=False)
    assert not list(merged.output_dir.glob("*token*"))


def test_a_dry_run_says_what_a_merge_would_be_and_reads_a_few_matrices(models, tmp_path, monkeypatch):
    shutil.copytree(models.folder, tmp_path, dirs_exist_ok=True)
    for place, licence in {"base": "apache-2.0", "left": "mit"}.items():
        (tmp_path / place / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A model\n")
    adapted = get_peft_model(models.task_model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    adapted.save_pretrained(tmp_path / "lora")
    before = snapshot(tmp_path)

    read = set()

    def refuse(*_):
        pytest.fail("all weights are read")

    read_tensor = TensorFile.read

    def noted(self, key):
        read.add(key.removeprefix("bert."))
        return read_tensor(self, key)

    monkeypatch.setattr(TensorFile, "read", noted)
    for checkpoint in (FolderCheckpoint, LiveCheckpoint):
        monkeypatch.setattr(checkpoint, "load_model", refuse)
    monkeypatch.setattr("hf_esm.merging.run.check_values", refuse)
    live = BERT.build()
    experts = {"left": tmp_path / "left", "right": tmp_path / "right", "lora": tmp_path / "lora", "live": live}
    dry = {"calibration": dict.fromkeys(experts, text_samples(0)), "dry_run": True}
    plan = merge_models(tmp_path / "base", experts, output_dir=str(tmp_path / "merged"), **dry)
    assert isinstance(plan, MergePlan)
    text = str(plan)
    parts = [f"  {task}: " for task in experts]
    parts += ["licences   base: apache-2.0; left: mit; right: not stated", "LoRA adapter", "live model", "3 labels"]
    parts += ["disk", "memory", "time", "the licences differ (apache-2.0, mit)"]
    assert [part for part in parts if part not in text] == [], text
    vectors = {name for name in read if name.endswith("LayerNorm.weight")}  # of the base, because of the adapter
    biases = {name for name in read if name.endswith("bias")}
    assert 0 < len(vectors | biases) <= 16 and 0 < len(read - vectors - biases) <= 16
    assert not any("embeddings.weight" in name for name in read)
    assert snapshot(tmp_path) == before
    stored = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert 0.8 * stored < plan.output_bytes < stored
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    for given, says in (({"output_dir": str(tmp_path / "merged")}, "1 kB are free"), ({"max_memory": "1KB"}, "1KB")):
        with pytest.raises(HfEsmError, match=says):
            merge_models(tmp_path / "base", experts, method="concrete-adamerging", **dry, **given)
    given = {"validation": {"left": []}, **dry}
    text = str(merge_models(tmp_path / "base", experts, method="concrete-adamerging", **given))
    said = ["to learn", "`validation` is only used with `method='auto'` or `alpha='auto'`"]
    assert [part for part in said if part not in text] == [], text
    assert "to calibrate" not in text and "whole merged model" not in text
    monkeypatch.undo()
    monkeypatch.setattr("hf_esm.merging.run.check_values", refuse)
    monkeypatch.setattr("hf_esm.merging.run.check_memory", lambda *_: None)  # toys are smaller than what merging takes
    given = {"alpha": "auto", "score_fn": lambda model: 0.0, **dry}
    for size, says in ((plan.output_bytes - 1, True), (plan.output_bytes, False)):
        text = str(merge_models(tmp_path / "base", experts, method="esm++", **given | {"max_memory": size}))
        for what in ("`alpha='auto'`", "esm++"):
            assert (f"{what}: holds the whole merged model" in text) == says, text
    with pytest.raises(pytest.fail.Exception, match="all weights are read"):
        merge_models(tmp_path / "base", experts, calibration=dict.fromkeys(experts, text_samples(0)), progress=False)


def test_the_same_samples_are_the_same_bytes(tmp_path):
    samples = [{"input_ids": torch.tensor([3, 1, 2]), "pixel_values": torch.rand(1, 2, 2)}]
    files = {saved(samples, tmp_path / f"{i}.safetensors").read_bytes() for i in range(12)}
    assert len(files) == 1
    (read,) = load_samples(tmp_path / "0.safetensors")
    assert read.keys() == samples[0].keys() and all(torch.equal(read[name], samples[0][name]) for name in read)


def test_a_sample_that_is_passed_twice_is_written_twice(tmp_path):
    sample = {"input_ids": torch.tensor([3, 4, 5])}
    save_samples([sample, sample], tmp_path / "samples.safetensors")
    found = load_samples(tmp_path / "samples.safetensors")
    assert [row["input_ids"].tolist() for row in found] == [[3, 4, 5]] * 2


NULL_ROWS = {
    "null": "line 1",
    "\ufeffnull\n": "line 1",
    '\n null {"text": "a"}': "line 2",
    '{"text": "a"}\n{"text": null}\nnull\n': "line 3",
    '[null, {"text": "a"}]': "entry 1",
    '[\n{"text": "a"},\nnull\n]': "entry 2",
}


@pytest.mark.parametrize("content", NULL_ROWS, ids=ascii)
def test_null_in_the_place_of_a_row_is_refused_and_ends_no_process(content, tmp_path):
    for suffix in ("json", "jsonl"):
        path = tmp_path / f"rows.{suffix}"
        path.write_text(content)
        with pytest.raises(HfEsmError, match=rf"samples: .*rows.{suffix}: {NULL_ROWS[content]} is null, not a row"):
            read_rows(path, "samples", SampleOptions())


def test_null_inside_of_a_row_is_a_value(tmp_path):
    for name, content in {
        "a.jsonl": '{"text": "a", "x": null}\n{"text": "b", "x": 1}\n',
        "b.json": '[{"text": "a", "x": null}, {"text": "b", "x": 1}]',
        "c.json": '[\n{"text": "a", "x":\nnull\n}, {"text": "b",\n"x": 1}]',
    }.items():
        (tmp_path / name).write_text(content)
        assert read_rows(tmp_path / name, "samples", SampleOptions()) == [
            {"text": "a", "x": None},
            {"text": "b", "x": 1},
        ]
