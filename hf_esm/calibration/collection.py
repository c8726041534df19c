"""One pass of a live model over its samples, which records the inputs of its linear maps."""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from ..architecture import body_key, layer_type, reads_prompts, tower_of, towers
from ..data import Sample, batch_for, batch_indices, sample_fingerprint, text_config
from ..linalg import triangular_factor
from ..methods import InputStatistics
from ..utils import default_accelerator, gather, together, tracked
from .decoder_inputs import with_decoder_inputs
from .embeddings import RowCounter
from .hooks import Call, InputHooks
from .reading import Reading, learn_reading
from .recorder import FactorAccumulator, InputRecorder
from .statistics import ActivationStatistics, Provenance


# Shares of a sample that stand for prompts: a router reads a prompt alone, but a sample is a text with its answer.
PROMPT_SHARES = (1 / 8, 1 / 4, 1 / 2, 1)


def collect_statistics(
    model: PreTrainedModel,
    samples: list[Sample],
    *,
    accelerator: Optional[Accelerator] = None,
    batch_size: int = 8,
    title: str = "model",
    provenance: Optional[Provenance] = None,
    progress: bool = True,
    folder: Optional[Path] = None,
    readings: Optional[dict[Any, Reading]] = None,
    counts_only: bool = False,
) -> ActivationStatistics:
    """Run a model over samples, shared out over processes, and collect the statistics of its linear maps,
    and the token counts of its embeddings.

    Args:
        model: the expert. It is moved to the accelerator's device for the run, and afterwards is as it was.
        samples: unbatched, unpadded model inputs. Samples of the same shape share a batch; texts of other lengths do,
            too, if the model reads them in a padded batch as it does alone.
        accelerator: the Accelerate instance to run under; by default a new one.
        batch_size: samples per batch and process.
        title: name on the progress bar.
        provenance: origin of the statistics; by default the number of samples alone. The fingerprints of the samples
            are added.
        progress: show a progress bar.
        folder: empty folder for the factors, which then need no memory while they grow, and are read from there.
        readings: how models read batches, learned in earlier calls on fine-tunes of the same checkpoint; this call
            adds to it. Learning takes up to three passes over two samples.
        counts_only: collect no statistics but token counts, for methods that need no others.

    Returns:
        Statistics of every linear map that ran, the same on every process.

    Example:
        >>> import torch
        >>> from transformers import AutoModel
        >>> from hf_esm import collect_statistics
        >>> model = AutoModel.from_pretrained("bert-base")
        >>> samples = [{"input_ids": torch.tensor([2, 5, 6, 3])}, {"input_ids": torch.tensor([2, 7, 3])}]
        >>> statistics = collect_statistics(model, samples, progress=False)
        >>> statistics["encoder.layer.0.attention.self.query.weight"].count  # tokens
        7
    """
    accelerator = accelerator or default_accelerator()
    hooks = InputHooks(model)
    with (
        together(accelerator),
        in_evaluation(model, accelerator),
        torch.no_grad(),
        accelerator.split_between_processes(samples) as local,
    ):
        local = with_decoder_inputs(model, local, batch_size)
        groups, reading = learn_batches(hooks, local, batch_size, {} if readings is None else readings)
        recorder, counter = InputRecorder(hooks, reading, folder), RowCounter(hooks.embeddings, reading.repeated)
        for group in tracked(groups, f"Calibrating {title}", progress, leave=False):
            batch = batch_for([local[i] for i in group], model)
            mask = batch.get("attention_mask")
            with nullcontext() if counts_only else recorder.recording(mask), counter.counting(len(group), mask):
                model(**batch)
    keys_of = _keys_of(gather(accelerator, dict(recorder.leaders)))
    entries = {
        key: _reduce(recorder.accumulators.pop(key, None), accelerator) for key in sorted(set(keys_of.values()))
    }
    provenance = replace(
        provenance or Provenance(num_samples=len(samples)), samples=tuple(map(sample_fingerprint, samples))
    )
    return ActivationStatistics(entries, keys_of, provenance, token_counts=_total(gather(accelerator, counter.counts)))


def learn_batches(
    hooks: InputHooks, samples: list[Sample], batch_size: int, readings: dict[Any, Reading]
) -> tuple[list[list[int]], Reading]:
    """Decide which samples run together.

    Args:
        hooks: hooks on the model.
        samples: unbatched, unpadded model inputs.
        batch_size: samples per batch.
        readings: what is known of how models read batches; what is learned here is added.

    Returns:
        The indices of the samples of each batch, and how the model reads them.
    """
    groups, padded = batch_indices(samples, batch_size), batch_indices(samples, batch_size, padded=True)
    if not groups:
        return [], Reading()
    model, shortest = hooks.model, samples[groups[-1][-1]]
    texts = "input_ids" in shortest and all(
        sample.keys() == shortest.keys() and len({value.shape for value in sample.values()}) == 1 for sample in samples
    )
    masked = "attention_mask" in inspect.signature(model.forward).parameters
    pair, mask = [shortest, shortest], None
    if texts and masked and len(groups) > len(padded) + 1:  # learning about padding takes one pass more
        longer = [samples[i] for i, *_ in groups if len(samples[i]["input_ids"]) >= 2 * len(shortest["input_ids"])]
        pair = [shortest, longer[-1] if longer else samples[groups[0][0]]]
        mask = batch_for(pair, model)["attention_mask"]
    key = body_key(model), mask is not None, *sorted(shortest)
    if key not in readings:
        readings[key] = learn_reading(hooks, lambda chosen: model(**batch_for([pair[i] for i in chosen], model)), mask)
    reading = readings[key]
    return padded if reading.alike and mask is not None else groups, reading


