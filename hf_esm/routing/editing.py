"""A routed model with one expert more, or one less: the same static model, in a new folder."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from ..architecture import to_matrices, towers
from ..calibration import ActivationStatistics, calibrate, pool_inputs
from ..checkpoints import (
    BASE_WEIGHTS,
    BODY_WEIGHTS,
    CARD_FILE,
    HASHES_FILE,
    HEAD_WEIGHTS,
    HEADS_FOLDER,
    PICTURES_FOLDER,
    RECIPE_FILE,
    ROUTED_FOLDER,
    SCORES_PICTURE,
    Access,
    Checkpoint,
    ModelSource,
    ModelSpec,
    base_of_adapters,
    first_processor,
    load_processor,
    open_checkpoint,
    prompt_before,
    resolve_source,
    save_head,
    write_body,
)
from ..data import DataSpec, RunOptions, encode, read_rows, with_prompt
from ..errors import HfEsmError
from ..hub import card_with_experts, public_name, write_hashes
from ..methods import RoutedMerge, resolve_method
from ..planning import (
    MergePlan,
    calibrated_widths,
    check_replaceable,
    check_values,
    load_recipe,
    name_experts,
    plan_merge,
)
from ..tuners.routed import RoutedExpertsConfig
from ..utils import (
    check_known,
    default_accelerator,
    markdown_text,
    plain_text,
    publish_folder,
    reading,
    staging_folder,
)
from .experts import RoutedExperts, expert_factors, load_experts, unrouted
from .router import shift_of_task


logger = logging.getLogger(__name__)


# Shift of features, over the distance to the nearest task, from which on an added task was found in fewer than 90 % of
# its samples in some merges (0.95 and more; in all below 0.86 it was found).
LARGE_SHIFT = 0.75


@dataclass(frozen=True)
class ExpertSpec:
    """An expert to add, as the caller of `RoutedModel.add_expert` names it."""

    task: str
    expert: ModelSpec
    statistics: Optional[ActivationStatistics | str | os.PathLike]
    base: Optional[ModelSpec]
    access: Access
    calibration: Optional[DataSpec] = None
    options: RunOptions = field(default_factory=RunOptions)


def add_expert(
    folder: Path, static: PreTrainedModel, config: RoutedExpertsConfig, spec: ExpertSpec, output: Path
) -> Path:
    """See `RoutedModel.add_expert`; `static` and `config` are those of the model in `folder`."""
    task, output = spec.task, _new(output)
    if task in config.tasks:
        raise HfEsmError(f"There is an expert for {task!r} already. Remove it first, or choose another name.")
    name_experts({**dict.fromkeys(config.tasks), task: spec.expert})
    if spec.calibration is not None:
        spec = replace(spec, calibration=read_rows(spec.calibration, f"samples of '{task}'", spec.options))
    merged = open_checkpoint(resolve_source(str(folder), "the merged model", spec.access))
    source, expert, adapted = _open_expert(spec)
    heads = "keep" if any((folder / HEADS_FOLDER).glob(f"*/{HEAD_WEIGHTS}")) else "auto"
    plan = _check_weights(merged, task, expert, source, heads)
    experts = load_experts(folder)
    names = {merged.names[name].removesuffix(".weight"): name for name in merged.linear}
    if missing := [names[module] for module in experts.factors if names[module] not in expert.names]:
        raise HfEsmError(f"'{task}' has no weight '{missing[0]}'. Is it a fine-tune of this base?")
    statistics, base = None, None
    if spec.calibration is not None or spec.statistics is not None or config.router != "static":  # TSV-C needs none
        statistics = _open_statistics(folder, spec, source)
        statistics.check_fits(calibrated_widths(plan), task)
        _check_statistics(statistics, task, expert, experts, names)
    if experts.expert_directions == "update":
        base = adapted or _open_base(folder, spec)
        _check_weights(base, task, expert, source, heads)
    for module in experts.factors:
        _append_expert(experts, module, names[module], merged, expert, base, statistics)
    experts.tasks.append(task)
    experts.features[task] = _features(folder, static, merged, experts, spec, statistics, names)
    revision, licence = f" @ {expert.revision}" if expert.revision else "", plan.licences[task]
    named = public_name(expert.source, source.repo_id, expert.revision, source.root)
    keeps_head = plan.heads.by_task[task]
    change = {
        "added": task,
        "repo_id": source.repo_id,
        "licence": licence,
        "labels": list(expert.config.id2label.values()) if keeps_head else [],
        "note": f"'{markdown_text(task)}' was added, from {named} (licence: {markdown_text(licence)})",
    }
    note = f"'{task}' was added, from {plain_text(expert.source or 'a live model')}{revision} (licence: {licence})"
    return _write(
        folder,
        static,
        config,
        experts,
        output,
        lambda staging: _add_head(staging, task, expert, merged, plan),
        note,
        change=change,
    )


def _add_head(staging: Path, task: str, expert: Checkpoint, merged: Checkpoint, plan: MergePlan) -> None:
    """Write the head of a task, and its body if the other tasks have one, of the rank that the recipe gives."""
    save_head(staging, task, expert, plan.heads.by_task[task])
    heads = staging / HEADS_FOLDER
    if not any(heads.glob(f"*/{BODY_WEIGHTS}")):
        return
    known = set(safe_open(heads / BASE_WEIGHTS, "pt").keys()) if (heads / BASE_WEIGHTS).is_file() else set()
    floating = [name for name in plan.heads.shared if merged.dtype(name).is_floating_point]
    names = [
        name
        for name in unrouted(floating, merged)
        if name in known or expert.residual(name, merged.tensor(name)).any()  # else the static model's is right
    ]

    recipe = load_recipe(staging / RECIPE_FILE)
    method = resolve_method(recipe["method"])

    def compress(update: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return expert_factors(update, None, method.expert_rank(update.shape, len(recipe["experts"])))

    write_body(staging, task, expert, merged, names, compress)


def _open_expert(spec: ExpertSpec) -> tuple[ModelSource, Checkpoint, Optional[Checkpoint]]:
    """The expert; for an adapter, also the base that it was trained on, which is not the merged model."""
    source = resolve_source(spec.expert, f"expert '{spec.task}'", spec.access)
    if not source.is_adapter:
        return source, open_checkpoint(source), None
    base = open_checkpoint(resolve_source(base_of_adapters([source]), f"base of {source.title}", spec.access))
    return source, open_checkpoint(source, base), base


def _check_weights(base: Checkpoint, task: str, expert: Checkpoint, source: ModelSource, heads: str) -> MergePlan:
    """Check that an expert's weights fit a base and are finite. Returns the plan of a merge of this expert alone."""
    plan = plan_merge(base, {task: expert}, RoutedMerge(), heads=heads, sources={task: source})
    check_values(plan)
    return plan


