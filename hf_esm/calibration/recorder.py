"""Running an expert over its proxy samples, and keeping what its linear maps read."""

import copy
import inspect
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from ..architecture import body_key, canonical_names, layer_type, linear_maps, tower_of, towers
from ..data.batches import batch_for, batch_indices, to_generate_from
from ..data.samples import Sample, text_config
from ..errors import HfEsmError
from ..linalg import triangular_factor
from ..utils.distributed import default_accelerator, gather, together
from .mixtures import mixtures_of
from .placement import reserve
from .statistics import ActivationStatistics, InputStatistics, Provenance


# A linear map by its weight, and which of its calls within one pass.
_Call = tuple[str, int]


class _Accumulator:
    """Streams rows into a factor of at most twice as many rows as columns, their sum and their count.

    The factor stands in a buffer of that size, of which the operating system backs what was written; given a file, it
    stands there, and memory only caches it.
    """

    def __init__(self, width: int, file: Optional[Path] = None):
        size = 2 * width * width
        held = torch.empty(size) if file is None else torch.from_file(str(file), shared=True, size=size)
        self._held, self._rows, self._file = held.view(2 * width, width), 0, file
        self.total, self.count = torch.zeros(width, dtype=torch.float64), 0

    @property
    def factor(self) -> Tensor:
        return self._held[: self._rows]

    def add(self, rows: Tensor) -> None:
        rows = rows.detach().float()
        self.total += rows.sum(0).cpu()  # exact enough within a batch, float64 over all
        self.count += rows.shape[0]
        for part in rows.split(rows.shape[1]):
            if self._rows + part.shape[0] > self._held.shape[0]:
                self._put(triangular_factor(self.factor.to(rows.device)), 0)
            self._put(part, self._rows)

    def _put(self, rows: Tensor, start: int) -> None:
        self._rows = start + rows.shape[0]
        if self._file is not None:  # what a full disk does not take would end the process without a word
            reserve(self._file, self._rows * rows.shape[1] * rows.element_size())
        self._held[start : self._rows] = rows


@dataclass
class Reading:
    """How a model reads samples that share a batch: the same for all models of one class and one body.

    Attributes:
        left_out: inputs that are made of no sample, such as DeBERTa's relative positions.
        padded: inputs that hold the padding of a batch.
        alike: whether samples are read the same in a padded batch as alone, up to rounding: not so where padding
            shows, as through convolutions.
    """

    left_out: set[_Call] = field(default_factory=set)
    padded: set[_Call] = field(default_factory=set)
    alike: bool = True


