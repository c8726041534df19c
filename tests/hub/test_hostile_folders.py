"""Folders of a stranger: names that lead outside, files that were added, pickled weights, labels that are no text."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_esm import (
    ActivationStatistics,
    EssentialComponentsConfig,
    HfEsmError,
    RoutedExpertsConfig,
    RoutedModel,
    load_task_model,
    merge_models,
)
from hf_esm.checkpoints import open_checkpoint, resolve_source
from hf_esm.cli import parser
from hf_esm.cli.main import main
from hf_esm.hub import write_hashes
from hf_esm.planning import name_experts
from support.routed_toys import write_bert


WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_by_0.1.0" / "routed"

BAD_NAMES = ["../../x", "/x", "a/b", "a\\b", "c:x", "..", ".", "", "a\0", "a.", "con", "NUL.txt", "com1", "static"]
BAD_NAMES += ["a" * 101, "é" * 101, "字" * 90, "a\n", 3, None, ["a"]]

OUTSIDE = ["../x", "/x", "a/../../x", "..\\x", "c:\\x", "a\0", ""]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A routed model with a good hash of every file, two folders below the one that the test looks at."""
    return shutil.copytree(WRITTEN, tmp_path / "up" / "models" / "routed")


def rewrite(folder: Path, name: str, **settings: object) -> None:
    """Change settings in a JSON file, as its author could."""
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | settings))
    write_hashes(folder)


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(HfEsmError) as caught:
        RoutedModel.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:12])
def test_one_rule_for_the_names_of_tasks_wherever_they_come_from(name):
    for take in (
        lambda: RoutedExpertsConfig(tasks=["a", name], router="oracle"),
        lambda: EssentialComponentsConfig(tasks=["a", name], gates=True),
        lambda: name_experts({"a": "x", name if name != ["a"] else ("a",): "y"}),
    ):
        with pytest.raises(HfEsmError, match=r"name of a task|task name|tasks of different names"):
            take()


ALIKE = [("A", "a"), ("straße", "STRASSE"), ("\u212b", "\u00e5")]


@pytest.mark.parametrize("names", ALIKE, ids=ascii)
def test_names_that_are_one_folder_on_other_systems_are_not_two_tasks(names):
    for take in (
        lambda: RoutedExpertsConfig(tasks=[*names], router="oracle"),
        lambda: EssentialComponentsConfig(tasks=[*names], gates=True),
        lambda: name_experts(dict.fromkeys(names, "x")),
        lambda: name_experts([f"models/{name}" for name in names]),
    ):
        with pytest.raises(HfEsmError, match=r"as on Windows and macOS. Rename one.$"):
            take()


def test_names_that_can_be_tasks():
    RoutedExpertsConfig(tasks=["sst2", "SST-2", "v1.0", "_x", "-x", "überall", "字" * 60, "console"], router="oracle")


BASE = WRITTEN.parent / "base"

# Every command that reads a model. Those of `AS_ROUTED` read all that a routed model has; `chat` sees first that the
# model does not write, and the others take the folder for the static model that it also is, or for an adapter.
AS_ROUTED = ("export", "add", "remove", "predict", "explain", "evaluate", "push")
COMMANDS = {
    "export": "export {folder} -o {out}",
    "add": "add {folder} --expert c={folder} -o {out}",
    "remove": "remove {folder} b -o {out}",
    "predict": "predict {folder} {rows}",
    "explain": "explain {folder} {rows}",
    "evaluate": "evaluate {folder} --data a={rows} -o {out}",
    "chat": "chat {folder} --message x",
    "push": "push {folder} me/x --adapter-over me/y",
    "calibrate": "calibrate {folder} {rows} -o {out}",
    "inspect": "inspect --base {base} --expert a={folder} --method mean",
    "inspect a recipe": "inspect {recipe}",
    "merge": "merge --base {base} --expert a={folder} --method mean --output-dir {out}",
    "merge a recipe": "merge {recipe} --output-dir {out}",
    "compare a recipe": "compare {recipe} --methods mean --test a={rows} --output-dir {out}",
    "components": "components {base} {folder} {rows} --rank 2 --output-dir {out}",
    "fuse": "fuse {folder}/routed {components} --base {folder} --output-dir {out}",
}

