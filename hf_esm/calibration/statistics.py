"""`ActivationStatistics`: what the linear maps of one expert read on its samples."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from ..checkpoints import STATISTICS_FILE
from ..errors import HfEsmError
from ..linalg import right_singular_vectors, triangular_factor
from ..methods import InputStatistics
from ..utils import check_path, reading
from .statistics_file import FileEntries, read_file, write_file


@dataclass
class Provenance:
    """Where statistics come from.

    Attributes:
        model: id or folder of the expert.
        revision: its commit on the Hub, if it is from there.
        num_samples: number of samples that were run.
        seed: seed of their choice.
        compressed_rank: rows per factor after compression; None if the factors are exact.
        compression_error: the largest `‖R − R_q‖_F / ‖R‖_F` over all factors.
        samples: a fingerprint of every sample that was run, sorted; empty in files of hf_esm 0.1.
    """

    model: str = ""
    revision: Optional[str] = None
    num_samples: int = 0
    seed: Optional[int] = None
    compressed_rank: Optional[int] = None
    compression_error: float = 0.0
    samples: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        self.samples = tuple(sorted(self.samples))


@dataclass
class ActivationStatistics(Mapping):
    """The input statistics of every linear map of one expert, by the canonical name of its weight.

    A canonical name is the name inside the model's body: `encoder.layer.0.attention.self.query.weight` for BERT,
    whichever head it has. Maps that read the same tensor share one entry. Entries of a file are read when they are
    asked for, so statistics of any size need no memory.

    Attributes:
        entries: an entry for each tensor that is read, by its key: a factor `R` with `Rᵀ R = Xᵀ X`, the mean, and the
            number of rows `X`, one per token.
        keys_of: key of the entry of each map, by the canonical name of its weight.
        provenance: where the statistics come from.
        pooled: what each block of the *base* reads on the same samples, `[num_samples, d_in]` float32, by the
            canonical name of a weight; of a model that reads prompts, `[num_samples, 4, d_in]`. A router is made from
            these (see `pooled_inputs`). Empty without a base.
        token_counts: how often the samples read each row of an embedding, `[V]` int64, by the canonical name of its
            weight. Empty in files of hf_esm 0.1.

    Example:
        >>> from hf_esm import ActivationStatistics, calibrate
        >>> path = calibrate("bert-sst2", sst2_texts, progress=False).save("sst2.safetensors")
        >>> statistics = ActivationStatistics.load(path)
        >>> query = statistics["encoder.layer.0.attention.self.query.weight"]
        >>> query.factor.shape[1] == len(query.mean) == statistics.width("encoder.layer.0.attention.self.query.weight")
        True
        >>> statistics.compress(4).save("sst2-small.safetensors").name
        'sst2-small.safetensors'
    """

    entries: Mapping[str, InputStatistics]
    keys_of: dict[str, str]
    provenance: Provenance = field(default_factory=Provenance)
    pooled: Mapping[str, Tensor] = field(default_factory=dict)
    token_counts: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, weight: str) -> InputStatistics:
        return self.entries[self.keys_of[weight]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} linear maps, {self.provenance})"

    def width(self, weight: str) -> int:
        """Return the number of inputs of a map, `d_in`."""
        entries = self.entries
        return entries.width(self.keys_of[weight]) if isinstance(entries, FileEntries) else len(self[weight].mean)

    def means(self) -> dict[str, tuple[int, Tensor]]:
        """Return the number of rows and the mean row of every entry, by key. They differ for other samples, and are
        little to read.
        """
        if isinstance(self.entries, FileEntries):
            return {key: (self.entries.counts[key], self.entries.mean(key)) for key in self.entries}
        return {key: (entry.count, entry.mean) for key, entry in self.entries.items()}

    def check_fits(self, widths: Mapping[str, int], task: str, rows: Optional[Mapping[str, int]] = None) -> None:
        """Raise if the statistics are of another architecture.

        Args:
            widths: number of inputs of every matrix that is merged with statistics, by canonical name.
            task: task of the expert.
            rows: number of rows of every embedding that is merged by token counts, by canonical name.

        Raises:
            HfEsmError: if no matrix has statistics, or a matrix has another number of inputs, or an embedding another
                number of rows.
        """
        if widths and not self.keys() & widths.keys():
            raise HfEsmError(
                f"The statistics of '{task}' are of another model: they are of {next(iter(self), 'nothing')!r} and "
                "the like, which the base does not have. Calibrate again."
            )
        for name in self.keys() & widths.keys():
            if self.width(name) != widths[name]:
                raise HfEsmError(
                    f"The statistics of '{task}' have {self.width(name)} inputs for '{name}', the base has "
                    f"{widths[name]}: they are of another model. Calibrate again."
                )

        for name in self.token_counts.keys() & (rows or {}).keys():
            counted = len(self.token_counts[name])
            if counted != rows[name]:
                raise HfEsmError(
                    f"The statistics of '{task}' have token counts of {counted} rows for '{name}', the base has "
                    f"{rows[name]}: they are of another model. Calibrate again."
                )

    def save(self, path: str | os.PathLike, compact: bool = True) -> Path:
        """Write the statistics to one safetensors file, which appears when it is complete.

        Args:
            path: file to write; a folder, or a name without a suffix, gets a file of the name that `merge_models`
                looks for beside an expert's weights.
            compact: reduce each factor to at most `d_in` rows, which loses nothing.

        Returns:
            The path of the file.
        """
        check_path(path, "statistics")
        path = Path(path)
        if path.is_dir() or not path.suffix:
            path = path / STATISTICS_FILE
        header = {"keys_of": self.keys_of, "provenance": asdict(self.provenance)}
        write_file(path, self.entries, self.pooled, self.token_counts, header, compact)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ActivationStatistics":
        """Open a file that `save` wrote, or the folder that holds one. Factors are read when they are asked for.

        Raises:
            HfEsmError: if the file is damaged, has another format, or another version of this one.
        """
        check_path(path, "statistics")
        path = Path(path)
        path = path / STATISTICS_FILE if path.is_dir() else path
        entries, pooled, token_counts, header = read_file(path)
        with reading(path, f"{path}: its header of statistics", "Calibrate again."):
            return cls(entries, header["keys_of"], Provenance(**header["provenance"]), pooled, token_counts)

    @classmethod
    def merge(cls, parts: list["ActivationStatistics"]) -> "ActivationStatistics":
        """Return the statistics of all samples from those of disjoint parts, collected on the same model.

        Raises:
            HfEsmError: if there are no parts, or they are of different models.
        """
        if not parts:
            raise HfEsmError("There are no statistics to merge.")
        keys_of = {weight: key for part in parts for weight, key in part.keys_of.items()}
        _check_one_model(parts, keys_of)
        entries = {
            key: _sum([part.entries[key] for part in parts if key in part.entries])
            for key in dict.fromkeys(keys_of.values())
        }
        ranks = [part.provenance.compressed_rank for part in parts if part.provenance.compressed_rank is not None]
        provenance = replace(
            parts[0].provenance,
            num_samples=sum(part.provenance.num_samples for part in parts),
            compressed_rank=min(ranks, default=None),
            compression_error=max(part.provenance.compression_error for part in parts),
            samples=tuple(name for part in parts for name in part.provenance.samples),
        )
        in_all = [weight for weight in parts[0].pooled if all(weight in part.pooled for part in parts)]
        pooled = {weight: torch.cat([part.pooled[weight] for part in parts]) for weight in in_all}
        counted = [name for name in parts[0].token_counts if all(name in part.token_counts for part in parts)]
        token_counts = {name: sum(part.token_counts[name] for part in parts) for name in counted}
        return cls(entries, keys_of, provenance, pooled, token_counts)

    def compress(self, rank: int) -> "ActivationStatistics":
        """Return a smaller, lossy copy: the top `rank` rows of `S Vᵀ` of each factor. `provenance` states the error.

        Raises:
            HfEsmError: if the rank is not a whole number, 1 or more.
        """
        if not isinstance(rank, int) or rank < 1:
            raise HfEsmError(f"rank must be a whole number, 1 or more, not {rank!r}.")
        entries, error = {}, 0.0
        for key, entry in self.entries.items():
            values, rows = right_singular_vectors(entry.factor.double())
            factor = (values[:rank, None] * rows[:rank]).float()
            lost = values[rank:].square().sum() / values.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
            error = max(error, float(lost.sqrt()))
            entries[key] = InputStatistics(factor, entry.mean, entry.count)
        earlier = self.provenance  # an earlier compression's error adds up
        provenance = replace(
            earlier,
            compressed_rank=min(rank, earlier.compressed_rank or rank),
            compression_error=(earlier.compression_error**2 + (1 - earlier.compression_error**2) * error**2) ** 0.5,
        )
        return type(self)(entries, self.keys_of, provenance, self.pooled, self.token_counts)


def _check_one_model(parts: list[ActivationStatistics], keys_of: dict[str, str]) -> None:
    """Raise if statistics are of different models. Experts of a mixture may be missing where no token reached them."""
    missing = [w for part in parts for w in keys_of if w not in part and not w.rpartition(".")[2].isdigit()]
    differing = [weight for part in parts for weight, key in part.keys_of.items() if keys_of[weight] != key]
    models = {(part.provenance.model, part.provenance.revision) for part in parts if part.provenance.model}
    sizes = {(name, len(counted)) for part in parts for name, counted in part.token_counts.items()}
    if missing or differing or len(models) > 1 or len(sizes) > len(dict(sizes)):
        raise HfEsmError("Statistics of different models cannot be merged; collect them on the same model.")


def _sum(entries: list[InputStatistics]) -> InputStatistics:
    """Return the statistics of all rows behind several entries of one map."""
    count = sum(entry.count for entry in entries)
    total = sum(entry.mean.double() * entry.count for entry in entries)
    factor = triangular_factor(torch.cat([entry.factor for entry in entries]))
    return InputStatistics(factor, (total / max(count, 1)).float(), count)
