"""Where a model that is calibrated fits: on the accelerator's device, or partly on disk."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

from accelerate import Accelerator
from accelerate.utils.modeling import get_max_memory
from transformers import PreTrainedModel

from ..architecture import width_of
from ..checkpoints import Checkpoint, ExpertLoader
from ..data import Sample
from ..utils import bytes_of
from .collection import in_evaluation


def placement(
    checkpoint: Checkpoint, accelerator: Accelerator, max_memory: Optional[int | float | str], folder: Path
) -> dict[str, Any]:
    """Return the arguments of `load_model` that place a model.

    Args:
        checkpoint: the model.
        accelerator: its device is filled first.
        max_memory: main memory to use, such as `"16GB"`; by default all that is free.
        folder: takes the weights that fit in neither.

    Returns:
        Nothing if the model fits on the accelerator's device, else the settings of Accelerate's offloading.
    """
    memory = available_memory(accelerator, max_memory)
    if checkpoint.nbytes <= next(iter(memory.values())):
        return {}
    return {"device_map": "auto", "max_memory": memory, "offload_folder": str(folder)}


@contextmanager
def loaded_model(
    checkpoint: Checkpoint,
    accelerator: Accelerator,
    max_memory: Optional[int | float | str],
    folder: Path,
    loader: ExpertLoader,
) -> Iterator[PreTrainedModel]:
    """Load a model where it fits, on the accelerator's device if it does; `folder` takes the weights that do not."""
    with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as spill:
        model = loader.load(checkpoint, **placement(checkpoint, accelerator, max_memory, Path(spill)))
        with in_evaluation(model, accelerator):
            yield model


def available_memory(accelerator: Accelerator, max_memory: Optional[int | float | str] = None) -> dict[int | str, int]:
    """Return the bytes to use on this process's device, nine tenths of what is free, and in main memory, at most
    `max_memory`.
    """
    device = accelerator.device
    place = device.type if device.type in ("cpu", "mps") else device.index or 0
    free = {name: size for name, size in get_max_memory().items() if name in (place, "cpu")}
    memory = {name: size if name == "cpu" else int(0.9 * size) for name, size in free.items()}
    if max_memory is not None and "cpu" in memory:
        memory["cpu"] = min(memory["cpu"], bytes_of(max_memory, "max_memory"))
    return memory


def needs_spill(
    checkpoint: Checkpoint,
    samples: list[Sample],
    accelerator: Accelerator,
    max_memory: Optional[int | float | str] = None,
) -> bool:
    """Return whether the factors of a model's calibration may not fit in main memory together with its weights."""
    memory = available_memory(accelerator, max_memory)
    weights = checkpoint.nbytes if accelerator.device.type == "cpu" else 0
    return weights + factor_bytes(checkpoint, samples, shared=False) > memory.get("cpu", math.inf)


def factor_bytes(checkpoint: Checkpoint, samples: list[Sample], shared: bool) -> int:
    """Estimate the bytes of the factors of a model's linear maps.

    A factor has one row per token (if samples tell how many there are), at most twice as many as the map has inputs.
    Which maps read the same tensor, and so share a factor, is known only when they run.

    Args:
        checkpoint: the model.
        samples: the samples that it will be run on.
        shared: estimate low: maps of one module with equally many inputs share a factor, and the experts of a mixture
            share out the tokens. Otherwise estimate high: no map shares a factor, and every expert reads all tokens.
    """
    tokens = sum(sample["input_ids"].numel() if "input_ids" in sample else math.inf for sample in samples)
    sizes = {}
    for name, linear in checkpoint.linear.items():
        width, matrices = width_of(checkpoint.shape(name), linear), max(linear.slices, 1)
        rows = min(tokens, 2 * width * matrices) if shared else matrices * min(tokens, 2 * width)
        key = (linear.module.rpartition(".")[0], width) if shared else name
        sizes[key] = max(4 * width * rows, sizes.get(key, 0))
    return int(sum(sizes.values()))
