"""Safetensors files that are read and written one tensor at a time, in any order, by one process or several."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from ..errors import HfEsmError
from ..utils import reading


# The dtypes that the safetensors format has, by torch's.
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
    torch.float8_e8m0fnu: "F8_E8M0",
}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


class TensorFile:
    """Maps tensors of a safetensors file, each by itself, so that its pages are in memory only while the tensor is.

    What `safe_open` returns keeps all pages that were read of the file in memory, until the file is closed.

    Attributes:
        headers: `(shape, code of the dtype)` of every tensor by its name.
    """

    def __init__(self, path: Path, title: str):
        """Read the header.

        Args:
            path: the file.
            title: name of the model in messages.

        Raises:
            DamagedFileError: if the file is missing, or is not one of safetensors.
        """
        self.path, self._named = path, f"{title}: {path}"
        self.headers: dict[str, tuple[tuple[int, ...], str]] = {}
        with reading(path, self._named):
            self._state = _state(path)
            checked = safe_open(path, "pt")
            for key in sorted(checked.keys()):
                header = checked.get_slice(key)
                self.headers[key] = (tuple(header.get_shape()), header.get_dtype())
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(size))
            self._places = {key: [8 + size + end for end in entries[key]["data_offsets"]] for key in self.headers}

    def read(self, key: str) -> Tensor:
        """Return a tensor.

        Raises:
            DamagedFileError: if the file was removed.
            HfEsmError: if it was changed since its header was read.
        """
        (shape, code), (start, end) = self.headers[key], self._places[key]
        with reading(self.path, self._named):
            if _state(self.path) != self._state:
                raise HfEsmError(f"{self._named} was changed while it was being read. Start again.")
            data = torch.from_file(str(self.path), shared=False, size=self._state[0], dtype=torch.uint8)[start:end]
        aligned = start % DTYPES[code].itemsize == 0
        return (data if aligned else data.clone()).view(DTYPES[code]).reshape(shape)


def _state(path: Path) -> tuple[int, int]:
    """Return what tells a file from a later one of its name."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


class ShardedWriter:
    """Writes tensors into `<stem>.safetensors`, or into shards with an index if they exceed `max_shard_size`.

    The format fixes every offset once names, shapes and dtypes are known, so the tensors may come in any order, and
    none is held in memory. Several processes share the files. All tensors of this process's files must be written
    before the `with` block ends.
    """

    def __init__(
        self,
        folder: Path,
        plan: dict[str, Tensor],
        max_shard_size: str | int = "5GB",
        stem: str = "model",
        *,
        written: Collection[str] = (),
        metadata: Optional[Mapping[str, str]] = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Create the files of this process, with their headers, in full size.

        Args:
            folder: folder to write to.
            plan: every tensor that will come, on the meta device.
            max_shard_size: size of the largest file.
            stem: first part of the names of the files.
            written: tensors that an interrupted writer of the same plan left in the folder.
            metadata: entries of each file's header besides the format.
            rank: number of this process.
            world_size: number of processes; each writes every `world_size`-th file.

        Raises:
            HfEsmError: if the files of an interrupted writer have changed.
        """
        self.folder, self.stem, self.plan = folder, stem, plan
        # The experts of a mixture are views of one storage, whose size would count for each of them.
        separate = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in plan.items()}
        split = split_torch_state_dict_into_shards(
            separate, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=max_shard_size
        )
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files: list[BinaryIO] = []
        files = split.filename_to_tensors or {f"{stem}.safetensors": []}
        for file_name, names in list(files.items())[rank::world_size]:
            header, offsets, size = _layout({name: plan[name] for name in names}, metadata or {})
            file = self._open(folder / file_name, header, size, resumed=bool(written))
            self._places.update({name: (file, offset) for name, offset in offsets.items()})
        self.pending = set(self._places) - set(written)
        if split.is_sharded and rank == 0:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _open(self, path: Path, header: bytes, size: int, resumed: bool) -> BinaryIO:
        if resumed and (not path.is_file() or path.stat().st_size != size):
            raise HfEsmError(
                f"{path} was changed after the merge was interrupted. Remove {self.folder} to start again."
            )
        file = open(path, "r+b" if resumed else "wb")
        self._files.append(file)
        file.write(header)
        file.truncate(size)
        return file

    def owns(self, name: str) -> bool:
        """Return whether the tensor belongs into a file of this process."""
        return name in self._places

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, which must have the planned shape and dtype."""
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
        """Flush everything written so far to the disk."""
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


def _layout(plan: dict[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Return the header of a file, the position of each tensor in the file, and the size of the file in bytes."""
    # The widest dtypes come first, so that every tensor starts at a multiple of its item size.
    names = sorted(plan, key=lambda name: (-plan[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        start, end = end, end + plan[name].nbytes
        entries[name] = {
            "dtype": DTYPE_CODES[plan[name].dtype],
            "shape": list(plan[name].shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(entries).encode()
    encoded += b" " * (-len(encoded) % 8)
    header = len(encoded).to_bytes(8, "little") + encoded
    return header, {name: len(header) + entries[name]["data_offsets"][0] for name in names}, len(header) + end
