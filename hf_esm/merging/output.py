"""What stands in the folder of a merged model: weights, configs, processor, heads, proxies, recipe, report, card."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from ..calibration import ActivationStatistics
from ..checkpoints import (
    CALIBRATION_FOLDER,
    RECIPE_FILE,
    REPORT_FILE,
    Checkpoint,
    ModelSource,
    ShardedWriter,
    output_dtype,
    save_head,
    to_stored,
    write_plan,
)
from ..data import Sample, save_samples
from ..errors import HfEsmError
from ..methods import describe_method
from ..planning import RECIPE_VERSION, MergeOptions, MergePlan, absolute_path, torch_dtype
from ..utils import bytes_of
from ..version import __version__
from .card import write_card
from .updates import MergedUpdates


def write_model(
    folder: Path,
    plan: MergePlan,
    updates: MergedUpdates,
    alpha: float,
    options: MergeOptions,
    progress: Callable[[Iterable], Iterable] = iter,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Pass two: every weight of the base with its scaled update, in the layout that `save_pretrained` would write; of
    `world_size` processes each writes files of its own.
    """
    base, dtype = plan.base, torch_dtype(options.dtype)
    groups = write_plan(base, dtype)
    planned = {key: tensor for group in groups for key, tensor in group.stored.items()}
    extra = base.extra_tensors() if base.extra else {}
    planned |= {key: torch.empty_like(tensor, device="meta") for key, tensor in extra.items()}
    with ShardedWriter(
        folder, planned, bytes_of(options.max_shard_size, "max_shard_size"), rank=rank, world_size=world_size
    ) as writer:
        for group in progress([group for group in groups if any(map(writer.owns, group.stored))]):
            tensors = {name: _written(name, base, updates.weight(name, alpha), dtype) for name in group.names}
            for key, tensor in to_stored(base, tensors).items():
                if writer.owns(key):
                    writer.write(key, tensor)
        for key in filter(writer.owns, extra):
            writer.write(key, extra[key])
        writer.sync()  # what is published is whole, whatever happens next


def _written(name: str, base: Checkpoint, weight: Tensor, asked: Optional[torch.dtype]) -> Tensor:
    """A weight in the dtype that it is written in."""
    found = weight.to(output_dtype(base.dtype(name), asked))
    if found.dtype == torch.float16 and not found.isfinite().all():
        raise HfEsmError(
            f"'{base.names[name]}': values up to {weight.abs().max():.3g} are too large for float16. Write the "
            "merged model in another dtype: dtype='bfloat16' or 'float32'."
        )
    return found


def write_files(
    folder: Path,
    plan: MergePlan,
    sources: dict,
    processors: dict,
    samples: dict,
    statistics: dict,
    calibration: Any,
    options: MergeOptions,
    result: Any,
) -> None:
    """All that stands beside the weights: configs, processor, heads, proxies, recipe, report, card."""
    model = plan.base.skeleton
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if options.dtype:
        config.dtype = torch_dtype(options.dtype)
    config.save_pretrained(folder)
    if model.can_generate():
        _generation_config(sources["base"]).save_pretrained(folder)
    if processors["base"] is not None:
        _with_chat_template(processors).save_pretrained(folder)
    for task, expert in plan.experts.items():
        save_head(folder, task, expert, plan.heads.by_task[task])
    recorded = _record_calibration(folder, plan, calibration, samples, options)
    recipe = {
        "recipe_version": RECIPE_VERSION,
        "hf_esm_version": __version__,
        "base": absolute_path(sources["base"].record, Path()),
        "experts": {task: absolute_path(sources[task].record, Path()) for task in plan.experts},
        **({"calibration": recorded} if recorded else {}),
        "method": describe_method(plan.method),
        "alpha": result.alpha,
        **{name: _plain(getattr(options, name)) for name in _RECORDED if getattr(options, name) is not None},
    }
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    report = {
        "alpha": result.alpha,
        "alpha_scores": result.alpha_scores,
        "seconds": {stage: round(value, 3) for stage, value in result.seconds.items()},
        "warnings": result.warnings,
        "weights": [asdict(weight) for weight in result.weights],
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    counts = [found.provenance.num_samples for found in statistics.values() if found is not None]
    write_card(folder, plan, sources, result.alpha, counts)


# Options that a recipe repeats; the others say where and how, not what.
_RECORDED = ("heads", "num_samples", "seed", "max_length", "columns", "dtype", "max_shard_size", "batch_size")


def _record_calibration(
    folder: Path, plan: MergePlan, calibration: Any, samples: dict[str, list[Sample]], options: MergeOptions
) -> dict:
    """Where the recipe finds the calibration again: where it was, in the statistics that were kept, or beside the
    recipe, where samples that were in memory are saved.
    """
    recorded: dict[str, Any] = {}
    for task in plan.experts:
        if isinstance(calibration, (str, os.PathLike)):
            recorded[task] = str(Path(calibration).expanduser().absolute() / f"{task}.safetensors")
            continue
        given = (calibration or {}).get(task)
        if task in samples and options.statistics_dir:
            kept = Path(options.statistics_dir).expanduser() / f"{task}.safetensors"
            recorded[task] = str(kept.absolute())
        elif isinstance(given, (str, os.PathLike)) and _goes_away(given, options):
            recorded[task] = f"{CALIBRATION_FOLDER}/{task}.safetensors"
            (folder / CALIBRATION_FOLDER).mkdir(exist_ok=True)
            shutil.copy(Path(given).expanduser(), folder / recorded[task])
        elif isinstance(given, (str, os.PathLike)):
            recorded[task] = str(Path(given).expanduser().absolute())
        elif isinstance(given, Mapping) and "path" in given:
            recorded[task] = absolute_path(given, Path())
        elif task in samples:
            recorded[task] = f"{CALIBRATION_FOLDER}/{task}.safetensors"
            save_samples(samples[task], folder / recorded[task])
        elif isinstance(given, ActivationStatistics) and plan.method.needs_statistics:
            recorded[task] = f"{CALIBRATION_FOLDER}/{task}.safetensors"
            given.save(folder / recorded[task], compact=False)
    return recorded


def _goes_away(given: str | os.PathLike, options: MergeOptions) -> bool:
    """Whether samples stand in the folder that is replaced, as a merge left them there."""
    if not options.output_dir:
        return False
    return (
        Path(given)
        .expanduser()
        .resolve()
        .is_relative_to((Path(options.output_dir).expanduser() / CALIBRATION_FOLDER).resolve())
    )


def _plain(value: Any) -> Any:
    """An option in the types that YAML has."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Integral):
        return int(value)
    return value if isinstance(value, str) else list(value)


def _generation_config(source: ModelSource) -> GenerationConfig:
    """The base's generation settings."""
    if source.model is not None:
        return source.model.generation_config
    try:
        return GenerationConfig.from_pretrained(source.folder)
    except OSError:  # older models keep them in config.json
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(source.folder))


def _with_chat_template(processors: dict[str, Any]) -> Any:
    """The merged model's processor; a base without a chat template takes that of the first expert that has one."""
    processor = processors["base"]
    if hasattr(processor, "chat_template") and processor.chat_template is None:
        templates = [getattr(other, "chat_template", None) for other in processors.values()]
        template = next((found for found in templates if found), None)
        if template is not None:
            processor = copy.deepcopy(processor)
            processor.chat_template = template
    return processor