def pooled_inputs(
    model: PreTrainedModel,
    samples: list[Sample],
    *,
    accelerator: Optional[Accelerator] = None,
    batch_size: int = 8,
    title: str = "model",
    progress: bool = True,
) -> dict[str, Tensor]:
    """Run a model over samples, and pool what each of its blocks reads: the mean input of its first linear map.

    The first linear map to run names the kind: a block is whatever holds a map of the same kind. Each tower of a model
    with two towers has its blocks; the projections behind the towers are not blocks.

    Returns:
        `[N, d_in]` float32, one row per sample, by the weight's canonical name, in the order in which the maps run. Of
        a model that reads prompts, `[N, 4, d_in]`: the means over the beginnings of a sample, `PROMPT_SHARES` of it.
    """
    hooks, tower_names, prompts = InputHooks(model), towers(model), reads_prompts(model)
    pooled: dict[str, Tensor] = {}
    with in_evaluation(model, accelerator or default_accelerator()), torch.no_grad():
        samples = with_decoder_inputs(model, samples, batch_size)
        for group in tracked(batch_indices(samples, batch_size), f"Reading {title}", progress):
            means: dict[str, Tensor] = {}

            def act(call: Call, inputs: Tensor, size: int = len(group), means: dict[str, Tensor] = means) -> None:
                weight, tower = call[0], tower_of(call[0], tower_names)
                kind = layer_type(next((name for name in means if name.startswith(tower)), weight))
                if layer_type(weight) == kind and call[1] == 1 and inputs.shape[0] % size == 0:
                    rows = inputs.detach().float().reshape(size, -1, inputs.shape[-1])
                    means[weight] = (_means_of_beginnings(rows) if prompts else rows.mean(1)).cpu()

            with hooks.hooked(act):
                model(**batch_for([samples[i] for i in group], model))
            for weight, rows in means.items():
                pooled.setdefault(weight, torch.zeros(len(samples), *rows.shape[1:]))[group] = rows
    return pooled


def _means_of_beginnings(rows: Tensor) -> Tensor:
    """Return the means `[B, 4, d]` over the first tokens of rows `[B, n, d]`, a share of `PROMPT_SHARES` each."""
    lengths = [math.ceil(share * rows.shape[1]) for share in PROMPT_SHARES]
    return torch.stack([rows[:, :length].mean(1) for length in lengths], dim=1)


@contextmanager
def in_evaluation(model: PreTrainedModel, accelerator: Accelerator) -> Iterator[None]:
    """Put the model on the accelerator's device and into evaluation mode inside the block."""
    training = {module: module.training for module in model.modules()}
    config = text_config(model.config)
    unpadded = getattr(config, "pad_token_id", -1) is None and not model.config.is_encoder_decoder
    device = next(model.parameters()).device
    moved = device != accelerator.device and not getattr(model, "hf_device_map", None)
    try:
        model.eval()
        if unpadded:
            config.pad_token_id = -1  # decoders without a padding token classify one sample at a time
        if moved:
            model.to(accelerator.device)
        yield
    finally:
        if unpadded:
            config.pad_token_id = None
        if moved:
            model.to(device)
        for module, mode in training.items():
            module.training = mode


def _keys_of(leaders_of_processes: list[dict[str, set[str]]]) -> dict[str, str]:
    """Return the key of each map's entry. A map that reads now its own tensor, now another map's, has none: its inputs
    cannot be told apart.
    """
    leaders = defaultdict(set)
    for leaders_of_process in leaders_of_processes:
        for weight, names in leaders_of_process.items():
            leaders[weight] |= names
    return {weight: next(iter(names)) for weight, names in leaders.items() if len(names) == 1}


def _total(counts_of_processes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Add up the token counts of all processes."""
    total: dict[str, Tensor] = {}
    for counts in counts_of_processes:
        total |= {name: total.get(name, 0) + count for name, count in counts.items()}
    return dict(sorted(total.items()))


def _reduce(accumulator: Optional[FactorAccumulator], accelerator: Accelerator) -> InputStatistics:
    """Add up the inputs that the processes recorded of one map; a process may have recorded none."""
    part = (accumulator.factor, accumulator.total, accumulator.count) if accumulator else None
    if accelerator.num_processes > 1:
        # The smaller factor is sent, cloned: with a view, all of its buffer would be sent.
        parts = gather(accelerator, part and (triangular_factor(part[0]).clone(), *part[1:]))
        factors, totals, counts = zip(*(part for part in parts if part is not None), strict=True)
        factor, total, count = torch.cat(factors), sum(totals), sum(counts)
        if factor.shape[0] > 2 * factor.shape[1]:
            factor = triangular_factor(factor)
    else:
        factor, total, count = part
    return InputStatistics(factor, (total / max(count, 1)).float(), count)
