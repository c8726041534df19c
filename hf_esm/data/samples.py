"""Samples: strings, pairs, columns, images, sound and ready inputs encoded as a model's inputs; saved and loaded."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PretrainedConfig
from transformers.image_utils import is_valid_image
from transformers.utils import is_vision_available

from ..errors import DamagedFileError, HfEsmError
from ..utils import UNSEALED, atomic_file, check_seal, reading, seal
from .options import COLUMNS, SampleOptions
from .prompts import PROMPT_MASK, count_prompt_tokens, default_prompt_of, prompted


# Columns of a row that are model inputs already.
READY_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values", "inputs_embeds")

# Columns of ready rows that no model reads.
_NO_INPUTS = ("label", "label_ids", "idx")

# Tokens that a text is cut to, unless `max_length` says otherwise.
LONGEST = 512

# One tensor per model input, by name, without a batch dimension and without padding.
Sample = dict[str, Tensor]


# The format of a file of samples, whose name is older than the word "samples". Version 1 has no checksum.
FORMAT, FORMAT_VERSIONS = "hf_esm.proxies", (1, 2)


@dataclass(frozen=True)
class UnreadProcessor:
    """Stands for a processor that needs a library that is not installed, or code that is not trusted.

    Attributes:
        folder: folder of its files.
        files: names of these files.
        reason: what it needs, in words.
    """

    folder: Path
    files: tuple[str, ...]
    reason: str

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the files as they are."""
        for name in self.files:
            shutil.copy2(self.folder / name, Path(folder) / name)


def encode(
    rows: list[Any],
    processor: Any,
    config: PretrainedConfig,
    title: str,
    options: SampleOptions,
    with_targets: bool = False,
    with_contexts: bool = False,
) -> list[Sample]:
    """Encode rows as model inputs.

    Args:
        rows: at least one row; all hold ready model inputs, or none.
        processor: the model's tokenizer, image processor, feature extractor or processor; ready inputs need none.
        config: the model's settings.
        title: name of the data in messages.
        options: names of the columns, and the length that texts are cut to.
        with_targets: keep `labels` of single tokens, `[L]`, -100 where a token has none. Labels of an encoder-decoder
            are always kept, as its targets; all other labels are left out.
        with_contexts: add `context`, `[L]` bool, to samples of two texts: whether a token belongs to the second text.

    Raises:
        HfEsmError: if a row cannot be encoded, or samples have different inputs.
    """
    ready = isinstance(rows[0], Mapping) and any(name in rows[0] for name in READY_INPUTS)
    encode_row = _RowEncoder(processor, config, options, with_targets, with_contexts)
    keep_labels = with_targets or config.is_encoder_decoder
    samples = []
    for i, row in enumerate(rows):
        place = f"{title}: sample {i}"
        samples.append(_ready_sample(row, config, keep_labels, place) if ready else encode_row(row, place))
    samples = [_unpadded(sample, config) for sample in samples]
    for i, sample in enumerate(samples):
        if any(tensor.numel() == 0 for tensor in sample.values()):
            raise HfEsmError(f"{title}: sample {i} has no real token. Leave it out.")
        if sample.keys() != samples[0].keys():
            raise HfEsmError(
                f"{title}: sample {i} has {', '.join(sample)}, but sample 0 has {', '.join(samples[0])}. Give all "
                "samples the same inputs."
            )
        _check_tokens(sample, config, f"{title}: sample {i}")
    return samples


def _check_tokens(sample: Sample, config: PretrainedConfig, title: str) -> None:
    """Raise for tokens that the model has no embedding for; beside an image, some may be placeholders."""
    size, ids = getattr(text_config(config), "vocab_size", None), sample.get("input_ids")
    if size and ids is not None and "pixel_values" not in sample and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise HfEsmError(
            f"{title} has tokens from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary has {size}. "
            "Encode it with the model's own tokenizer."
        )


