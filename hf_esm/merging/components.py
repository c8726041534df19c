"""Essential components as adapters: compresses one expert, and fuses several adapters."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from torch import Tensor

from ..architecture import to_matrices
from ..calibration import ActivationStatistics, calibrate_checkpoint
from ..checkpoints import (
    Access,
    ModelSource,
    ModelSpec,
    base_of_adapters,
    find_processors,
    open_checkpoint,
    rank_settings,
    read_adapter_tensors,
    resolve_source,
    write_adapter,
    write_lora_adapter,
)
from ..data import DataSpec, Sample
from ..errors import HfEsmError
from ..linalg import essential_subspace, truncated_svd
from ..methods import EssentialMerge, fuse_with_singular_values, share_subtracted
from ..planning import MergeData, MergeOptions, MergePlan, check_values, plan_merge
from ..tuners.essential import EssentialComponentsConfig, EssentialComponentsLayer
from ..utils import default_accelerator, main_first, new_folder, together
from .expert_statistics import gather_statistics


logger = logging.getLogger(__name__)


# How the names of an adapter's tensors end.
_E, _C = ".essential_components_E", ".essential_components_C"


# The task name of the one expert, as messages and progress bars show it.
_TASK = "expert"


def essential_components(
    base: ModelSpec,
    expert: ModelSpec,
    calibration: Optional[DataSpec] = None,
    *,
    rank: int,
    output_dir: str | os.PathLike,
    shrinkage: float = 0.0,
    as_lora: bool = True,
    heads: str | Sequence[str] = "auto",
    processor: Any = None,
    num_samples: int = 32,
    seed: int = 0,
    max_length: Optional[int] = None,
    columns: Optional[Mapping[str, str]] = None,
    batch_size: int = 8,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
    token: Optional[str | bool] = None,
    accelerator: Optional[Accelerator] = None,
) -> Path:
    """Compress one fine-tuned model to an adapter: the essential components (arXiv 2602.20208) of its update.

    The update `Δ [d_out, d_in]` of every calibrated linear map of the body is approximated by `E C`, with `E` the
    `rank` leading principal directions of the output shift `X Δᵀ` on the expert's samples. Other tuned weights are not
    in the adapter: heads, embeddings, norms, biases, the experts of a mixture.

    Args:
        base: the checkpoint that the expert was tuned from, and that the adapter is for; as for `merge_models`.
        expert: the fine-tuned model, as for `merge_models`.
        calibration: the expert's unlabelled samples, `ActivationStatistics`, or the path of a statistics file, as for
            `merge_models`; not needed if there is a statistics file beside the expert's weights.
        rank: components per linear map; a map whose output shift has fewer gets those.
        output_dir: folder to write; it must not exist yet.
        shrinkage: weight of the identity in the inputs' second moments; see `essential_subspace`.
        as_lora: write an ordinary LoRA adapter (`A = C`, `B = E`), which loads without hf_esm; otherwise an adapter of
            `EssentialComponentsConfig`, which can be fused with others. Factors are float32.
        heads: modules that belong to the task, not to the body, as for `merge_models`.
        processor: tokenizer or processor of the samples; by default the one beside the models.
        num_samples: number of samples, chosen at random if there are more; 0 takes all.
        seed: seed of that choice.
        max_length: number of tokens that a text is cut to; by default what the model takes, at most 512.
        columns: names of the columns that hold `text`, `text_pair`, `text_target`, `image`, `audio`, if they differ.
        batch_size: samples per batch and process.
        allow_pickle: read `.bin` checkpoints, which can run code.
        trust_remote_code: run code that comes with a model.
        progress: show progress: bars on a terminal or in a notebook, elsewhere lines in the log.
        token: access token for the Hub; by default the one that `hf auth login` stored.
        accelerator: the Accelerate instance to calibrate under; by default a new one.

    Returns the folder.

    Raises:
        HfEsmError: on models or data that cannot be read or do not fit; nothing is left at `output_dir`.
    """
    if not isinstance(rank, int) or rank < 1:
        raise HfEsmError(f"rank must be a whole number, 1 or more, not {rank!r}.")
    if not 0 <= shrinkage < float("inf"):
        raise HfEsmError(f"shrinkage must be 0 or more, not {shrinkage!r}.")
    options = MergeOptions(
        heads=heads,
        num_samples=num_samples,
        statistics_samples=num_samples,
        seed=seed,
        max_length=max_length,
        columns=columns,
        batch_size=batch_size,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    accelerator = accelerator or default_accelerator()
    output = new_folder(output_dir)
    access = Access(token, allow_pickle, trust_remote_code)

    def read() -> tuple[MergePlan, Optional[ActivationStatistics], list[Sample]]:
        sources = {"base": resolve_source(base, "base", access), _TASK: resolve_source(expert, "expert", access)}
        return _read(sources, calibration, processor, options)

    plan, statistics, samples = main_first(accelerator, read)
    if statistics is None:
        with TemporaryDirectory(ignore_cleanup_errors=True) as spill:
            tuned = plan.experts[_TASK]
            statistics = calibrate_checkpoint(tuned, samples, options, accelerator, Path(spill), _TASK)
    with together(accelerator):
        if accelerator.is_main_process:
            factors = _decompose(plan, statistics, rank, shrinkage)
            if as_lora:
                _write_lora(output, factors, plan)
            else:
                settings = EssentialComponentsConfig(
                    base_model_name_or_path=plan.base.source or None, revision=plan.base.revision, inference_mode=True
                )
                _write_components(output, factors, settings, type(plan.base.skeleton))
    return output


def _read(
    sources: dict[str, ModelSource], calibration: Any, processor: Any, options: MergeOptions
) -> tuple[MergePlan, Optional[ActivationStatistics], list[Sample]]:
    """Open and check the models; return the plan, and the expert's statistics or its encoded samples."""
    base = open_checkpoint(sources["base"])
    experts = {_TASK: open_checkpoint(sources[_TASK], base)}
    plan = plan_merge(base, experts, EssentialMerge(), heads=options.heads, sources=sources)
    processors, notes = find_processors(sources, processor, options.trust_remote_code)
    plan.warnings += notes
    gathered = gather_statistics(plan, sources, MergeData({_TASK: calibration}), processors, options)
    check_values(plan)
    return plan, gathered.statistics[_TASK], gathered.samples.get(_TASK, [])


