"""Statistics of checkpoints: each is loaded where it fits, run over its samples, and let go."""

from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import torch
from accelerate import Accelerator

from ..architecture import matrix_names
from ..checkpoints import Access, Checkpoint, first_processor, open_checkpoint, resolve_source
from ..data import RunOptions, Sample, SampleOptions, encode, read_rows
from ..errors import HfEsmError
from ..utils import default_accelerator, together
from .collection import collect_statistics, pooled_inputs
from .placement import needs_spill, placement
from .recorder import Reading
from .statistics import ActivationStatistics, Provenance


# The options of a merge that mean something here, beside those of `SampleOptions`.
_OPTIONS = {f.name for f in fields(SampleOptions)} | {"allow_pickle", "trust_remote_code", "progress", "max_memory"}


def calibrate(
    model: Any,
    data: Any,
    *,
    base: Any = None,
    processor: Any = None,
    token: Optional[str | bool] = None,
    accelerator: Optional[Accelerator] = None,
    batch_size: int = 8,
    **options: Any,
) -> ActivationStatistics:
    """Collect one expert's activation statistics, to save beside its weights: then merging it needs no data.

    Args:
        model: the expert: a Hub id, a folder, a live model, or a LoRA adapter.
        data: unlabelled samples, as `calibration` of `merge_models`.
        base: the base model: needed if the expert is a LoRA adapter; otherwise, with it the statistics also hold what
            a router of ESM++ is made from.
        options: fields of `ProxyOptions`: `num_samples`, `seed`, `max_length`, `columns`; and of `RunOptions`:
            `allow_pickle`, `trust_remote_code`, `progress`, `max_memory`.

    Returns statistics with `save`; the same on every process.
    """
    if unknown := options.keys() - _OPTIONS:
        raise TypeError(f"calibrate has no argument {sorted(unknown)[0]!r}")
    options = RunOptions(batch_size=batch_size, **options)
    access = Access(token, options.allow_pickle, options.trust_remote_code)
    sources = [resolve_source(model, "model", access)]
    if base is not None:
        sources.append(resolve_source(base, "base", access))
    elif sources[0].is_adapter:
        raise HfEsmError(f"{sources[0].title} is a PEFT adapter: name the base model that it belongs to, too.")
    over = open_checkpoint(sources[1]) if base is not None else None
    expert = open_checkpoint(sources[0], over)
    accelerator = accelerator or default_accelerator()
    processor = processor or first_processor(sources, options.trust_remote_code)
    samples = encode(read_rows(data, "data", options), processor, expert.config, "data", options)
    with TemporaryDirectory() as folder:
        pooled = pool_inputs(over, {over.title: samples} if over else {}, options, accelerator, Path(folder))
        title = expert.source or "model"
        statistics = calibrate_checkpoint(expert, samples, options, accelerator, Path(folder), title)
    statistics.pooled = pooled[over.title] if over else {}
    return statistics


def pool_inputs(
    base: Checkpoint,
    samples: dict[str, list[Sample]],
    options: RunOptions,
    accelerator: Accelerator,
    folder: Path,
) -> dict[str, dict[str, torch.Tensor]]:
    """What every block of the base reads, by task; the base is loaded for it, if there are tasks, and let go."""
    if not samples:
        return {}
    with together(accelerator), TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as spill:
        model = base.load_model(**placement(base, accelerator, options.max_memory, Path(spill)))
        return {
            task: pooled_inputs(
                model,
                rows,
                accelerator=accelerator,
                batch_size=options.batch_size,
                title=task,
                progress=options.progress,
            )
            for task, rows in samples.items()
        }


def calibrate_checkpoint(
    expert: Checkpoint,
    samples: list[Sample],
    options: RunOptions,
    accelerator: Accelerator,
    folder: Path,
    title: str,
    readings: Optional[dict[Any, Reading]] = None,
) -> ActivationStatistics:
    """Load an expert, run it over its samples, and let it go.

    `folder` takes what memory does not: weights that do not fit, and factors that do not fit beside the weights. Its
    files are without a name, and go when the statistics do.
    """
    provenance = Provenance(expert.source, expert.revision, len(samples), options.seed)
    with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as spill:
        with together(accelerator):
            place = placement(expert, accelerator, options.max_memory, Path(spill))
            crowded = place or needs_spill(expert, samples, accelerator, options.max_memory)
            model = expert.load_model(**place)
        statistics = collect_statistics(
            model,
            samples,
            accelerator=accelerator,
            batch_size=options.batch_size,
            title=title,
            provenance=provenance,
            progress=options.progress,
            folder=Path(spill) if crowded else None,
            readings=readings,
        )
    linear = expert.linear
    matrices = (m for name in expert.names for m in (matrix_names(name, linear[name]) if name in linear else [name]))
    for name in matrices:  # from the first layer on: what it spoils comes after it
        if name in statistics.entries and not statistics.entries[name].mean.isfinite().all():
            raise HfEsmError(
                f"{expert.title}: on its samples, '{name}' reads NaN or infinite values. If the model is stored in "
                "float16, save it in float32 and merge that; else it is broken."
            )
    return statistics
