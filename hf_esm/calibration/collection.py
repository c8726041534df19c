"""One pass of a live model over its samples, with its inputs recorded."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel

from ..architecture import body_key, layer_type, tower_of, towers
from ..data import Sample, batch_for, batch_indices, text_config
from ..linalg import triangular_factor
from ..methods import InputStatistics
from ..utils import default_accelerator, gather, together
from .decoder_inputs import with_decoder_inputs
from .recorder import Call, InputRecorder, Reading
from .statistics import ActivationStatistics, Provenance


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
) -> ActivationStatistics:
    """One forward pass over the samples, shared out over processes.

    Args:
        model: the expert. It is moved to the accelerator's device for the run and left exactly as it was.
        samples: unbatched, unpadded model inputs, see `proxies.encode`. Those of one shape share a batch; texts of
            unlike length do, too, where the model is seen to read them in a padded batch as it does alone.
        accelerator: by default a new one.
        batch_size: samples per batch and process.
        title: name on the progress bar.
        folder: an empty one, to hold the factors on disk rather than in memory; the statistics stand there, too.
        readings: what calls on fine-tunes of the same checkpoint learned of how they read batches, to which this one
            adds; without, it takes up to three passes over two samples to learn.

    Returns statistics of every linear map that ran, the same on every process.
    """
    accelerator = accelerator or default_accelerator()
    recorder = InputRecorder(model, folder)

    with (
        together(accelerator),
        _in_evaluation(model, accelerator),
        torch.no_grad(),
        accelerator.split_between_processes(samples) as own,
    ):
        own = with_decoder_inputs(model, own, batch_size)
        groups = _learn_batches(recorder, own, batch_size, {} if readings is None else readings)
        for group in tqdm(groups, desc=f"Calibrating {title}", disable=not progress or not groups, leave=False):
            batch = batch_for([own[i] for i in group], model)
            with recorder.recording(batch.get("attention_mask")):
                model(**batch)
    entries, keys_of = _reduce(recorder, accelerator)
    provenance = provenance or Provenance(num_samples=len(samples))
    return ActivationStatistics(entries, keys_of, provenance)


def _learn_batches(
    recorder: InputRecorder, samples: list[Sample], batch_size: int, readings: dict[Any, Reading]
) -> list[list[int]]:
    """Which samples run together; and what of their inputs is no sample's, or padding."""
    groups, padded = batch_indices(samples, batch_size), batch_indices(samples, batch_size, padded=True)
    if not groups:
        return []
    model, shortest = recorder.model, samples[groups[-1][-1]]
    texts = "input_ids" in shortest and all(
        sample.keys() == shortest.keys() and len({value.shape for value in sample.values()}) == 1 for sample in samples
    )
    masked = "attention_mask" in inspect.signature(model.forward).parameters
    pair, mask = [shortest, shortest], None
    if texts and masked and len(groups) > len(padded) + 1:  # finding out takes one pass more
        longer = [samples[i] for i, *_ in groups if len(samples[i]["input_ids"]) >= 2 * len(shortest["input_ids"])]
        pair = [shortest, longer[-1] if longer else samples[groups[0][0]]]
        mask = batch_for(pair, model)["attention_mask"]
    key = body_key(model), mask is not None, *sorted(shortest)
    if key in readings:
        recorder.reading = readings[key]
    else:
        recorder.learn(lambda chosen: model(**batch_for([pair[i] for i in chosen], model)), mask)
        readings[key] = recorder.reading
    return padded if recorder.reading.alike and mask is not None else groups


def pooled_inputs(
    model: PreTrainedModel,
    samples: list[Sample],
    *,
    accelerator: Optional[Accelerator] = None,
    batch_size: int = 8,
    title: str = "model",
    progress: bool = True,
) -> dict[str, Tensor]:
    """What every block reads: the mean input row of its first linear map, for each sample.

    Blocks are told by their names: the linear maps that stand where the first one to run stands in its own block. Of a
    model with two towers, those of each; what is projected from them is no block.

    Returns `[N, d_in]` float32 by the weight's canonical name, in the order in which they run.
    """
    recorder, apart = InputRecorder(model), towers(model)
    found: dict[str, Tensor] = {}
    with _in_evaluation(model, accelerator or default_accelerator()), torch.no_grad():
        samples = with_decoder_inputs(model, samples, batch_size)
        for group in tqdm(batch_indices(samples, batch_size), desc=f"Reading {title}", disable=not progress):
            first: dict[str, Tensor] = {}

            def act(call: Call, inputs: Tensor, size: int = len(group), first: dict[str, Tensor] = first) -> None:
                weight, tower = call[0], tower_of(call[0], apart)
                kind = layer_type(next((name for name in first if name.startswith(tower)), weight))
                if layer_type(weight) == kind and call[1] == 1 and inputs.shape[0] % size == 0:
                    first[weight] = inputs.detach().float().reshape(size, -1, inputs.shape[-1]).mean(1).cpu()

            with recorder.hooked(act):
                model(**batch_for([samples[i] for i in group], model))
            for weight, rows in first.items():
                found.setdefault(weight, torch.zeros(len(samples), rows.shape[1]))[group] = rows
    return found


@contextmanager
def _in_evaluation(model: PreTrainedModel, accelerator: Accelerator) -> Iterator[None]:
    """The model on the accelerator's device and in evaluation mode; afterwards as it was."""
    training = {module: module.training for module in model.modules()}
    config = text_config(model.config)
    unpadded = getattr(config, "pad_token_id", -1) is None and not model.config.is_encoder_decoder
    device = next(model.parameters()).device
    moved = device != accelerator.device and not getattr(model, "hf_device_map", None)
    try:
        model.eval()
        if unpadded:
            config.pad_token_id = -1  # without one, decoders classify single samples only; nothing is padded here
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


def _reduce(recorder: InputRecorder, accelerator: Accelerator) -> tuple[dict[str, InputStatistics], dict[str, str]]:
    """Factors, means and counts over all processes."""
    entries = {}
    leaders = defaultdict(set)
    for part in gather(accelerator, dict(recorder.leaders)):
        for weight, found in part.items():
            leaders[weight] |= found
    # A map that reads now its own input and now another map's cannot be told apart from it: neither has statistics.
    keys_of = {weight: next(iter(found)) for weight, found in leaders.items() if len(found) == 1}
    for key in sorted(set(keys_of.values())):
        found = recorder.accumulators.pop(key, None)
        part = (found.factor, found.total, found.count) if found else None
        if accelerator.num_processes > 1:
            # The smaller factor, and no view, which would be sent with all that it is a view of.
            parts = gather(accelerator, part and (triangular_factor(part[0]).clone(), *part[1:]))
            factors, totals, counts = zip(*(part for part in parts if part is not None), strict=True)
            factor, total, count = torch.cat(factors), sum(totals), sum(counts)
            if factor.shape[0] > 2 * factor.shape[1]:
                factor = triangular_factor(factor)
        else:
            factor, total, count = part
        mean = total / max(count, 1)
        entries[key] = InputStatistics(factor, mean.float(), count)
    return entries, keys_of
