"""Rows in, batches out.

Comes in: whatever users call data (files, lists, data sets, loaders). Goes out: rows, samples (one unbatched model
input each), and batches on a model's device.
"""

from .batches import batch_for, batch_indices, collate, reads_singly, to_generate_from
from .options import RunOptions, SampleOptions
from .prompts import PROMPT_MASK, Prompt, default_prompt_of, with_prompt
from .rows import DataSpec, read_first_row, read_rows
from .samples import (
    Sample,
    UnreadProcessor,
    encode,
    is_samples_file,
    is_words,
    load_samples,
    prompts_of,
    row_fields,
    sample_fingerprint,
    save_samples,
    text_config,
)


__all__ = [
    "PROMPT_MASK",
    "DataSpec",
    "Prompt",
    "RunOptions",
    "Sample",
    "SampleOptions",
    "UnreadProcessor",
    "batch_for",
    "batch_indices",
    "collate",
    "default_prompt_of",
    "encode",
    "is_samples_file",
    "is_words",
    "load_samples",
    "prompts_of",
    "read_first_row",
    "read_rows",
    "reads_singly",
    "row_fields",
    "sample_fingerprint",
    "save_samples",
    "text_config",
    "to_generate_from",
    "with_prompt",
]
