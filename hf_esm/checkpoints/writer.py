"""Where weights go: safetensors shards, streamed one weight at a time into a folder that appears when it is whole."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, apply_converters, revert_weight_conversion

from ..errors import HfEsmError
from .reader import Checkpoint


_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class ShardedWriter:
    """Streams tensors into `<stem>.safetensors`, or into shards with an index where they exceed `max_shard_size`.

    The format fixes every offset once names, shapes and dtypes are known, so the tensors may come in any order and
    none is held. Leave the `with` block only when all of them were written.
    """

    def __init__(
        self,
        folder: Path,
        plan: dict[str, Tensor],
        max_shard_size: str | int = "5GB",
        stem: str = "model",
        written: Collection[str] = (),
    ):
        """`plan` holds every tensor that will come, on the meta device; `written` are those that an interrupted writer
        of the same plan left in the folder.
        """
        self.folder, self.stem, self.plan = folder, stem, plan
        split = split_torch_state_dict_into_shards(
            plan, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=max_shard_size
        )
        self.pending = set(plan) - set(written)
        self._places: dict[str, tuple[Any, int]] = {}
        self._files = []
        for file_name, names in split.filename_to_tensors.items():
            # The widest dtypes first, so that every tensor starts at a multiple of its item size.
            names = sorted(names, key=lambda name: (-plan[name].dtype.itemsize, name))
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            position, positions = 0, {}
            for name in names:
                end = position + plan[name].nbytes
                header[name] = {
                    "dtype": _CODES[plan[name].dtype],
                    "shape": list(plan[name].shape),
                    "data_offsets": [position, end],
                }
                positions[name], position = position, end
            encoded = json.dumps(header).encode()
            encoded += b" " * (-len(encoded) % 8)
            file = open(folder / file_name, "r+b" if written and (folder / file_name).is_file() else "wb")
            self._files.append(file)
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + position)
            self._places.update({name: (file, 8 + len(encoded) + start) for name, start in positions.items()})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        planned = self.plan[name]
        if tensor.shape != planned.shape or tensor.dtype != planned.dtype:
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {planned.dtype} "
                f"{tuple(planned.shape)} was planned"
            )
        file, position = self._places[name]
        file.seek(position)
        if tensor.numel():
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.pending.discard(name)

    def sync(self) -> None:
        """Bring to the disk what was written."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.sync()
        for file in self._files:
            file.close()
        if kind is None and self.pending:
            raise RuntimeError(f"never written: {sorted(self.pending)[:5]}")


@dataclass
class OutputGroup:
    """Weights that go to disk together: usually one, more where the layout on disk joins or splits them.

    Attributes:
        names: canonical names of the live weights.
        stored: what is written for them, by name on disk, on the meta device.
    """

    names: list[str]
    stored: dict[str, Tensor]


def write_plan(checkpoint: Checkpoint, dtype: Optional[torch.dtype] = None) -> list[OutputGroup]:
    """How the weights of `checkpoint` stand on disk when `save_pretrained` writes its model, in reading order.

    `dtype` is asked of every floating-point weight; by default each keeps its own.
    """
    model = checkpoint.skeleton
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # never loaded from disk
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in conversions if not isinstance(entry, PrefixChange)]
    backwards = [entry.reverse_transform() for entry in conversions[::-1] if isinstance(entry, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name, live in checkpoint.names.items():
        groups.setdefault(apply_converters(live, backwards)[0], []).append(name)
    plan = []
    for names in groups.values():
        tensors = {
            name: torch.empty(checkpoint.shape(name), dtype=output_dtype(checkpoint.dtype(name), dtype), device="meta")
            for name in names
        }
        plan.append(OutputGroup(names, to_stored(checkpoint, tensors)))
    return plan


def output_dtype(own: torch.dtype, asked: Optional[torch.dtype]) -> torch.dtype:
    """The dtype that a weight is written in."""
    return asked if asked is not None and own.is_floating_point else own


def to_stored(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one group, by canonical name, as they stand on disk."""
    live = {checkpoint.names[name]: tensor for name, tensor in tensors.items()}
    return revert_weight_conversion(checkpoint.skeleton, live)


@contextlib.contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` to write into. It is removed unless `publish_folder` has moved it away."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.incomplete-", dir=output.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(folder: Path, output: Path, overwrite: bool = False) -> None:
    """Give a finished folder its name, in one step. What stood there before goes only once the new one stands."""
    folder.chmod(0o777 & ~_umask())
    if output.exists():
        if not overwrite:
            raise HfEsmError(f"{output} exists. Choose another output folder, or pass overwrite.")
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent)) / "folder"
        output.rename(old)
        folder.rename(output)
        shutil.rmtree(old.parent)
    else:
        folder.rename(output)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
