"""Runs the blocks of README.md and of all pages of `docs/`, in their order and in one folder a page, as readers would.

Blocks of `python` share a namespace. Blocks of `yaml` are files, which their first line names, or parts of recipes,
which are parsed. Blocks of `bash` are commands of `hf-esm`. A block of `text` after one of these is what that block
prints, but for numbers. The folder holds toy models under the names of the pages, and the namespace their data. A
block after the line `<!-- not run: WHY -->` is left out; the last test counts these.
"""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_esm import METHODS
from hf_esm.cli.main import main
from hf_esm.planning import convert_mergekit, load_recipe
from support.embedders import write_embedder
from support.helpers import perturbed
from support.pictures import picture
from support.tiny import WORDS, save_tokenizer
from support.toys import HEADS, base_model, classifier, lora_adapter, write_rows
from support.writers import save_writers


ROOT = Path(__file__).parents[1]
NAMES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {name: BLOCK.findall((ROOT / name).read_text(encoding="utf-8")) for name in NAMES}
RUN = ("python", "bash")
PRINTED = {"README.md": 2, "docs/language_models.md": 3}  # blocks of text that are compared


def plain(text):
    """The lines of what was printed, without numbers, the width of columns and the order of candidates."""
    lines = [line for line in text.strip().splitlines() if not line.startswith(("  by alpha", "  cost"))]  # left out
    lines = [re.sub(r"-?\d+(\.\d+)?( [kKMG]?B\b)?", "#", line) for line in lines]
    lines = [re.sub(r"; alpha # of # tried.*", "", line) for line in lines]  # as is the rule that chose
    return sorted(re.sub(r"; [\w-]+ is # behind", "; # is # behind", " ".join(line.split())) for line in lines)


def sentences(seed, count):
    draw = np.random.default_rng(seed)
    words = WORDS[:7] if seed % 2 else WORDS[7:]  # each task has words of its own
    return [" ".join(draw.choice(words, 8)) for _ in range(count)]


def labelled(texts):
    return [{**(text if isinstance(text, dict) else {"text": text}), "label": i % 2} for i, text in enumerate(texts)]


def save_classifiers(folder):
    base = base_model()
    base.save_pretrained(folder / "bert-base-uncased")
    save_tokenizer(folder / "bert-base-uncased")
    for seed, task in enumerate(("sst2", "mrpc", "law")):
        model = classifier(base, task if task in HEADS else "a")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "embeddings" not in name:  # as those of the experts that the README is about
                    weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(folder / "me" / f"bert-{task}")
        save_tokenizer(folder / "me" / f"bert-{task}")
    for seed, name in enumerate(("bert-mrpc-lora", "law-lora", "code-lora")):
        adapter = lora_adapter(base, "mrpc", "bert-base-uncased", seed)
        adapter.save_pretrained(folder / "me" / name, save_embedding_layers=False)


