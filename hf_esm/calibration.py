"""Running an expert over its proxy samples, and keeping what its linear maps read."""

import inspect
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, tqdm
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import HfEsmError
from .linalg import triangular_factor
from .proxies import Sample, collate
from .statistics import ActivationStatistics, InputStatistics, Provenance
from .weights import canonical_names, linear_maps


@dataclass
class _Accumulator:
    """Streams rows into a factor of at most twice as many rows as columns, their sum and their count."""

    factor: Tensor
    total: Tensor
    count: int = 0
    pending: list[Tensor] = field(default_factory=list)
    waiting: int = 0

    @classmethod
    def empty(cls, width: int) -> "_Accumulator":
        return cls(torch.zeros(0, width), torch.zeros(width, dtype=torch.float64))

    def add(self, rows: Tensor) -> None:
        rows = rows.detach().to("cpu", torch.float32)
        self.total += rows.sum(0, dtype=torch.float64)
        self.count += rows.shape[0]
        self.pending.append(rows)
        self.waiting += rows.shape[0]
        if self.factor.shape[0] + self.waiting > 2 * rows.shape[1]:
            self.compact()
            self.factor = triangular_factor(self.factor)

    def compact(self) -> None:
        self.factor = torch.cat([self.factor, *self.pending])
        self.pending, self.waiting = [], 0


@dataclass
class Frame:
    """What the forward pass of one (nested) model says of its tokens.

    Attributes:
        mask: which tokens are real, `[B, L]`, or None.
        encoder_states: the encoder's output that a decoder reads.
        encoder_mask: which of its tokens are real.
        model: whose forward pass it is.
    """

    mask: Optional[Tensor]
    encoder_states: Optional[Tensor]
    encoder_mask: Optional[Tensor]
    model: PreTrainedModel

    def real_tokens(self, inputs: Tensor) -> Optional[Tensor]:
        """The mask that belongs to a map's input `[B, L, d]`: its shape is exactly the input's, or there is none."""
        mask = self.encoder_mask if inputs is self.encoder_states else self.mask
        if mask is None:
            return None
        if mask.shape == inputs.shape[:-1]:
            return mask
        if inputs.dim() == 2 and inputs.shape[0] == mask.numel():  # tokens laid out in one row
            return mask.flatten()
        shrink = getattr(self.model, "_get_feature_vector_attention_mask", None)
        if shrink is not None and inputs.dim() == 3:  # audio: the mask counts samples, the layers see frames
            return shrink(inputs.shape[1], mask).bool()
        return None


