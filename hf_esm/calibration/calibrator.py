"""Statistics of checkpoints: each checkpoint is loaded where it fits, run over its samples, and released."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import torch
from accelerate import Accelerator

from ..architecture import matrix_names
from ..checkpoints import (
    Access,
    Checkpoint,
    ExpertLoader,
    ModelSpec,
    base_of_adapters,
    first_processor,
    open_checkpoint,
    prompt_before,
    resolve_source,
)
from ..data import DataSpec, RunOptions, Sample, encode, read_rows, with_prompt
from ..errors import HfEsmError
from ..utils import default_accelerator, together
from .collection import collect_statistics, pooled_inputs
from .placement import needs_spill, placement
from .reading import Reading
from .statistics import ActivationStatistics, Provenance


def calibrate(
    model: ModelSpec,
    data: DataSpec,
    *,
    base: Optional[ModelSpec] = None,
    processor: Any = None,
    num_samples: int = 32,
    seed: int = 0,
    max_length: Optional[int] = None,
    columns: Optional[Mapping[str, str]] = None,
    batch_size: int = 8,
    max_memory: Optional[int | float | str] = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
    token: Optional[str | bool] = None,
    accelerator: Optional[Accelerator] = None,
) -> ActivationStatistics:
    """Collect the activation statistics of one expert. Saved beside its weights, they replace data in later merges.

    Args:
        model: the expert: a Hub id, a folder, a live model, or a PEFT adapter.
        data: unlabelled samples: whatever `calibration` of `merge_models` takes for one task.
        base: the base model; of an adapter, by default the one that it names. Other experts can do without, but then
            the statistics do not hold what a router of ESM++ is made from.
        processor: the tokenizer or processor of the samples; by default the one beside the model or the base.
        num_samples: number of samples, chosen at random if there are more; 0 takes all.
        seed: seed of that choice.
        max_length: number of tokens that a text is cut to; by default what the model takes, at most 512.
        columns: names of the columns that hold `text`, `text_pair`, `text_target`, `image`, `audio`, if they differ.
        batch_size: samples per batch and process.
        max_memory: memory for the model and its statistics, as `"16GB"` or bytes; the rest goes to disk.
        allow_pickle: read `.bin` checkpoints, which can run code.
        trust_remote_code: run code that comes with a model.
        progress: show progress: bars on a terminal or in a notebook, elsewhere lines in the log.
        token: access token for the Hub; by default the one that `hf auth login` stored.
        accelerator: the Accelerate instance to run under; by default a new one.

    Returns:
        Statistics, the same on every process. `save` writes them to a file.

    Raises:
        HfEsmError: if the model or the data cannot be read, or the model reads NaN or infinite values.

    Example:
        >>> from hf_esm import ActivationStatistics, calibrate
        >>> statistics = calibrate("bert-sst2", sst2_texts, base="bert-base", num_samples=8, progress=False)
        >>> path = statistics.save("bert-sst2")  # beside the weights, where `merge_models` finds it
        >>> ActivationStatistics.load("bert-sst2").provenance.num_samples
        8
    """
    options = RunOptions(
        num_samples=num_samples,
        seed=seed,
        max_length=max_length,
        columns=columns,
        batch_size=batch_size,
        max_memory=max_memory,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    access = Access(token, allow_pickle, trust_remote_code)
    sources = [resolve_source(model, "model", access)]
    if base is None and sources[0].is_adapter:
        base = base_of_adapters(sources)
    if base is not None:
        sources.append(resolve_source(base, "base", access))
    opened_base = open_checkpoint(sources[1]) if base is not None else None
    expert = open_checkpoint(sources[0], opened_base)
    accelerator = accelerator or default_accelerator()
    processor = processor or first_processor(sources, trust_remote_code)
    processor = with_prompt(processor, prompt_before(expert.skeleton))
    samples = encode(read_rows(data, "data", options), processor, expert.config, "data", options)
    title = expert.source or "model"
    with TemporaryDirectory() as folder:
        pooled = pool_inputs(opened_base, {title: samples}, options, accelerator, Path(folder)) if opened_base else {}
        statistics = calibrate_checkpoint(expert, samples, options, accelerator, Path(folder), title)
    statistics.pooled = pooled.get(title, {})
    return statistics


def pool_inputs(
    base: Checkpoint,
    samples: dict[str, list[Sample]],
    options: RunOptions,
    accelerator: Accelerator,
    folder: Path,
) -> dict[str, dict[str, torch.Tensor]]:
    """Load the base, and pool what each of its blocks reads on the samples of each task.

    Args:
        samples: the samples of each task; without tasks the base is not loaded.
        folder: takes the weights that do not fit in memory.

    Returns:
        For each task, `[N, d_in]` or `[N, 4, d_in]` float32 by the canonical name of a block's first weight; see
        `pooled_inputs`.
    """
    if not samples:
        return {}
    with together(accelerator), TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as spill:
        model = base.load_model(**placement(base, accelerator, options.max_memory, Path(spill)))
        return {
            task: pooled_inputs(
                model,
                task_samples,
                accelerator=accelerator,
                batch_size=options.batch_size,
                title=task,
                progress=options.progress,
            )
            for task, task_samples in samples.items()
        }


def calibrate_checkpoint(
    expert: Checkpoint,
    samples: list[Sample],
    options: RunOptions,
    accelerator: Accelerator,
    folder: Path,
    title: str,
    readings: Optional[dict[Any, Reading]] = None,
    *,
    counts_only: bool = False,
    loader: Optional[ExpertLoader] = None,
) -> ActivationStatistics:
    """Load an expert, run it over its samples, and release it.

    Args:
        samples: the encoded samples of the expert's task.
        options: batch size, memory and progress; the seed is recorded.
        folder: takes what does not fit in memory: weights, and factors. Its files have no directory entry, and vanish
            with the statistics.
        title: name on the progress bar.
        readings: see `collect_statistics`.
        counts_only: collect no statistics but token counts.
        loader: loads the expert, and those before and after it.

    Raises:
        HfEsmError: if a layer reads NaN or infinite values.
    """
    provenance = Provenance(expert.source, expert.revision, len(samples), options.seed)
    with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as spill:
        with together(accelerator):
            place = placement(expert, accelerator, options.max_memory, Path(spill))
            spills = place or (not counts_only and needs_spill(expert, samples, accelerator, options.max_memory))
            model = (loader or ExpertLoader()).load(expert, **place)
        statistics = collect_statistics(
            model,
            samples,
            accelerator=accelerator,
            batch_size=options.batch_size,
            title=title,
            provenance=provenance,
            progress=options.progress,
            folder=Path(spill) if spills else None,
            readings=readings,
            counts_only=counts_only,
        )
    _check_finite(statistics, expert)
    return statistics


def _check_finite(statistics: ActivationStatistics, expert: Checkpoint) -> None:
    """Raise for the first layer that reads NaN or infinite values: it spoils those after it."""
    linear = expert.linear
    for weight in expert.names:
        for name in matrix_names(weight, linear[weight]) if weight in linear else [weight]:
            if name in statistics.entries and not statistics.entries[name].mean.isfinite().all():
                raise HfEsmError(
                    f"{expert.title}: on its samples, '{name}' reads NaN or infinite values. If the model is stored "
                    "in float16, save it in float32 and merge that; otherwise its weights are damaged."
                )