def _decompose(
    plan: MergePlan, statistics: ActivationStatistics, rank: int, shrinkage: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `(C [r, d_in], E [d_out, r])`, float32, by module of the base."""
    factors = {}
    for name in plan.heads.shared:
        linear = plan.base.linear.get(name)
        if linear is None or linear.slices or name not in statistics:
            continue
        (update,) = to_matrices(plan.experts[_TASK].update(name, plan.base.tensor(name)), linear)
        directions = essential_subspace(statistics[name].factor, update, rank, shrinkage).directions
        factors[linear.module] = (directions.T @ update.double()).float(), directions.float()
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


def _write_components(
    output: Path,
    factors: dict[str, tuple[Tensor, Tensor]],
    settings: EssentialComponentsConfig,
    base_class: Optional[type] = None,
) -> None:
    """Write `(C, E)` by module, with the settings of an adapter for those modules."""
    factors = {module: (c, e) for module, (c, e) in factors.items() if len(c)}
    rank, pattern = rank_settings({module: len(c) for module, (c, _) in factors.items()})
    config = replace(settings, r=rank, rank_pattern=pattern, target_modules=list(factors))
    tensors = {module + _C: c for module, (c, _) in factors.items()}
    tensors |= {module + _E: e for module, (_, e) in factors.items()}
    write_adapter(output, config, tensors, base_class)


@torch.no_grad()
def fuse_components(model: PeftModel, adapter_names: Sequence[str], new_name: str) -> None:
    """Add an adapter that is the ESM merge (arXiv 2602.20208) of loaded adapters of essential components.

    Each linear map is merged as `EssentialMerge` does by default: the leading components of each of the `T` adapters
    are orthogonalised against each other, keep their singular values, and are scaled; a part of the updates' sum is
    subtracted. No update is ever built; the rank of the new adapter is at most the sum of the ranks. The new adapter
    is not made active; saved modules such as heads stay with the adapters that they came with.

    Args:
        model: holds the adapters.
        adapter_names: two adapters or more, each once.
        new_name: name of the new adapter, without dots.

    Raises:
        HfEsmError: on fewer than two adapters, an adapter that is missing or of another kind, or a name that is taken.
    """
    _check_names(model, adapter_names, new_name)
    factors = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, EssentialComponentsLayer):
            present = [name for name in adapter_names if name in layer.essential_components_E]
            updates = [(layer.essential_components_E[name], layer.essential_components_C[name]) for name in present]
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
        _check_kind(model.peft_config[name], f"Adapter {name!r}")
    if not isinstance(new_name, str) or not new_name or "." in new_name:
        raise HfEsmError(f"An adapter's name is a string without dots, not {new_name!r}. Choose another new_name.")
    if new_name in model.peft_config:
        raise HfEsmError(f"The model already has an adapter {new_name!r}. Choose another name.")


def _check_kind(config: PeftConfig, title: str) -> None:
    if not isinstance(config, EssentialComponentsConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise HfEsmError(f"{title} is a {kind} adapter; only essential components are fused.")
    if config.gates:
        raise HfEsmError(
            f"{title} has gates, and may hold several tasks: fuse adapters without gates, or merge this one into the "
            "model by `merge_and_unload()`."
        )


@torch.no_grad()
def fuse_adapters(
    adapters: Sequence[str | os.PathLike],
    base: Optional[ModelSpec] = None,
    *,
    output_dir: str | os.PathLike,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    token: Optional[str | bool] = None,
) -> Path:
    """Fuse the folders of adapters of essential components into one, as `fuse_components` does. No weight of the base
    is read.

    Args:
        adapters: two or more folders or Hub ids.
        base: the model that the adapters are for; by default the one that all of them name.
        output_dir: folder to write, which must not exist yet.
        allow_pickle: read `.bin` adapters, which can run code.
        trust_remote_code: run code that comes with a model.
        token: access token for the Hub; by default the one that `hf auth login` stored.

    Returns the folder.

    Raises:
        HfEsmError: if an adapter is of another kind, or does not fit the base.
    """
    output, access = new_folder(output_dir), Access(token, allow_pickle, trust_remote_code)
    if len({str(adapter) for adapter in adapters}) != len(adapters) or len(adapters) < 2:
        raise HfEsmError("Fusing components takes two adapters or more, each once.")
    sources = [resolve_source(adapter, "adapter", access) for adapter in adapters]
    for source in sources:
        if not source.is_adapter:
            raise HfEsmError(f"{source.title} is a full model. Make an adapter of it: `essential_components`.")
        _check_kind(source.peft_config, source.title)
    base_source = resolve_source(base_of_adapters(sources) if base is None else base, "base", access)
    checkpoint = open_checkpoint(base_source, headers_only=True)
    updates: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for source in sources:
        open_checkpoint(source, checkpoint, headers_only=True)  # checks that the adapter fits the base
        tensors = read_adapter_tensors(source.folder, source.title, allow_pickle)
        for key in [key for key in tensors if key.endswith(_E)]:
            pair = tensors.pop(key), tensors.pop(key.removesuffix(_E) + _C)
            updates.setdefault(key.removesuffix(_E).removeprefix("base_model.model."), []).append(pair)
        if tensors:
            logger.warning("%s: %s and the like are left out of the fusion.", source.title, next(iter(tensors)))
    factors = {}
    for module, pairs in updates.items():
        if (fused := _fuse(pairs, len(sources))) is not None:
            factors[module] = fused[1].float(), fused[0].float()
    settings = replace(
        sources[0].peft_config,
        base_model_name_or_path=checkpoint.source,
        revision=checkpoint.revision,
        modules_to_save=None,
        inference_mode=True,
    )
    _write_components(output, factors, settings)
    return output


def _fuse(updates: list[tuple[Tensor, Tensor]], tasks: int) -> Optional[tuple[Tensor, Tensor]]:
    """Fuse one map's updates `E_t C_t`; returns `E`, orthonormal, the strongest component first, and `C`.

    None if no adapter changes the map.
    """
    method = EssentialMerge()
    directions, coordinates, whole_updates = [], [], []
    for e, c in updates:
        basis, triangle = torch.linalg.qr(e.cpu().double())  # training leaves E neither orthonormal nor independent
        rows = triangle @ c.cpu().double()
        rank = max(int(min(len(e), c.shape[1]) * method.rank_share) // tasks, 1)
        directions.append(basis[:, :rank])
        coordinates.append(rows[:rank])
        whole_updates.append((basis, rows))
    if not any(rows.any() for rows in coordinates):
        return None
    left, right = fuse_with_singular_values(directions, coordinates)
    norm = torch.stack([rows.norm() for _, rows in whole_updates]).norm()
    scale = method.factor * norm / _norm_of_product(left, right)
    total = torch.cat([basis for basis, _ in whole_updates], dim=1), torch.cat([rows for _, rows in whole_updates])
    share = share_subtracted(method.sum_subtracted, _norm_of_product(*total), norm)
    left, right = torch.cat([left * scale, -share * total[0]], dim=1), torch.cat([right, total[1]])
    basis, triangle = torch.linalg.qr(left)
    rotation, values, right = truncated_svd(triangle @ right, len(triangle))
    return basis @ rotation, values[:, None] * right


def _norm_of_product(left: Tensor, right: Tensor) -> Tensor:
    """The Frobenius norm of `left @ right`, without the product of their outer sides."""
    return torch.linalg.qr(left, mode="r").R.matmul(right).norm()