def _unpadded(sample: Sample, config: PretrainedConfig) -> Sample:
    """Remove the padding that a mask, or the targets themselves, mark."""
    sample = dict(sample)
    for mask_name, inputs in (("attention_mask", READY_INPUTS), ("decoder_attention_mask", ("decoder_input_ids",))):
        mask = sample.get(mask_name)
        if mask is not None and any(name in sample and sample[name].shape[:1] == mask.shape for name in inputs):
            masked = [name for name, value in sample.items() if value.shape[:1] == mask.shape]
            sample |= {name: sample[name][mask.bool()] for name in masked}
    if "labels" in sample and config.is_encoder_decoder:
        real = (sample["labels"] != -100).nonzero()
        sample["labels"] = sample["labels"][: int(real.max()) + 1 if len(real) else 0]
    return sample


def _ready_sample(row: Any, config: PretrainedConfig, keep_labels: bool, title: str) -> Sample:
    """Turn a row of ready model inputs into a sample.

    Args:
        keep_labels: whether labels of a sequence are inputs (an encoder-decoder's targets) or asked for.
    """
    sample = _ready_tensors(row, title)
    ids, mask, pixels = (sample.get(name) for name in ("input_ids", "attention_mask", "pixel_values"))
    if ids is not None and mask is not None and ids.dim() == mask.dim() == 1 and len(ids) != len(mask):
        raise HfEsmError(
            f"{title} has {len(ids)} tokens, but an attention_mask of {len(mask)}. Give both the same length."
        )
    architecture = (config.architectures or [""])[0]
    multiple_choice = architecture.endswith("ForMultipleChoice")
    if ids is not None:
        batched = ids.dim() == 2 and len(ids) == 1 and not multiple_choice
    else:
        batched = pixels is not None and pixels.dim() == 4 and len(pixels) == 1 and not hasattr(config, "num_frames")
    if batched:  # processors return a batch of one with `return_tensors`
        sample = {name: value[0] if value.shape[:1] == (1,) else value for name, value in sample.items()}
        ids = sample.get("input_ids")
    may_be_several = multiple_choice or not architecture  # a sample may hold several texts
    if ids is not None and (ids.is_floating_point() or not 1 <= ids.dim() <= 1 + may_be_several):
        raise HfEsmError(
            f"{title}: 'input_ids' has the shape {tuple(ids.shape)} and is {ids.dtype}. Give the whole numbers of one "
            "sample, of shape [length]."
        )
    # An encoder-decoder reads its targets, shifted; no model reads a class.
    if "labels" in sample and not (keep_labels and sample["labels"].dim()):
        del sample["labels"]
    return sample


def _ready_tensors(row: Any, title: str) -> Sample:
    if not isinstance(row, Mapping):
        raise HfEsmError(
            f"{title} is a {type(row).__name__}, but sample 0 holds model inputs. Give all samples in one form."
        )
    sample = {}
    for name, value in row.items():
        if name not in _NO_INPUTS and not isinstance(value, str) and value is not None:
            try:
                sample[name] = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise HfEsmError(f"{title}: '{name}' is not an array of numbers ({error}). Leave it out.") from None
    return sample


