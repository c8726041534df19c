"""Rows turned into samples that a model takes: strings, pairs, columns, images, sound, ready inputs."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.image_utils import is_valid_image

from ..errors import HfEsmError
from .options import COLUMNS, SampleOptions


# What a row may hold that is model input as it is.
READY_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values", "inputs_embeds")


LONGEST = 512  # tokens, unless `max_length` says otherwise


# One model input per name, unbatched and unpadded.
Sample = dict[str, Tensor]


def encode(
    rows: list[Any],
    processor: Any,
    config: PretrainedConfig,
    title: str,
    options: SampleOptions,
    with_targets: bool = False,
    with_contexts: bool = False,
) -> list[Sample]:
    """Rows as unbatched, unpadded model inputs, labels left out; those of an encoder-decoder stay, as its targets, and
    `with_targets` those of any tokens: of ready ones, or of words that have one each. `with_contexts`, samples of two
    texts say in `context`, `[L]` bool, which tokens are of the second.
    """
    first = rows[0]
    if isinstance(first, Mapping) and any(name in first for name in READY_INPUTS):
        keeps = with_targets or config.is_encoder_decoder
        samples = [_ready(row, config, keeps, f"{title}: sample {i}") for i, row in enumerate(rows)]
    else:
        if processor is None:
            raise HfEsmError(
                f"{title}: no tokenizer or processor beside the model, which its samples need. Save one into the "
                "model's folder, pass `processor=`, or give ready model inputs (`input_ids`, `pixel_values`, …)."
            )
        samples = [
            _encode_row(row, processor, config, f"{title}: sample {i}", options, with_targets, with_contexts)
            for i, row in enumerate(rows)
        ]
    samples = [_unpadded(sample, config) for sample in samples]
    for i, sample in enumerate(samples):
        if any(tensor.numel() == 0 for tensor in sample.values()):
            raise HfEsmError(f"{title}: sample {i} has no real token. Leave it out.")
        if sample.keys() != samples[0].keys():
            raise HfEsmError(
                f"{title}: sample {i} has {', '.join(sample)}, but sample 0 has {', '.join(samples[0])}. Give all of "
                "them the same inputs."
            )
        _check_tokens(sample, config, f"{title}: sample {i}")
    return samples


def _check_tokens(sample: Sample, config: PretrainedConfig, title: str) -> None:
    """Raise on tokens that the model has no embedding for; those that stand for an image may be such."""
    size, ids = getattr(text_config(config), "vocab_size", None), sample.get("input_ids")
    if size and ids is not None and "pixel_values" not in sample and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise HfEsmError(
            f"{title} has tokens from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary has {size}. "
            "Encode it with the model's own tokenizer."
        )


def _unpadded(sample: Sample, config: PretrainedConfig) -> Sample:
    """A sample without its padding, as far as a mask, or the targets themselves, say what is padding."""
    sample = dict(sample)
    for mask_name, inputs in (("attention_mask", READY_INPUTS), ("decoder_attention_mask", ("decoder_input_ids",))):
        mask = sample.get(mask_name)
        if mask is not None and any(name in sample and sample[name].shape[:1] == mask.shape for name in inputs):
            beside = [name for name, value in sample.items() if value.shape[:1] == mask.shape]
            sample |= {name: sample[name][mask.bool()] for name in beside}
    if "labels" in sample and config.is_encoder_decoder:
        real = (sample["labels"] != -100).nonzero()
        sample["labels"] = sample["labels"][: int(real.max()) + 1 if len(real) else 0]
    return sample


def _ready(row: Any, config: PretrainedConfig, with_targets: bool, title: str) -> Sample:
    if not isinstance(row, Mapping):
        raise HfEsmError(f"{title} is a {type(row).__name__}, but sample 0 holds model inputs. Give all in one form.")
    sample = {}
    for name, value in row.items():
        if name not in ("label", "label_ids", "idx") and not isinstance(value, str) and value is not None:
            try:
                sample[name] = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise HfEsmError(f"{title}: '{name}' is no array of numbers ({error}). Leave it out.") from None
    ids, pixels = sample.get("input_ids"), sample.get("pixel_values")
    mask = sample.get("attention_mask")
    if ids is not None and mask is not None and ids.dim() == mask.dim() == 1 and len(ids) != len(mask):
        raise HfEsmError(
            f"{title} has {len(ids)} tokens, but an attention_mask of {len(mask)}. Make them of one length."
        )
    kind = (config.architectures or [""])[0]
    if ids is not None:
        batched = ids.dim() == 2 and len(ids) == 1 and not kind.endswith("ForMultipleChoice")
    else:
        batched = pixels is not None and pixels.dim() == 4 and len(pixels) == 1 and not hasattr(config, "num_frames")
    if batched:  # as processors give a sample with `return_tensors`
        sample = {name: value[0] if value.shape[:1] == (1,) else value for name, value in sample.items()}
        ids = sample.get("input_ids")
    several = kind.endswith("ForMultipleChoice") or not kind  # texts in one sample, as far as is known
    if ids is not None and (ids.is_floating_point() or not 1 <= ids.dim() <= 1 + several):
        raise HfEsmError(
            f"{title}: 'input_ids' is of shape {tuple(ids.shape)} and {ids.dtype}. Give the whole numbers of one "
            "sample, of shape [length]."
        )
    # What an encoder-decoder is to write are its decoder's inputs; a class is nothing that a model reads.
    if "labels" in sample and not (with_targets and sample["labels"].dim()):
        del sample["labels"]
    return sample


def _encode_row(
    row: Any,
    processor: Any,
    config: PretrainedConfig,
    title: str,
    options: SampleOptions,
    with_targets: bool,
    with_contexts: bool,
) -> Sample:
    fields = row_fields(row, title, options)
    if isinstance(fields.get("text"), (list, tuple)) and not fields["text"]:
        raise HfEsmError(f"{title} has no words. Leave it out.")
    tokenizer = getattr(processor, "tokenizer", processor)
    found: dict[str, Any] = {}
    if "text" in fields and not hasattr(tokenizer, "get_vocab"):
        raise HfEsmError(f"{title}: this model reads no text; its processor is a {type(tokenizer).__name__}.")
    try:
        if "text" in fields:
            words = is_words(fields["text"])
            encoded = tokenizer(
                fields["text"],
                fields.get("text_pair"),
                truncation=True,
                max_length=text_limit(tokenizer, config, options),
                is_split_into_words=words,
            )
            found |= encoded
            if words and with_targets:
                found["labels"] = _labels_of_tokens(encoded.word_ids(), fields["label"])
            if with_contexts and "text_pair" in fields:
                found["context"] = [part == 1 for part in encoded.sequence_ids()]
        if "text_target" in fields and config.is_encoder_decoder:
            limit = text_limit(tokenizer, config, options)
            found["labels"] = tokenizer(text_target=fields["text_target"], truncation=True, max_length=limit).input_ids
        if "image" in fields:
            images, image = getattr(processor, "image_processor", processor), fields["image"]
            if hasattr(image, "convert") and getattr(config, "num_channels", 3) == 3:  # of PIL: grey, or transparent
                if image.mode.startswith(("I", "F")):
                    raise HfEsmError(f"{title}: a picture of mode {image.mode!r}, not of 8 bits. Scale it to 'L'.")
                image = image.convert("RGB")
            found |= images(image, return_tensors="pt")
        if "audio" in fields:
            sound = fields["audio"]
            rate = sound.get("sampling_rate") if isinstance(sound, Mapping) else None
            extractor = getattr(processor, "feature_extractor", processor)
            found |= extractor(sound["array"] if rate else sound, sampling_rate=rate, return_tensors="pt")
    except (AssertionError, TypeError, ValueError) as error:  # an assertion: BPE without `add_prefix_space`, of words
        why = " ".join(str(error).split())
        raise HfEsmError(f"{title}: {type(processor).__name__} does not take such a sample: {why}") from None
    # Processors give batches of one where tensors were asked for, and plain lists for text.
    return {name: value[0] if isinstance(value, Tensor) else torch.as_tensor(value) for name, value in found.items()}


def is_words(text: Any) -> bool:
    """Whether a text is given as a list of words."""
    return isinstance(text, (list, tuple)) and len(text) > 0 and all(isinstance(word, str) for word in text)


def _labels_of_tokens(word_ids: list[Optional[int]], labels: Sequence[int]) -> list[int]:
    """Of each word's first token the word's label, of all others -100."""
    return [
        -100 if word is None or word == before else labels[word]
        for word, before in zip(word_ids, [None, *word_ids], strict=False)
    ]


def row_fields(row: Any, title: str, options: SampleOptions) -> dict[str, Any]:
    """What stands in a row's columns, by the names in `COLUMNS`."""
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, (tuple, list)) and len(row) == 2 and all(isinstance(part, str) for part in row):
        return {"text": row[0], "text_pair": row[1]}
    if isinstance(row, Mapping):
        columns = {name: options.columns.get(name, name) for name in COLUMNS}
        fields = {name: row[column] for name, column in columns.items() if row.get(column) is not None}
        if fields.keys() & {"text", "image", "audio"}:
            return fields
        raise HfEsmError(
            f"{title}: a row has the columns {sorted(row)}; say which hold the input, as in "
            "columns={'text': 'sentence1', 'text_pair': 'sentence2'}."
        )
    if is_valid_image(row):
        return {"image": row}
    raise HfEsmError(
        f"{title}: cannot read a sample of type {type(row).__name__}; give strings, pairs, rows or images."
    )


def text_limit(tokenizer: Any, config: PretrainedConfig, options: SampleOptions) -> int:
    """Tokens that a text is cut to."""
    text = text_config(config)
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        positions = options.max_length or LONGEST
    if any(getattr(text, name, None) for name in ("rope_parameters", "rope_theta", "relative_attention")):
        positions = options.max_length or positions  # it may read farther than it was trained to
    if any(name in config.model_type for name in _OFFSET_POSITIONS):
        positions -= (getattr(config, "pad_token_id", None) or 0) + 1
    return min(options.max_length or min(LONGEST, getattr(tokenizer, "model_max_length", LONGEST)), positions)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The settings of the part that reads text; those of the whole where there are several such parts."""
    try:
        return config.get_text_config()
    except ValueError:
        return config


# Types of models that count positions from behind the padding token's index.
_OFFSET_POSITIONS = ("roberta", "camembert", "mpnet", "data2vec-text", "xmod", "ibert", "luke")
