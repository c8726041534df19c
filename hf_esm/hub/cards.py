"""The model card of a merged model, from the template in `model_cards/`."""

import os
import re
import shutil
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from ..checkpoints import Checkpoint, LiveCheckpoint, LoraCheckpoint, ModelSource
from ..errors import HfEsmError
from ..methods import ROUTED
from ..metrics.scores import Scores
from ..planning.heads import FOLDER as HEADS_FOLDER
from ..planning.options import PICTURES_FOLDER
from ..planning.plan import MergePlan
from ..tuners import RoutedExpertsConfig
from ..tuners.routed import DECIDING
from ..version import __version__


def write_card(
    folder: Path, plan: MergePlan, sources: dict[str, ModelSource], alpha: float, num_samples: list[int]
) -> None:
    """Write `README.md`: what was merged and how, how to load it, licence and limits.

    `num_samples` holds the number of proxy samples of each expert that was calibrated.
    """
    licences = set(plan.licences.values())
    task_heads = [task for task, own in plan.heads.own.items() if own]
    data = ModelCardData(
        base_model=[source.repo_id for source in sources.values() if source.repo_id] or None,
        base_model_relation="merge" if any(source.repo_id for source in sources.values()) else None,
        library_name="transformers",
        license=licences.pop() if len(licences) == 1 and "not stated" not in licences else None,
        tags=["merge", "hf_esm", plan.method.name],
    )
    card = ModelCard.from_template(
        data,
        template_str=_template("merged.md"),
        base=_named(plan.base),
        base_revision=plan.base.revision,
        experts=[
            {
                "task": task,
                "source": _named(expert),
                "revision": expert.revision,
                "kind": "LoRA" if isinstance(expert, LoraCheckpoint) else type(expert.skeleton).__name__,
                "licence": plan.licences.get(task, "not stated"),
                "labels": list(expert.config.id2label.values()) if plan.heads.own[task] else [],
            }
            for task, expert in plan.experts.items()
        ],
        method=plan.method.name,
        routed=(routed := isinstance(plan.method, ROUTED)),
        decides=routed and plan.method.router in DECIDING,
        predicts=all("classification" in _pipeline(type(e.skeleton).__name__) for e in plan.experts.values()),
        keeps_features=routed and plan.method.router == "discriminant",
        alpha=alpha,
        licences=sorted(set(plan.licences.values()) - {"not stated"}),
        model_class=type(plan.base.skeleton).__name__,
        task_heads=task_heads,
        version=__version__,
        num_samples=" to ".join(str(count) for count in sorted({min(num_samples), max(num_samples)}))
        if num_samples
        else "",
    )
    card.save(folder / "README.md")


def _named(model: Checkpoint) -> str:
    """Id or folder; of a model in memory, also what it was loaded from."""
    if not isinstance(model, LiveCheckpoint):
        return model.source
    return f"a live {type(model.skeleton).__name__}" + (f", loaded from {model.source}" if model.source else "")


def write_adapter_card(folder: Path, config: RoutedExpertsConfig) -> None:
    """Write `README.md` of a routed adapter that stands without its static model."""
    base = config.base_model_name_or_path
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="peft",
        tags=["merge", "hf_esm", "routed-experts"],
    )
    ModelCard.from_template(
        data,
        template_str=_template("routed_adapter.md"),
        base=base,
        tasks=config.tasks,
        decides=config.decides,
        model_class=(config.auto_mapping or {}).get("base_model_class", "AutoModel"),
        version=__version__,
    ).save(folder / "README.md")