@dataclass(frozen=True)
class _RowEncoder:
    """Encodes rows with a model's tokenizer or processor; see `encode` for the attributes."""

    processor: Any
    config: PretrainedConfig
    options: SampleOptions
    with_targets: bool
    with_contexts: bool

    def __call__(self, row: Any, title: str) -> Sample:
        fields = row_fields(row, title, self.options)
        self._check(fields, title)
        inputs: dict[str, Any] = {}
        try:
            if "text" in fields:
                inputs |= self._text(fields)
            if "text_target" in fields and self.config.is_encoder_decoder:
                inputs["labels"] = self._target(fields["text_target"])
            if "image" in fields:
                inputs |= self._image(fields["image"])
            if "audio" in fields:
                inputs |= self._audio(fields["audio"])
        # BPE without `add_prefix_space` asserts on words; an ImportError names a library to install.
        except (AssertionError, ImportError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            name = type(self.processor).__name__
            raise HfEsmError(f"{title}: {name} does not take such a sample: {reason}") from None
        # Processors return a batch of one where tensors were asked for, and plain lists for text.
        return {
            name: value[0] if isinstance(value, Tensor) else torch.as_tensor(value) for name, value in inputs.items()
        }

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def _check(self, fields: Mapping[str, Any], title: str) -> None:
        """Raise for a row that this processor cannot encode."""
        text, image = fields.get("text"), fields.get("image")
        if image is not None and not is_vision_available():
            raise HfEsmError(f"{title} holds an image, and reading images needs Pillow: pip install pillow")
        if isinstance(self.processor, UnreadProcessor):
            raise HfEsmError(f"{title}: the model's processor cannot be read: {self.processor.reason}")
        if self.processor is None:
            raise HfEsmError(
                f"{title}: there is no tokenizer or processor beside the model to encode it with. Save one into the "
                "model's folder, pass `processor=`, or give ready model inputs (`input_ids`, `pixel_values`, …)."
            )
        if isinstance(text, (list, tuple)) and not text:
            raise HfEsmError(f"{title} has no words. Leave it out.")
        if text is not None and not hasattr(self._tokenizer, "get_vocab"):
            name = type(self._tokenizer).__name__
            raise HfEsmError(f"{title}: this model reads no text; its processor is a {name}.")
        if self._reads_colours(image) and image.mode.startswith(("I", "F")):
            raise HfEsmError(f"{title}: an image of mode {image.mode!r} has more than 8 bits. Convert it to mode 'L'.")

    def _text(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        words, prompt = is_words(fields["text"]), default_prompt_of(self.processor)
        limit = text_limit(self._tokenizer, self.config, self.options)
        encoded = self._tokenizer(
            prompted(fields["text"], prompt),
            fields.get("text_pair"),
            truncation=True,
            max_length=limit,
            is_split_into_words=words,
        )
        inputs = dict(encoded)
        if prompt.text and not prompt.pooled:
            count = count_prompt_tokens(self._tokenizer, prompt, limit)
            inputs[PROMPT_MASK] = [int(i < count) for i in range(len(encoded.input_ids))]
        if words and self.with_targets and "label" in fields:
            inputs["labels"] = _labels_of_tokens(encoded.word_ids(), fields["label"])
        if self.with_contexts and "text_pair" in fields:
            inputs["context"] = [part == 1 for part in encoded.sequence_ids()]
        return inputs

    def _target(self, text: str) -> list[int]:
        limit = text_limit(self._tokenizer, self.config, self.options)
        return self._tokenizer(text_target=text, truncation=True, max_length=limit).input_ids

    def _reads_colours(self, image: Any) -> bool:
        """Whether an image is one of Pillow that the model reads in colour."""
        return hasattr(image, "convert") and getattr(self.config, "num_channels", 3) == 3

    def _image(self, image: Any) -> Mapping[str, Any]:
        image_processor = getattr(self.processor, "image_processor", self.processor)
        image = image.convert("RGB") if self._reads_colours(image) else image  # grey and transparent images
        return image_processor(image, return_tensors="pt")

    def _audio(self, sound: Any) -> Mapping[str, Any]:
        rate = sound.get("sampling_rate") if isinstance(sound, Mapping) else None
        extractor = getattr(self.processor, "feature_extractor", self.processor)
        return extractor(sound["array"] if rate else sound, sampling_rate=rate, return_tensors="pt")


def prompts_of(samples: list[Sample], title: str) -> list[Sample]:
    """Return the prompts of samples with answers: the tokens before the first label that is not -100.

    Samples without `labels` are prompts.

    Raises:
        HfEsmError: if the first token of a sample is an answer.
    """
    prompts = []
    for i, sample in enumerate(samples):
        labels = sample.get("labels")
        if labels is None:
            prompts.append(sample)
            continue
        answered = (labels != -100).nonzero()
        end = int(answered[0]) if len(answered) else len(labels)
        if end == 0:
            raise HfEsmError(
                f"{title}: sample {i} has no prompt, since its first token has a label. Label the answer's tokens "
                "alone (-100 elsewhere), or leave `labels` out where samples are prompts."
            )
        aligned = {name: value[:end] if value.shape[:1] == labels.shape else value for name, value in sample.items()}
        prompts.append({name: value for name, value in aligned.items() if name != "labels"})
    return prompts


def is_words(text: Any) -> bool:
    """Return whether a text is given as a list of words."""
    return isinstance(text, (list, tuple)) and len(text) > 0 and all(isinstance(word, str) for word in text)


def _labels_of_tokens(word_ids: list[Optional[int]], labels: Sequence[int]) -> list[int]:
    """Return the word's label for the first token of each word, -100 for all other tokens."""
    return [
        -100 if word is None or word == before else labels[word]
        for word, before in zip(word_ids, [None, *word_ids], strict=False)
    ]


def row_fields(row: Any, title: str, options: SampleOptions) -> dict[str, Any]:
    """Return the values of a row by the names in `COLUMNS`."""
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
            f"{title}: the row has the columns {sorted(row)}. Name those that hold the inputs, as in "
            "columns={'text': 'sentence1', 'text_pair': 'sentence2'}."
        )
    if is_valid_image(row):
        return {"image": row}
    raise HfEsmError(
        f"{title}: a sample of type {type(row).__name__} cannot be read. Give strings, pairs of strings, rows or "
        "images."
    )


def text_limit(tokenizer: Any, config: PretrainedConfig, options: SampleOptions) -> int:
    """Return the number of tokens that a text is cut to."""
    text = text_config(config)
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        positions = options.max_length or LONGEST
    if any(getattr(text, name, None) for name in ("rope_parameters", "rope_theta", "relative_attention")):
        positions = options.max_length or positions  # relative positions reach farther than the model was trained to
    if any(name in config.model_type for name in _OFFSET_POSITIONS):
        positions -= (getattr(config, "pad_token_id", None) or 0) + 1
    return min(options.max_length or min(LONGEST, getattr(tokenizer, "model_max_length", LONGEST)), positions)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the settings of the part that reads text; those of the whole model if several parts do."""
    try:
        return config.get_text_config()
    except ValueError:
        return config


# Types of models whose first position is the index after the padding token's.
_OFFSET_POSITIONS = ("roberta", "camembert", "mpnet", "data2vec-text", "xmod", "ibert", "luke")


def sample_fingerprint(sample: Sample) -> str:
    """Return a short hash of a sample's inputs, the same after `save_samples` and on every machine."""
    digest = hashlib.sha256()
    for name, value in sorted(sample.items()):
        value = value if value.is_floating_point() else value.long()  # tokens are the same in any integer dtype
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_samples(samples: list[Sample], path: Path) -> None:
    """Write samples to a safetensors file, so that a recipe can repeat the calibration exactly."""
    tensors = {  # of their own, since a caller may pass one sample twice, which safetensors refuses to write
        f"{i}.{name}": value.contiguous().clone() for i, sample in enumerate(samples) for name, value in sample.items()
    }
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSIONS[-1])} | UNSEALED
    with atomic_file(path) as partial:
        partial.write_bytes(_with_sorted_metadata(save(tensors, metadata)))
        seal(partial)


