"""Overrides: which weights they select, what they set, and what is refused; and the kinds of weights."""

import pytest
import torch

from hf_esm import METHODS, HfEsmError, Mean, MergeOptions
from hf_esm.architecture import KINDS, weight_kinds
from hf_esm.checkpoints import Access, open_checkpoint, resolve_source
from hf_esm.planning import plan_merge, resolve_overrides
from hf_esm.planning.overrides import interpolated
from support.architectures import ARCHITECTURES
from support.problems import seeds
from support.routed_toys import tuned


EXAMPLES = {
    "bert": {
        "embeddings.word_embeddings.weight": "embedding",
        "embeddings.LayerNorm.bias": "norm",
        "encoder.layer.1.attention.self.query.weight": "attention",
        "encoder.layer.1.attention.output.dense.bias": "bias",
        "encoder.layer.0.attention.output.LayerNorm.weight": "norm",
        "encoder.layer.0.output.dense.weight": "mlp",
        "pooler.dense.weight": "head",
    },
    "gpt2": {"transformer.wte.weight": "embedding", "transformer.h.0.attn.c_attn.weight": "attention"}
    | {"transformer.h.1.mlp.c_fc.weight": "mlp", "transformer.ln_f.weight": "norm"},
    "llama": {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head", "model.norm.weight": "norm"}
    | {"model.layers.0.self_attn.q_proj.weight": "attention", "model.layers.1.mlp.up_proj.weight": "mlp"},
    "mixtral": {"model.layers.0.mlp.experts.gate_up_proj": "mlp", "model.layers.0.mlp.gate.weight": "mlp"},
    "t5": {"shared.weight": "embedding", "decoder.block.1.layer.1.EncDecAttention.k.weight": "attention"},
    "vit": {"embeddings.position_embeddings": "embedding", "layernorm.weight": "norm"},
    "mamba": {"backbone.layers.0.mixer.in_proj.weight": "mlp", "backbone.embeddings.weight": "embedding"},
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_weights_are_of_the_kinds_that_a_reader_expects(kind):
    kinds = weight_kinds(ARCHITECTURES[kind].build())
    assert {name: kinds[name] for name in EXAMPLES[kind]} == EXAMPLES[kind]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_matrix_of_every_architecture_has_a_kind(kind):
    model = ARCHITECTURES[kind].build()
    kinds = weight_kinds(model)
    assert kinds.keys() >= {name for name, _ in model.named_parameters()} and {*kinds.values()} <= {*KINDS, ""}
    assert all(kinds[name] for name, parameter in model.named_parameters() if parameter.dim() == 2)


@seeds
def test_numbers_are_interpolated_linearly(seed):
    numbers = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for place in torch.linspace(0, 1, 41, dtype=torch.float64).tolist():
        left = min(int(place * 4), 3)
        expected = numbers[left] + (place * 4 - left) * (numbers[left + 1] - numbers[left])
        assert interpolated(tuple(numbers.tolist()), place) == pytest.approx(expected.item(), abs=1e-12)
    assert interpolated((3.0,), 0.7) == interpolated(3.0, 0.2) == 3.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = ARCHITECTURES["llama"].build(num_hidden_layers=5)
    base.save_pretrained(folder / "base")
    for seed, task in enumerate(("law", "code")):
        tuned(base, seed, 0.1).save_pretrained(folder / task)
    opened = open_checkpoint(resolve_source(str(folder / "base"), "base", Access()))
    experts = {t: open_checkpoint(resolve_source(str(folder / t), t, Access()), opened) for t in ("law", "code")}
    return opened, experts


def planned(checkpoints, *overrides, method="task-arithmetic", **options):
    base, experts = checkpoints
    resolved = resolve_overrides(overrides, experts)
    return plan_merge(base, experts, METHODS[method](), overrides=resolved, **options)


def test_key_by_key_the_last_entry_that_selects_a_weight_wins(checkpoints):
    plan = planned(
        checkpoints,
        {"match": "self_attn", "method": "mean", "alpha": 0.6},
        {"match": r"q_proj", "kind": "attention", "alpha": 0.2, "weights": {"law": 3}},
        {"match": "layers.1.*q_proj", "method": "ties"},
        weights={"code": 0.5},
    )
    rules = {name: plan.rule_of(name) for name in plan.heads.shared}
    of = {place: rules[f"layers.{place}.weight"] for place in ("0.self_attn.k_proj", "0.self_attn.q_proj")}
    of["last"] = rules["layers.1.self_attn.q_proj.weight"]
    found = [(rule.method.name, rule.alpha, rule.weights) for rule in of.values()]
    assert found == [("mean", 0.6, (1.0, 0.5)), ("mean", 0.2, (3.0, 0.5)), ("ties", 0.2, (3.0, 0.5))]
    assert rules["layers.0.mlp.up_proj.weight"].method.name == "task-arithmetic"
    assert [method.name for method in plan.methods] == ["task-arithmetic", "mean", "ties"]
    assert "override   names with 'self_attn': mean, alpha 0.6" in str(plan)


def test_lists_run_over_the_blocks_and_reach_the_weights_around_them(checkpoints):
    plan = planned(checkpoints, {"match": ".", "alpha": [1, 0, 0.5], "weights": {"code": [0.0, 2.0]}})
    rules = {name: plan.rule_of(name) for name in plan.heads.shared}
    alphas = [rules[f"layers.{i}.mlp.up_proj.weight"].alpha for i in range(5)]
    assert alphas == pytest.approx([1, 0.5, 0, 0.25, 0.5])
    weights = [rules[f"layers.{i}.mlp.up_proj.weight"].weights for i in range(5)]
    assert weights == [(1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (1.0, 1.5), (1.0, 2.0)]
    assert rules["embed_tokens.weight"].alpha == 1 and rules["lm_head.weight"].alpha == 0.5
    assert "alpha 1 to 0 to 0.5, weight of code 0 to 2" in str(plan)


def test_an_override_is_written_as_it_was_read():
    entry = {"match": "mlp", "kind": "mlp", "weights": {"a": [1.0, 0.0]}, "method": {"name": "mean"}, "alpha": 2.0}
    (override,) = resolve_overrides([entry], ["a"])
    assert override.describe() == entry and override.method == Mean()
    (none,) = resolve_overrides([{"kind": "mlp", "alpha": "5e-1", "method": None}], ["a"])
    assert none.describe() == {"kind": "mlp", "alpha": 0.5}
    assert resolve_overrides(None, ["a"]) == []


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"match": "mlp", "alpha": 1}, "must be a list of mappings"),
        (["mlp"], "entry 1: must be a mapping"),
        ([{"match": "mlp", "alpha": 1}, {"macth": "mlp"}], "entry 2: there is no key 'macth' (did you mean 'match'?)"),
        ([{"alpha": 1}], "selects no weights"),
        ([{"match": "mlp"}], "sets nothing"),
        ([{"match": "(", "alpha": 1}], "not a regular expression"),
        ([{"match": 3, "alpha": 1}], "not a regular expression"),
        ([{"kind": "atention", "alpha": 1}], "did you mean 'attention'?"),
        ([{"kind": "mlp", "alpha": "auto"}], "`alpha` must be a finite number"),
        ([{"kind": "mlp", "alpha": []}], "`alpha` is an empty list"),
        ([{"kind": "mlp", "alpha": float("nan")}], "finite number"),
        ([{"kind": "mlp", "weights": 3}], "`weights` must be numbers by task"),
        ([{"kind": "mlp", "weights": {"lwa": 3}}], "did you mean 'law'?"),
        ([{"kind": "mlp", "method": "auto"}], "Name the method"),
        ([{"kind": "mlp", "method": "esm++"}], "cannot merge some weights alone"),
        ([{"kind": "mlp", "method": "concrete-adamerging"}], "learns from the whole model"),
        ([{"kind": "mlp", "method": "tsvm"}], "no method 'tsvm'"),
    ],
)
def test_what_is_wrong_is_named(entries, says):
    with pytest.raises(HfEsmError) as caught:
        resolve_overrides(entries, ["law", "code"])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "method", "says"),
    [
        ({"match": "self_atn", "alpha": 1}, "mean", "matches 'self_atn' (did you mean 'self_attn'?); names are like"),
        ({"match": "mlp", "kind": "attention", "alpha": 1}, "mean", "that matches 'mlp' is of kind 'attention'"),
        ({"kind": "bias", "alpha": 1}, "mean", "is of kind 'bias'; there are attention, mlp, norm, embedding, head."),
        ({"kind": "mlp", "method": "mean"}, "concrete-task-arithmetic", "learns on the whole model"),
        ({"kind": "mlp", "method": "mean", "weights": {"law": -1}}, "esm", "sum to 0"),
    ],
)
def test_what_does_not_fit_the_model_is_named(checkpoints, entry, method, says):
    with pytest.raises(HfEsmError) as caught:
        planned(checkpoints, entry, method=method)
    assert says in str(caught.value)


def test_alpha_of_a_kind_that_is_not_there_is_refused(checkpoints):
    with pytest.raises(HfEsmError, match="no merged weight of kind 'bias'"):
        planned(checkpoints, scaled_kinds=["bias"])
    with pytest.raises(HfEsmError, match="did you mean 'attention'"):
        MergeOptions(alpha={"atention": 1})
    with pytest.raises(HfEsmError, match="`alpha` of 'mlp' must be a finite number or 'auto', not 'fast'"):
        MergeOptions(alpha={"mlp": "fast"})
    options = MergeOptions(alpha={"mlp": "auto", "norm": "1e0"})
    assert options.alpha == {"mlp": "auto", "norm": 1.0} and options.searches_alpha
    assert not MergeOptions(alpha={"mlp": 2}).searches_alpha and MergeOptions(alpha="auto").searches_alpha
