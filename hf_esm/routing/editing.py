"""A routed model with one expert more, or one less: the same static model, in a new folder."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedModel

from ..architecture import to_matrices
from ..calibration import ActivationStatistics
from ..checkpoints import (
    HASHES_FILE,
    HEAD_WEIGHTS,
    HEADS_FOLDER,
    RECIPE_FILE,
    ROUTED_FOLDER,
    Access,
    Checkpoint,
    ModelSource,
    open_checkpoint,
    resolve_source,
    save_head,
)
from ..errors import HfEsmError
from ..hub import write_hashes
from ..methods import RoutedMerge
from ..planning import calibrated_widths, check_values, load_recipe, name_experts, plan_merge
from ..tuners.routed import RoutedExpertsConfig
from ..utils import publish_folder, staging_folder
from .experts import RoutedExperts, expert_factors, load_experts, residual_update


logger = logging.getLogger(__name__)


def add_expert(
    folder: Path,
    static: PreTrainedModel,
    config: RoutedExpertsConfig,
    task: str,
    expert: Any,
    statistics: Any,
    output: Path,
    token: Any = None,
    trust_remote_code: bool = False,
    base: Any = None,
) -> Path:
    """See `RoutedModel.add_expert`; `static` and `config` are those of the model in `folder`."""
    if task in config.tasks:
        raise HfEsmError(f"There is an expert for {task!r} already. Remove it first, or choose another name.")
    name_experts({**dict.fromkeys(config.tasks), task: expert})
    access = Access(token, trust_remote_code=trust_remote_code)
    root = open_checkpoint(resolve_source(str(folder), "the merged model", access))
    source = resolve_source(expert, f"expert '{task}'", access)
    over = None
    if source.is_adapter:  # its update is over the base that it was trained on, not over the merged model
        named = PeftConfig.from_pretrained(source.folder)
        spec = {"path": named.base_model_name_or_path, "revision": named.revision}
        over = open_checkpoint(resolve_source(spec, f"base of {source.title}", access))
    opened = open_checkpoint(source, over)
    keeps = any((folder / HEADS_FOLDER).glob(f"*/{HEAD_WEIGHTS}"))
    heads = "keep" if keeps else "auto"
    plan = plan_merge(root, {task: opened}, RoutedMerge(), heads, sources={task: source})
    check_values(plan)
    experts = load_experts(folder)
    modules = {root.names[name].removesuffix(".weight"): name for name in root.linear}
    if lacking := [module for module in experts.factors if modules[module] not in opened.names]:
        raise HfEsmError(f"'{task}': no weight for '{lacking[0]}'. Is it a fine-tune of this base?")
    if statistics is not None or config.router != "static":  # TSV-C's experts are of singular vectors
        statistics = _statistics(task, source, statistics)
        statistics.check_fits(calibrated_widths(plan), task)
        taken_of = statistics.provenance.model
        if taken_of and opened.source and Path(taken_of).name != Path(opened.source).name:
            logger.warning("'%s': its statistics were taken of %s, not of %s.", task, taken_of, opened.source)
        if lacking := [module for module in experts.factors if modules[module] not in statistics]:
            raise HfEsmError(f"'{task}': no statistics for '{lacking[0]}'. Were they taken of this expert?")
    if lacking := [module for module in experts.modules if modules[module] not in statistics.pooled]:
        raise HfEsmError(
            f"The statistics of '{task}' do not hold what the base's blocks read, which makes the router. "
            "Calibrate again with the base (`hf-esm calibrate --base`)."
        )
    tuned_from = None
    if experts.expert_directions == "update":
        tuned_from = over or _base(folder, base, access)
        check_values(plan_merge(tuned_from, {task: opened}, RoutedMerge(), heads, sources={task: source}))
    for module, (a, b) in experts.factors.items():
        name, update = modules[module], None
        linear = root.linear[name]
        (residual,) = to_matrices(residual_update(opened, name, root.tensor(name)), linear)
        if tuned_from is not None:
            (update,) = to_matrices(opened.update(name, tuned_from.tensor(name)), linear)
        new_a, new_b = expert_factors(residual, statistics and statistics[name], a.shape[1], update=update)
        experts.factors[module] = torch.cat([a, new_a[None]]), torch.cat([b, new_b[None]])
        if module in experts.prototypes:
            prototype = torch.nn.functional.normalize(statistics[name].mean, dim=0)
            experts.prototypes[module] = torch.cat([experts.prototypes[module], prototype[None]])
    experts.tasks.append(task)
    experts.features[task] = {
        module: statistics.pooled[modules[module]] + experts.shift.get(module, 0) for module in experts.modules
    }
    return _rewrite(
        folder,
        static,
        config,
        experts,
        output,
        lambda staging: save_head(staging, task, opened, plan.heads.by_task[task]),
        f"'{task}' was added, from {opened.source or 'a live model'}"
        f"{f' @ {opened.revision}' if opened.revision else ''} (licence: {plan.licences[task]})",
    )


def _base(folder: Path, given: Any, access: Access) -> Checkpoint:
    """The base of a merge: as it is given, or as its recipe names it."""
    try:
        spec = load_recipe(folder / RECIPE_FILE)["base"] if given is None else given
        return open_checkpoint(resolve_source(spec, "the base", access))
    except HfEsmError as error:
        if given is not None:
            raise
        raise HfEsmError(
            f"An expert's directions are those of its update over the base. {error} Give `base`."
        ) from None


def _statistics(task: str, source: ModelSource, given: Any) -> ActivationStatistics:
    """Statistics as they are given, or those that stand beside the expert."""
    if isinstance(given, ActivationStatistics):
        return given
    if given is None and source.folder is None:
        raise HfEsmError(f"{source.title}: it has no folder with statistics. Give `statistics`.")
    return ActivationStatistics.load(source.folder if given is None else given)


def remove_expert(folder: Path, static: PreTrainedModel, config: RoutedExpertsConfig, task: str, output: Path) -> Path:
    """See `RoutedModel.remove_expert`."""
    if task not in config.tasks:
        raise HfEsmError(f"There is no expert for {task!r}; there are {', '.join(config.tasks)}.")
    if len(config.tasks) == 1:
        raise HfEsmError(f"{task!r} is the last expert. Without it, this is the static model in {folder}.")
    experts = load_experts(folder)
    kept = [i for i, name in enumerate(experts.tasks) if name != task]
    experts.factors = {module: (a[kept], b[kept]) for module, (a, b) in experts.factors.items()}
    experts.prototypes = {module: rows[kept] for module, rows in experts.prototypes.items()}
    experts.tasks.remove(task)
    del experts.features[task]
    return _rewrite(
        folder,
        static,
        config,
        experts,
        output,
        lambda staging: shutil.rmtree(staging / HEADS_FOLDER / task, ignore_errors=True),
        f"'{task}' was removed",
    )


def _rewrite(
    folder: Path,
    static: PreTrainedModel,
    config: RoutedExpertsConfig,
    experts: RoutedExperts,
    output: Path,
    change: Callable[[Path], Any],
    what: str,
) -> Path:
    """The same model with other experts, in a new folder; card and recipe say what became of them."""
    output = output.expanduser()
    if output.exists():
        raise HfEsmError(f"{output} exists. Choose another output_dir.")
    with staging_folder(output) as staging:
        shutil.copytree(folder, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        shutil.rmtree(staging / ROUTED_FOLDER)
        (staging / HASHES_FILE).unlink()
        change(staging)
        experts.save(staging / ROUTED_FOLDER, static, base_fingerprint=config.base_fingerprint)
        said = f"After this merge, {what}; the experts now: {', '.join(experts.tasks)}."
        for name, line in (("README.md", said), (RECIPE_FILE, f"# {said}")):
            with (staging / name).open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")
        write_hashes(staging)
        publish_folder(staging, output)
    return output
