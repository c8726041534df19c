"""A checkpoint that is computed, loaded in memory, or through a copy on disk where it does not fit."""

from pathlib import Path
from typing import Any, Optional

from transformers import PreTrainedModel

from .base import Checkpoint, quiet_loading
from .conversion import to_stored, write_plan
from .shards import ShardedWriter


def load_written(checkpoint: Checkpoint, offload_folder: str, **options: Any) -> PreTrainedModel:
    """Write the model of a checkpoint weight by weight to `offload_folder`, and load it from there.

    Args:
        options: further arguments of `from_pretrained`, such as the placement.
    """
    folder = Path(offload_folder) / "written"
    folder.mkdir(parents=True)
    checkpoint.config.save_pretrained(folder)
    groups = write_plan(checkpoint)
    plan = {key: tensor for group in groups for key, tensor in group.stored.items()}
    with ShardedWriter(folder, plan) as writer:
        for group in groups:
            tensors = {name: checkpoint.tensor(name) for name in group.names}
            for key, tensor in to_stored(checkpoint, tensors).items():
                writer.write(key, tensor)
    return _load(checkpoint, folder, offload_folder=offload_folder, **options)


def load_read(checkpoint: Checkpoint, **options: Any) -> PreTrainedModel:
    """Read all weights of a checkpoint, and load its model with them. Weights that it lacks are newly initialised.

    Args:
        options: further arguments of `from_pretrained`.
    """
    weights = {live: checkpoint.tensor(name) for name, live in checkpoint.names.items()}
    return _load(checkpoint, None, state_dict=weights, **options)


def _load(checkpoint: Checkpoint, folder: Optional[Path], **options: Any) -> PreTrainedModel:
    with quiet_loading():
        model_class = type(checkpoint.skeleton)
        return model_class.from_pretrained(folder, config=checkpoint.config, dtype="auto", **options).eval()
