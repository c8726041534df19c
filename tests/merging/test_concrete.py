"""Concrete merging: what is learned, step by step against autograd over the literal formula, and its state on disk."""

import copy
import re
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import BertForSequenceClassification

from hf_esm import HfEsmError, merge_models
from hf_esm.methods import LearnedMask, resolve_method
from hf_esm.methods.concrete import AdaMerging, ConcreteAdaMerging, ConcreteTaskArithmetic
from hf_esm.utils.resume import WORK_FOLDER
from support import reference
from support.architectures import T5
from support.problems import relative_error
from support.routed_toys import encoded, expert, task_texts, tuned
from support.tiny import GPT2, LLAMA, snapshot
from support.toys import base_model, texts


pytestmark = pytest.mark.slow


TASKS = "abc"
RATE = 0.05
SEED = 3


def expert_of(base, place, kind, scale=0.15):
    """A classifier of 2 to 4 labels; all its maps (square, wide, tall), or one, have updates of full or low rank."""
    torch.manual_seed(place)
    model = BertForSequenceClassification(type(base.config)(**base.config.to_diff_dict(), num_labels=2 + place % 3))
    model.bert.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(place)
    for name, module in model.bert.encoder.named_modules():
        if isinstance(module, nn.Linear) and (kind != "one" or name == "layer.1.output.dense"):
            rows, columns = module.weight.shape
            rank = 2 if kind == "low-rank" else columns
            a, b = (torch.randn(*size, generator=generator) for size in ((rows, rank), (rank, columns)))
            module.weight.data += scale / rank**0.5 * a @ b
    return model.eval()


def last_logits(model, state, row, decoder):
    """What a model answers to one sample: its classes, or its next token."""
    inputs = {"input_ids": row["input_ids"][None]}
    if decoder is not None:
        inputs["decoder_input_ids"] = torch.tensor([[decoder]])
    logits = functional_call(model, state, (), inputs).logits
    return logits if logits.dim() == 2 else logits[:, -1]


def literal(base, experts, samples, method, prefix="bert.", decoder=None):
    """The merged weights of the body by `reference.concrete`, with the noise that the product draws; batches are all
    samples. `prefix` is that of the body in the experts."""
    weights = {n: p.detach().double() for n, p in base.named_parameters() if "pooler" not in n}
    tuned_weights = {task: dict(model.named_parameters()) for task, model in experts.items()}
    updates = {n: [tuned_weights[t][prefix + n].detach().double() - w for t in experts] for n, w in weights.items()}
    changed = [name for name in weights if any(update.any() for update in updates[name])]  # nothing else is learned
    models = {task: copy.deepcopy(model).double() for task, model in experts.items()}

    def entropy(merged):
        total = torch.zeros((), dtype=torch.float64)
        for task, rows in samples.items():
            state = {prefix + name: weight for name, weight in merged.items()}
            logits = torch.cat([last_logits(models[task], state, row, decoder) for row in rows]).log_softmax(-1)
            total = total - (logits.exp() * logits).sum(-1).mean()
        return total

    def uniform(step):
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        return {name: torch.rand(weights[name].shape, generator=generator).double() for name in changed}

    settings = asdict(method)
    if isinstance(method, AdaMerging):  # as the Concrete method after no step of a mask, which is 1 then
        settings = {
            "coefficient": method.coefficient,
            "coefficient_steps": method.steps,
            "coefficient_rate": method.learning_rate,
            **{"steps": 0, "learning_rate": 1.0, "mask": "expected", "layer_wise": method.granularity == "layer"},
            **{"batch_size": 0, "temperature": 0.5},
        }
    groups = ("layer" if settings.pop("layer_wise") else "task") if method.adapts else ""
    del settings["batch_size"], settings["temperature"]
    given = {name: weights[name] for name in changed}
    return reference.concrete(given, {n: updates[n] for n in changed}, entropy, uniform, groups=groups, **settings)


def given(method, **options):
    calibration = {task: task_texts(task, count=5) for task in TASKS}
    return {"method": method, "calibration": calibration, "progress": False, "seed": SEED, "batch_size": 2, **options}


def merged_weights(models, **options):
    experts = {task: models / task for task in TASKS}
    return merge_models(models / "base", experts, **given(**options)).load_model().state_dict()


