"""The folder of a merged model: weights, configs, processor, heads, samples, recipe, report, card."""

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

from ..calibration import ActivationStatistics
from ..checkpoints import (
    CALIBRATION_FOLDER,
    GENERATION_CONFIG,
    RECIPE_FILE,
    REPORT_FILE,
    Checkpoint,
    ModelSource,
    ShardedWriter,
    output_dtype,
    save_head,
    to_stored,
    write_plan,
    written_config,
)
from ..data import Sample, save_samples
from ..errors import HfEsmError
from ..methods import describe_method
from ..planning import (
    BASE,
    RECIPE_VERSION,
    MergeData,
    MergeOptions,
    MergePlan,
    RefineSettings,
    absolute_path,
    tokenizer_of,
    torch_dtype,
)
from ..utils import bytes_of
from ..version import __version__
from .card import write_card
from .expert_statistics import Inputs, statistics_and_samples
from .generation import merged_generation
from .result import MergeResult


class ModelWriter:
    """Writes the weights of a merged model, in any order, into the files that `save_pretrained` would write.

    Weights that are stored together are held until the last of them comes. Each of several processes writes files of
    its own.

    Attributes:
        names: canonical names of the weights that belong into the files of this process, in reading order.
    """

    def __init__(self, folder: Path, base: Checkpoint, options: MergeOptions, rank: int = 0, world_size: int = 1):
        self.base, self.dtype = base, torch_dtype(options.dtype)
        extra = base.extra_tensors() if base.extra else {}
        groups = write_plan(base, self.dtype)
        planned = {key: tensor for group in groups for key, tensor in group.stored.items()}
        planned |= {key: torch.empty_like(tensor, device="meta") for key, tensor in extra.items()}
        size = bytes_of(options.max_shard_size, "max_shard_size")
        self._files = ShardedWriter(folder, planned, size, rank=rank, world_size=world_size)
        self._groups = {
            name: group for group in groups if any(map(self._files.owns, group.stored)) for name in group.names
        }
        self._held: dict[str, Tensor] = {}
        for key in filter(self._files.owns, extra):
            self._files.write(key, extra[key])

    @property
    def names(self) -> list[str]:
        return list(self._groups)

    def first_of(self, name: str) -> str:
        """Return the first of the weights that a weight is stored with; often itself."""
        return self._groups[name].names[0]

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that a weight is written in."""
        return output_dtype(self.base.dtype(name), self.dtype)

    def rounded(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight in the dtype that it is written in.

        Raises:
            HfEsmError: if a value is too large for float16.
        """
        return written(name, self.base, weight, self.dtype)

    def write(self, name: str, weight: Tensor) -> None:
        """Write a weight of the merged model, by its canonical name, in its dtype.

        Raises:
            HfEsmError: if a value is too large for float16.
        """
        group = self._groups[name]
        self._held[name] = self.rounded(name, weight)
        if self._held.keys() >= set(group.names):
            tensors = {name: self._held.pop(name) for name in group.names}
            for key, tensor in to_stored(self.base, tensors).items():
                if self._files.owns(key):
                    self._files.write(key, tensor)

    def __enter__(self) -> "ModelWriter":
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self._files.sync()  # what is published is complete, whatever happens next
        self._files.__exit__(kind, *rest)


