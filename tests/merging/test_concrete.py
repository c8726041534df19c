"""Concrete merging: what is learned, step by step against autograd over the literal formula, and its state on disk."""

import copy

import pytest
import torch
from torch.func import functional_call

from hf_esm import HfEsmError, merge_models
from hf_esm.methods.concrete import ConcreteAdaMerging, ConcreteTaskArithmetic
from hf_esm.utils.resume import WORK_FOLDER
from support import reference
from support.problems import relative_error
from support.routed_toys import encoded, expert, task_texts, tuned
from support.tiny import GPT2, snapshot
from support.toys import base_model


pytestmark = pytest.mark.slow


TASKS = "abc"
RATE = 0.05


def entropies(updates, base, logits, uniform, coefficients, temperature, samples):
    """`Σ_t mean H(softmax(model_t(W0 + Σ_s λ_s m ∘ Δ_s; x)))` with the relaxed mask, as a function of tensors."""
    weights = {}
    for name, weight in base.items():
        mask = reference.relaxed_mask(logits[name], uniform[name], temperature)
        weights[name] = weight + sum(c * mask * u for c, u in zip(coefficients[name], updates[name]))
    total = torch.zeros((), dtype=torch.float64)
    for task, rows in samples.items():
        model = expert(task).double().eval()
        state = {f"bert.{name}": weight for name, weight in weights.items()}
        answers = [functional_call(model, state, (row["input_ids"][None],)).logits.log_softmax(-1) for row in rows]
        answers = torch.cat(answers)
        total = total - (answers.exp() * answers).sum(-1).mean()
    return total


def literal(method, seed, steps):
    """The published loop, in float64, with the noise that the product draws; batches are all samples."""
    base = {name: p.detach().double() for name, p in base_model().named_parameters() if "pooler" not in name}
    experts = {task: dict(expert(task).bert.named_parameters()) for task in TASKS}
    updates = {n: [experts[t][n].detach().double() - weight for t in TASKS] for n, weight in base.items()}
    samples = {task: encoded(task_texts(task, count=5)) for task in TASKS}
    logits = {name: torch.zeros_like(weight).requires_grad_(True) for name, weight in base.items()}
    adam = torch.optim.Adam(list(logits.values()), lr=method.learning_rate)
    adaptive = isinstance(method, ConcreteAdaMerging)

    def start():
        if adaptive and method.layer_wise:
            return {
                name: torch.full((3,), method.coefficient, dtype=torch.float64, requires_grad=True) for name in base
            }
        one = torch.full((3,), method.coefficient, dtype=torch.float64, requires_grad=True)
        return dict.fromkeys(base, one)

    def loss(coefficients, uniform):
        return entropies(updates, base, logits, uniform, coefficients, method.temperature, samples)

    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        changed = [name for name in base if any(update.any() for update in updates[name])]  # nothing else is learned
        uniform = {name: torch.rand(base[name].shape, generator=generator).double() for name in changed}
        uniform |= {name: torch.full_like(base[name], 0.5) for name in base.keys() - uniform.keys()}
        coefficients = start()
        if adaptive:
            distinct = list({id(c): c for c in coefficients.values()}.values())
            inner = torch.optim.Adam(distinct, lr=method.coefficient_rate)
            inner.zero_grad()
            loss(coefficients, uniform).backward()
            inner.step()
        adam.zero_grad()
        found = loss({n: c.detach() for n, c in coefficients.items()}, uniform)
        found.backward()
        adam.step()
    coefficients = start()
    if adaptive:
        distinct = list({id(c): c for c in coefficients.values()}.values())
        outer = torch.optim.Adam(distinct, lr=method.coefficient_rate)
        for _ in range(method.coefficient_steps):
            outer.zero_grad()
            weights = {}
            for name, weight in base.items():
                mask = reference.rescaled((logits[name].detach() > 0).double())
                weights[name] = weight + mask * sum(c * u for c, u in zip(coefficients[name], updates[name]))
            total = torch.zeros((), dtype=torch.float64)
            for task, rows in samples.items():
                model, state = expert(task).double().eval(), {f"bert.{n}": w for n, w in weights.items()}
                answers = [functional_call(model, state, (r["input_ids"][None],)).logits.log_softmax(-1) for r in rows]
                answers = torch.cat(answers)
                total = total - (answers.exp() * answers).sum(-1).mean()
            total.backward()
            outer.step()
    merged = {}
    for name, weight in base.items():
        mask = reference.rescaled((logits[name].detach() > 0).double())
        merged[name] = weight + mask * sum(c * u for c, u in zip(coefficients[name].detach(), updates[name]))
    return merged


def given(method, **options):
    calibration = {task: task_texts(task, count=5) for task in TASKS}
    return {"method": method, "calibration": calibration, "progress": False, "seed": 3, "batch_size": 5, **options}


def merged_weights(models, **options):
    experts = {task: models / task for task in TASKS}
    return merge_models(models / "base", experts, **given(**options)).load_model().state_dict()


METHODS = {
    "task arithmetic": ConcreteTaskArithmetic(steps=4, learning_rate=RATE),
    "task-wise": ConcreteAdaMerging(steps=3, learning_rate=RATE, layer_wise=False, coefficient_steps=3,
                                    coefficient_rate=0.02),
    "layer-wise": ConcreteAdaMerging(steps=3, learning_rate=RATE, coefficient_steps=3, coefficient_rate=0.02),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_merge_is_the_literal_loop(models, method):
    expected = literal(method, 3, method.steps)
    found = merged_weights(models, method=method)
    # A logit whose gradient is nearly zero moves by a whole step of Adam in a direction that rounding decides.
    for name, weight in expected.items():
        apart = (found[name].double() - weight).abs() > 1e-4 * weight.abs().max()
        assert float(apart.double().mean()) < 0.03, name


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
        ConcreteAdaMerging(steps=8, learning_rate=0.2, coefficient_steps=20, coefficient_rate=0.02),
    ):
        assert entropy(merged_weights(models, method=method)) < plain - 0.05, method.name


def test_an_interrupted_run_goes_on_to_the_same_model(models, tmp_path, monkeypatch):
    method = ConcreteAdaMerging(steps=5, learning_rate=RATE, coefficient_steps=4, coefficient_rate=0.02)
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
    with pytest.raises(HfEsmError, match="'a': a BertModel is not a classifier"):
        merge_models(base_model(), live, **given("concrete-task-arithmetic", calibration=samples))
    assert snapshot(models) == before


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (ConcreteTaskArithmetic, {"temperature": 0.0}, "temperature must be a finite number, above 0"),
        (ConcreteTaskArithmetic, {"steps": 0}, "steps must be a whole number, at least 1"),
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
    method = ConcreteTaskArithmetic(steps=3, learning_rate=RATE, expected_mask=True)
    result = merge_models(base, experts, **given(method, calibration=samples))
    merged, before = result.load_model().state_dict(), base.state_dict()
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"):
        logits, _ = result.plan.method.learned.of(name)
        mask = torch.sigmoid(logits.T).double()
        total = sum(model.state_dict()[name].double() - before[name].double() for model in experts.values())
        assert relative_error(merged[name], before[name] + 0.3 * total * reference.rescaled(mask)) < 1e-6
        assert mask.std() > 1e-3
    assert method.learned is None  # the caller's own