def share_apart(found, expected):
    """The largest share of a weight's entries that differ. A logit whose gradient is nearly zero moves by a whole step
    of Adam in a direction that rounding decides."""
    apart = {n: (found[n].double() - w).abs() > 1e-4 * w.abs().max() for n, w in expected.items()}
    return max(float(entries.double().mean()) for entries in apart.values())


ADAPTIVE = {"steps": 3, "learning_rate": RATE, "coefficient_steps": 3, "coefficient_rate": 0.02, "batch_size": 5}
METHODS = {
    "task arithmetic": ConcreteTaskArithmetic(steps=4, learning_rate=RATE, batch_size=5),
    "task-wise": ConcreteAdaMerging(layer_wise=False, inner_rate=0.2, **ADAPTIVE),
    "layer-wise": ConcreteAdaMerging(inner_rate=1.0, **ADAPTIVE),
    "clamped": ConcreteAdaMerging(inner_rate=0.4, **{**ADAPTIVE, "coefficient_rate": 0.35, "coefficient_steps": 5}),
}
EXPERTS = {
    "two": ["full", "full"],
    "three, one with zeros but for one map": ["full", "one", "full"],
    "four of low rank": ["low-rank"] * 4,
    "eight": ["full", "low-rank"] * 4,
}


@pytest.mark.cases(6)
@pytest.mark.parametrize(
    ("kinds", "mask"), [*((name, "relaxed") for name in EXPERTS), ("two", "expected"), ("eight", "expected")]
)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_merge_is_the_literal_loop(method, kinds, mask):
    kinds = EXPERTS[kinds]
    method, base = resolve_method({"name": method.name, **asdict(method), "mask": mask}), base_model()
    experts = {f"t{i}": expert_of(base, i, kind, 0.3 / len(kinds)) for i, kind in enumerate(kinds)}
    samples = {task: encoded(texts(i, count=5)) for i, task in enumerate(experts)}
    result = merge_models(base, experts, **given(method, calibration=samples))
    expected = literal(base, experts, samples, method)
    assert len(expected) == 12 and share_apart(result.load_model().state_dict(), expected) < 0.03


ADAMERGING = {
    "task": AdaMerging("task", steps=4, learning_rate=0.03, batch_size=5),
    "layer": AdaMerging(steps=4, learning_rate=0.03, batch_size=5),
    "clamped": AdaMerging(steps=5, learning_rate=0.35, batch_size=5),
}


@pytest.mark.parametrize("kinds", ["two", "four of low rank"])
@pytest.mark.parametrize("method", ADAMERGING.values(), ids=ADAMERGING)
def test_adamerging_is_the_literal_loop(method, kinds):
    base = base_model()
    experts = {f"t{i}": expert_of(base, i, kind, 0.3 / 4) for i, kind in enumerate(EXPERTS[kinds])}
    samples = {task: encoded(texts(i, count=5)) for i, task in enumerate(experts)}
    found = merge_models(base, experts, **given(method, calibration=samples)).load_model().state_dict()
    expected = literal(base, experts, samples, method)
    assert all(relative_error(found[name], weight) < 1e-4 for name, weight in expected.items()) and len(expected) == 12


def test_adamerging_without_a_step_is_task_arithmetic_and_one_expert_is_merged():
    base = base_model()
    experts = {f"t{i}": expert_of(base, i, "full", 0.1) for i in range(2)}
    for tasks in (["t0", "t1"], ["t0"]):
        samples = {task: encoded(texts(1, count=5)) for task in tasks}
        chosen = {task: experts[task] for task in tasks}
        found, plain = (
            merge_models(base, chosen, **given(method, calibration=samples)).load_model().state_dict()
            for method in (AdaMerging(steps=0), "task-arithmetic")
        )
        assert all(relative_error(found[n], w) < 1e-5 for n, w in plain.items() if "embeddings" not in n)


WRITERS = {"llama": (LLAMA, None), "gpt2": (GPT2, None), "t5": (T5, 0)}


def prompts(seed, count=4):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 60, (n,), generator=generator)} for n in range(3, 3 + count)]