def token_mask(mask: Any) -> Optional[Tensor]:
    """Which tokens are real, `[B, L]`, from a mask of any form that Transformers hands down."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4:  # a token attends to itself exactly if it is real
        mask = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return mask if mask.dtype == torch.bool else mask >= 0
    return mask.bool()


class InputRecorder:
    """Hooks on a model's linear maps that add every real token they read to an accumulator.

    Maps that read the same tensor share one. Padding is left out by the mask of the innermost model that runs; inputs
    that are not tokens of the batch (DeBERTa's relative positions) are left out too.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        live = {name: canonical for canonical, name in canonical_names(model).items()}
        self.weight_of = {
            linear.module: live[linear.weight]
            for linear in linear_maps(model).values()
            if not linear.slices and linear.weight in live
        }
        self.accumulators: dict[str, _Accumulator] = {}
        self.leaders: dict[str, set[str]] = defaultdict(set)
        self._frames: list[Frame] = []
        self._seen: dict[int, tuple[weakref.ref, str]] = {}
        self._matched: set[str] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        handles = []
        for name, module in self.model.named_modules():
            if isinstance(module, PreTrainedModel):
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            if name in self.weight_of:
                handles.append(module.register_forward_pre_hook(self._reader(self.weight_of[name]), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
        names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
        bound = {**dict(zip(names, args)), **kwargs}
        if not self._frames:
            self._seen, self._matched = {}, set()
        # The outer model of an encoder-decoder reads its own head's input from the decoder.
        own = token_mask(bound.get("decoder_attention_mask", bound.get("attention_mask")))
        self._frames.append(
            Frame(own, bound.get("encoder_hidden_states"), token_mask(bound.get("encoder_attention_mask")), module)
        )

    def _leave(self, *_: Any) -> None:
        self._frames.pop()

    def _reader(self, weight: str) -> Any:
        def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            known = self._seen.get(id(inputs))
            if known is not None and known[0]() is inputs:
                self.leaders[weight].add(known[1])
                return
            rows = self._real_rows(weight, inputs)
            if rows is None:
                return
            self._seen[id(inputs)] = (weakref.ref(inputs), weight)
            self.leaders[weight].add(weight)
            if weight not in self.accumulators:
                self.accumulators[weight] = _Accumulator.empty(rows.shape[1])
            self.accumulators[weight].add(rows)

        return read

    def _real_rows(self, weight: str, inputs: Tensor) -> Optional[Tensor]:
        """The real tokens of a map's input, `[n, d]`; None if it is not made of the batch's tokens."""
        frame = self._frames[-1]
        mask = frame.real_tokens(inputs)
        if mask is not None:
            self._matched.add(weight)
            return inputs[mask.to(inputs.device)]
        if weight in self._matched and inputs.dim() > 2:
            return None
        batch = next((f.mask for f in reversed(self._frames) if f.mask is not None), None)
        if batch is not None and inputs.shape[0] % batch.shape[0]:
            return None
        return inputs.reshape(-1, inputs.shape[-1])


def collect_statistics(
    model: PreTrainedModel,
    samples: list[Sample],
    *,
    accelerator: Optional[Accelerator] = None,
    batch_size: int = 8,
    title: str = "model",
    provenance: Optional[Provenance] = None,
    progress: bool = True,
) -> ActivationStatistics:
    """One forward pass over the samples, shared out over processes.

    Args:
        model: the expert. It is moved to the accelerator's device for the run and left exactly as it was.
        samples: unbatched model inputs, see `proxies.encode`.
        accelerator: by default a new one.
        batch_size: samples per batch and process.
        title: name on the progress bar.

    Returns statistics of every linear map that ran, the same on every process.
    """
    accelerator = accelerator or Accelerator()
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    moved = device != accelerator.device and not getattr(model, "hf_device_map", None)
    recorder = InputRecorder(model)
    try:
        model.eval()
        if moved:
            model.to(accelerator.device)
        with accelerator.split_between_processes(samples) as own, torch.no_grad():
            own = sorted(own, key=lambda sample: -max(value.numel() for value in sample.values()))
            starts = range(0, len(own), batch_size)
            for start in tqdm(starts, desc=f"Calibrating {title}", disable=not progress or not starts, leave=False):
                batch = collate(own[start : start + batch_size], model.config)
                batch = send_to_device(batch, next(model.parameters()).device)
                batch = _add_decoder_inputs(model, batch)
                with recorder.recording():
                    model(**_floats_like(batch, model.dtype))
    finally:
        if moved:
            model.to(device)
        for module, mode in training.items():
            module.training = mode
    entries, keys_of = _reduce(recorder, accelerator)
    provenance = provenance or Provenance(num_samples=len(samples))
    return ActivationStatistics(entries, keys_of, provenance)


def _reduce(recorder: InputRecorder, accelerator: Accelerator) -> tuple[dict[str, InputStatistics], dict[str, str]]:
    """Factors, means and counts over all processes."""
    entries = {}
    leaders = defaultdict(set)
    for part in gather_object([dict(recorder.leaders)]) if accelerator.num_processes > 1 else [recorder.leaders]:
        for weight, found in part.items():
            leaders[weight] |= found
    # A map that reads now its own input and now another map's cannot be told apart from it: neither has statistics.
    keys_of = {weight: next(iter(found)) for weight, found in leaders.items() if len(found) == 1}
    for key in sorted(set(keys_of.values())):
        accumulator = recorder.accumulators.pop(key, None)
        if accumulator is not None:
            accumulator.compact()
        parts = gather_object([accumulator]) if accelerator.num_processes > 1 else [accumulator]
        parts = [part for part in parts if part is not None]
        count = sum(part.count for part in parts)
        factor = torch.cat([part.factor for part in parts]) if len(parts) > 1 else parts[0].factor
        if factor.shape[0] > 2 * factor.shape[1]:
            factor = triangular_factor(factor)
        mean = sum(part.total for part in parts) / max(count, 1)
        entries[key] = InputStatistics(factor, mean.float(), count)
    return entries, keys_of


def _add_decoder_inputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give an encoder-decoder something to decode: the targets if there are any, else what it generates itself."""
    config = model.config
    if not config.is_encoder_decoder or "decoder_input_ids" in batch:
        return batch
    batch = dict(batch)
    labels = batch.pop("labels", None)
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id or 0
    if labels is not None:
        ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        mask = torch.cat([torch.ones_like(labels[:, :1]), labels[:, :-1] != -100], dim=1).bool()
        ids = ids.masked_fill(~mask, config.pad_token_id or 0)
    elif model.can_generate():
        ids = model.generate(**_floats_like(batch, model.dtype), max_new_tokens=32, do_sample=False, num_beams=1)
        ends = (ids == (config.eos_token_id if isinstance(config.eos_token_id, int) else -1)).int()
        mask = (ends.cumsum(1) - ends) == 0  # up to the first end-of-sequence token
        mask[:, 0] = True
    else:
        ids = batch["input_ids"] if "input_ids" in batch else None
        if ids is None:
            raise HfEsmError(f"{type(model).__name__} decodes: give samples with `decoder_input_ids` or `labels`.")
        mask = batch["attention_mask"].bool()
    return {**batch, "decoder_input_ids": ids, "decoder_attention_mask": mask.long()}


def _floats_like(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch with its floating-point inputs (pixels, audio features) in the model's dtype."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
