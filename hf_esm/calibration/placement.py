"""Where a model that calibrates fits: on the accelerator's device, or partly on disk."""

import math
from pathlib import Path
from typing import Any, Optional

from accelerate import Accelerator
from accelerate.utils.modeling import get_max_memory

from ..architecture import width_of
from ..checkpoints import Checkpoint
from ..data import Sample
from ..utils import bytes_of


def placement(
    checkpoint: Checkpoint, accelerator: Accelerator, max_memory: Optional[str | int], folder: Path
) -> dict[str, Any]:
    """What to pass to `load_model`: nothing where the model fits on the accelerator's device, else Accelerate's
    offloading, of what fits in neither the device nor `max_memory` (by default, the memory that is free) to `folder`.
    """
    memory = available_memory(accelerator, max_memory)
    if checkpoint.nbytes <= next(iter(memory.values())):
        return {}
    return {"device_map": "auto", "max_memory": memory, "offload_folder": str(folder)}


def available_memory(accelerator: Accelerator, max_memory: Optional[str | int] = None) -> dict[int | str, int]:
    """Bytes to use on this process's device (nine tenths of what is free) and in main memory, the latter at most
    `max_memory`.
    """
    device = accelerator.device
    own = device.type if device.type in ("cpu", "mps") else device.index or 0
    free = {place: size for place, size in get_max_memory().items() if place in (own, "cpu")}
    memory = {place: size if place == "cpu" else int(0.9 * size) for place, size in free.items()}
    if max_memory is not None and "cpu" in memory:
        memory["cpu"] = min(memory["cpu"], bytes_of(max_memory, "max_memory"))
    return memory


def needs_spill(
    checkpoint: Checkpoint, samples: list[Sample], accelerator: Accelerator, max_memory: Optional[str | int] = None
) -> bool:
    """Whether the factors that a model's calibration grows may not fit in main memory beside its weights."""
    memory = available_memory(accelerator, max_memory)
    weights = checkpoint.nbytes if accelerator.device.type == "cpu" else 0
    return weights + factor_bytes(checkpoint, samples, shared=False) > memory.get("cpu", math.inf)


def factor_bytes(checkpoint: Checkpoint, samples: list[Sample], shared: bool) -> int:
    """What the factors of a model's linear maps take.

    A factor has as many rows as there were tokens (where samples say how many), and at most twice as many as the map
    has inputs. Maps that read the same tensor share one, which is not known before they run: `shared` takes all maps
    of one module that have as many inputs to do so, for a low guess; else none does, for a high one. The experts of a
    mixture share out the tokens among them, or, high, each of them reads all.
    """
    tokens = sum(sample["input_ids"].numel() if "input_ids" in sample else math.inf for sample in samples)
    sizes = {}
    for name, linear in checkpoint.linear.items():
        width, most = width_of(checkpoint.shape(name), linear), max(linear.slices, 1)
        rows = min(tokens, 2 * width * most) if shared else most * min(tokens, 2 * width)
        key = (linear.module.rpartition(".")[0], width) if shared else name
        sizes[key] = max(4 * width * rows, sizes.get(key, 0))
    return int(sum(sizes.values()))
