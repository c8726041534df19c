"""The file of activation statistics: one safetensors file, whose entries are read when they are asked for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoints import ShardedWriter
from ..errors import DamagedFileError, HfEsmError
from ..linalg import triangular_factor
from ..methods import InputStatistics
from ..utils import UNSEALED, atomic_file, check_seal, is_file, reading, seal


FORMAT = "hf_esm.statistics"
FORMAT_VERSIONS = (1, 2)  # version 1 has no token counts, and no fingerprints of samples
_AGAIN = "Run `hf-esm calibrate` again."
PRIVACY = (
    "Factors and means are computed from the calibration samples. They hold no sample as such, but where there are "
    "fewer tokens than features the inputs of a layer can be recovered up to a rotation. Token counts tell how often "
    "the samples hold each token, and fingerprints let anyone test whether a known sample was among them."
)


class FileEntries(Mapping[str, InputStatistics]):
    """The entries of an open file, by key.

    Attributes:
        counts: number of rows behind each entry.
    """

    def __init__(self, file: Any, counts: dict[str, int]):
        self._file, self.counts = file, counts

    def __getitem__(self, key: str) -> InputStatistics:
        return InputStatistics(self._file.get_tensor(f"{key}.factor"), self.mean(key), self.counts[key])

    def mean(self, key: str) -> Tensor:
        """Read the mean row of an entry alone."""
        return self._file.get_tensor(f"{key}.mean")

    def width(self, key: str) -> int:
        """Return the number of features of an entry, without reading it."""
        return self._file.get_slice(f"{key}.mean").get_shape()[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)


def write_file(
    path: Path,
    entries: Mapping[str, InputStatistics],
    pooled: Mapping[str, Tensor],
    token_counts: Mapping[str, Tensor],
    header: dict[str, Any],
    compact: bool,
) -> None:
    """Write statistics, entry by entry; the file appears when it is complete.

    Args:
        path: file to write.
        entries: statistics of each input, by key.
        pooled: what the base's blocks read, by the weight's canonical name.
        token_counts: how often each row of an embedding was read, by the weight's canonical name.
        header: everything else, as JSON can hold it.
        compact: reduce each factor to at most as many rows as it has columns.
    """
    planned = {f"{weight}.pooled": torch.empty_like(rows, device="meta") for weight, rows in pooled.items()}
    planned |= {
        f"{name}.token_counts": torch.empty_like(counted, device="meta") for name, counted in token_counts.items()
    }
    counts = {}
    for key, entry in entries.items():
        rows, width = entry.factor.shape
        planned[f"{key}.factor"] = torch.empty(min(rows, width) if compact else rows, width, device="meta")
        planned[f"{key}.mean"] = torch.empty(width, device="meta")
        counts[key] = entry.count
    header = json.dumps({"counts": counts, **header, "pooled": list(pooled), "token_counts": list(token_counts)})
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSIONS[-1]), "privacy": PRIVACY, "header": header} | UNSEALED
    with atomic_file(path, ".safetensors") as partial:
        with ShardedWriter(path.parent, planned, 2**62, partial.stem, metadata=metadata) as writer:
            for weight, rows in pooled.items():
                writer.write(f"{weight}.pooled", rows)
            for name, counted in token_counts.items():
                writer.write(f"{name}.token_counts", counted)
            for key, entry in entries.items():
                writer.write(f"{key}.factor", triangular_factor(entry.factor) if compact else entry.factor)
                writer.write(f"{key}.mean", entry.mean)
        seal(partial)


def read_file(path: Path) -> tuple[FileEntries, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Open what `write_file` wrote: its entries, `pooled`, `token_counts`, and the header. The file is read once, to
    check its checksum, and the shape and the numbers of every tensor.

    Raises:
        HfEsmError: if the file is damaged, has another format, or another version of this one.
    """
    if not is_file(path):
        raise DamagedFileError(f"{path}: not a readable statistics file (there is none). {_AGAIN}")
    with reading(path, f"{path}: not a readable statistics file: it", _AGAIN):
        file = safe_open(path, "pt")
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise HfEsmError(f"{path}: no activation statistics in it. `hf-esm calibrate` writes such a file.")
    if metadata.get("version") not in map(str, FORMAT_VERSIONS):
        versions = " and ".join(map(str, FORMAT_VERSIONS))
        raise HfEsmError(
            f"{path}: format version {metadata.get('version')}; this hf_esm reads {versions}. Upgrade hf_esm, or "
            "calibrate again."
        )
    with reading(path, f"{path}: its header of statistics", "Calibrate again."):
        header: dict[str, Any] = json.loads(metadata["header"])
        pooled = {weight: file.get_tensor(f"{weight}.pooled") for weight in header["pooled"]}
        names = header["token_counts"] if metadata["version"] != "1" else []
        token_counts = {name: file.get_tensor(f"{name}.token_counts") for name in names}
        entries = FileEntries(file, header["counts"])
        broken = _broken(entries, pooled, dict(header["keys_of"]))
    if broken:
        raise DamagedFileError(f"{path}: {broken}. Calibrate again.")
    for name, counted in token_counts.items():
        if counted.dtype != torch.int64 or counted.dim() != 1 or (counted < 0).any():
            raise DamagedFileError(f"{path}: the token counts of '{name}' are not numbers of tokens. Calibrate again.")
    check_seal(path, _AGAIN, needed=metadata["version"] != "1")
    return entries, pooled, token_counts, header


def _broken(entries: FileEntries, pooled: Mapping[str, Tensor], keys_of: Mapping[str, str]) -> str:
    """Say what is wrong with the tensors of a file; nothing if they are statistics."""
    for key, count in entries.counts.items():
        entry = entries[key]
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            return f"the number of rows of '{key}' is {count!r}"
        if entry.mean.dim() != 1 or entry.factor.dim() != 2 or entry.factor.shape[1] != len(entry.mean):
            return f"'{key}' has a factor {tuple(entry.factor.shape)} and a mean {tuple(entry.mean.shape)}"
        if not all(part.dtype == torch.float32 and part.isfinite().all() for part in (entry.factor, entry.mean)):
            return f"the statistics of '{key}' are not finite float32 numbers"
    for weight, rows in pooled.items():
        if rows.dim() not in (2, 3) or rows.dtype != torch.float32 or not rows.isfinite().all():
            return f"the features of '{weight}' are not finite float32 rows"
    unknown = [weight for weight, key in keys_of.items() if key not in entries.counts]
    return f"it has no statistics of '{unknown[0]}'" if unknown else ""