def write_weights(
    folder: Path,
    base: Checkpoint,
    weight: Callable[[str], Tensor],
    options: MergeOptions,
    *,
    progress: Callable[[Iterable], Iterable] = iter,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Pass two: write every weight of the base with its scaled update.

    Args:
        weight: returns the merged model's weight by its canonical name.

    Raises:
        HfEsmError: if a value is too large for float16.
    """
    with ModelWriter(folder, base, options, rank, world_size) as writer:
        for name in progress(writer.names):
            writer.write(name, weight(name))


def write_modules(folder: Path, base: Checkpoint, weight: Callable[[str], Tensor], options: MergeOptions) -> None:
    """Write the modules that follow the body of a Sentence Transformers model, if it is one."""
    if base.modules is not None:
        base.modules.save(folder, lambda name: written(name, base, weight(name), torch_dtype(options.dtype)))


def written(name: str, base: Checkpoint, weight: Tensor, dtype: Optional[torch.dtype]) -> Tensor:
    """Return a weight in the dtype that it is written in."""
    written = weight.to(output_dtype(base.dtype(name), dtype))
    if written.dtype == torch.float16 and not written.isfinite().all():
        raise HfEsmError(
            f"'{base.names[name]}': values up to {weight.abs().max():.3g} are too large for float16. Write the "
            "merged model in another dtype: `dtype='bfloat16'` or `dtype='float32'`."
        )
    return written


def write_files(
    result: MergeResult,
    sources: Mapping[str, ModelSource],
    inputs: Inputs,
    data: MergeData,
    options: MergeOptions,
    refining: Optional[RefineSettings] = None,
) -> None:
    """Write all files of a merged model, or of a merged adapter, except its weights to `result.output_dir`.

    These are configs, processor, heads, samples that the recipe refers to, recipe, report and card.

    Args:
        refining: settings that the model was refined with, if it was.
    """
    folder, plan = result.output_dir, result.plan
    if options.output == "model":  # a folder with an adapter has the config of its base
        _write_configs(folder, plan, sources, inputs, options)
    if inputs.processors[BASE] is not None:
        inputs.processors[BASE].save_pretrained(folder)
    for task, expert in plan.experts.items():
        save_head(folder, task, expert, plan.heads.by_task[task])
    calibration = record_calibration(folder, plan, inputs, data, options, refining is not None)
    _write_recipe(result, sources, calibration, options, refining)
    _write_report(result)
    counts = [existing.provenance.num_samples for existing in inputs.statistics.values() if existing is not None]
    write_card(folder, result, sources, counts)


def _write_configs(
    folder: Path, plan: MergePlan, sources: Mapping[str, ModelSource], inputs: Inputs, options: MergeOptions
) -> None:
    """Write the config of the model, and that of its generation."""
    model = plan.base.skeleton
    config = written_config(plan.base)
    config.architectures = [type(model).__name__]
    if options.dtype:
        config.dtype = torch_dtype(options.dtype)
    if plan.voice != BASE:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if (token := getattr(tokenizer_of(inputs.processors[BASE]), name, None)) is not None:
                setattr(config.get_text_config(), name, token)
    config.save_pretrained(folder)
    if model.can_generate():
        # `save_pretrained` refuses what many published models have: a temperature without sampling.
        generation = merged_generation(plan, sources, inputs.processors)
        generation.to_json_file(folder / GENERATION_CONFIG, keys_to_pop=["compile_config"])


# Options that a recipe repeats. The others say where and how to merge, not what the merged model is.
_RECORDED = (
    "weights",
    "tokenizer",
    "chat_template",
    "heads",
    "num_samples",
    "statistics_samples",
    "seed",
    "max_length",
    "columns",
    "dtype",
    "max_shard_size",
    "batch_size",
)


def _write_recipe(
    result: MergeResult,
    sources: Mapping[str, ModelSource],
    calibration: Mapping[str, Any],
    options: MergeOptions,
    refining: Optional[RefineSettings],
) -> None:
    """Write the recipe that repeats a merge: `hf-esm merge merge_recipe.yaml`."""
    plan = result.plan
    recipe = {
        "recipe_version": RECIPE_VERSION,
        "hf_esm_version": __version__,
        "base": absolute_path(sources["base"].record, Path()),
        "experts": {task: absolute_path(sources[task].record, Path()) for task in plan.experts},
        **({"calibration": dict(calibration)} if calibration else {}),
        "method": describe_method(plan.method),
        "alpha": result.alpha_by_kind or result.alpha,
        "refine": asdict(refining) if refining else False,
        **({"output": options.output, "rank": options.rank} if options.output != "model" else {}),
        **({"overrides": [override.describe() for override in plan.overrides]} if plan.overrides else {}),
        **({"lines": plan.lines.describe()} if plan.lines and plan.method.tunable else {}),
        **{name: _plain(getattr(options, name)) for name in _RECORDED if getattr(options, name) is not None},
    }
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    (result.output_dir / RECIPE_FILE).write_text(text, encoding="utf-8")


def _write_report(result: MergeResult) -> None:
    """Write what was done with every weight, and how long each stage took."""
    report = {
        "alpha": result.alpha,
        "alpha_by_kind": result.alpha_by_kind,
        "alpha_scores": result.alpha_scores,
        "alpha_errors": result.alpha_errors,
        "alpha_default": result.alpha_default,
        "evaluations": result.evaluations,
        "chosen_by": result.chosen_by,
        "choice": result.choice,
        "standings": [asdict(place) for place in result.standings],
        "scores": {task: asdict(score) for task, score in result.scores.items()},
        "agreement": {task: asdict(found) for task, found in result.agreement.items()},
        "refined": result.refined,
        "seconds": {stage: round(value, 3) for stage, value in result.seconds.items()},
        "warnings": result.warnings,
        "weights": [asdict(weight) for weight in result.weights],
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (result.output_dir / REPORT_FILE).write_text(text, encoding="utf-8")


def record_calibration(
    folder: Path, plan: MergePlan, inputs: Inputs, data: MergeData, options: MergeOptions, refined: bool
) -> dict[str, Any]:
    """Return by task where the recipe finds the calibration again.

    That is where the caller's data are, or the statistics that `options.statistics_dir` keeps. Data in memory, data in
    a folder that is about to be replaced, and samples that were split are saved next to the recipe. Statistics beside
    an expert's weights are found there.

    Args:
        refined: whether the recipe needs the samples for agreement again.
    """
    recorded: dict[str, Any] = {}
    for task in plan.experts:
        statistics, rows = statistics_and_samples(data.calibration_of(task))
        samples, apart = inputs.samples.get(task), inputs.agreement_samples.get(task, []) if refined else []
        apart_file = f"{CALIBRATION_FOLDER}/{task}-agreement.safetensors"
        if not samples:
            entry = _recorded_statistics(statistics, folder, task, options)
        elif options.statistics_dir and inputs.statistics[task]:  # token counts alone are not kept
            entry = str((Path(options.statistics_dir).expanduser() / f"{task}.safetensors").absolute())
        else:
            entry = _recorded_samples(rows, samples + apart, folder, task, options, inputs.agreement_samples)
            apart = []
        if apart:
            save_samples(apart, folder / apart_file)
            entry = {"samples": apart_file} | ({"statistics": entry} if entry else {})
        if entry:
            recorded[task] = entry
    return recorded


def _recorded_statistics(statistics: Any, folder: Path, task: str, options: MergeOptions) -> Optional[str]:
    """Return where a recipe finds statistics that the caller passed, if any."""
    saved = f"{CALIBRATION_FOLDER}/{task}.safetensors"
    if isinstance(statistics, ActivationStatistics):
        statistics.save(folder / saved, compact=False)
        return saved
    return None if statistics is None else _recorded_file(statistics, folder, saved, options)


def _recorded_samples(
    rows: Any, samples: list[Sample], folder: Path, task: str, options: MergeOptions, split: Mapping[str, Any]
) -> Any:
    """Return where a recipe finds samples: where the caller has all of them, or in a file that is written here."""
    saved = f"{CALIBRATION_FOLDER}/{task}.safetensors"
    if not split and isinstance(rows, (str, os.PathLike)):
        return _recorded_file(rows, folder, saved, options)
    if not split and isinstance(rows, Mapping) and "path" in rows:  # arguments of `datasets.load_dataset`
        return absolute_path(rows, Path())
    save_samples(samples, folder / saved)
    return saved


def _recorded_file(path: str | os.PathLike, folder: Path, saved: str, options: MergeOptions) -> str:
    """Return the path of a file of the caller, or of its copy if it is about to be replaced."""
    path = Path(path).expanduser()
    if not _will_be_replaced(path, options):
        return str(path.absolute())
    (folder / CALIBRATION_FOLDER).mkdir(exist_ok=True)
    shutil.copy(path, folder / saved)
    return saved


def _will_be_replaced(path: str | os.PathLike, options: MergeOptions) -> bool:
    """Whether a file is in the calibration folder of the output, as an earlier merge left it there."""
    if not options.output_dir:
        return False
    replaced = Path(options.output_dir).expanduser() / CALIBRATION_FOLDER
    return Path(path).expanduser().resolve().is_relative_to(replaced.resolve())


def _plain(value: Any) -> Any:
    """Return an option in the types that YAML has."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Integral):
        return int(value)
    return value if isinstance(value, str) else list(value)