@pytest.mark.cases(3)
@pytest.mark.parametrize(("kind", "decoder"), WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("method", ["layer-wise", "task arithmetic", "adamerging"])
def test_models_that_write_learn_at_the_first_token_of_an_answer(kind, decoder, method):
    base = kind.build()
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab", 1)}
    samples = {task: prompts(seed) for seed, task in enumerate("ab")}
    method = ADAMERGING["layer"] if method == "adamerging" else METHODS[method]
    merged = merge_models(base, experts, **given(method, calibration=samples)).load_model().state_dict()
    expected = literal(base, experts, samples, method, prefix="", decoder=decoder)
    # Over the one token that a decoder reads, attention is 1 whatever these are: rounding decides where they move.
    idle = re.compile(r"decoder\..*SelfAttention\.[qk]\.")
    assert share_apart(merged, {name: w for name, w in expected.items() if not idle.match(name)}) < 0.03


@pytest.mark.parametrize("kind", [GPT2, T5], ids=["gpt2", "t5"])
def test_answers_in_the_samples_are_not_read(kind):
    """A causal language model's samples are cut where their labels begin; an encoder-decoder decodes one token."""
    base = kind.build()
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab", 1)}
    answer = torch.tensor([7, 8, 9])
    alone = {task: prompts(seed) for seed, task in enumerate("ab")}
    answered = {t: [dict(row) for row in rows] for t, rows in alone.items()}
    for rows in answered.values():
        for row in rows:
            ids, row["labels"] = row["input_ids"], answer
            if kind is GPT2:
                row["input_ids"] = torch.cat([ids, answer])
                row["labels"] = torch.cat([torch.full_like(ids, -100), answer])
    method = ConcreteTaskArithmetic(steps=2, learning_rate=RATE)
    merged = [
        merge_models(base, experts, **given(method, calibration=samples)).load_model().state_dict()
        for samples in (alone, answered)
    ]
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())


def test_a_sample_without_a_prompt_is_named():
    base = GPT2.build()
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab", 1)}
    rows = prompts(0)
    samples = {"a": rows, "b": [{**row, "labels": row["input_ids"]} for row in rows]}
    method = ConcreteTaskArithmetic(steps=1)
    with pytest.raises(HfEsmError, match=r"calibration of 'b': sample 0 has no prompt.*or leave `labels` out"):
        merge_models(base, experts, **given(method, calibration=samples))
    merge_models(base, experts, **given(method, calibration={**samples, "b": rows}))  # the remedy
    labelled = [
        {**row, "labels": row["input_ids"].masked_fill(torch.arange(len(row["input_ids"])) < 2, -100)} for row in rows
    ]
    merge_models(base, experts, **given(method, calibration={**samples, "b": labelled}))  # the other


@pytest.mark.parametrize("kind", [None, GPT2, T5], ids=["classifiers", "gpt2", "t5"])
def test_rates_and_batches_are_those_of_the_papers_family(kind):
    base = kind.build() if kind else base_model()
    experts = {task: tuned(base, i) if kind else expert_of(base, i, "full") for i, task in enumerate("ab", 1)}
    arguments = given("concrete-adamerging", calibration={t: prompts(0) for t in "ab"}, dry_run=True)
    method = merge_models(base, experts, **arguments).method
    settings = (method.learning_rate, method.inner_rate, method.coefficient_rate, method.batch_size)
    assert settings == ((1e-4, 0.1, 1e-4, 8) if kind else (1e-3, 1.0, 1e-3, 16))
    arguments["method"] = {"name": "concrete-adamerging", "learning_rate": "1e-2", "batch_size": 3}
    method = merge_models(base, experts, **arguments).method
    assert (method.learning_rate, method.batch_size, method.inner_rate) == (1e-2, 3, 0.1 if kind else 1.0)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["concrete-task-arithmetic", "concrete-adamerging"])
def test_without_a_step_the_merge_is_task_arithmetic(models, name):
    nothing = {"steps": 0} | ({"coefficient_steps": 0} if "ada" in name else {})
    merged = merged_weights(models, method={"name": name, **nothing})
    base = base_model().state_dict()
    for weight, tensor in base.items():
        if "pooler" not in weight:
            total = sum(expert_weights(models, task)[weight].double() - tensor.double() for task in TASKS)
            assert relative_error(merged[weight], tensor.double() + 0.3 * total) < 1e-6