def _with_sorted_metadata(file: bytes) -> bytes:
    """Sort the metadata of a safetensors file: the library writes it in random order, so that hashes would differ."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return file[:8] + encoded.ljust(size) + file[8 + size :]


def is_samples_file(path: Path) -> bool:
    """Return whether `save_samples` wrote a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except Exception:  # a file that is neither; its reader says why
        return False


def load_samples(path: Path) -> list[Sample]:
    """Read a file that `save_samples` wrote.

    Raises:
        HfEsmError: if the file is damaged, has another format, or another version of this one.
    """
    samples: dict[int, Sample] = {}
    again = "Copy it again, or save the samples again."
    with reading(path, remedy=again), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT or metadata.get("version") not in map(str, FORMAT_VERSIONS):
            raise HfEsmError(f"{path}: neither statistics nor samples that this hf_esm can read.")
        check_seal(path, again, needed=metadata["version"] != "1")
        for key in sorted(file.keys()):
            index, _, name = key.partition(".")
            tensor = samples.setdefault(int(index), {})[name] = file.get_tensor(key)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise DamagedFileError(f"{path}: {name} of sample {index} has NaN or infinite values. {again}")
    if sorted(samples) != list(range(len(samples))):
        raise DamagedFileError(f"{path}: it lacks some samples. {again}")
    return [samples[i] for i in range(len(samples))]