LABEL = "x | ![p](http://h/p.png)\n\n# Owned\n<script>`"


def rename_task(folder: Path) -> str:
    rewrite(folder, "routed/adapter_config.json", tasks=["../../x", "b"])
    return "'../../x' cannot be the name of a task"


def move_shard(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder.parent / "stolen.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "../stolen.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_hashes(folder)
    return "model.safetensors.index.json names '../stolen.safetensors', which is not in the model's folder"


def list_outside(folder: Path) -> str:
    hashes = json.loads((folder / "hashes.json").read_text())
    (folder / "hashes.json").write_text(json.dumps(hashes | {"../stolen.safetensors": "0" * 64}))
    return "hashes.json names '../stolen.safetensors'"


def add_code(folder: Path) -> str:
    (folder / "modeling.py").write_text("raise SystemExit")
    return "modeling.py was added to the model"


def owned_labels(folder: Path) -> str:
    for place in ("config.json", "heads/a/config.json"):
        label = f"{LABEL}\x1b[2J"
        rewrite(folder, place, id2label={"0": label, "1": "y"}, label2id={label: 0, "y": 1})
    return ""


HOSTILE = [rename_task, move_shard, list_outside, add_code, owned_labels]


def test_every_command_is_tried():
    assert {words.split()[0] for words in COMMANDS.values()} == parser.COMMANDS.keys() - {"demo", "convert", "methods"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("harm", HOSTILE, ids=lambda harm: harm.__name__)
def test_every_command_over_the_folder_of_a_stranger(harm, command, folder, tmp_path, capsys):
    """It is refused in one line, or does its work; nothing is written elsewhere, and no label reaches the terminal."""
    says = harm(folder)
    (tmp_path / "rows.jsonl").write_text('{"text": "good", "label": 0}\n')
    places = {"folder": folder, "base": BASE, "out": tmp_path / "up" / "out", "rows": tmp_path / "rows.jsonl"}
    places["components"] = WRITTEN.parent / "essential_components"
    places["recipe"] = tmp_path / "recipe.yaml"
    recipe = {"base": str(BASE), "experts": {"a": {"path": str(folder), "task": "a"}}, "method": "mean"}
    places["recipe"].write_text(json.dumps(recipe))
    before = contents(tmp_path)
    status = main([word.format(**places) for word in COMMANDS[command].split()])
    printed = capsys.readouterr()
    assert status in (0, 2), printed.err
    if command in AS_ROUTED and says:
        assert status == 2 and says in printed.err
    if command.split()[0] in ("merge", "inspect", "compare") and harm is move_shard:
        assert status == 2 and says in printed.err
    assert "internal error" not in printed.err
    assert "\x1b[2J" not in printed.out + printed.err
    shutil.rmtree(places["out"], ignore_errors=True)
    places["out"].unlink(missing_ok=True)
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_files_that_hashes_and_indexes_name_are_in_the_folder(name, folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors", "b": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_hashes(folder)
    for read in (
        RoutedModel.from_pretrained,
        lambda place: load_task_model(place, "a"),
        lambda place: open_checkpoint(resolve_source(str(place), "base")),
    ):
        with pytest.raises(HfEsmError, match=r"model.safetensors.index.json names .* not in the model's folder"):
            read(folder)
    hashes = json.loads((folder / "hashes.json").read_text())
    (folder / "hashes.json").write_text(json.dumps(hashes | {name: "0" * 64}))
    assert "hashes.json names " in refusal(folder)


ADDED = ["more.safetensors", "pytorch_model.bin", "heads/a/more.json", "chat_template.jinja", "spiece.model", "a.py"]


@pytest.mark.parametrize("name", ADDED)
def test_a_file_that_could_be_loaded_and_has_no_hash_is_refused_and_can_be_listed(name, folder):
    (folder / "calibration" / "more.json").write_text("{}")
    (folder / "notes.txt").write_text("no file that is loaded")
    RoutedModel.from_pretrained(folder)
    (folder / name).write_text("{}")
    message = refusal(folder)
    assert f"{name} was added to the model: hashes.json does not list it" in message
    add_line(folder, message)
    RoutedModel.from_pretrained(folder)


def add_line(folder: Path, message: str) -> None:
    """Do what the message says."""
    line, digest = re.findall(r'"([^"]*)"', message)
    assert message.endswith(f'"{line}": "{digest}".')
    hashes = json.loads((folder / "hashes.json").read_text())
    (folder / "hashes.json").write_text(json.dumps(hashes | {line: digest}))


def test_a_file_that_its_owner_changed_gets_the_hash_that_the_message_names(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    message = refusal(folder)
    assert "its line in hashes.json must be" in message
    add_line(folder, message)
    RoutedModel.from_pretrained(folder)


def test_a_head_of_a_class_that_lacks_its_weights_is_refused(folder):
    rewrite(folder, "heads/b/config.json", architectures=["BertModel"])
    weights = load_file(folder / "heads" / "b" / "head.safetensors")
    assert all(name.startswith(("bert.", "classifier.")) for name in weights)
    with pytest.raises(HfEsmError, match=r"head\.safetensors: BertModel has no place for .* Merge again"):
        RoutedModel.from_pretrained(folder).task_model("b")


def test_statistics_that_are_saved_into_the_folder_leave_it_whole(folder):
    statistics = ActivationStatistics.load(WRITTEN.parent / "statistics.safetensors")
    statistics.save(folder)
    RoutedModel.from_pretrained(folder)
    assert list(ActivationStatistics.load(folder)) == list(statistics)
    write_hashes(folder)
    assert "esm_statistics" not in (folder / "hashes.json").read_text()


def test_settings_of_generation_that_the_first_version_did_not_list_are_read(folder):
    for name in ("generation_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    RoutedModel.from_pretrained(folder)
    write_hashes(folder)
    (folder / "generation_config.json").write_text('{"max_length": 7}')
    assert "generation_config.json is damaged: its hash" in refusal(folder)


def test_a_pickled_static_model_is_read_only_where_that_is_allowed(folder, capsys):
    ids = {"input_ids": torch.tensor([[2, 7, 3]])}
    expected = RoutedModel.from_pretrained(folder)(**ids).last_hidden_state
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    write_hashes(folder)
    assert "pass `allow_pickle=True` if you trust it" in refusal(folder)
    assert torch.equal(RoutedModel.from_pretrained(folder, allow_pickle=True)(**ids).last_hidden_state, expected)
    with pytest.raises(HfEsmError, match="pickle"):
        load_task_model(folder, "a")
    load_task_model(folder, "a", allow_pickle=True)
    (folder / "rows.txt").write_text("good\n")
    assert main(["predict", str(folder), str(folder / "rows.txt")]) == 2
    assert "pass --allow-pickle if you trust it" in capsys.readouterr().err
    assert main(["predict", str(folder), str(folder / "rows.txt"), "--allow-pickle"]) == 0


def test_labels_and_licences_are_text_in_the_card(tmp_path):
    models = write_bert(tmp_path / "models")
    config = json.loads((models / "a" / "config.json").read_text())
    config |= {"id2label": {"0": LABEL, "1": "not_equal"}, "label2id": {LABEL: 0, "not_equal": 1}}
    (models / "a" / "config.json").write_text(json.dumps(config))
    licence = json.dumps("mit | [x](y)\ntags: [owned]\x1b[2J")
    (models / "a" / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    experts = {task: models / task for task in "ab"}
    merge_models(models / "base", experts, method="tsv-m", output_dir=tmp_path / "out", progress=False)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert r"| a | x \| !\[p\](http://h/p.png) \# Owned \<script\>\`, not_equal |" in card.text
    assert r"| BertForSequenceClassification | mit \| \[x\](y) tags: \[owned\] \[2j |" in card.text
    assert "\n# Owned" not in card.text
    assert card.data.tags == ["merge", "hf_esm", "tsv-m"]
