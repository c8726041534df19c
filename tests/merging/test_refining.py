"""Refining: gates against the literal decomposition, their gradient against finite differences, and the loop that
trains them: alike on every run, after an interrupt and on two processes.
"""

import copy
import socket
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_esm import HfEsmError
from hf_esm.merging.gates import ComponentFactors, UpdateFactors, build_gates, fold, gated_maps, write_gates
from hf_esm.merging.refining import RefiningLoss, gates_on
from hf_esm.metrics import divergence
from hf_esm.planning import RefineSettings, resolve_refine
from support import reference
from support.helpers import save, token_inputs
from support.problems import relative_error
from support.processes import start_script
from support.refining_toys import KINDS, TASKS, classifier_problem, language_problem, plan_of, samples_of


kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def problems():
    return {kind: language_problem(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def factors(problems, tmp_path_factory):
    """Four components, and whole updates, by kind."""
    folder = tmp_path_factory.mktemp("gates")
    return {(kind, k): problems[kind].factors(k, folder / f"{kind}{k}") for kind in KINDS for k in (4, 0)}


def linear_maps(problem):
    """Linear maps of the base by canonical name, without a tied output map."""
    live = {live: name for name, live in problem.plan.base.names.items()}
    maps = {f"{name}.weight": m for name, m in problem.base.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    return {live[name]: (name, module) for name, module in maps.items() if name in live}


def matrices(problem, task, name, module):
    delta = problem.experts[task].get_parameter(name).detach().double() - module.weight.detach().double()
    return delta.T if isinstance(module, Conv1D) else delta


@kinds
def test_components_are_the_literal_decomposition(problems, factors, kind):
    problem, found = problems[kind], factors[kind, 4]
    inputs = {t: token_inputs(problem.experts[t], samples_of(t), KINDS[kind]) for t in TASKS}
    maps = linear_maps(problem)
    assert maps.keys() - found.keys() == ({"lm_head.weight"} if kind == "llama" else set())  # no expert changes it
    ranks = set()
    for name, part in found.items():
        live, module = maps[name]
        expected = [reference.esd(inputs[t][live], matrices(problem, t, live, module), 4) for t in TASKS]
        assert part.ranks == tuple(e.shape[1] for e, _, _ in expected)
        assert part.directions.dtype == part.coordinates.dtype == torch.float32
        per_task = zip(part.directions.split(part.ranks, 1), part.coordinates.split(part.ranks), expected)
        for e, c, (directions, _, coordinates) in per_task:
            assert relative_error(e.double() @ c.double(), directions @ coordinates) < 1e-2  # within the tolerance
            assert relative_error(e.T.double() @ e.double(), torch.eye(e.shape[1])) < 1e-5
        ranks |= {part.ranks}
    assert ranks == {(4, 4), (4, 1)}


@kinds
def test_without_components_a_coefficient_is_of_the_whole_update(problems, factors, kind):
    for name, part in factors[kind, 0].items():
        live, module = linear_maps(problems[kind])[name]
        expected = torch.stack([matrices(problems[kind], task, live, module) for task in TASKS])
        assert relative_error(part.updates.double(), expected) < 1e-6
    assert factors[kind, 0].keys() >= factors[kind, 4].keys()


def test_folding_is_the_literal_sum():
    torch.manual_seed(0)
    weight, e, c, gates = torch.randn(5, 4), torch.randn(5, 3), torch.randn(3, 4), torch.randn(3)
    expected = weight.double() + sum(gates[i].double() * torch.outer(e[:, i], c[i]).double() for i in range(3))
    components = ComponentFactors(e, c, (1, 2))
    assert relative_error(fold(weight, components, gates), expected) < 1e-6
    assert relative_error(fold(weight.T, components, gates, transposed=True), expected.T) < 1e-6
    assert fold(weight.bfloat16(), components, gates).dtype == torch.float32
    updates = torch.randn(3, 5, 4)
    expected = weight.double() + sum(gates[i].double() * updates[i].double() for i in range(3))
    assert relative_error(fold(weight, UpdateFactors(updates), gates), expected) < 1e-6
    assert torch.equal(fold(weight, components, components.zero_gates()), weight)


def test_only_maps_with_all_statistics_get_components(problems, tmp_path):
    problem = problems["llama"]
    lost = "layers.0.mlp.down_proj.weight"
    entries = {name: problem.statistics["code"][name] for name in problem.statistics["code"] if name != lost}
    some = {"law": problem.statistics["law"], "code": entries}
    everything, found = (gated_maps(problem.plan, s, 4) for s in (problem.statistics, some))
    assert set(everything) - set(found) == {lost} and "embed_tokens.weight" not in everything
    assert lost in gated_maps(problem.plan, some, 0)
    assert gated_maps(problem.plan, {"law": problem.statistics["law"], "code": None}, 4) == []
    built = build_gates(problem.plan, some, 2, tmp_path, Accelerator())
    assert lost not in built and built


def test_a_lora_expert_has_at_most_its_rank(problems, tmp_path):
    problem = problems["llama"]
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = save(problem.base, tmp_path / "base")
    get_peft_model(type(problem.base).from_pretrained(base), config).save_pretrained(tmp_path / "code")
    plan = plan_of(base, {"law": problem.experts["law"], "code": str(tmp_path / "code")})
    for part in build_gates(plan, problem.statistics, 4, tmp_path, Accelerator()).values():
        assert part.ranks in ((4, 2), (4, 0))


def test_factors_of_an_interrupted_run_are_read_again(problems, tmp_path, monkeypatch):
    first = problems["gpt2"].factors(4, tmp_path)
    monkeypatch.setattr("hf_esm.merging.gates.essential_subspace", lambda *_, **__: pytest.fail("decomposed again"))
    again = problems["gpt2"].factors(4, tmp_path)
    assert all(torch.equal(again[name].directions, part.directions) for name, part in first.items())


@pytest.fixture(scope="module")
def classifiers():
    return classifier_problem()


@pytest.mark.parametrize("components", [4, 0])
@pytest.mark.parametrize("kind", ["gpt2", "classifiers"])
def test_gradients_are_finite_differences(request, problems, tmp_path, kind, components):
    """In float64, of the loss on three samples of each task, along a random direction in the space of every gate."""
    problem = problems[kind] if kind in problems else request.getfixturevalue(kind)
    models = copy.deepcopy(problem.models)  # what models share stays shared
    distinct = list({id(model): model.double() for model in models.values()}.values())
    precise = {
        name: type(part)(*(to_double(value) for value in vars(part).values()))
        for name, part in problem.factors(components, tmp_path).items()
    }
    drawn, scales = {"law": [0, 1, 2], "code": [3, 4, 5]}, {"law": 2.0, "code": 0.5}
    loss = RefiningLoss(models, problem.learn, problem.held_back, scales, Accelerator())
    generator = torch.Generator().manual_seed(0)
    with gates_on(distinct, precise, TASKS) as gates:
        for gate in gates.values():
            gate.data = 0.1 * torch.randn(gate.shape, generator=generator).double()
        loss.differentiate(drawn, gates.values())
        trained = {id(gate) for gate in gates.values()}
        for model in distinct:
            assert trained <= {id(parameter) for parameter in model.parameters()}
            assert all((parameter.grad is not None) is (id(parameter) in trained) for parameter in model.parameters())

        @torch.no_grad()
        def value(name, change):
            gates[name].data += change
            parts = [divergence(models[task], problem.learn[task], drawn[task]) / scales[task] for task in TASKS]
            gates[name].data -= change
            return float(sum(parts) / 2)

        for name, gate in gates.items():
            direction = 1e-5 * torch.randn(gate.shape, generator=generator).double()
            expected = (value(name, direction) - value(name, -direction)) / 2
            found = float((gate.grad * direction).sum())
            assert abs(found - expected) < 1e-5 * abs(expected) + 1e-13, name


def to_double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("components", [4, 0])
@kinds
def test_refining_brings_the_model_nearer_and_folds_exactly(problems, factors, kind, components):
    problem, part = problems[kind], factors[kind, components]
    before = {name: weight.clone() for name, weight in problem.merged.state_dict().items()}
    modules = {name: type(module) for name, module in problem.merged.named_modules()}
    refined = problem.refine(part)
    after = problem.merged.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert {name: type(module) for name, module in problem.merged.named_modules()} == modules
    assert all(parameter.requires_grad and parameter.grad is None for parameter in problem.merged.parameters())
    assert not hasattr(problem.merged, "peft_config")
    assert refined.gates.keys() == part.keys() and refined.history.keys() == {0, 10, 20, 30}
    assert refined.history[0] == pytest.approx(problem.loss(problem.models, problem.held_back), rel=1e-5)
    assert refined.history[refined.best_step] < 0.9 * refined.history[0]
    folded = problem.folded(part, refined.gates)
    assert problem.loss(folded, problem.held_back) == pytest.approx(refined.history[refined.best_step], rel=1e-4)
    model = copy.deepcopy(problem.merged)
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad(), gates_on([model], part, TASKS) as gates:
        for name, gate in gates.items():
            gate.copy_(refined.gates[name])
        torch.testing.assert_close(folded["law"](ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@kinds
def test_written_gates_are_an_adapter_over_the_merged_model(problems, factors, tmp_path, kind):
    problem, part = problems[kind], factors[kind, 4]
    gates = problem.refine(part, steps=10).gates
    write_gates(tmp_path / "gates", problem.plan, part, gates)
    ids = torch.arange(3, 19).reshape(2, 8)
    for trainable in (False, True):
        model = PeftModel.from_pretrained(copy.deepcopy(problem.merged), tmp_path / "gates", is_trainable=trainable)
        config = model.peft_config["default"]
        with torch.no_grad():
            expected = problem.folded(part, gates)["law"](ids).logits
            torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=0, atol=1e-5)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert len(trained) == (len(part) if trainable else 0) and all("gates" in name for name in trained)
        for name, of_map in part.items():
            module = problem.plan.base.linear[name].module
            assert config.task_ranks_of(module) == dict(zip(TASKS, of_map.ranks))


def test_the_same_seed_gives_the_same_gates(problems, factors):
    problem, part = problems["llama"], factors["llama", 4]
    first, second, other = (problem.refine(part, steps=8, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first.gates[name], second.gates[name]) for name in part)
    assert first.history == second.history
    assert any(not torch.equal(first.gates[name], other.gates[name]) for name in part)


def test_refining_never_makes_the_held_back_loss_worse_and_stops_early(problems, factors):
    """At a rate that is too high, step 0 is best, and a third of the steps is tried."""
    problem, part = problems["llama"], factors["llama", 4]
    refined = problem.refine(part, steps=60, learning_rate=30.0)
    assert refined.best_step == 0 and not any(gates.any() for gates in refined.gates.values())
    assert list(refined.history) == [0, 10, 20]
    assert refined.history[20] > refined.history[0]


@pytest.mark.parametrize(("components", "best_step"), [(4, 30), (0, 20)])
def test_an_interrupted_run_goes_on_to_the_same_gates(problems, factors, tmp_path, monkeypatch, components, best_step):
    problem, part = problems["gpt2"], factors["gpt2", components]
    whole = problem.refine(part)
    assert whole.best_step == best_step  # after the interrupt, and before it
    monkeypatch.setattr("hf_esm.merging.refining.SAVE_EVERY", 4)

    class Stopped(Exception):
        pass

    def stopping(title):
        def until(steps):
            for step in steps:
                if step == 27:
                    raise Stopped
                yield step

        return until

    with pytest.raises(Stopped):
        problem.refine(part, folder=tmp_path, progress=stopping)
    taken = []
    again = problem.refine(part, folder=tmp_path, progress=lambda title: lambda steps: taken.append(steps) or steps)
    assert taken == [range(24, 31)]
    assert again.history == whole.history and again.best_step == whole.best_step
    assert all(torch.equal(again.gates[name], whole.gates[name]) for name in part)
    (tmp_path / "refining.safetensors").write_bytes(b"x")
    with pytest.raises(HfEsmError, match="Remove the file to start again"):
        problem.refine(part, folder=tmp_path)


@kinds
def test_checkpointed_activations_give_the_same_gates(problems, factors, kind):
    problem, part, calls = problems[kind], factors[kind, 4], []
    watched = problem.merged.get_submodule({"llama": "model.layers.0.self_attn", "gpt2": "transformer.h.0.attn"}[kind])
    counts, found = [], []
    for checkpointing in (False, True):
        handle = watched.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        found.append(problem.refine(part, steps=5, gradient_checkpointing=checkpointing))
        handle.remove()
        counts.append(sum(calls))
        calls.clear()
    assert counts[1] == 2 * counts[0] > 0
    for name in part:
        torch.testing.assert_close(found[1].gates[name], found[0].gates[name], rtol=0, atol=1e-6)
    assert problem.merged.config.use_cache


def test_tasks_with_heads_of_their_own_share_the_gates_of_one_body(classifiers, tmp_path):
    problem = classifiers
    for components in (8, 0):
        part = problem.factors(components, tmp_path)
        refined = problem.refine(part)
        assert refined.history[refined.best_step] < 0.9 * refined.history[0]
        folded = problem.folded(part, refined.gates)
        assert problem.loss(folded, problem.held_back) == pytest.approx(refined.history[refined.best_step], rel=1e-4)


def test_a_bfloat16_model_has_float32_gates(factors):
    problem = language_problem("llama", torch.bfloat16)
    refined = problem.refine(factors["llama", 4])
    assert all(gates.dtype == torch.float32 for gates in refined.gates.values())
    assert refined.history[refined.best_step] < 0.9 * refined.history[0]


def test_a_task_whose_base_answers_as_its_expert_is_weighed_as_the_others(problems, factors):
    problem = copy.copy(problems["llama"])
    problem.base_divergence = {"law": problem.base_divergence["law"], "code": 0.0}
    refined = problem.refine(factors["llama", 4], steps=10)
    assert all(torch.tensor(list(refined.history.values())).isfinite())
    with_scale = {"law": problem.base_divergence["law"], "code": problem.base_divergence["law"]}
    problem.base_divergence = with_scale
    assert problem.refine(factors["llama", 4], steps=10).history == refined.history


RANK = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[2])
from support.refining_toys import language_problem

folder, rank = Path(sys.argv[1]), Accelerator().process_index
problem = language_problem("llama")
components = problem.factors(4, folder)
for name, factors in {"components": components, "updates": problem.factors(0, folder)}.items():
    refined = problem.refine(factors, steps=12, batch_size=3)
    history = {f"history.{step}": torch.tensor(value) for step, value in refined.history.items()}
    save_file({**refined.gates, **history}, folder / f"{name}-{rank}.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_gates_of_one(problems, factors, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common["ACCELERATE_USE_CPU"] = "true"
    tests, outputs = Path(__file__).parents[1], [tmp_path / f"output-{rank}" for rank in (0, 1)]
    ranks = [
        start_script(
            RANK, tmp_path, tests, output=output, environment={**common, "RANK": str(i), "LOCAL_RANK": str(i)}
        )
        for i, output in enumerate(outputs)
    ]
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0], "".join(output.read_text() for output in outputs)
    assert len(list(tmp_path.glob("gates-*-of-2.safetensors"))) == 2
    for name, components in {"components": 4, "updates": 0}.items():
        found = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1)]
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
        expected = problems["llama"].refine(factors["llama", components], steps=12, batch_size=3)
        for key, gates in expected.gates.items():
            torch.testing.assert_close(found[0][key], gates, rtol=0, atol=1e-4)
        for step, value in expected.history.items():
            assert float(found[0][f"history.{step}"]) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, RefineSettings()),
        (False, None),
        (None, None),
        ({"components": 8, "steps": 3}, RefineSettings(components=8, steps=3)),
        (RefineSettings(steps=9), RefineSettings(steps=9)),
    ],
)
def test_refine_is_true_false_or_settings(value, expected):
    assert resolve_refine(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"component": 8}, "`refine`: there is no setting 'component' .did you mean 'components'"),
        ({"steps": 0}, "`refine`: steps must be a whole number, at least 1"),
        ({"learning_rate": 0.0}, "`refine`: learning_rate must be a finite number, above 0"),
        ({"components": -1}, "`refine`: components must be a whole number, at least 0"),
        ({"components": 0, "keep_adapter": True}, "are not an adapter"),
        ("yes", "`refine` must be true, false or a mapping"),
    ],
)
def test_bad_settings_are_refused(value, message):
    with pytest.raises(HfEsmError, match=message):
        resolve_refine(value)