class InputRecorder:
    """Hooks on a model's linear maps that add every row they read to an accumulator.

    Maps that read the same tensor share one. A mixture whose experts one module holds counts as a map, by the name of
    its first matrices, until its rows are told apart by expert.
    """

    def __init__(self, model: PreTrainedModel, folder: Optional[Path] = None):
        """`folder` is where factors stand while they grow, if not in memory."""
        self.model, self.folder = model, folder
        live, maps = {name: canonical for canonical, name in canonical_names(model).items()}, linear_maps(model)
        self.weight_of = {
            linear.module: live[linear.weight]
            for linear in maps.values()
            if not linear.slices and linear.weight in live
        }
        by_module = mixtures_of(model, maps, live)
        self.weight_of |= {module: mixture.first for module, mixture in by_module.items()}
        self.mixtures = {mixture.first: mixture for mixture in by_module.values()}
        self.accumulators: dict[str, _Accumulator] = {}
        self.leaders: dict[str, set[str]] = defaultdict(set)
        self.reading = Reading()
        self._seen: dict[int, tuple[weakref.ref, str]] = {}

    def learn(self, run: Callable[[list[int]], Any], mask: Optional[Tensor]) -> None:
        """Learn the model's `reading` from passes over two samples. An input that has one shape alone and in a batch
        is made of no sample.

        Args:
            run: passes over the first, the second, or both: the second is the longer one, or they are of one shape.
            mask: `[2, length]`, 0 where the batch of both is padded; None where they are of one shape.
        """
        reading = self.reading = Reading()
        alone: dict[_Call, list[tuple[torch.Size, Tensor]]] = defaultdict(list)
        passes = (0, 1) if mask is not None else (1,)
        for i in passes:
            with self.hooked(lambda call, inputs: alone[call].append((inputs.shape, _sketch(_rows(inputs))))):
                run([i])
        together: dict[_Call, bool] = {}

        def compare(call: _Call, inputs: Tensor) -> None:
            rows = [sketch for _, sketch in alone.get(call, []) if len(sketch)]
            if len(rows) == len(passes) and inputs.shape == alone[call][-1][0]:
                reading.left_out.add(call)
            elif mask is not None:
                together[call] = bool(rows) and self._reads_alike(call, inputs, mask, torch.cat(rows))

        with self.hooked(compare):
            run([0, 1])
        reading.alike = mask is None or all(together.get(call, False) for call in alone.keys() - reading.left_out)
        if not reading.alike:
            reading.padded.clear()

    def _reads_alike(self, call: _Call, inputs: Tensor, mask: Tensor, expected: Tensor) -> bool:
        padded = inputs.shape[:-1].numel() == mask.numel() != expected.shape[0]
        if padded:
            self.reading.padded.add(call)
        found, tolerance = _sketch(_rows(inputs, mask if padded else None)), 8 * torch.finfo(inputs.dtype).eps
        same = found.shape == expected.shape
        return same and bool((found - expected).abs().max() <= max(1e-4, tolerance) * expected.abs().max())

    @contextmanager
    def recording(self, mask: Optional[Tensor] = None) -> Iterator[None]:
        """Around one pass over samples; `mask` `[B, length]` is 0 where they are padded."""
        self._seen = {}
        with self.hooked(lambda call, inputs: self._take(call, inputs, mask)):
            yield

    def _take(self, call: _Call, inputs: Tensor, mask: Optional[Tensor]) -> None:
        weight, _ = call
        if call in self.reading.left_out:
            return
        mask = mask if call in self.reading.padded else None
        if weight in self.mixtures:
            real = None if mask is None else mask.reshape(-1).bool()
            for matrix, rows in self.mixtures[weight].reads(inputs, real):
                self._add(matrix, rows)
            return
        known = self._seen.get(id(inputs))
        if known is not None and known[0]() is inputs:
            self.leaders[weight].add(known[1])
            return
        self._seen[id(inputs)] = (weakref.ref(inputs), weight)
        self._add(weight, _rows(inputs, mask))

    def _add(self, weight: str, rows: Tensor) -> None:
        """Add what a map reads by itself, or the first of those that read it."""
        self.leaders[weight].add(weight)
        if weight not in self.accumulators:
            file = self.folder / f"{weight}.factor" if self.folder else None
            self.accumulators[weight] = _Accumulator(rows.shape[-1], file)
        self.accumulators[weight].add(rows)

    @contextmanager
    def hooked(self, act: Callable[[_Call, Tensor], Any]) -> Iterator[None]:
        """Call `act` with every input of every linear map in one pass."""
        calls: Counter[str] = Counter()

        def reader(weight: str) -> Callable:
            def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                calls[weight] += 1
                if weight in self.mixtures:
                    inputs = self.mixtures[weight].open(args, kwargs)
                else:
                    inputs = args[0] if args else next(iter(kwargs.values()))
                act((weight, calls[weight]), inputs)

            return read

        handles = [
            module.register_forward_pre_hook(reader(self.weight_of[name]), with_kwargs=True)
            for name, module in self.model.named_modules()
            if name in self.weight_of
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


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
        own = _with_decoder_inputs(model, own, batch_size)
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


def _rows(inputs: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """The rows of what a linear map reads, `[n, d]`; those where `mask` is 0 are left out."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1).bool()]


def _sketch(rows: Tensor) -> Tensor:
    """Four fixed random mixtures of each row's features, `[n, 4]`: enough to tell other rows, without keeping them."""
    mixed = torch.randn(rows.shape[1], 4, generator=torch.Generator().manual_seed(0))
    return rows.float() @ mixed.to(rows.device)


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
        samples = _with_decoder_inputs(model, samples, batch_size)
        for group in tqdm(batch_indices(samples, batch_size), desc=f"Reading {title}", disable=not progress):
            first: dict[str, Tensor] = {}

            def act(call: _Call, inputs: Tensor, size: int = len(group), first: dict[str, Tensor] = first) -> None:
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


def _with_decoder_inputs(model: PreTrainedModel, samples: list[Sample], batch_size: int) -> list[Sample]:
    """Give an encoder-decoder something to decode: the targets if there are any, else what it generates itself, else
    its source, as its classifiers do.
    """
    targets = [sample.get("labels") for sample in samples]
    samples = [{name: value for name, value in sample.items() if name != "labels"} for sample in samples]
    if "decoder_input_ids" not in inspect.signature(type(model).forward).parameters:
        return samples
    waiting = [i for i, sample in enumerate(samples) if "decoder_input_ids" not in sample]
    generating = [i for i in waiting if targets[i] is None and model.can_generate()]
    if generating:
        greedy = copy.deepcopy(model.generation_config)
        greedy.update(max_new_tokens=32, max_length=None, do_sample=False, num_beams=1)
    for group in batch_indices([samples[i] for i in generating], batch_size):
        chosen = [generating[i] for i in group]
        batch = to_generate_from([samples[i] for i in chosen], model)
        # Not the class's own `generate`: Whisper's gives back the text alone, not what its decoder read.
        ids = GenerationMixin.generate(model, **batch, generation_config=greedy).cpu()
        ends = torch.isin(ids, torch.tensor(_token_ids(model, "eos_token_id"), dtype=ids.dtype))
        ends[:, 0] = False  # BART starts with its end-of-sequence token
        real = ends.cumsum(1) - ends.int() == 0  # up to the first end-of-sequence token
        for i, row, kept in zip(chosen, ids, real, strict=True):
            samples[i]["decoder_input_ids"] = row[kept]
    for i in waiting:
        if "decoder_input_ids" in samples[i]:
            continue
        target = targets[i] if targets[i] is not None else samples[i].get("input_ids")
        if target is None:
            raise HfEsmError(f"{type(model).__name__} decodes: give samples with `decoder_input_ids` or `labels`.")
        samples[i]["decoder_input_ids"] = _shifted(model, target)
    return samples


def _shifted(model: PreTrainedModel, target: Tensor) -> Tensor:
    """What a decoder reads to write the target."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return shift(labels=target[None])[0]
    start, *_ = _token_ids(model, "decoder_start_token_id", "bos_token_id", "pad_token_id") or [0]
    ids = torch.cat([target.new_tensor([start]), target[:-1]])
    return ids.masked_fill(ids == -100, getattr(model.config, "pad_token_id", None) or 0)


def _token_ids(model: PreTrainedModel, *names: str) -> list[int]:
    """The special tokens under the first of these names that the model's settings know; empty if they know none."""
    for name in names:
        for settings in (getattr(model, "generation_config", None), model.config):
            found = getattr(settings, name, None)
            if found is not None:
                return found if isinstance(found, list) else [found]
    return []
