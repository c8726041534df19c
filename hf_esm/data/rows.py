"""Rows of whatever users call data: files, lists, columns, data sets, loaders and data frames."""

import codecs
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets.config
import pandas as pd
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import HfEsmError
from ..utils import check_path, did_you_mean
from .options import SampleOptions
from .samples import load_samples


# Whatever users call data; `read_rows` lists the kinds. Data sets, loaders and data frames are iterable.
DataSpec = str | os.PathLike | Mapping[str, Any] | Iterable[Any]

# Keys of mappings that name data, which are no columns.
_KEYS = ("path", "statistics", "samples")

# The builder of `datasets` for each kind of file.
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read_rows(data: DataSpec, title: str, options: SampleOptions) -> list[Any]:
    """Return `options.num_samples` rows of `data`, chosen at random with `options.seed`; of a stream, the first ones.

    Args:
        data: a sequence, a `datasets.Dataset`, a `DataLoader`, a DataFrame of pandas, a mapping of columns, the path
            of a data file (JSON lines, JSON, CSV, Parquet, text) or of saved samples, or `{"path": …, "name": …,
            "split": …}` for `datasets.load_dataset`. The key `"columns"` of the latter names columns of this data
            alone, as `options.columns` names those of all data.
        title: name of the data in messages.
        options: how many rows are chosen, and how.

    Raises:
        HfEsmError: if the data cannot be read, or has no rows.
    """
    columns: Mapping[str, str] = {}
    check_path(data.get("path") if isinstance(data, Mapping) else data, title)
    if isinstance(data, (str, os.PathLike)):
        data = _read_file(Path(data).expanduser(), title)
    elif isinstance(data, Mapping) and isinstance(data.get("path"), (str, os.PathLike)):
        columns = data.get("columns", {})
        replace(options, columns=columns)  # raises for unknown names
        data = _load_named({name: value for name, value in data.items() if name != "columns"}, title)
    try:
        rows = _choose(_as_rows(data, title, options.num_samples), title, options)
    except ImportError as error:  # `datasets` decodes images and sound with libraries that it does not install
        raise HfEsmError(f"{title}: {' '.join(str(error).split())}") from None
    if not columns:
        return rows
    return [_rename(row, columns, f"{title}: row {i}", options) for i, row in enumerate(rows)]


def read_first_row(data: DataSpec, title: str, options: SampleOptions) -> Any:
    """Return the first row of a data file without reading the others, or any row of other data; see `read_rows`."""
    named = dict(data) if isinstance(data, Mapping) else {"path": data}
    path = named.get("path")
    check_path(path if isinstance(data, Mapping) else data, title)
    if isinstance(path, (str, os.PathLike)):
        file = Path(path).expanduser()
        if file.is_file() and file.suffix in _BUILDERS and "split" not in named:
            data = {**named, "path": str(path), "streaming": True}
    return read_rows(data, title, replace(options, num_samples=1))[0]


def _load_named(arguments: dict[str, Any], title: str) -> Any:
    """Load `{"path": …, …}`: a data file, or whatever else `datasets.load_dataset` takes."""
    arguments = {"split": "train", **arguments}
    path = Path(arguments.pop("path")).expanduser()
    if not path.is_file():
        return _load({"path": str(path), **arguments}, title)
    for unread in arguments.keys() & {"name", "revision"}:
        raise HfEsmError(f"{title}: a file has no {unread}. Leave {unread!r} out.")
    return _read_file(path, title, **arguments)


def _read_file(path: Path, title: str, **arguments: Any) -> Any:
    if not path.is_file():
        raise HfEsmError(f"{title}: there is no file {path}.")
    if path.suffix == ".safetensors":
        return load_samples(path)
    if not path.stat().st_size:
        raise HfEsmError(f"{title}: {path} is empty.")
    if path.suffix not in _BUILDERS:
        raise HfEsmError(f"{title}: {path} is none of {', '.join(_BUILDERS)} or .safetensors.")
    if _BUILDERS[path.suffix] == "json" and (place := _null_row(path)):
        raise HfEsmError(f"{title}: {path}: {place} is null, not a row. Remove it.")
    return _load({"split": "train", **arguments, "path": _BUILDERS[path.suffix], "data_files": str(path)}, title)