def _open_statistics(folder: Path, spec: ExpertSpec, source: ModelSource) -> ActivationStatistics:
    """The statistics of the new expert; by default those of the samples that are given, or else in its folder."""
    if isinstance(spec.statistics, ActivationStatistics):
        return spec.statistics
    if spec.statistics is None and spec.calibration is not None:
        processor = first_processor([source], spec.access.trust_remote_code) or load_processor(folder)
        options = {"processor": processor, "token": spec.access.token, **vars(spec.options)}
        return calibrate(spec.expert, spec.calibration, **options)
    if spec.statistics is None and source.folder is None:
        raise HfEsmError(f"{source.title}: a live model has no folder with statistics. Pass `statistics`.")
    return ActivationStatistics.load(source.folder if spec.statistics is None else spec.statistics)


def _check_statistics(
    statistics: ActivationStatistics,
    task: str,
    expert: Checkpoint,
    experts: RoutedExperts,
    names: Mapping[str, str],
) -> None:
    """Refuse statistics that lack modules with experts, or features that the router reads.

    Args:
        names: canonical names of weights by the module's name.
    """
    model = statistics.provenance.model
    if model and expert.source and Path(model).name != Path(expert.source).name:
        logger.warning("'%s': its statistics were collected on %s, not on %s.", task, model, expert.source)
    if missing := [names[module] for module in experts.factors if names[module] not in statistics]:
        raise HfEsmError(f"'{task}' has no statistics of '{missing[0]}'. Were they collected on this expert?")


def _features(
    folder: Path,
    static: PreTrainedModel,
    merged: Checkpoint,
    experts: RoutedExperts,
    spec: ExpertSpec,
    statistics: Optional[ActivationStatistics],
    names: Mapping[str, str],
) -> dict[str, torch.Tensor]:
    """The new task's features of the modules that the router reads, by module.

    With samples, they are the merged model's. Without, they are the base's, which the statistics hold, moved by the
    mean shift of the other tasks; then there is a warning if the shift is large.

    Args:
        names: canonical names of weights by the module's name.
    """
    task = spec.task
    if not experts.modules:
        return {}
    if spec.calibration is not None:
        processor = with_prompt(load_processor(folder), prompt_before(merged.skeleton))
        samples = encode(spec.calibration, processor, merged.config, f"samples of '{task}'", spec.options)
        with TemporaryDirectory() as scratch:
            pooled = pool_inputs(merged, {task: samples}, spec.options, default_accelerator(), Path(scratch))[task]
        return {module: pooled[names[module]] for module in experts.modules}
    if any(names[module] not in statistics.pooled for module in experts.modules):
        raise HfEsmError(
            f"The statistics of '{task}' lack the pooled inputs of the base's blocks, from which the router is made. "
            "Pass samples of the task as `calibration`, or calibrate again with the base (`hf-esm calibrate --base`)."
        )
    features = {module: statistics.pooled[names[module]] for module in experts.modules}
    if experts.shift:
        features = {module: rows + experts.shift[module].mean(0) for module, rows in features.items()}
        shift = shift_of_task({**experts.features, task: features}, task, experts.shift, towers(static))
        if shift > LARGE_SHIFT:
            logger.warning(
                "'%s': the router may take its samples for those of another task. The merged model reads samples "
                "otherwise than the base does, on which the statistics were collected: the difference is %.1f times "
                "as large as the distance to the nearest task. Pass samples of the task as `calibration`.",
                task,
                shift,
            )
    return features