def expert_weights(models, task):
    return BertForSequenceClassification.from_pretrained(models / task).bert.state_dict()


def test_rows_of_tokens_that_no_sample_holds_have_their_update():
    """Their logits move by the gradient of the mask's mean alone, and stay near 0, so that their mask is near 1."""
    base, name = base_model(), "embeddings.word_embeddings.weight"
    experts = {task: expert_of(base, i, "full") for i, task in enumerate("ab")}
    for seed, model in enumerate(experts.values()):
        noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
        model.bert.embeddings.word_embeddings.weight.data += 0.1 * noise
    samples = {task: encoded(texts(i)) for i, task in enumerate(experts)}
    result = merge_models(
        base, experts, **given(ConcreteTaskArithmetic(steps=20, learning_rate=RATE), calibration=samples)
    )
    held = torch.unique(torch.cat([row["input_ids"] for rows in samples.values() for row in rows]))
    unseen = torch.ones(64, dtype=torch.bool).index_fill(0, held, False)
    before = base.state_dict()[name].double()
    full = 0.3 * sum(model.bert.state_dict()[name].double() - before for model in experts.values())
    update = result.load_model().state_dict()[name].double() - before
    assert int(unseen.sum()) > 30 and relative_error(update[unseen], full[unseen]) < 0.06
    assert relative_error(update[~unseen], full[~unseen]) > 0.1


def test_all_samples_are_learned_on(monkeypatch):
    """Not the 32 that statistics would take; where agreement chooses alpha, half of them."""
    base = base_model()
    experts = {task: expert_of(base, i, "full") for i, task in enumerate("ab")}
    counts = []
    monkeypatch.setattr(
        "hf_esm.merging.run.learn_mask",
        lambda plan, samples, *_, **__: counts.append({t: len(s) for t, s in samples.items()}) or LearnedMask({}, {}),
    )
    samples = {task: encoded(texts(i, count=50)) for i, task in enumerate(experts)}
    for options in ({}, {"num_samples": 40}, {"alpha": "auto"}):
        merge_models(base, experts, **given("concrete-task-arithmetic", calibration=samples, **options))
    assert counts == [{"a": n, "b": n} for n in (50, 40, 25)]


@pytest.mark.parametrize("value", [True, False])
def test_the_setting_that_is_gone_says_what_to_do(models, value):
    old = {"name": "concrete-adamerging", "steps": 1, "coefficient_steps": 1, "expected_mask": value}
    with pytest.raises(HfEsmError) as caught:
        merged_weights(models, method=old)
    message = str(caught.value)
    assert message.startswith("Method 'concrete-adamerging' has no setting 'expected_mask' any more. Leave it out: ")
    del old["expected_mask"]
    merged_weights(models, method=old)  # the remedy
    assert "`mask: relaxed`" in message
    merged_weights(models, method={**old, "mask": "relaxed"})  # the other


def test_the_heads_become_surer(models):
    """The planted objective: the entropy that is learned on falls, below that of plain task arithmetic."""
    samples = {task: encoded(task_texts(task, count=5)) for task in TASKS}

    def entropy(state):
        total = 0.0
        for task, rows in samples.items():
            model = copy.deepcopy(expert(task)).eval()
            model.bert.load_state_dict(state, strict=False)
            with torch.no_grad():
                answers = torch.cat([model(**{k: v[None] for k, v in r.items()}).logits for r in rows]).log_softmax(-1)
            total -= float((answers.exp() * answers).sum(-1).mean())
        return total

    plain = entropy(merged_weights(models, method="task-arithmetic", alpha=0.3))
    for method in (
        ConcreteTaskArithmetic(steps=20, learning_rate=0.15),
        ConcreteAdaMerging(steps=8, learning_rate=0.2, inner_rate=0.02, coefficient_steps=20, coefficient_rate=0.02),
    ):
        assert entropy(merged_weights(models, method=method)) < plain - 0.05, method.name


