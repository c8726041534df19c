"""Prompts of embedding models: a text that is put before every text that a model reads."""

import copy
from dataclasses import dataclass
from typing import Any


# Model input of samples with a prompt that is left out of pooling: `[L]` int64, 1 for the tokens of the prompt.
PROMPT_MASK = "prompt_mask"


@dataclass(frozen=True)
class Prompt:
    """What a model reads before every text.

    Attributes:
        text: the prompt; empty for none.
        pooled: whether its tokens are pooled with those of the text.
    """

    text: str = ""
    pooled: bool = True


def with_prompt(processor: Any, prompt: Prompt) -> Any:
    """Return a tokenizer or processor for which `encode` puts a prompt before texts; the processor itself if it is one
    already.
    """
    reads_text = hasattr(getattr(processor, "tokenizer", processor), "get_vocab")
    if not reads_text or default_prompt_of(processor) == prompt:
        return processor
    processor = copy.deepcopy(processor)
    getattr(processor, "tokenizer", processor).sample_prompt = prompt
    return processor


def default_prompt_of(processor: Any) -> Prompt:
    """Return the prompt that `encode` puts before the texts of a processor."""
    return getattr(getattr(processor, "tokenizer", processor), "sample_prompt", Prompt())


def prompted(text: Any, prompt: Prompt) -> Any:
    """Return a text with a prompt before it; words stay as they are."""
    return prompt.text + text if isinstance(text, str) else text


def count_prompt_tokens(tokenizer: Any, prompt: Prompt, limit: int) -> int:
    """Return the number of tokens that a prompt is counted as: special tokens at its beginning belong to it, a special
    token at its end does not.
    """
    ids = tokenizer(prompt.text, truncation=True, max_length=limit).input_ids
    return len(ids) - (len(ids) > 0 and ids[-1] in tokenizer.all_special_ids)
