"""Where data comes from: rows of whatever users call data, chosen by seed, and samples in files."""

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import HfEsmError
from .options import SampleOptions
from .samples import Sample


# Whatever users call data; `read_rows` lists the kinds. Data sets, loaders and data frames are iterable.
DataSpec = str | os.PathLike | Mapping[str, Any] | Iterable[Any]


FORMAT = "hf_esm.proxies"


FORMAT_VERSION = 1


def read_rows(data: DataSpec, title: str, options: SampleOptions) -> list[Any]:
    """`num_samples` entries of whatever holds data, chosen with `seed`; the first of what can only be gone through.

    Args:
        data: a sequence, a `datasets.Dataset`, a `DataLoader`, a DataFrame of pandas, a column mapping, the path of a
            data file (JSON lines, JSON, CSV, Parquet, text) or of saved proxies, or `{"path": …, "name": …, "split":
            …}` for `datasets.load_dataset`. With such a mapping, `"columns"` in it names columns of this data alone,
            as `options.columns` does those of all.
        title: what messages call it.
    """
    columns: Mapping[str, str] = {}
    if isinstance(data, (str, os.PathLike)):
        data = _read_file(Path(data).expanduser(), title)
    elif isinstance(data, Mapping) and isinstance(data.get("path"), (str, os.PathLike)):
        named = {"split": "train", **data}
        columns, path = named.pop("columns", {}), Path(named.pop("path")).expanduser()
        replace(options, columns=columns)  # refuses names that are none
        data = _read_file(path, title, **named) if path.is_file() else _load({"path": str(path), **named}, title)
    elif isinstance(data, pd.DataFrame):
        data = data.astype(object).where(data.notna(), None).to_dict("records")
    elif isinstance(data, (DatasetDict, IterableDatasetDict)):
        raise HfEsmError(f"{title}: these are several splits ({', '.join(map(str, data))}). Give one of them.")
    elif isinstance(data, Mapping):
        if single := [name for name, column in data.items() if isinstance(column, str)]:
            raise HfEsmError(
                f"{title}: '{single[0]}' is one text, not a column of them. Give a list of rows: [{{…}}]."
            )
        length = len(next(iter(data.values()), ()))
        for name, column in data.items():
            if not hasattr(column, "__len__") or len(column) != length:
                raise HfEsmError(f"{title}: the column {name!r} is not as long as {next(iter(data))!r}.")
        data = [{name: column[i] for name, column in data.items()} for i in range(length)]
    if isinstance(data, DataLoader):
        data = list(_split_batches(data, options.num_samples, title))
    if isinstance(data, IterableDataset):
        data = list(data.take(options.num_samples)) if options.num_samples else list(data)
    if not isinstance(data, (Sequence, Dataset)):
        data = list(data) if isinstance(data, Iterable) else [data]
    if not len(data):
        raise HfEsmError(f"{title}: no samples.")
    chosen = range(len(data))
    if options.num_samples and len(data) > options.num_samples:
        chosen = sorted(random.Random(options.seed).sample(chosen, options.num_samples))
    rows = [data[i] for i in chosen]
    return [_renamed(row, columns, f"{title}: row {i}", options) for i, row in enumerate(rows)] if columns else rows


def _renamed(row: Any, columns: Mapping[str, str], title: str, options: SampleOptions) -> dict[str, Any]:
    """A row with those of its columns that its own data names, under the names that are looked for in all."""
    if lacking := [column for column in columns.values() if not isinstance(row, Mapping) or column not in row]:
        there = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise HfEsmError(f"{title} has no column {lacking[0]!r}; it has {there}.")
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return rest | {options.columns.get(name, name): row[column] for name, column in columns.items()}


def _read_file(path: Path, title: str, **arguments: Any) -> Any:
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
    if not path.is_file():
        raise HfEsmError(f"{title}: there is no file {path}.")
    if path.suffix == ".safetensors":
        return load_samples(path)
    if not path.stat().st_size:
        raise HfEsmError(f"{title}: {path} is empty.")
    if path.suffix not in kinds:
        raise HfEsmError(f"{title}: {path} is none of {', '.join(kinds)} or .safetensors.")
    return _load({"split": "train", **arguments, "path": kinds[path.suffix], "data_files": str(path)}, title)


def _load(arguments: dict[str, Any], title: str) -> Any:
    """What `datasets.load_dataset` gives."""
    try:
        return load_dataset(**arguments)
    except (DatasetsError, ValueError, TypeError, OSError, StopIteration) as error:
        what = arguments.get("data_files") or arguments["path"]
        why = " ".join(str(error.__cause__ or error).split()) or "it is empty"
        raise HfEsmError(f"{title}: {what} cannot be read: {why}") from None


def _split_batches(loader: DataLoader, count: int, title: str) -> Iterator[Any]:
    """The samples of a loader's batches, as many as are wanted."""
    rows = chain.from_iterable(_split(batch, title) for batch in loader)
    return islice(rows, count or None)


def _split(batch: Any, title: str) -> Iterable[Any]:
    """The samples of one batch: columns by name, strings, pairs of strings as PyTorch collates them, or tensors of
    which the first are the inputs.
    """
    if isinstance(batch, Mapping):
        return [dict(zip(batch, values)) for values in zip(*batch.values())]
    if isinstance(batch, (list, tuple)) and all(isinstance(entry, str) for entry in batch):
        return batch
    if isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(part, tuple) for part in batch):
        return zip(*batch)
    first = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if isinstance(first, Tensor) and first.dim() == 4 and first.is_floating_point():
        return [{"pixel_values": row} for row in first]
    if isinstance(first, Tensor) and first.dim() == 2 and not first.is_floating_point():
        return [{"input_ids": row} for row in first]
    raise HfEsmError(f"{title}: batches of a DataLoader must hold model inputs by name, texts, or inputs and labels.")


def save_samples(samples: list[Sample], path: Path) -> None:
    """Write encoded samples, so that a recipe can repeat the calibration exactly."""
    tensors = {f"{i}.{name}": value.contiguous() for i, sample in enumerate(samples) for name, value in sample.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": FORMAT, "version": str(FORMAT_VERSION)})


def is_samples_file(path: Path) -> bool:
    """Whether a safetensors file was written by `save_samples`."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def load_samples(path: Path) -> list[Sample]:
    """What `save_samples` wrote."""
    samples: dict[int, Sample] = {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT or metadata.get("version") != str(FORMAT_VERSION):
            raise HfEsmError(f"{path}: neither statistics nor proxies that this hf_esm can read.")
        for key in file.keys():
            index, _, name = key.partition(".")
            samples.setdefault(int(index), {})[name] = file.get_tensor(key)
    return [samples[i] for i in sorted(samples)]
