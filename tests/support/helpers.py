"""Tiny models of real classes, experts made of them, and what merging them must give: the literal formulas of
`reference`, on inputs that are collected here one sample at a time, without batches, padding or masks.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_esm import MergeResult, merge_models
from hf_esm.calibration import collect_statistics
from support import reference
from support.problems import relative_error


TOLERANCE = 1e-4  # of every merged update, in the Frobenius norm
VOCABULARY = 60
LENGTHS = (5, 11, 8, 12, 3, 9, 12)

Samples = list[dict[str, Tensor]]


def text_samples(seed: int) -> Samples:
    """Token ids of differing lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCABULARY, (length,), generator=generator)} for length in LENGTHS]


def with_end(seed: int) -> Samples:
    """Texts with the end-of-sequence token that the classifiers of encoder-decoders read."""
    return [{"input_ids": torch.cat([row["input_ids"], torch.tensor([2])])} for row in text_samples(seed)]


def image_samples(seed: int, size: int = 16) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(3, size, size, generator=generator)} for _ in range(6)]


def sound_samples(seed: int) -> Samples:
    """Waves of differing lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_values": torch.randn(length, generator=generator)} for length in (400, 520, 440, 520)]


def sequence_pairs(seed: int) -> Samples:
    """Sources and targets, the lengths of one unlike those of the other."""
    targets = [{"labels": sample["input_ids"]} for sample in text_samples(seed + 100)]
    return pairs(text_samples(seed), targets[1:] + targets[:1])


def pairs(first: Samples, second: Samples) -> Samples:
    """Samples that hold the inputs of both."""
    return [{**one, **other} for one, other in zip(first, second)]


@dataclass(frozen=True)
class Architecture:
    """A tiny model of a real class, and how to feed it.

    Attributes:
        model_class: name of the class in Transformers.
        settings: arguments of its config's class.
        samples: unbatched inputs by seed.
        stacked: regular expression of the parameters that stack the matrices of several experts.
        not_tokens: regular expression of linear maps that read nothing of the samples.
        first_call: of a map that is called twice in a pass, the second call reads nothing of the samples.
    """

    model_class: str
    settings: dict[str, Any]
    samples: Callable[[int], Samples] = text_samples
    stacked: Optional[str] = None
    not_tokens: Optional[str] = None
    first_call: bool = False

    def build(self, model_class: Optional[str] = None, **settings: Any) -> PreTrainedModel:
        """Random weights; none is left at zero or one, nor the embedding of the padding token."""
        cls = getattr(transformers, model_class or self.model_class)
        torch.manual_seed(0)
        model = cls(cls.config_class(**copy.deepcopy(self.settings | settings))).eval()
        return perturb(model, 0.2, 0)


def perturbed(model: PreTrainedModel, scale: float, seed: int) -> PreTrainedModel:
    """A copy of the model with noise, of full rank, on every weight that is saved."""
    return perturb(copy.deepcopy(model), scale, seed)


@torch.no_grad()
def perturb(model: PreTrainedModel, scale: float, seed: int) -> PreTrainedModel:
    """The model itself, with noise added as `perturbed` does to a copy."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for name, weight in floating_weights(model).items():
        noise = scale * torch.randn(weight.shape, generator=generator)
        weight.add_((noise.abs() if "running_var" in name else noise).to(weight.dtype))
    return model


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model in which the head is a weight of its own, if the model ties it to the embeddings.

    What PEFT merges into one of two tied weights changes both, so that the merged model is not the trained one.
    """
    model = copy.deepcopy(model)
    if (model.all_tied_weights_keys or {}).keys() == {"lm_head.weight"}:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings, model.all_tied_weights_keys = False, {}
    return model


@torch.no_grad()
def train(model: PreTrainedModel, config: PeftConfig, seed: int = 3) -> PeftModel:
    """The model with an adapter, and noise on all that PEFT would train."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


