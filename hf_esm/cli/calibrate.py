"""Run an expert over unlabelled samples and write its activation statistics, which serve every later merge. With a
recipe, do so for every expert that it names samples for: TASK.safetensors in one folder.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..calibration import ActivationStatistics, calibrate
from ..data import SampleOptions
from ..errors import HfEsmError
from ..merging import STATISTICS_SAMPLES, statistics_and_samples
from ..planning import load_recipe, name_experts, task_weights
from ..utils import check_path
from .console import Outcome
from .device import add_device_flag
from .flags import add_flags, add_trust_flags, count, options_of
from .requests import is_recipe
from .values import plain_or_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of the expert; or a recipe, for all experts in it")
    parser.add_argument("data", nargs="?", help="samples: JSON lines, JSON, CSV, Parquet or text (not with a recipe)")
    parser.add_argument(
        "-o", "--output", help="file to write (.safetensors), or a folder (default: the recipe's statistics_dir)"
    )
    parser.add_argument("--base", help="the base model, for ESM++ (default for adapters: the one that they name)")
    parser.add_argument("--compress-rank", type=count, help="keep this many rows of each factor (smaller, lossy)")
    parser.add_argument("--batch-size", type=count, help="samples per batch and process (default: 8)")
    parser.add_argument("--max-memory", help="memory to calibrate in, such as 16GB; the rest goes to disk")
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help="show progress"
    )
    add_device_flag(parser)
    add_trust_flags(parser)
    add_flags(parser, SampleOptions)


def run(arguments: argparse.Namespace) -> Outcome:
    if is_recipe(arguments.model):
        return _calibrate_recipe(arguments)
    if arguments.data is None or arguments.output is None:
        raise HfEsmError("calibrate takes a recipe, or MODEL SAMPLES -o FILE.")
    check_path(arguments.output, "--output")
    data, base = plain_or_yaml(arguments.data, "samples"), arguments.base
    base = plain_or_yaml(base, "--base") if base else None
    statistics = calibrate(plain_or_yaml(arguments.model, "model"), data, base=base, **_options(arguments))
    return _outcome([_save(statistics, arguments.output, arguments)])


def _outcome(written: list[dict[str, Any]], following: str = "") -> Outcome:
    lines = []
    for entry in written:
        line = f"{entry['file']}: {entry['linear_maps']} linear maps, {entry['num_samples']} samples"
        if entry["compression_error"] is not None:
            line += f", compression error up to {entry['compression_error']:.1%}"
        lines.append(line)
    return Outcome("\n".join(lines), written, "\n".join(entry["file"] for entry in written), following=following)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `calibrate` that flags set."""
    options = options_of(arguments, SampleOptions)
    options |= {n: v for n in ("batch_size", "max_memory") if (v := getattr(arguments, n)) is not None}
    options |= {n: True for n in ("allow_pickle", "trust_remote_code") if getattr(arguments, n)}
    return options | ({"progress": arguments.progress} if hasattr(arguments, "progress") else {})


def _save(statistics: ActivationStatistics, output: str | Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write statistics on the main process; return where, and how much they hold."""
    if arguments.compress_rank:
        statistics = statistics.compress(arguments.compress_rank)
    path = statistics.save(output) if PartialState().is_main_process else output
    return {
        "file": str(path),
        "linear_maps": len(statistics),
        "num_samples": statistics.provenance.num_samples,
        "compression_error": statistics.provenance.compression_error if arguments.compress_rank else None,
    }


def _calibrate_recipe(arguments: argparse.Namespace) -> Outcome:
    """Write the statistics of every expert in a recipe that has samples there."""
    if arguments.data is not None:
        raise HfEsmError(f"{arguments.model} is a recipe, which names the samples. Leave {arguments.data!r} out.")
    recipe = load_recipe(arguments.model, "calibrate")
    folder = arguments.output or recipe.pop("statistics_dir", None)
    if not folder:
        raise HfEsmError("Say where to write: -o FOLDER (or statistics_dir in the recipe).")
    check_path(folder, "--output")
    experts, _ = task_weights(name_experts(recipe.pop("experts")), None)
    calibration, base = recipe.pop("calibration", None), recipe.pop("base")
    base = plain_or_yaml(arguments.base, "--base") if arguments.base else base
    most = recipe.pop("statistics_samples", None)
    most = STATISTICS_SAMPLES if most is None else most
    if most:  # as a merge by the recipe chooses
        recipe["num_samples"] = min(recipe.get("num_samples", most) or most, most)
    if not isinstance(calibration, Mapping):
        raise HfEsmError(f"{arguments.model} names no samples by task. Add calibration: {{TASK: FILE}} for each.")
    found = {task: statistics_and_samples(calibration.get(task)) for task in experts}
    options = {**recipe, **_options(arguments)}
    if not any(rows is not None for _, rows in found.values()):
        raise HfEsmError(f"{arguments.model}: no expert has samples in calibration. Add those of one expert or more.")
    written = []
    for task, (_, rows) in found.items():
        if rows is not None:
            path = Path(folder).expanduser() / f"{task}.safetensors"
            written.append(_save(calibrate(experts[task], rows, base=base, **options), path, arguments))
    every = None not in [rows for _, rows in found.values()]
    return _outcome(written, f"hf-esm merge {arguments.model} --calibration {folder}" if every else "")
