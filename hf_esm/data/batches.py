"""Batches: which samples run together, and their tensors on a model's device."""

import inspect
from collections import defaultdict

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel

from .samples import Sample, text_config


def batch_indices(samples: list[Sample], size: int, padded: bool = False) -> list[list[int]]:
    """Return the indices of the samples of each batch, the largest samples first.

    Args:
        samples: unbatched, unpadded model inputs.
        size: samples per batch, at most.
        padded: whether samples of similar size share a batch; otherwise only samples of the same shape do.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i in sorted(range(len(samples)), key=lambda i: -max(value.numel() for value in samples[i].values())):
        shape = tuple((name, tuple(value.shape)) for name, value in sorted(samples[i].items()))
        groups[() if padded else shape].append(i)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


# The mask that marks the padding of an input.
_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def collate(samples: list[Sample], config: PretrainedConfig) -> dict[str, Tensor]:
    """Return a batch, padded on the right: masks with 0, labels with -100, tokens with the padding token.

    Samples without a mask get one if their tokens are padded.
    """
    padding = {"input_ids": max(getattr(config, "pad_token_id", None) or 0, 0), "labels": -100}
    padding["decoder_input_ids"] = padding["input_ids"]
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if any(value.shape != values[0].shape for value in values):
            if name in _MASKS and _MASKS[name] not in samples[0]:
                batch[_MASKS[name]] = pad_sequence([torch.ones_like(value) for value in values], True)
            values = pad_sequence(values, True, padding.get(name, 0))
        batch[name] = torch.stack(list(values))
    return batch


def batch_for(samples: list[Sample], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a batch, padded on the right, on the model's device; images and sound have the model's dtype."""
    device = next(model.parameters()).device
    # Accelerate moves the inputs of a model that is partly offloaded.
    batch = send_to_device(collate(samples, model.config), "cpu" if device.type == "meta" else device)
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in batch.items()}


def to_generate_from(samples: list[Sample], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a batch without inputs that `generate` would refuse, such as BERT's `token_type_ids` for T5."""
    known = set(inspect.signature(model.forward).parameters)
    if model.config.is_encoder_decoder:
        known |= set(inspect.signature(model.get_encoder().forward).parameters)
    return {name: value for name, value in batch_for(samples, model).items() if name in known}


def reads_singly(config: PretrainedConfig) -> bool:
    """Return whether a classifier needs texts one by one: a decoder finds the end of a text by its padding token."""
    return getattr(text_config(config), "pad_token_id", 0) is None
