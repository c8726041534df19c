"""Essential components as adapters: one expert compressed, several fused."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from ..architecture import to_matrices
from ..calibration import ActivationStatistics, calibrate_checkpoint
from ..checkpoints import (
    Access,
    find_processors,
    open_checkpoint,
    rank_settings,
    resolve_source,
    write_adapter,
    write_lora_adapter,
)
from ..data import Sample
from ..errors import HfEsmError
from ..linalg import essential_subspace, truncated_svd
from ..methods import EssentialMerge, fuse_with_singular_values, share_subtracted
from ..planning import MergeData, MergeOptions, MergePlan, check_values, plan_merge
from ..tuners.essential import EssentialComponentsConfig, EssentialComponentsLayer
from ..utils import default_accelerator, main_first, new_folder, together
from .expert_statistics import gather_statistics


# What the one expert is called in messages.
_TASK = "expert"


# The options of a merge that mean something here.
_OPTIONS = {
    "num_samples",
    "seed",
    "max_length",
    "columns",
    "heads",
    "batch_size",
    "allow_pickle",
    "trust_remote_code",
    "progress",
}


def essential_components(
    base: Any,
    expert: Any,
    calibration: Any = None,
    *,
    rank: int,
    output_dir: str | os.PathLike,
    shrinkage: float = 0.0,
    as_lora: bool = True,
    processor: Any = None,
    token: Optional[str | bool] = None,
    accelerator: Optional[Accelerator] = None,
    **options: Any,
) -> Path:
    """Compress one fine-tuned model to an adapter: the essential components (arXiv 2602.20208) of its update.

    Of every calibrated linear map of the body that it shares with the base, the update `Δ [d_out, d_in]` is kept as
    `E C`, with `E` the `rank` leading principal directions of the output shift `X Δᵀ` on the expert's own samples.
    What else was tuned is not in the adapter: heads, embeddings, norms, biases, the experts of a mixture.

    Args:
        base: the checkpoint that the expert was tuned from, and that the adapter goes on; as for `merge_models`.
        expert: the fine-tuned model, as for `merge_models`.
        calibration: its unlabelled samples, `ActivationStatistics` or the path of a statistics file, as for
            `merge_models`; not needed where a statistics file stands beside its weights.
        rank: components per linear map; where the output shift has fewer, the map gets those.
        output_dir: folder to write; it must not exist yet.
        shrinkage: weight of the identity in the inputs' second moments; see `essential_subspace`.
        as_lora: write an ordinary LoRA adapter (`A = C`, `B = E`), which anyone loads without hf_esm; otherwise one of
            `EssentialComponentsConfig`, which can be fused with others and keeps float32 factors.
        processor: tokenizer or processor, where none stands beside the models.
        token: access token for the Hub.
        accelerator: the Accelerate instance to calibrate under; by default a new one.
        options: fields of `MergeOptions`: `num_samples`, `seed`, `max_length`, `columns`, `heads`, `batch_size`,
            `allow_pickle`, `trust_remote_code`, `progress`.

    Returns the folder. Factors are float32.

    Raises:
        HfEsmError: on input that does not fit; nothing is left at `output_dir`.
    """
    unknown = options.keys() - _OPTIONS
    if unknown:
        raise TypeError(f"essential_components has no argument {sorted(unknown)[0]!r}")
    if not isinstance(rank, int) or rank < 1:
        raise HfEsmError(f"rank must be a whole number, 1 or more, not {rank!r}.")
    if not 0 <= shrinkage < float("inf"):
        raise HfEsmError(f"shrinkage must be 0 or more, not {shrinkage!r}.")
    options, accelerator = MergeOptions(**options), accelerator or default_accelerator()
    output = new_folder(output_dir)
    access = Access(token, options.allow_pickle, options.trust_remote_code)

    def read() -> tuple[MergePlan, Optional[ActivationStatistics], list[Sample]]:
        sources = {"base": resolve_source(base, "base", access)}
        sources[_TASK] = resolve_source(expert, "expert", access)
        opened = open_checkpoint(sources["base"])
        tuned = {_TASK: open_checkpoint(sources[_TASK], opened)}
        plan = plan_merge(opened, tuned, EssentialMerge(), options.heads, sources=sources)
        processors = find_processors(sources, processor, options.trust_remote_code)
        found, samples = gather_statistics(plan, sources, MergeData({_TASK: calibration}), processors, options)
        check_values(plan)
        return plan, found[_TASK], samples.get(_TASK, [])

    plan, statistics, samples = main_first(accelerator, read)
    if statistics is None:
        with TemporaryDirectory(ignore_cleanup_errors=True) as spill:
            tuned = plan.experts[_TASK]
            statistics = calibrate_checkpoint(tuned, samples, options, accelerator, Path(spill), _TASK)
    with together(accelerator):
        if accelerator.is_main_process:
            factors = _decompose(plan, statistics, rank, shrinkage)
            (_write_lora if as_lora else _write_components)(output, factors, plan)
    return output


def _decompose(
    plan: MergePlan, statistics: ActivationStatistics, rank: int, shrinkage: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """`(C [r, d_in], E [d_out, r])` by module of the base, float32."""
    factors = {}
    for name in plan.heads.shared:
        linear = plan.base.linear.get(name)
        if linear is None or linear.slices or name not in statistics:
            continue
        (delta,) = to_matrices(plan.experts[_TASK].update(name, plan.base.tensor(name)), linear)
        directions = essential_subspace(statistics[name].factor, delta, rank, shrinkage).directions
        factors[linear.module] = (directions.T @ delta.double()).float(), directions.float()
    return factors


def _write_lora(output: Path, factors: dict[str, tuple[Tensor, Tensor]], plan: MergePlan) -> None:
    base = plan.base
    write_lora_adapter(
        output,
        factors,
        base.source or None,
        fan_in_fan_out=any(linear.transposed for linear in base.linear.values() if linear.module in factors),
        base_revision=base.revision,
        base_class=type(base.skeleton),
    )


def _write_components(output: Path, factors: dict[str, tuple[Tensor, Tensor]], plan: MergePlan) -> None:
    factors = {module: (c, e) for module, (c, e) in factors.items() if len(c)}
    rank, pattern = rank_settings({module: len(c) for module, (c, _) in factors.items()})
    config = EssentialComponentsConfig(
        r=rank,
        rank_pattern=pattern,
        target_modules=list(factors),
        inference_mode=True,
        base_model_name_or_path=plan.base.source or None,
        revision=plan.base.revision,
    )
    tensors = {f"{module}.essential_components_C": c for module, (c, _) in factors.items()}
    tensors |= {f"{module}.essential_components_E": e for module, (_, e) in factors.items()}
    write_adapter(output, config, tensors, type(plan.base.skeleton))


@torch.no_grad()
def fuse_components(model: PeftModel, adapter_names: Sequence[str], new_name: str) -> None:
    """Add an adapter that is the ESM merge (arXiv 2602.20208) of loaded adapters of essential components.

    Per linear map, as `EssentialMerge` does by default: the leading components of each of the `T` adapters,
    orthogonalised against each other, with their singular values, scaled, and a part of the updates' sum taken off. No
    update is ever built; the new adapter's rank is at most the sum of the ranks. It is not made active; saved modules
    such as heads stay with the adapters that brought them.

    Raises:
        HfEsmError: on fewer than two adapters, one that is not there or of another kind, or a name that is taken.
    """
    _check_names(model, adapter_names, new_name)
    factors = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, EssentialComponentsLayer):
            held = [name for name in adapter_names if name in layer.essential_components_E]
            updates = [(layer.essential_components_E[name], layer.essential_components_C[name]) for name in held]
            fused = _fuse(updates, len(adapter_names))
            if fused is not None:
                factors[path] = fused
    rank, pattern = rank_settings({path: len(coordinates) for path, (_, coordinates) in factors.items()})
    first = model.peft_config[adapter_names[0]]
    config = EssentialComponentsConfig(
        r=rank,
        rank_pattern=pattern,
        target_modules=list(factors),
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        inference_mode=first.inference_mode,
    )
    model.add_adapter(new_name, config)
    for path, (directions, coordinates) in factors.items():
        layer = model.get_base_model().get_submodule(path)
        layer.essential_components_E[new_name].copy_(directions)
        layer.essential_components_C[new_name].copy_(coordinates)


def _check_names(model: PeftModel, adapter_names: Sequence[str], new_name: str) -> None:
    if not isinstance(model, PeftModel):
        raise HfEsmError(f"Fusing components takes a PeftModel that holds the adapters, not a {type(model).__name__}.")
    if isinstance(adapter_names, str) or len(set(adapter_names)) != len(adapter_names) or len(adapter_names) < 2:
        raise HfEsmError(f"Fusing components takes two adapters or more, each once; got {adapter_names!r}.")
    for name in adapter_names:
        if name not in model.peft_config:
            raise HfEsmError(f"The model has no adapter {name!r}; it has {', '.join(model.peft_config)}.")
        if not isinstance(model.peft_config[name], EssentialComponentsConfig):
            kind = model.peft_config[name].peft_type.value
            raise HfEsmError(f"Adapter {name!r} is a {kind} adapter; only essential components are fused.")
    if not isinstance(new_name, str) or not new_name or "." in new_name:
        raise HfEsmError(f"An adapter's name is a string without dots, not {new_name!r}. Choose another new_name.")
    if new_name in model.peft_config:
        raise HfEsmError(f"The model already has an adapter {new_name!r}. Choose another name.")


def _fuse(updates: list[tuple[Tensor, Tensor]], tasks: int) -> Optional[tuple[Tensor, Tensor]]:
    """The fusion of one map's updates `E_t C_t` as such a pair: E orthonormal, the strongest component first. None
    where no adapter changes the map.
    """
    method = EssentialMerge()
    directions, coordinates, wholes = [], [], []
    for e, c in updates:
        basis, triangle = torch.linalg.qr(e.cpu().double())  # training leaves E neither orthonormal nor independent
        whole = triangle @ c.cpu().double()
        kept = max(int(min(len(e), c.shape[1]) * method.rank_share) // tasks, 1)
        directions.append(basis[:, :kept])
        coordinates.append(whole[:kept])
        wholes.append((basis, whole))
    if not any(found.any() for found in coordinates):
        return None
    left, right = fuse_with_singular_values(directions, coordinates)
    norm = torch.stack([whole.norm() for _, whole in wholes]).norm()
    scale = method.factor * norm / torch.linalg.qr(left, mode="r").R.matmul(right).norm()
    total = torch.cat([basis for basis, _ in wholes], dim=1), torch.cat([whole for _, whole in wholes])
    size = torch.linalg.qr(total[0], mode="r").R.matmul(total[1]).norm()
    share = share_subtracted(method.sum_subtracted, size, norm)
    left, right = torch.cat([left * scale, -share * total[0]], dim=1), torch.cat([right, total[1]])
    basis, triangle = torch.linalg.qr(left)
    turn, values, right = truncated_svd(triangle @ right, len(triangle))
    return basis @ turn, values[:, None] * right
