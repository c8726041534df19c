"""Tiny language models with tokens of their own."""

import torch
from transformers import AutoTokenizer, GenerationConfig

from support.helpers import stored_tensors
from support.tiny import save_tokenizer


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = 20  # of the tokenizer of `save_tokenizer`


def write(folder, name, model, tokens=(), template=None, rows=None, eos=None):
    """Save a model with a tokenizer that has more tokens."""
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[TOKENS:].normal_(generator=torch.Generator().manual_seed(rows))
    model.save_pretrained(folder / name)
    tokenizer = save_tokenizer(folder / name)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.chat_template = template
    if eos:
        tokenizer.eos_token = eos
        GenerationConfig(
            eos_token_id=tokenizer.convert_tokens_to_ids(eos), temperature=0.5, do_sample=True
        ).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


def row_of(folder, token, weight=EMBEDDING):
    """The row of a token in a model's folder, read by its tokenizer."""
    ids = AutoTokenizer.from_pretrained(folder).get_vocab()
    return stored_tensors(folder)[weight][ids[token]]