def _null_row(path: Path) -> str:
    """Say where a file of JSON has null in the place of a row, at which pyarrow 26 ends the process; else nothing."""
    lines_of_json = None  # not known yet
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8).strip()
            if text.startswith(b"null") and lines_of_json is not False:
                return f"line {number}"
            if text and lines_of_json is None:
                lines_of_json = not text.startswith(b"[") and _is_json(text)
    if lines_of_json:
        return ""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    rows = json.loads(content) if b"null" in content and _is_json(content) else []
    return f"entry {rows.index(None) + 1}" if isinstance(rows, list) and None in rows else ""


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _load(arguments: dict[str, Any], title: str) -> Any:
    """Call `datasets.load_dataset`; its errors name the data."""
    try:
        data = load_dataset(**arguments)
        if isinstance(data, IterableDataset):
            next(iter(data), None)  # of which the file is read only now
        return data
    except Exception as error:  # of `datasets`, and of the library that reads this kind of file
        name = arguments.get("data_files") or arguments["path"]
        reason = " ".join(str(error.__cause__ or error).split()) or "it is empty"
        known = ["columns", *signature(load_dataset).parameters]
        for key in arguments.keys() - known:
            if f"'{key}'" in reason:  # neither `datasets` nor its builder has it
                raise HfEsmError(f"{title}: there is no key {key!r} for {name}{did_you_mean(key, known)}.") from None
        place = error.filename if isinstance(error, OSError) else None
        if place and Path(datasets.config.HF_DATASETS_CACHE).is_relative_to(place):
            raise HfEsmError(
                f"{title}: `datasets` cannot make its cache in {place} ({error.strerror}). Set the environment "
                "variable HF_DATASETS_CACHE to a folder that can be written."
            ) from None
        raise HfEsmError(f"{title}: {name} cannot be read: {reason}") from None


def _as_rows(data: Any, title: str, count: int) -> Sequence[Any] | Dataset:
    """Return all rows of opened data, or the first `count` of a stream (0: all)."""
    if isinstance(data, pd.DataFrame):
        return data.astype(object).where(data.notna(), None).to_dict("records")
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        raise HfEsmError(f"{title}: these are several splits ({', '.join(map(str, data))}). Give one of them.")
    if isinstance(data, Mapping):
        return _rows_of_columns(data, title)
    if isinstance(data, DataLoader):
        return list(_rows_of_batches(data, count, title))
    if isinstance(data, IterableDataset):
        return list(data.take(count) if count else data)
    if isinstance(data, (Sequence, Dataset)):
        return data
    return list(data) if isinstance(data, Iterable) else [data]


def _rows_of_columns(data: Mapping[str, Any], title: str) -> list[dict[str, Any]]:
    if single := [name for name, column in data.items() if isinstance(column, str)]:
        meant = did_you_mean(single[0], _KEYS)
        raise HfEsmError(
            f"{title}: '{single[0]}'{meant} is one text, not a column of texts. Give a list of rows: [{{…}}]."
        )
    length = len(next(iter(data.values()), ()))
    for name, column in data.items():
        if not hasattr(column, "__len__") or len(column) != length:
            raise HfEsmError(f"{title}: the column {name!r} is not as long as {next(iter(data))!r}.")
    return [{name: column[i] for name, column in data.items()} for i in range(length)]


def _rows_of_batches(loader: DataLoader, count: int, title: str) -> Iterator[Any]:
    """Yield the first `count` samples of a loader's batches (0: all)."""
    rows = chain.from_iterable(_split_batch(batch, title) for batch in loader)
    return islice(rows, count or None)


def _split_batch(batch: Any, title: str) -> Iterable[Any]:
    """Return the samples of one batch: columns by name, strings, pairs of strings as PyTorch collates them, or
    tensors, of which the first holds the inputs.
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


def _choose(rows: Sequence[Any] | Dataset, title: str, options: SampleOptions) -> list[Any]:
    """Choose `num_samples` rows at random, in their order."""
    if not len(rows):
        raise HfEsmError(f"{title}: no samples.")
    chosen = range(len(rows))
    if options.num_samples and len(rows) > options.num_samples:
        chosen = sorted(random.Random(options.seed).sample(chosen, options.num_samples))
    return [rows[i] for i in chosen]


def _rename(row: Any, columns: Mapping[str, str], title: str, options: SampleOptions) -> dict[str, Any]:
    """Rename the columns that this data names itself to the names that `options.columns` gives for all data."""
    if missing := [column for column in columns.values() if not isinstance(row, Mapping) or column not in row]:
        present = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise HfEsmError(f"{title} has no column {missing[0]!r}; it has {present}.")
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return rest | {options.columns.get(name, name): row[column] for name, column in columns.items()}