def token_inputs(model: PreTrainedModel, samples: Samples, architecture: Architecture) -> dict[str, Tensor]:
    """`X` of every linear map that runs, by its weight's name, from one sample at a time; of stacked matrices, of each
    by its index behind that.
    """
    rows: dict[str, list[Tensor]] = defaultdict(list)
    called: set[str] = set()

    def reader(name: str) -> Callable:
        def read(module: nn.Module, args: tuple) -> None:
            if not (architecture.first_call and name in called):
                rows[name].append(args[0].double().reshape(-1, args[0].shape[-1]))
            called.add(name)

        return read

    handles = [
        module.register_forward_pre_hook(reader(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and not (architecture.not_tokens and re.search(architecture.not_tokens, name))
    ]
    if architecture.stacked:
        handles += [
            module.register_forward_hook(token_reader(name, rows))
            for name, module in model.named_modules()
            if re.search(architecture.stacked, f"{name}.down_proj")
        ]
    for sample in samples:
        called.clear()
        model(**{name: value[None] for name, value in sample.items()})
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def token_reader(name: str, rows: dict[str, list[Tensor]]) -> Callable:
    """A forward hook of a mixture's experts: each token through each of its experts by itself, which has to give what
    the module gave.
    """

    def read(module: nn.Module, args: tuple, output: Tensor) -> None:
        expected = torch.zeros_like(output, dtype=torch.float64)
        held = {key: value.double() for key, value in module.named_parameters()}
        for at, (token, chosen, weights) in enumerate(zip(*args)):
            for expert, weight in zip(chosen.tolist(), weights.double()):
                between, after = token.double(), expected[at].clone()
                for key in ("gate_up_proj", "down_proj"):
                    rows[f"{name}.{key}.{expert}"].append(between[None])
                    matrix, bias = held[key][expert], held.get(f"{key}_bias")
                    between = between @ (matrix if module.is_transposed else matrix.T)
                    between = between + (0 if bias is None else bias[expert])
                    between = gated(module, between) if key == "gate_up_proj" else between
                expected[at] = after + weight * between
        assert relative_error(output.double(), expected) < 1e-5

    return read


def gated(module: nn.Module, values: Tensor) -> Tensor:
    if module.is_concatenated:
        gate, up = values.chunk(2)
        return gate * gate.sigmoid() * up
    gate, up = values[::2].clamp(max=module.limit), values[1::2].clamp(-module.limit, module.limit)
    return (up + 1) * gate * (gate * module.alpha).sigmoid()


@dataclass(frozen=True)
class Rules:
    """What a method does with the weights, in the terms of `reference`.

    Attributes:
        esm: settings of `reference.esm` that differ from its defaults; None for a method that calibrates nothing.
        matrix: rule for other matrices.
        rest: rule for parameters of other kinds.
        layer_exponent: see `reference.layer_scales`.
        uncalibrated: regular expression of linear maps that are treated as other matrices.
        sisters: names of the maps that are merged as one weight.
        biases: rule for biases, if they have one of their own.
        alpha: what every update is multiplied by, but for embeddings.
        counted: whether embeddings are merged by token counts.
    """

    esm: Optional[dict[str, Any]] = None
    matrix: Callable = reference.tsv_m
    rest: Callable = reference.mean
    biases: Optional[Callable] = None
    layer_exponent: float = 0.0
    uncalibrated: str = "^$"
    sisters: tuple[str, ...] = ()
    alpha: float = 1.0
    counted: bool = True


PUBLISHED = {
    "gamma": 0.15,
    "shrinkage": 0.0,
    "keep_singular_values": False,
    "match_norm": False,
    "factor": 1.0,
    "rank_share": 1.0,
    "sum_subtracted": 0.0,
    "all_columns": True,
}
RULES = {
    "esm": Rules(esm={}),
    "tsv-m": Rules(),
    "mean": Rules(matrix=reference.mean),
    "task-arithmetic": Rules(
        matrix=reference.task_arithmetic,
        rest=reference.task_arithmetic,
        alpha=0.3,
    ),
    "esm-roberta": Rules(
        esm=PUBLISHED,
        matrix=lambda deltas: reference.tsv_m(deltas, keep_scale=True),
        biases=lambda deltas: torch.zeros_like(deltas[0]),  # those of the base
        layer_exponent=2.0,
        counted=False,
    ),
    "esm-vit": Rules(
        esm=PUBLISHED | {"task_exponent": 2.0, "dimension_exponent": 2.0, "factor": 2.0},
        layer_exponent=2.0,
        uncalibrated=r"\.(o_proj|out_proj)\.weight$",
        sisters=("q_proj", "k_proj", "v_proj"),
        counted=False,
    ),
}


def inside(model: PreTrainedModel, name: str) -> str:
    """A weight's name inside the body that all task models share."""
    prefix = model.base_model_prefix
    return name.removeprefix(f"{prefix}.") if isinstance(getattr(model, prefix, None), nn.Module) else name


def floating_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and buffers that are saved, by name; of weights that are tied, the first alone."""
    saved = model.state_dict().keys() - model._keys_to_ignore_on_save
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach() for name, value in found.items() if name in saved and value.is_floating_point()}


def expected_updates(  # noqa: C901 - every rule of every method in one place, as it is read in the papers
    base: PreTrainedModel, experts: list[PreTrainedModel], architecture: Architecture, rules: Rules
) -> dict[str, Tensor]:
    """What is added to every weight of the base that all experts have, float64, by its name in the base.

    Expert `i` was calibrated on the samples of seed `i`.
    """
    weights = floating_weights(base)
    tuned = [{inside(expert, name): value for name, value in floating_weights(expert).items()} for expert in experts]
    inputs: list[dict[str, Tensor]] = []
    if rules.esm is not None:
        for seed, expert in enumerate(experts):
            rows = token_inputs(expert, architecture.samples(seed), architecture)
            inputs.append({inside(expert, name): x for name, x in rows.items()})
    linear = {f"{name}.weight": m for name, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    embedded = {f"{name}.weight" for name, m in base.named_modules() if rules.counted and isinstance(m, nn.Embedding)}
    counts = token_counts(experts, architecture) if embedded & weights.keys() else []
    buffers = {name for name, _ in base.named_buffers()}  # averages, or what nobody trains
    transposed = {
        f"{name}.{key}"
        for name, m in base.named_modules()
        for key, _ in m.named_parameters(recurse=False)
        if getattr(m, "is_transposed", False)
    }
    updates: dict[str, Tensor] = {}
    norms: dict[str, dict[str, float]] = defaultdict(dict)
    for name, weight in weights.items():
        if name in updates or any(inside(base, name) not in found for found in tuned):
            continue
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        sisters = [f"{parent}.{s}.weight" for s in rules.sisters] if leaf in rules.sisters else [name]
        deltas = [[found[inside(base, s)].double() - weights[s].double() for s in sisters] for found in tuned]
        deltas = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in deltas]
        known = name in linear and inputs and all(inside(base, name) in found for found in inputs)
        stacked = bool(architecture.stacked and re.search(architecture.stacked, name))
        if known and not re.search(rules.uncalibrated, name):
            turned = isinstance(linear[name], Conv1D)
            deltas = [delta.T for delta in deltas] if turned else deltas
            merged = reference.esm(deltas, [found[inside(base, name)] for found in inputs], **rules.esm)
            merged = merged.T if turned else merged
        elif name in buffers:
            updates[name] = reference.mean(deltas) / rules.alpha
            continue
        elif name in embedded:
            known = [found.get(inside(base, name)) for found in counts]
            by_counts = all(count is not None for count in known)
            merged = reference.counted_embedding(deltas, known) if by_counts else reference.mean(deltas)
            updates[name] = merged / rules.alpha  # α scales no embedding
            continue
        elif rules.biases and name.endswith("bias"):
            merged = rules.biases(deltas)
        elif weight.dim() == 2:
            merged = rules.matrix(deltas)
        elif stacked:
            turned = rules.esm is not None and name in transposed
            merged = []
            for i, matrices in enumerate(zip(*deltas)):
                read = [found.get(f"{inside(base, name)}.{i}") for found in inputs]
                if rules.esm is None or any(x is None for x in read):
                    merged.append(rules.matrix(list(matrices)))
                    continue
                matrices = [matrix.T if turned else matrix for matrix in matrices]
                found = reference.esm(matrices, read, **rules.esm)
                merged.append(found.T if turned else found)
            merged = torch.stack(merged)
        else:
            merged = rules.rest(deltas)
        parts = merged.split([len(weights[s]) for s in sisters]) if len(sisters) > 1 else [merged]
        updates |= dict(zip(sisters, parts))
        if weight.dim() == 2 or stacked:
            for sister in sisters:
                norms[re.sub(r"\.\d+(?=\.)", "", sister)][sister] = merged.norm().item()
    for of_type in norms.values():
        for name, scale in zip(of_type, reference.layer_scales(list(of_type.values()), rules.layer_exponent)):
            updates[name] = updates[name] * scale
    return {name: rules.alpha * update for name, update in updates.items()}


def token_counts(experts: list[PreTrainedModel], architecture: Architecture) -> list[dict[str, Tensor]]:
    """How often each expert's samples read each row of each embedding; `test_token_counts.py` tests the counting."""
    return [
        collect_statistics(
            expert, architecture.samples(seed), batch_size=1, progress=False, counts_only=True
        ).token_counts
        for seed, expert in enumerate(experts)
    ]


def save(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder's safetensors files by their names on disk."""
    found: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                assert key not in found, f"{key} is stored twice"
                found[key] = file.get_tensor(key)
    return found


def merge(
    base: Any, experts: list[Any], architecture: Architecture, output: Path, method: str = "esm", **options: Any
) -> MergeResult:
    """`merge_models` as the tests call it: tasks `t0`, `t1`, …, each with its own samples, in batches of three; `esm`
    and `tsv-m` exactly, without a tolerance.
    """
    calibration = {f"t{seed}": architecture.samples(seed) for seed in range(len(experts))}
    options = {"calibration": calibration, "batch_size": 3, "progress": False, **options}
    named = {f"t{i}": expert for i, expert in enumerate(experts)}
    settings = {"name": method, "tolerance": 0} if method in ("esm", "tsv-m") else method
    return merge_models(base, named, method=settings, output_dir=str(output), **options)


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The merged model in the class of `model`, read by Transformers alone, with nothing missing and nothing left."""
    found, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return found


def check_weights(base: PreTrainedModel, merged: PreTrainedModel, updates: dict[str, Tensor]) -> None:
    """Every weight is the base's plus its update; what has none is the base's own."""
    before, after, tied = base.state_dict(), merged.state_dict(), merged.all_tied_weights_keys
    assert after.keys() == before.keys()
    for name, weight in after.items():
        if name in tied:
            assert merged.get_parameter(name) is merged.get_parameter(tied[name]), f"{name} is no longer tied"
        elif name in updates:
            error = relative_error(weight.double() - before[name].double(), updates[name])
            assert error < TOLERANCE, f"{name}: off by {error:.2g}"
        else:
            assert torch.equal(weight, before[name]), f"{name} was changed"