def test_an_interrupted_run_goes_on_to_the_same_model(models, tmp_path, monkeypatch):
    method = ConcreteAdaMerging(
        steps=5, learning_rate=RATE, coefficient_steps=4, coefficient_rate=0.02, mask="relaxed"
    )
    whole = merged_weights(models, method=copy.copy(method))
    monkeypatch.setattr("hf_esm.merging.learning.SAVE_EVERY", 2)
    for stop in (3, 7):  # in either stage

        class Stopped(Exception):
            pass

        def stopping(description, done, total, stop=stop):
            before = 5 if "coefficients" in description else 0
            if "Learning" in description and before + done > stop:
                raise Stopped

        folder = tmp_path / f"{stop}"
        with pytest.raises(Stopped):
            merged_weights(models, method=copy.copy(method), resume_dir=str(folder), callback=stopping)
        assert "concrete.safetensors" in {path.name for path in (folder / WORK_FOLDER).iterdir()}
        found = merged_weights(models, method=copy.copy(method), resume_dir=str(folder))
        assert not folder.exists()
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_a_broken_state_is_named(models, tmp_path, monkeypatch):
    method = ConcreteTaskArithmetic(steps=2)
    monkeypatch.setattr("hf_esm.merging.run.merge_weights", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merged_weights(models, method=method, resume_dir=str(tmp_path / "state"))
    (tmp_path / "state" / WORK_FOLDER / "concrete.safetensors").write_bytes(b"x")
    with pytest.raises(HfEsmError, match="Remove the file to start again"):
        merged_weights(models, method=method, resume_dir=str(tmp_path / "state"))


def test_statistics_are_no_samples_and_bodies_no_classifiers(models, tmp_path):
    before = snapshot(models)
    with pytest.raises(HfEsmError, match="learns from the samples themselves"):
        merged_weights(models, method="concrete-task-arithmetic", calibration=None)
    live = {task: expert(task).bert for task in TASKS}
    samples = {task: encoded(task_texts(task)) for task in TASKS}
    with pytest.raises(HfEsmError, match="'a': a BertModel neither writes nor is a classifier"):
        merge_models(base_model(), live, **given("concrete-task-arithmetic", calibration=samples))
    assert snapshot(models) == before


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (ConcreteTaskArithmetic, {"temperature": 0.0}, "temperature must be a finite number, above 0"),
        (ConcreteTaskArithmetic, {"steps": -1}, "steps must be a whole number, at least 0"),
        (ConcreteTaskArithmetic, {"mask": "sign"}, "mask must be one of expected, relaxed"),
        (ConcreteTaskArithmetic, {"batch_size": 0}, "batch_size must be a whole number, at least 1"),
        (ConcreteAdaMerging, {"coefficient": 1.5}, "coefficient must be a finite number, at least 0 and at most 1"),
        (ConcreteAdaMerging, {"inner_rate": 0.0}, "inner_rate must be a finite number, above 0"),
        (ConcreteAdaMerging, {"coefficient_rate": 0.0}, "coefficient_rate must be a finite number, above 0"),
        (ConcreteAdaMerging, {"coefficient_steps": -1}, "coefficient_steps must be a whole number, at least 0"),
    ],
)
def test_bad_settings_are_refused(method, settings, message):
    with pytest.raises(HfEsmError, match=message):
        method(**settings)


def test_masks_follow_matrices_that_are_stored_transposed():
    """GPT-2's `Conv1D` keeps its weight the other way round than the methods see it."""
    base = GPT2.build("GPT2ForSequenceClassification", num_labels=3, pad_token_id=0)
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab", 1)}
    samples = {task: encoded(task_texts(task, count=4)) for task in "ab"}
    method = ConcreteTaskArithmetic(steps=3, learning_rate=RATE)
    result = merge_models(base, experts, **given(method, calibration=samples))
    merged, before = result.load_model().state_dict(), base.state_dict()
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"):
        mask = result.plan.method.learned.of(name)[0].T.double()
        total = sum(model.state_dict()[name].double() - before[name].double() for model in experts.values())
        assert relative_error(merged[name], before[name] + 0.3 * total * mask) < 1e-6
        assert mask.std() > 1e-3 and mask.mean().item() == pytest.approx(1, abs=1e-5)
    assert method.learned is None  # the caller's own