def save_vision(folder):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    base = ViTForImageClassification(config)
    for seed, (name, labels) in enumerate(
        {"vit": ["x"], "vit-digits": list("01"), "vit-letters": list("abc")}.items()
    ):
        model = ViTForImageClassification(ViTConfig(**{**config.to_dict(), "id2label": dict(enumerate(labels))}))
        model.vit.load_state_dict((perturbed(base, 0.05, seed) if seed else base).vit.state_dict())
        model.save_pretrained(folder / "me" / name)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "me" / name)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder that every page gets a copy of."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("guides")
    save_classifiers(folder)
    save_vision(folder)
    save_writers(folder / "me", "llama", ["llama-code", "llama-verse"])
    for seed, name in enumerate(("base-embedder", "embedder-law", "embedder-code")):
        write_embedder(folder / "me" / name, seed)
    for task, rows in data()["rows"].items():
        write_rows(folder / f"{task}_test.jsonl", rows)
        write_rows(folder / f"{task}.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in rows])
    for task, lines in data()["texts"].items():
        (folder / f"{task}.txt").write_text("\n".join(lines))
    return folder


def data():
    """Lists of samples and of rows, by task."""
    texts = {task: sentences(seed, 24) for seed, task in enumerate(("code", "verse", "law", "sst2"))}
    pairs = [(texts["verse"][i], texts["law"][-i]) for i in range(24)]
    rows = {"sst2": texts["sst2"], "mrpc": [{"text": first, "text_pair": second} for first, second in pairs]}
    return {"texts": texts, "pairs": pairs, "rows": {task: labelled(lines) for task, lines in rows.items()}}


def namespace():
    """What pages take for granted."""
    found, draw = data(), np.random.default_rng(0)
    names = {f"{task}_texts": texts for task, texts in found["texts"].items()}
    names |= {f"{task}_rows": rows for task, rows in found["rows"].items()}
    names |= {f"{task}_images": [picture(draw) for _ in range(8)] for task in ("digit", "letter")}
    names["mrpc_pairs"], names["torch"] = found["pairs"], torch
    names["other_texts"] = {task: sentences(seed, 8) for seed, task in enumerate(("code", "verse"), start=10)}
    return names


# What some pages say elsewhere: in words, or on the page that they follow.
BEFORE = {
    "docs/choosing.md": """
base, experts = "bert-base-uncased", {"sst2": "me/bert-sst2", "mrpc": "me/bert-mrpc"}
samples, labelled_rows = {"sst2": sst2_texts, "mrpc": mrpc_pairs}, {"sst2": sst2_rows, "mrpc": mrpc_rows}
""",
    "docs/evaluation.md": """
from hf_esm import merge_models
experts = {"sst2": "me/bert-sst2", "mrpc": "me/bert-mrpc"}
merge_models("bert-base-uncased", experts, method="mean", output_dir="merged", progress=False)
""",
    "docs/large_models.md": """
from pathlib import Path
experts = "{sst2: me/bert-sst2, mrpc: me/bert-mrpc}"
Path("recipe.yaml").write_text(f"base: bert-base-uncased\\nexperts: {experts}\\nmethod: mean\\n")
""",
}


def run_yaml(block):
    first = block.splitlines()[0]
    if re.fullmatch(r"# [\w.]+\.yaml", first):
        path = Path(first.removeprefix("# "))
        path.write_text(block)
        if "merge_method" not in yaml.safe_load(block):
            load_recipe(path, "compare")
    else:
        assert yaml.safe_load(block)


def run_bash(block):
    for line in block.replace("\\\n", " ").splitlines():
        command, *arguments = shlex.split(line, comments=True)
        assert (command, main(arguments)) == ("hf-esm", 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if {language for _, language, _ in PAGES[name]} & {*RUN}])
def test_a_page_runs_and_prints_what_it_says(name, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(models, tmp_path / "guide"))
    monkeypatch.setattr(METHODS, "data", dict(METHODS.data))
    names = namespace()
    exec(BEFORE.get(name, ""), names)
    printed, compared = "", 0
    for skipped, language, block in PAGES[name]:
        if skipped:
            continue
        if language in RUN:
            capsys.readouterr()
        if language == "python":
            exec(compile(block, name, "exec"), names)
        elif language == "bash":
            run_bash(block)
        elif language == "yaml":
            run_yaml(block)
        elif language == "text" and printed:
            assert plain(printed) == plain(block)
            printed, compared = "", compared + 1
        if language in RUN:
            printed = capsys.readouterr().out
    assert compared == PRINTED.get(name, 0)


def test_the_readme_shows_what_mergekits_recipe_is_converted_to(tmp_path):
    *_, theirs, ours = (block for _, language, block in PAGES["README.md"] if language == "yaml")
    (tmp_path / "mergekit.yaml").write_text(theirs)
    assert convert_mergekit(tmp_path / "mergekit.yaml")[0] == yaml.safe_load(ours)


def test_blocks_that_are_not_run_are_few_and_say_why():
    left_out = {name: len([skipped for skipped, *_ in blocks if skipped]) for name, blocks in PAGES.items()}
    counts = {"README.md": 1, "docs/routed.md": 2, "docs/large_models.md": 1, "docs/recipes.md": 1}
    assert {name: count for name, count in left_out.items() if count} == counts


@pytest.mark.extras
@pytest.mark.parametrize("name", ["classifiers", "routed_language_models"])
def test_a_notebook_of_the_examples_runs(name, models, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    folder = str(shutil.copytree(models, tmp_path / "notebook"))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any("experts merged" in output.get("text", "") for cell in cells for output in cell.outputs)