def update_card(folder: str | os.PathLike, scores: Scores, data: Mapping[str, Any]) -> Path:
    """Put scores into the card of a merged model: as evaluation entries in its metadata, which the Hub shows, and as a
    table before its limits. Earlier results are replaced.

    Args:
        folder: what `merge_models` wrote.
        scores: what `evaluate` gave.
        data: what they were measured on, as `evaluate` took it; data sets of the Hub are named.
    """
    path = Path(folder).expanduser() / "README.md"
    if not path.is_file():
        raise HfEsmError(f"{folder}: there is no model card (README.md) in it.")
    card = ModelCard.load(path)
    card.data.model_name = Path(folder).expanduser().resolve().name
    card.data.eval_results = [
        EvalResult(
            task_type=_pipeline(_class_of(path.parent, task)),
            dataset_type=_dataset(spec := data.get(task), task),
            dataset_name=task,
            dataset_config=spec.get("name") if isinstance(spec, Mapping) else None,
            dataset_split=spec.get("split") if isinstance(spec, Mapping) else None,
            metric_type=scores.metric,
            metric_value=round(score, 6),
        )
        for task, score in scores.model.items()
        if isfinite(score)
    ]
    rows = [
        f"| {task} | {scores.shown(score)} | {scores.shown(scores.expert.get(task))} |"
        for task, score in scores.model.items()
    ]
    share = f" ({100 * scores.normalised:.1f} % of the experts)" if scores.normalised is not None else ""
    rows.append(f"| average | {scores.shown(scores.average)}{share} | |")
    card.text = _with_section(
        card.text, "Results", "\n".join([f"| task | {scores.metric} | its expert |", "|---|--:|--:|", *rows])
    )
    card.save(path)
    return path


def _dataset(spec: Any, task: str) -> str:
    """The id of a data set on the Hub, or, of what stands on this machine or in memory, the task's name."""
    named = spec.get("path") if isinstance(spec, Mapping) else None
    local = not isinstance(named, str) or "data_files" in spec or Path(named).expanduser().exists()
    return task if local else named


def add_comparison(folder: str | os.PathLike, report: str | os.PathLike) -> Path:
    """Put what `compare` found into the card of a merged model, pictures and all, before its limits. An earlier
    comparison is replaced.

    Args:
        folder: what `merge_models` wrote.
        report: the `output_dir` of `compare`.
    """
    folder, report = Path(folder).expanduser(), Path(report).expanduser()
    for path in (folder / "README.md", report / "report.md"):
        if not path.is_file():
            raise HfEsmError(f"{path} is missing: {folder} must be a merged model's folder, {report} a comparison's.")
    if report.resolve().is_relative_to((folder / PICTURES_FOLDER).resolve()):
        raise HfEsmError(f"{report}: the card's own pictures stand there. Compare into another folder.")
    shutil.rmtree(folder / PICTURES_FOLDER, ignore_errors=True)
    (folder / PICTURES_FOLDER).mkdir()
    for picture in report.glob("*.png"):
        shutil.copy(picture, folder / PICTURES_FOLDER)
    _, _, text = (report / "report.md").read_text(encoding="utf-8").partition("\n")  # after its title
    text = text.replace("\n## ", "\n### ").replace("](", f"]({PICTURES_FOLDER}/")
    card = ModelCard.load(folder / "README.md")
    card.text = _with_section(card.text, "Comparison", text.strip())
    card.save(folder / "README.md")
    return folder / "README.md"


def _with_section(text: str, title: str, body: str) -> str:
    """A card's text with a section of this title before its limits, in place of an earlier one."""
    text = re.sub(rf"## {title}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    before, limits, after = text.partition("## Limits")
    return f"{before.rstrip()}\n\n## {title}\n\n{body}\n\n{limits}{after}"


# The Hub's name of a task, by how the class of its model ends.
_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "LMHeadModel": "text-generation",
    "ForCausalLM": "text-generation",
}


def _pipeline(model_class: str) -> str:
    return next((kind for ending, kind in _PIPELINES.items() if model_class.endswith(ending)), "other")


def _class_of(folder: Path, task: str) -> str:
    own = folder / HEADS_FOLDER / task
    return (AutoConfig.from_pretrained(own if own.is_dir() else folder).architectures or [""])[0]


def _template(name: str) -> str:
    """A template, from the installed package or from the checkout that it is developed in."""
    places = (Path(__file__).parents[1] / "model_cards", Path(__file__).parents[2] / "model_cards")
    return next(place / name for place in places if place.is_dir()).read_text(encoding="utf-8")
