"""Tiny language models on disk, as users have them: a base and full fine-tunes, with tokenizer and chat template."""

from collections.abc import Iterable
from pathlib import Path

from support.helpers import perturbed
from support.refining_toys import LLAMA
from support.tiny import save_tokenizer


TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} [SEP] {% endfor %}"


def save_writers(folder: Path, base: str, experts: Iterable[str]) -> None:
    """A causal language model of one block with tied embeddings, and fine-tunes of all of its weights."""
    model = LLAMA.build(tie_word_embeddings=True, num_hidden_layers=1, max_position_embeddings=256)
    for seed, name in enumerate((base, *experts)):
        (perturbed(model, 0.07, seed) if seed else model).save_pretrained(folder / name)
        tokenizer = save_tokenizer(folder / name)
        tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "[SEP]"
        tokenizer.save_pretrained(folder / name)
