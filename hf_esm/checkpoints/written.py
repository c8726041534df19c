"""A checkpoint that is computed, loaded through a copy on disk where it does not fit in memory."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .base import Checkpoint, quiet_loading
from .conversion import to_stored, write_plan
from .shards import ShardedWriter


def load_written(checkpoint: Checkpoint, offload_folder: str, **placement: Any) -> PreTrainedModel:
    """Write the model of a checkpoint weight by weight to `offload_folder`, and load it with the given placement."""
    folder = Path(offload_folder) / "adapted"
    folder.mkdir(parents=True)
    checkpoint.config.save_pretrained(folder)
    groups = write_plan(checkpoint)
    plan = {key: tensor for group in groups for key, tensor in group.stored.items()}
    with ShardedWriter(folder, plan) as writer:
        for group in groups:
            tensors = {name: checkpoint.tensor(name) for name in group.names}
            for key, tensor in to_stored(checkpoint, tensors).items():
                writer.write(key, tensor)
    with quiet_loading():
        model = type(checkpoint.skeleton).from_pretrained(
            folder, config=checkpoint.config, dtype="auto", offload_folder=offload_folder, **placement
        )
    return model.eval()
