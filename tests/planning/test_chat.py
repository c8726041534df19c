"""A chat template whose mark of the end of an answer does not end generation is warned of."""

import json

import pytest
from transformers import AutoModelForCausalLM

from hf_esm import merge_models
from hf_esm.planning import endless_turns
from support.helpers import perturbed, save
from support.tiny import LLAMA, save_tokenizer


ENDING = "{% for m in messages %}{{ m.role }} {{ m.content }} END{% endfor %}"
MARKS = {
    "not a token": ("<|im_end|>", [3], "ends an answer with '<|im_end|>', which is not a token"),
    "with a line after it": ("</s>\n", [3], "ends an answer with '</s>', which is not a token"),
    "not an end": ("[MASK]", [3], "'[MASK]', at which generation does not end. Add its id, 4,"),
    "one end of no token": ("[MASK]", None, "'[MASK]', at which generation does not end"),
    "an end": ("[SEP]", 3, None),
    "one of the ends": ("[SEP]\n", [7, 3], None),
    "words": ("\n\n### Question", [3], None),
    "nothing": ("", [3], None),
    "refused": ("{{ raise_exception('no') }}", [3], None),
}


@pytest.mark.parametrize(("mark", "ends", "says"), MARKS.values(), ids=MARKS)
def test_a_mark_ends_an_answer_only_as_a_token_that_ends_generation(tmp_path, mark, ends, says):
    tokenizer = save_tokenizer(tmp_path)
    assert endless_turns(tokenizer, ends) == []  # without a template
    tokenizer.chat_template = ENDING.replace("END", mark)
    warnings = endless_turns(tokenizer, ends)
    assert (says is None and warnings == []) or (len(warnings) == 1 and says in warnings[0])
    assert endless_turns(None, ends) == []


@pytest.fixture
def models(tmp_path):
    """A base, an expert whose template ends turns with a token that its tokenizer lacks, and one that is right."""
    base = LLAMA.build()
    marks = {"base": None, "lost": "<|im_end|>", "right": "[SEP]", "late": "[MASK]"}
    for seed, (name, end) in enumerate(marks.items()):
        save(perturbed(base, 0.02 * seed, seed), tmp_path / name)
        tokenizer = save_tokenizer(tmp_path / name)
        tokenizer.chat_template = end and ENDING.replace("END", end)
        tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def merge(folder, *tasks, **options):
    experts = {task: folder / task for task in tasks}
    return merge_models(folder / "base", experts, method="mean", progress=False, **options)


def test_a_merge_says_that_turns_would_not_end_and_its_remedies_end_them(models):
    (warning,) = merge(models, "lost", dry_run=True).warnings
    assert "'<|im_end|>'" in warning and "`tokenizer`" in warning and "`chat_template`" in warning
    assert merge(models, "lost", "right", chat_template="right", dry_run=True).warnings == []
    assert merge(models, "lost", "right", tokenizer="right", dry_run=True).warnings == []
    (warning,) = merge(models, "late", dry_run=True).warnings
    assert "Add its id, 4, to `eos_token_id` in the generation_config.json" in warning
    path = models / "late" / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "eos_token_id": [4, 3]}))
    result = merge(models, "late", output_dir=models / "merged")
    assert result.warnings == []
    assert 4 in AutoModelForCausalLM.from_pretrained(models / "merged").generation_config.eos_token_id