def _open_base(folder: Path, spec: ExpertSpec) -> Checkpoint:
    """The base of the merge in `folder`, as the caller or the recipe names it."""
    try:
        base = load_recipe(folder / RECIPE_FILE)["base"] if spec.base is None else spec.base
        return open_checkpoint(resolve_source(base, "the base", spec.access))
    except HfEsmError as error:
        if spec.base is not None:
            raise
        raise HfEsmError(
            f"The directions of the experts are those of their updates over the base. {error} Pass `base`."
        ) from None


def _append_expert(
    experts: RoutedExperts,
    module: str,
    name: str,
    merged: Checkpoint,
    expert: Checkpoint,
    base: Optional[Checkpoint],
    statistics: Optional[ActivationStatistics],
) -> None:
    """Append the factors, and the prototype if there are prototypes, of the new expert on one linear map.

    Args:
        module: name of the linear map.
        name: canonical name of its weight.
        base: where directions are those of the update.
    """
    linear, update = merged.linear[name], None
    (residual,) = to_matrices(expert.residual(name, merged.tensor(name)), linear)
    if base is not None:
        (update,) = to_matrices(expert.update(name, base.tensor(name)), linear)
    a, b = experts.factors[module]
    inputs = None if statistics is None else statistics[name]
    new_a, new_b = expert_factors(residual, inputs, a.shape[1], update=update)
    experts.factors[module] = torch.cat([a, new_a[None]]), torch.cat([b, new_b[None]])
    if module in experts.prototypes:
        prototype = torch.nn.functional.normalize(inputs.mean, dim=0)
        experts.prototypes[module] = torch.cat([experts.prototypes[module], prototype[None]])


def remove_expert(folder: Path, static: PreTrainedModel, config: RoutedExpertsConfig, task: str, output: Path) -> Path:
    """See `RoutedModel.remove_expert`."""
    check_known([task], config.tasks, "expert for")
    if len(config.tasks) == 1:
        raise HfEsmError(f"{task!r} is the last expert. Without it, the model is the static model in {folder}.")
    experts, output = load_experts(folder), _new(output)
    experts.remove(task)

    def remove_head(staging: Path) -> None:
        shutil.rmtree(staging / HEADS_FOLDER / task, ignore_errors=True)

    note = f"'{task}' was removed"
    change = {"removed": task, "note": f"'{markdown_text(task)}' was removed"}
    return _write(folder, static, config, experts, output, remove_head, note, change=change)


def _change_card(path: Path, tasks: list[str], note: str, **change: Any) -> None:
    """Write into the card, if there is one, how the experts changed."""
    if path.is_file():
        note = f"After this merge, {note}; the experts now: {', '.join(map(markdown_text, tasks))}."
        with reading(path):
            text = card_with_experts(path.read_text(encoding="utf-8"), tasks, note, **change)
        path.write_text(text, encoding="utf-8")


def _new(output: Path) -> Path:
    """The path of a folder that does not exist yet."""
    output = output.expanduser()
    check_replaceable(output, False, "output_dir")
    return output


def _write(
    folder: Path,
    static: PreTrainedModel,
    config: RoutedExpertsConfig,
    experts: RoutedExperts,
    output: Path,
    change_head: Callable[[Path], Any],
    note: str,
    *,
    change: Mapping[str, Any],
) -> Path:
    """Copy the model in `folder` with other experts to `output`.

    Args:
        change_head: is called with the copy, to add or remove a head.
        note: for the recipe: how the experts changed.
        change: for the card, see `card_with_experts`.
    """
    with staging_folder(output) as staging:
        shutil.copytree(folder, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        shutil.rmtree(staging / ROUTED_FOLDER)
        shutil.rmtree(staging / PICTURES_FOLDER, ignore_errors=True)  # of the scores of the earlier model
        (staging / SCORES_PICTURE).unlink(missing_ok=True)
        (staging / HASHES_FILE).unlink()
        change_head(staging)
        experts.save(staging / ROUTED_FOLDER, static, base_fingerprint=config.base_fingerprint)
        with (staging / RECIPE_FILE).open("a", encoding="utf-8") as file:
            file.write(f"\n# After this merge, {note}; the experts now: {', '.join(experts.tasks)}.\n")
        _change_card(staging / CARD_FILE, experts.tasks, **change)
        write_hashes(staging)
        publish_folder(staging, output)
    return output
