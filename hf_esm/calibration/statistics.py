"""`ActivationStatistics`: what one expert's proxies say about the inputs of its linear maps, in one file."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints import STATISTICS_FILE, ShardedWriter
from ..errors import HfEsmError
from ..linalg import triangular_factor
from ..methods import InputStatistics
from ..utils import atomic_file


FORMAT = "hf_esm.statistics"


FORMAT_VERSION = 1


PRIVACY = (
    "Factors and means are computed from the calibration samples. They hold no sample as such, but where there are "
    "fewer tokens than features the inputs of a layer can be recovered up to a rotation."
)


@dataclass
class Provenance:
    """Where statistics come from.

    Attributes:
        model: id or folder of the expert.
        revision: its commit on the Hub, if it came from there.
        num_samples: proxy samples that were run.
        seed: seed of their selection.
        compressed_rank: rows kept of each factor, or None if the factors are exact.
        compression_error: the largest `‖R − R_q‖_F / ‖R‖_F` over all factors.
    """

    model: str = ""
    revision: Optional[str] = None
    num_samples: int = 0
    seed: Optional[int] = None
    compressed_rank: Optional[int] = None
    compression_error: float = 0.0


@dataclass
class ActivationStatistics(Mapping):
    """The input statistics of every calibrated linear map of one expert, by the weight's canonical name.

    The canonical name of a weight is its name inside the model's body (`encoder.layer.0.attention.self.query.weight`
    for BERT, whichever head sits on it). Maps that read the same tensor share one entry. Loaded from a file, an entry
    is read when it is asked for, so that statistics of any size cost no memory.

    Attributes:
        entries: entry by its key.
        keys_of: weight's canonical name to the key of its entry.
        provenance: where they come from.
        pooled: what every block of the *base* reads on the same samples, `[num_samples, d_in]` by the weight's
            canonical name, from which a router can be made without data; empty where no base was given.
    """

    entries: Mapping[str, InputStatistics]
    keys_of: dict[str, str]
    provenance: Provenance = field(default_factory=Provenance)
    pooled: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, weight: str) -> InputStatistics:
        return self.entries[self.keys_of[weight]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)

    def width(self, weight: str) -> int:
        """`d_in` of a map."""
        return (
            self.entries.width(self.keys_of[weight])
            if isinstance(self.entries, _FileEntries)
            else len(self[weight].mean)
        )

    def check_fits(self, widths: Mapping[str, int], task: str) -> None:
        """Raise on statistics of another architecture.

        Args:
            widths: the number of inputs of every matrix that is merged with statistics, by its canonical name.
            task: whose statistics these are.

        Raises:
            HfEsmError: if no matrix has statistics, or one has another number of inputs.
        """
        if widths and not self.keys() & widths.keys():
            raise HfEsmError(
                f"The statistics of '{task}' are of another model: they are of {next(iter(self), 'nothing')!r} and "
                "the like, which the base has not. Calibrate again."
            )
        for name in self.keys() & widths.keys():
            if self.width(name) != widths[name]:
                raise HfEsmError(
                    f"The statistics of '{task}' have {self.width(name)} inputs for '{name}', the base has "
                    f"{widths[name]}: they are of another model. Calibrate again."
                )

    def means(self) -> dict[str, tuple[int, Tensor]]:
        """Rows and mean row of every entry, by its key: little to read, and other for other samples."""
        if isinstance(self.entries, _FileEntries):
            return {key: (self.entries.counts[key], self.entries.mean(key)) for key in self.entries}
        return {key: (entry.count, entry.mean) for key, entry in self.entries.items()}

    def save(self, path: str | os.PathLike, compact: bool = True) -> Path:
        """Write one safetensors file, atomically. `compact` brings each factor down to at most `d_in` rows."""
        path = Path(path)
        if path.is_dir() or not path.suffix:
            path = path / STATISTICS_FILE
        tensors = {f"{weight}.pooled": rows for weight, rows in self.pooled.items()}
        planned = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        counts = {}
        for key, entry in self.entries.items():
            rows, width = entry.factor.shape
            planned[f"{key}.factor"] = torch.empty(min(rows, width) if compact else rows, width, device="meta")
            planned[f"{key}.mean"] = torch.empty(width, device="meta")
            counts[key] = entry.count
        header = {
            "counts": counts,
            "keys_of": self.keys_of,
            "provenance": asdict(self.provenance),
            "pooled": list(self.pooled),
        }
        metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "privacy": PRIVACY, "header": json.dumps(header)}
        with (
            atomic_file(path, ".safetensors") as partial,
            ShardedWriter(path.parent, planned, 2**62, partial.stem, metadata=metadata) as writer,
        ):
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            for key, entry in self.entries.items():
                writer.write(f"{key}.factor", triangular_factor(entry.factor) if compact else entry.factor)
                writer.write(f"{key}.mean", entry.mean)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ActivationStatistics":
        """Open a file written by `save` (or a folder that holds one); its factors are read when asked for."""
        path = Path(path)
        path = path / STATISTICS_FILE if path.is_dir() else path
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise HfEsmError(
                f"{path}: not a readable statistics file ({error}). Run `hf-esm calibrate` again."
            ) from None
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise HfEsmError(f"{path}: no activation statistics in it. `hf-esm calibrate` writes such a file.")
        if metadata.get("version") != str(FORMAT_VERSION):
            raise HfEsmError(
                f"{path}: format version {metadata.get('version')}; this hf_esm reads {FORMAT_VERSION}. "
                "Upgrade hf_esm, or calibrate again."
            )
        try:
            header: dict[str, Any] = json.loads(metadata["header"])
            pooled = {weight: file.get_tensor(f"{weight}.pooled") for weight in header["pooled"]}
            provenance = Provenance(**header["provenance"])
            return cls(_FileEntries(file, header["counts"]), header["keys_of"], provenance, pooled)
        except (KeyError, TypeError, ValueError) as error:
            raise HfEsmError(f"{path}: its header of statistics is damaged ({error!r}). Calibrate again.") from None

    @classmethod
    def merge(cls, parts: list["ActivationStatistics"]) -> "ActivationStatistics":
        """The statistics of all samples together, from those of disjoint parts collected on the same model."""
        if not parts:
            raise HfEsmError("There are no statistics to merge.")
        keys_of = {weight: key for part in parts for weight, key in part.keys_of.items()}
        # The experts of a mixture are known as far as tokens came to them; all other maps, in every part.
        lacking = [w for part in parts for w in keys_of if w not in part and not w.rpartition(".")[2].isdigit()]
        apart = [weight for part in parts for weight, key in part.keys_of.items() if keys_of[weight] != key]
        models = {(part.provenance.model, part.provenance.revision) for part in parts if part.provenance.model}
        if lacking or apart or len(models) > 1:
            raise HfEsmError("Statistics of different models cannot be merged; collect them on the same model.")
        entries = {}
        for key in dict.fromkeys(keys_of.values()):
            found = [part.entries[key] for part in parts if key in part.entries]
            count = sum(entry.count for entry in found)
            total = sum(entry.mean.double() * entry.count for entry in found)
            factor = triangular_factor(torch.cat([entry.factor for entry in found]))
            entries[key] = InputStatistics(factor, (total / max(count, 1)).float(), count)
        ranks = [part.provenance.compressed_rank for part in parts if part.provenance.compressed_rank is not None]
        provenance = replace(
            parts[0].provenance,
            num_samples=sum(part.provenance.num_samples for part in parts),
            compressed_rank=min(ranks, default=None),
            compression_error=max(part.provenance.compression_error for part in parts),
        )
        everywhere = [weight for weight in parts[0].pooled if all(weight in part.pooled for part in parts)]
        pooled = {weight: torch.cat([part.pooled[weight] for part in parts]) for weight in everywhere}
        return cls(entries, keys_of, provenance, pooled)

    def compress(self, rank: int) -> "ActivationStatistics":
        """A smaller, lossy copy: the top `rank` rows of `S Vᵀ` of each factor. Its error is kept in `provenance`."""
        if not isinstance(rank, int) or rank < 1:
            raise HfEsmError(f"rank must be a whole number, 1 or more, not {rank!r}.")
        entries, worst = {}, 0.0
        for key, entry in self.entries.items():
            _, values, rows = torch.linalg.svd(entry.factor.double(), full_matrices=False)
            factor = (values[:rank, None] * rows[:rank]).float()
            lost = values[rank:].square().sum() / values.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
            worst = max(worst, float(lost.sqrt()))
            entries[key] = InputStatistics(factor, entry.mean, entry.count)
        before = self.provenance  # what an earlier compression lost stays lost
        provenance = replace(
            before,
            compressed_rank=min(rank, before.compressed_rank or rank),
            compression_error=(before.compression_error**2 + (1 - before.compression_error**2) * worst**2) ** 0.5,
        )
        return type(self)(entries, self.keys_of, provenance, self.pooled)


class _FileEntries(Mapping):
    """Entries of an open safetensors file."""

    def __init__(self, file: Any, counts: dict[str, int]):
        self.file, self.counts = file, counts

    def __getitem__(self, key: str) -> InputStatistics:
        return InputStatistics(self.file.get_tensor(f"{key}.factor"), self.mean(key), self.counts[key])

    def mean(self, key: str) -> Tensor:
        return self.file.get_tensor(f"{key}.mean")

    def width(self, key: str) -> int:
        return self.file.get_slice(f"{key}.mean").get_shape()[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)
