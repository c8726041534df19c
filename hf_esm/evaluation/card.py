"""Scores and comparisons written into the card of a merged model."""

import os
import shutil
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

from ..checkpoints import (
    CARD_FILE,
    EVALUATION_FOLDER,
    HEADS_FOLDER,
    PICTURES_FOLDER,
    SCORES_PICTURE,
    read_config,
)
from ..data import DataSpec
from ..errors import HfEsmError
from ..hub import pipeline_of, with_section
from ..metrics import Scores, plot_task_scores
from ..utils import atomic_file, markdown_table, publish_folder, reading, staging_folder
from .report import REPORT


RESULTS = f"{EVALUATION_FOLDER}/hf_esm.yaml"


def update_card(folder: str | os.PathLike, scores: Scores, data: Mapping[str, DataSpec]) -> Path:
    """Write scores into the card of a merged model, in place of earlier ones.

    They become evaluation results in the metadata, which the Hub shows, with the number of rows and the interval in
    the names; a table before the section "Limits", with the base and the experts; and, where matplotlib is installed,
    a picture. Scores on data sets of the Hub also go into `.eval_results/`, from where the Hub reads them.

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
        _result(folder, task, score, data.get(task), scores) for task, score in scores.model.items() if isfinite(score)
    ]
    lines = _results_table(scores)
    if picture := _draw(folder, scores, card.data.tags or []):
        lines += ["", f"![The scores as bars, with the experts as lines]({picture})"]
    card.text = with_section(card.text, "Results", "\n".join(lines))
    with atomic_file(folder / CARD_FILE) as partial:
        card.save(partial)
    _write_entries(folder, scores, data)
    return folder / CARD_FILE


def _draw(folder: Path, scores: Scores, tags: list[str]) -> str:
    """Draw the scores; return the file's name, which is empty if they are no shares or matplotlib is not installed."""
    (folder / SCORES_PICTURE).unlink(missing_ok=True)
    bars = {"this model": scores.model} | ({"the base": scores.base} if scores.base else {})
    values = [value for by_task in (*bars.values(), scores.expert) for value in by_task.values()]
    complete = all(by_task.keys() >= scores.model.keys() for by_task in (*bars.values(), scores.expert))
    if not complete or not all(0 <= value <= 1 for value in values):
        return ""
    nan = float("nan")
    intervals = {label: dict.fromkeys(scores.model, (nan, nan)) for label in bars}
    intervals["this model"] |= scores.intervals
    methods = {"this model": tags[-1] if tags else "esm", "the base": "the base"}
    experts = {task: scores.expert[task] for task in scores.model}
    path, title = folder / SCORES_PICTURE, "Scores by task"
    try:
        plot_task_scores(
            bars,
            experts,
            path,
            title,
            ylabel=scores.metric,
            intervals=intervals,
            methods=methods,
            bars_are=" and ".join(bars),
        )
    except HfEsmError:  # without matplotlib
        return ""
    return SCORES_PICTURE


def _write_entries(folder: Path, scores: Scores, data: Mapping[str, DataSpec]) -> None:
    """Write the scores on data sets of the Hub as the Hub reads them beside a card, in place of earlier ones."""
    entries = []
    for task, score in scores.model.items():
        rows = data.get(task)
        if isinstance(rows, Mapping) and (dataset := _dataset_id(rows)) and isfinite(score):
            split = f" of split {rows['split']}" if rows.get("split") else ""
            others = {"base": scores.base.get(task), "expert": scores.expert.get(task)}
            notes = [f"{scores.metric}{split}", _sampling(scores, task)]
            notes += [f"{name} {value:.4g}" for name, value in others.items() if value is not None]
            entries.append(
                EvalResultEntry(
                    dataset_id=dataset,
                    task_id=rows.get("name") or "default",
                    value=round(score, 6),
                    dataset_revision=rows.get("revision"),
                    notes="; ".join(filter(None, notes)),
                )
            )
    if not entries:
        (folder / RESULTS).unlink(missing_ok=True)
        return
    (folder / RESULTS).parent.mkdir(exist_ok=True)
    with atomic_file(folder / RESULTS) as partial:
        partial.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")


def _sampling(scores: Scores, task: str) -> str:
    """The number of rows and the interval of a task's score in words; empty if they are not known."""
    if task not in scores.outcomes:
        return ""
    low, high = scores.intervals[task]
    interval = f", 95 % interval {low:.4g} to {high:.4g}" if isfinite(low) and isfinite(high) else ""
    return f"n = {scores.rows[task]}{interval}"


def _result(folder: Path, task: str, score: float, rows: Any, scores: Scores) -> EvalResult:
    """One score as the Hub's metadata has it."""
    described = rows if isinstance(rows, Mapping) else {}
    return EvalResult(
        task_type=pipeline_of(_model_class(folder, task)),
        dataset_type=_dataset_id(rows) or task,
        dataset_name=task,
        dataset_config=described.get("name"),
        dataset_split=described.get("split"),
        dataset_revision=described.get("revision"),
        metric_type=scores.metric,
        metric_name=f"{scores.metric} ({sampling})" if (sampling := _sampling(scores, task)) else None,
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
