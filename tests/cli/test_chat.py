"""`hf-esm chat`: its answers are those of the model, its template and its settings, turn by turn."""

import io
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hf_esm import RoutedModel, merge_models
from hf_esm.cli.main import main
from support.helpers import Architecture, perturbed
from support.tiny import LLAMA, save_models, save_tokenizer
from support.writers import TEMPLATE


SAYS = ["the film was good", "so so"]
WORDS = {"code": ["one", "two", "a", "is", "so"], "verse": ["good", "film", "fine", "plot", "the", "dull"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A merged model, `merged`, a routed one, and one whose tokenizer has no template."""
    folder = tmp_path_factory.mktemp("models")
    model = LLAMA.build(vocab_size=20, max_position_embeddings=256)  # each id is a token
    for seed, name in enumerate(("base", *WORDS)):
        (perturbed(model, 0.5, seed) if seed else model).save_pretrained(folder / name)
        tokenizer = save_tokenizer(folder / name)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder / name)
    experts = {task: folder / task for task in WORDS}
    merge_models(folder / "base", experts, method="mean", output_dir=folder / "merged", progress=False)
    draw, samples = random.Random(0), {}
    for task, words in WORDS.items():
        talks = [[{"role": "user", "content": " ".join(draw.choices(words, k=draw.randint(4, 8)))}] for _ in range(32)]
        samples[task] = [{"input_ids": torch.tensor(by_template(tokenizer, talk))} for talk in talks]
    routed = {"method": "esm++", "refine": False, "rank": 8, "calibration": samples}
    merge_models(folder / "base", experts, output_dir=folder / "routed", progress=False, **routed)
    plain = AutoTokenizer.from_pretrained(folder / "merged")
    plain.chat_template = None
    AutoModelForCausalLM.from_pretrained(folder / "merged").save_pretrained(folder / "plain")
    plain.save_pretrained(folder / "plain")
    return folder


def expected(folder, says, answer, prompt, system=None):
    """The answers, by one pass of `answer` over the whole prompt a turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages, texts = [{"role": "system", "content": system}] if system else [], []
    for text in says:
        messages.append({"role": "user", "content": text})
        ids = prompt(tokenizer, messages)
        written = answer(torch.tensor([ids]))[0, len(ids) :]
        texts.append(tokenizer.decode(written, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts


def by_template(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def as_text(tokenizer, messages):
    return tokenizer("\n".join(message["content"] for message in messages)).input_ids


def run(*arguments):
    return main(["chat", *(str(argument) for argument in arguments)])


def said(*flags):
    return [part for text in SAYS for part in ("--message", text)] + list(flags)


@pytest.mark.parametrize(("name", "prompt"), [("merged", by_template), ("plain", as_text)])
def test_a_conversation_is_that_of_the_model(models, capsys, name, prompt):
    model = AutoModelForCausalLM.from_pretrained(models / name)
    texts = expected(models / name, SAYS, lambda ids: model.generate(ids, max_new_tokens=7), prompt, "it is bad")
    assert run(models / name, *said("--max-new-tokens", "7", "--system", "it is bad")) == 0
    assert capsys.readouterr().out.splitlines() == texts and any(texts)
    forgetful = [expected(models / name, [s], lambda ids: model.generate(ids, max_new_tokens=7), prompt) for s in SAYS]
    assert [text for (text,) in forgetful] != texts


def test_an_encoder_decoder_answers_each_text_by_itself(tmp_path, capsys, caplog):
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    t5 = Architecture("T5ForConditionalGeneration", {**sizes, "decoder_start_token_id": 0})
    model = perturbed(t5.build(), 0.5, 1)
    model.generation_config.max_length = 40
    model.save_pretrained(tmp_path)
    tokenizer, texts = save_tokenizer(tmp_path), []
    for text in SAYS:
        inputs = tokenizer(f"it is\n{text}", return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**inputs, max_new_tokens=6)
        texts.append(tokenizer.decode(written[0], skip_special_tokens=True))
    caplog.clear()
    assert run(tmp_path, *said("--max-new-tokens", "6", "--system", "it is")) == 0
    assert capsys.readouterr().out.splitlines() == texts and len({*texts, ""}) == 3
    assert not caplog.records


def test_settings_of_generation_are_those_of_the_folder(models, tmp_path, capsys):
    """A length, tokens that end a turn, and sampling."""
    model = AutoModelForCausalLM.from_pretrained(models / "merged")
    tokenizer = AutoTokenizer.from_pretrained(models / "merged")
    (whole,) = expected(models / "merged", SAYS[:1], lambda ids: model.generate(ids, max_new_tokens=9), by_template)
    words = whole.split()
    end = next(i for i, word in enumerate(words) if word not in words[:i] and i > 0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [tmp_path, "--message", SAYS[0]]
    GenerationConfig(max_new_tokens=4).save_pretrained(tmp_path)
    assert run(*command) == 0 and capsys.readouterr().out.split() == words[:4]
    ends = tokenizer.convert_tokens_to_ids(words[end])
    GenerationConfig(max_new_tokens=9, eos_token_id=ends).save_pretrained(tmp_path)
    assert run(*command) == 0 and capsys.readouterr().out.split() == words[: end + 1]
    GenerationConfig(max_new_tokens=9, do_sample=True, temperature=3.0).save_pretrained(tmp_path)
    answers = []
    for seed in (1, 1, 2):
        assert run(*command, "--seed", seed) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(("message", "task"), [("one two is so a two", "code"), ("good film fine plot", "verse")])
def test_a_routed_model_says_which_expert_answers(models, capsys, message, task):
    routed = RoutedModel.from_pretrained(models / "routed")
    (text,) = expected(models / "routed", [message], lambda ids: routed.generate(ids, max_new_tokens=6), by_template)
    prompt = by_template(AutoTokenizer.from_pretrained(models / "routed"), [{"role": "user", "content": message}])
    (why,) = routed.explain([{"input_ids": torch.tensor(prompt)}])
    assert run(models / "routed", "--message", message, "--max-new-tokens", 6) == 0
    assert capsys.readouterr().out == f"[{task} {why.probabilities[task]:.2f}] {text}\n"


def test_a_message_of_no_task_gets_no_expert(models, capsys):
    assert run(models / "routed", "--message", "bad " * 30, "--max-new-tokens", 6) == 0
    assert capsys.readouterr().out.startswith("[none] ")


@pytest.mark.parametrize("task", ["code", "verse", "static"])
def test_a_named_task_answers(models, capsys, task):
    routed = RoutedModel.from_pretrained(models / "routed")
    with routed.route(task):
        texts = expected(models / "routed", SAYS, lambda ids: routed.generate(ids, max_new_tokens=6), by_template)
    assert run(models / "routed", *said("--max-new-tokens", "6", "--task", task)) == 0
    assert capsys.readouterr().out.splitlines() == [f"[{task}] {text}" for text in texts]


@pytest.mark.parametrize("end", ["", "\nso so\n"], ids=["end of the input", "an empty line"])
def test_lines_are_answered_as_messages_are(models, capsys, monkeypatch, end):
    assert run(models / "merged", *said("--max-new-tokens", "5")) == 0
    texts = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(SAYS) + "\n" + end))
    assert run(models / "merged", "--max-new-tokens", 5) == 0
    assert [line.removeprefix("> ") for line in capsys.readouterr().out.split("\n")][:2] == texts


def test_what_cannot_chat_is_refused(models, tmp_path, capsys):
    save_models(tmp_path)
    for model, flags, says in (
        (tmp_path / "left", [], "a BertForSequenceClassification does not write"),
        (tmp_path / "none", [], "there is no such folder"),
        (models / "merged", ["--task", "code"], "--task names a routed expert, and this model has none"),
        (models / "routed", ["--task", "cod"], "no expert for 'cod' (did you mean 'code'?)"),
    ):
        assert run(model, "--message", "so", *flags) == 2
        assert says in capsys.readouterr().err
    for path in Path(models / "plain").glob("*token*"):
        path.unlink()
    assert run(models / "plain", "--message", "so") == 2
    assert "no tokenizer in" in capsys.readouterr().err
