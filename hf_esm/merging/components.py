"""From a fine-tuned model to an adapter of its essential components."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

from accelerate import Accelerator
from torch import Tensor

from ..architecture import to_matrices
from ..calibration.calibrator import calibrate_checkpoint
from ..calibration.statistics import ActivationStatistics
from ..checkpoints import open_checkpoint, resolve_source
from ..checkpoints.lora_export import new_folder, rank_settings, write_adapter, write_lora_adapter
from ..data.samples import Sample
from ..errors import HfEsmError
from ..linalg import essential_subspace
from ..methods import EssentialMerge
from ..planning.arguments import find_processors, gather_statistics
from ..planning.options import MergeOptions
from ..planning.plan import MergePlan, check_values, plan_merge
from ..tuners.essential.config import EssentialComponentsConfig
from ..utils.distributed import default_accelerator, main_first, together


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
    open_options = (token, options.allow_pickle, options.trust_remote_code)

    def read() -> tuple[MergePlan, Optional[ActivationStatistics], list[Sample]]:
        sources = {"base": resolve_source(base, "base", *open_options)}
        sources[_TASK] = resolve_source(expert, "expert", *open_options)
        opened = open_checkpoint(sources["base"])
        tuned = {_TASK: open_checkpoint(sources[_TASK], opened)}
        plan = plan_merge(opened, tuned, EssentialMerge(), options.heads, sources=sources)
        processors = find_processors(sources, processor, options.trust_remote_code)
        found, samples = gather_statistics(plan, sources, {_TASK: calibration}, processors, plan.method, options)
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
