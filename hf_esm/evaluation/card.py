"""Scores and comparisons in the card of a merged model."""

import os
import shutil
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from transformers import AutoConfig

from ..checkpoints import HEADS_FOLDER, PICTURES_FOLDER
from ..errors import HfEsmError
from ..hub import pipeline_of, with_section
from ..metrics import Scores


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
            task_type=pipeline_of(_class_of(path.parent, task)),
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
    card.text = with_section(
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
    card.text = with_section(card.text, "Comparison", text.strip())
    card.save(folder / "README.md")
    return folder / "README.md"


def _class_of(folder: Path, task: str) -> str:
    own = folder / HEADS_FOLDER / task
    return (AutoConfig.from_pretrained(own if own.is_dir() else folder).architectures or [""])[0]
