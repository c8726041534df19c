"""The inputs of an encoder-decoder's decoder during calibration."""

import copy
import inspect

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from ..data import Sample, batch_indices, to_generate_from
from ..errors import HfEsmError


def with_decoder_inputs(model: PreTrainedModel, samples: list[Sample], batch_size: int) -> list[Sample]:
    """Add decoder inputs to the samples of an encoder-decoder: made from their targets if there are any, else the text
    that the model generates itself, else from the source, which classifiers decode.

    Samples of other models lose their `labels`, and are otherwise returned as they are.

    Raises:
        HfEsmError: if a sample has neither targets nor tokens, and the model cannot generate.
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
        # The `generate` of all classes: Whisper's own returns the text alone, not the tokens that its decoder read.
        ids = GenerationMixin.generate(model, **batch, generation_config=greedy).cpu()
        ends = torch.isin(ids, torch.tensor(_token_ids(model, "eos_token_id"), dtype=ids.dtype))
        ends[:, 0] = False  # BART begins with its end-of-sequence token
        real = ends.cumsum(1) - ends.int() == 0  # up to the first end-of-sequence token
        for i, row, mask in zip(chosen, ids, real, strict=True):
            samples[i]["decoder_input_ids"] = row[mask]
    for i in waiting:
        if "decoder_input_ids" in samples[i]:
            continue
        target = targets[i] if targets[i] is not None else samples[i].get("input_ids")
        if target is None:
            raise HfEsmError(
                f"{type(model).__name__} has a decoder: give samples with `decoder_input_ids` or `labels`."
            )
        samples[i]["decoder_input_ids"] = _shifted(model, target)
    return samples


def with_first_decoder_input(model: PreTrainedModel, samples: list[Sample]) -> list[Sample]:
    """Return an encoder-decoder's samples with one token to decode, the one that its answer begins after: the first of
    the sample's decoder inputs or shifted targets, else the model's start token.

    Samples of other models, and of classifiers, are returned as they are.
    """
    if not (model.config.is_encoder_decoder and model.can_generate()):
        return samples
    begun = []
    for sample in samples:
        sample = {name: value for name, value in sample.items() if name != "decoder_attention_mask"}
        target, read = sample.pop("labels", None), sample.get("decoder_input_ids")
        if read is None:
            read = torch.tensor([_start_token(model)]) if target is None else _shifted(model, target)
        sample["decoder_input_ids"] = read[:1]
        begun.append(sample)
    return begun


def _start_token(model: PreTrainedModel) -> int:
    return (_token_ids(model, "decoder_start_token_id", "bos_token_id", "pad_token_id") or [0])[0]


def _shifted(model: PreTrainedModel, target: Tensor) -> Tensor:
    """Return the tokens that a decoder reads to write the target."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return shift(labels=target[None])[0]
    ids = torch.cat([target.new_tensor([_start_token(model)]), target[:-1]])
    return ids.masked_fill(ids == -100, getattr(model.config, "pad_token_id", None) or 0)


def _token_ids(model: PreTrainedModel, *names: str) -> list[int]:
    """Return the special tokens under the first of these names that the model's settings have."""
    for name in names:
        for settings in (getattr(model, "generation_config", None), model.config):
            ids = getattr(settings, name, None)
            if ids is not None:
                return ids if isinstance(ids, list) else [ids]
    return []
