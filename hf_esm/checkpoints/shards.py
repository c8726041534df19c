"""Safetensors files that are written one tensor at a time, in any order, by one process or several."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ..errors import HfEsmError


DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class ShardedWriter:
    """Streams tensors into `<stem>.safetensors`, or into shards with an index where they exceed `max_shard_size`.

    The format fixes every offset once names, shapes and dtypes are known, so the tensors may come in any order and
    none is held. Several processes share the work by files. Leave the `with` block only when every tensor of this
    process's files was written.
    """

    def __init__(
        self,
        folder: Path,
        plan: dict[str, Tensor],
        max_shard_size: str | int = "5GB",
        stem: str = "model",
        written: Collection[str] = (),
        metadata: Optional[Mapping[str, str]] = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Lay the files out.

        Args:
            plan: every tensor that will come, on the meta device.
            written: those that an interrupted writer of the same plan left in the folder.
            metadata: what stands in each file's header beside the format.
            rank: this process's number: of `world_size` processes each writes every `world_size`-th file.
        """
        self.folder, self.stem, self.plan = folder, stem, plan
        # The experts of a mixture are parts of one tensor here, whose size would count for each of them.
        apart = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in plan.items()}
        split = split_torch_state_dict_into_shards(
            apart, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=max_shard_size
        )
        self._places: dict[str, tuple[Any, int]] = {}
        self._files = []
        files = split.filename_to_tensors or {f"{stem}.safetensors": []}
        for file_name, names in list(files.items())[rank::world_size]:
            # The widest dtypes first, so that every tensor starts at a multiple of its item size.
            names = sorted(names, key=lambda name: (-plan[name].dtype.itemsize, name))
            header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
            position, positions = 0, {}
            for name in names:
                end = position + plan[name].nbytes
                header[name] = {
                    "dtype": DTYPE_CODES[plan[name].dtype],
                    "shape": list(plan[name].shape),
                    "data_offsets": [position, end],
                }
                positions[name], position = position, end
            encoded = json.dumps(header).encode()
            encoded += b" " * (-len(encoded) % 8)
            size = 8 + len(encoded) + position
            if written and (not (folder / file_name).is_file() or (folder / file_name).stat().st_size != size):
                raise HfEsmError(f"{folder / file_name} is not as it was left. Remove {folder} to start again.")
            file = open(folder / file_name, "r+b" if written else "wb")
            self._files.append(file)
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(size)
            self._places.update({name: (file, 8 + len(encoded) + start) for name, start in positions.items()})
        self.pending = set(self._places) - set(written)
        if split.is_sharded and rank == 0:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def owns(self, name: str) -> bool:
        """Whether the tensor stands in a file of this process."""
        return name in self._places

    def write(self, name: str, tensor: Tensor) -> None:
        planned = self.plan[name]
        if tensor.shape != planned.shape or tensor.dtype != planned.dtype:
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {planned.dtype} "
                f"{tuple(planned.shape)} was planned"
            )
        file, position = self._places[name]
        file.seek(position)
        try:
            if tensor.numel():
                file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise HfEsmError(f"{file.name}: '{name}' cannot be written: {error.strerror}.") from None
        self.pending.discard(name)

    def sync(self) -> None:
        """Bring to the disk what was written."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        for file in self._files:
            file.close()
        if kind is None and self.pending:
            raise RuntimeError(f"never written: {sorted(self.pending)[:5]}")
