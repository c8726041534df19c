"""Scores and comparisons written into the card of a merged model."""

import os
import shutil
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..checkpoints import CARD_FILE, HEADS_FOLDER, PICTURES_FOLDER, read_config
from ..data import DataSpec
from ..errors import HfEsmError
from ..hub import pipeline_of, with_section
from ..metrics import Scores
from ..utils import atomic_file, markdown_table, publish_folder, reading, staging_folder
from .report import REPORT


def update_card(folder: str | os.PathLike, scores: Scores, data: Mapping[str, DataSpec]) -> Path:
    """Write scores into the card of a merged model, in place of earlier ones.

    They become evaluation results in the metadata, which the Hub shows, and a table before the section "Limits".

    Args:
        folder: folder that `merge_models` wrote.
        scores: what `evaluate` returned.
        data: rows that the scores were measured on, as `evaluate` took them. Data sets of the Hub are named.

    Returns:
        The path of the card.

    Raises:
        HfEsmError: if the folder holds no card.
    """
    folder = Path(folder).expanduser()
    if not (folder / CARD_FILE).is_file():
        raise HfEsmError(f"{folder}: there is no model card ({CARD_FILE}). Give a folder that `merge_models` wrote.")
    with reading(folder / CARD_FILE):
        card = ModelCard.load(folder / CARD_FILE)
    card.data.model_name = folder.resolve().name
    card.data.eval_results = [
        _result(folder, task, score, data.get(task), scores.metric)
        for task, score in scores.model.items()
        if isfinite(score)
    ]
    card.text = with_section(card.text, "Results", "\n".join(_results_table(scores)))
    with atomic_file(folder / CARD_FILE) as partial:
        card.save(partial)
    return folder / CARD_FILE


def _result(folder: Path, task: str, score: float, rows: Any, metric: str) -> EvalResult:
    """One score as the Hub's metadata has it."""
    described = rows if isinstance(rows, Mapping) else {}
    return EvalResult(
        task_type=pipeline_of(_model_class(folder, task)),
        dataset_type=_dataset_id(rows) or task,
        dataset_name=task,
        dataset_config=described.get("name"),
        dataset_split=described.get("split"),
        metric_type=metric,
        metric_value=round(score, 6),
    )


def _dataset_id(rows: Any) -> str:
    """Id of a data set on the Hub; empty for local files and for rows in memory."""
    path = rows.get("path") if isinstance(rows, Mapping) else None
    if not isinstance(path, str) or "data_files" in rows or Path(path).expanduser().exists():
        return ""
    return path


def _model_class(folder: Path, task: str) -> str:
    head = folder / HEADS_FOLDER / task
    config = read_config(head if head.is_dir() else folder, str(folder))
    return (config.architectures or [""])[0]


def _results_table(scores: Scores) -> list[str]:
    columns = {name: other for name, other in (("base", scores.base), ("its expert", scores.expert)) if other}
    rows = [
        [task, scores.shown(score), *(scores.shown(other.get(task)) for other in columns.values())]
        for task, score in scores.model.items()
    ]
    share = f" ({100 * scores.normalised:.1f} % of the experts)" if scores.normalised is not None else ""
    average = ["average", f"{scores.shown(scores.average)}{share}", *[""] * len(columns)]
    table = [["task", scores.metric, *columns], *rows, average]
    if scores.rows:
        shown = [["95 % interval", "rows"], *([scores.shown_interval(t), str(n)] for t, n in scores.rows.items())]
        table = [[*row, *cells] for row, cells in zip(table, [*shown, ["", ""]], strict=True)]
    worse = ["", f"Worse than the base: {', '.join(scores.below_base)}."] if scores.below_base else []
    return [*markdown_table(table), *worse]


def add_comparison(folder: str | os.PathLike, report: str | os.PathLike) -> Path:
    """Write a comparison, with its pictures, into the card of a merged model, in place of an earlier one.

    Args:
        folder: folder that `merge_models` wrote.
        report: the `output_dir` of `compare`.

    Returns:
        The path of the card.

    Raises:
        HfEsmError: if one of the folders is of another kind.
    """
    folder, report = Path(folder).expanduser(), Path(report).expanduser()
    pictures = folder / PICTURES_FOLDER
    for path in (folder / CARD_FILE, report / REPORT):
        if not path.is_file():
            raise HfEsmError(f"{path} is missing: {folder} must be a merged model's folder, {report} a comparison's.")
    if report.resolve().is_relative_to(pictures.resolve()):
        raise HfEsmError(f"{report}: this folder is for the card's own pictures. Compare into another folder.")
    with staging_folder(pictures) as staging:
        for picture in report.glob("*.png"):
            shutil.copy(picture, staging)
        publish_folder(staging, pictures, overwrite=True)
    _, _, text = (report / REPORT).read_text(encoding="utf-8").partition("\n")  # without its title
    text = text.replace("\n## ", "\n### ").replace("](", f"]({PICTURES_FOLDER}/")
    with reading(folder / CARD_FILE):
        card = ModelCard.load(folder / CARD_FILE)
    card.text = with_section(card.text, "Comparison", text.strip())
    with atomic_file(folder / CARD_FILE) as partial:
        card.save(partial)
    return folder / CARD_FILE
