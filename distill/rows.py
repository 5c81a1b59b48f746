"""Rows of a dataset, one at a time: from the Hub, a folder, or a file (jsonl, json, csv, parquet, gz of these).

`problems.py` makes problems of them. What cannot be read is an error that names the file and the line; whether a row
can be used is not decided here.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

Row = Mapping[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
BATCH = 256  # rows of a parquet file in memory
_SHARD = re.compile(r"-\d+-of-\d+$")

csv.field_size_limit(1 << 24)


def read_rows(dataset: str, config: str | None, split: str | None, revision: str | None) -> Iterator[Row]:
    """The rows of a file or folder of that name, else of the Hub's dataset, in their order.

    FileNotFoundError, ConnectionError (the Hub, or no such id there), ValueError (which split is meant; what is no
    row), each naming what was looked for.
    """
    path = Path(dataset)
    if path.is_dir():
        yield from _folder_rows(path, config, split)
    elif path.is_file():
        for name, value in (("config", config), ("split", split), ("revision", revision)):
            if value is not None:
                raise ValueError(f"{name}={value!r} is for the Hub or a folder, and {path} is one file; leave it out")
        yield from file_rows(path)
    elif path.is_absolute() or dataset.startswith("~") or _suffix(path) in SUFFIXES:
        raise FileNotFoundError(f"there is no {dataset}")
    else:
        yield from _hub_rows(dataset, config, split, revision)


def _hub_rows(dataset: str, config: str | None, split: str | None, revision: str | None) -> Iterator[Row]:
    import datasets  # slow to import, and not needed for files

    try:
        found = datasets.load_dataset(dataset, config, split=split, revision=revision)
    except (OSError, ValueError) as error:  # no network, no such id, config or split: all of datasets' are among these
        raise ConnectionError(
            f"cannot read {dataset} from the Hub ({type(error).__name__}: {error}); with no network, name a folder or "
            "a file that is here"
        ) from error
    yield from _one_split(found, dataset, split)


def _one_split(found: Any, dataset: str, split: str | None) -> Iterator[Row]:
    """The rows of a Dataset, or of that split of a DatasetDict; they are read from disk as they are asked for."""
    if isinstance(found, Mapping):
        names = list(found)
        name = names[0] if split is None and len(names) == 1 else split
        if name not in found:
            raise ValueError(f"{dataset} has the splits {', '.join(names)}; say which with split")
        found = found[name]
    yield from found


def _folder_rows(folder: Path, config: str | None, split: str | None) -> Iterator[Row]:
    if config is not None:
        folder = folder / config
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}, which config={config!r} names")
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():  # `Dataset.save_to_disk`
        import datasets

        yield from _one_split(datasets.load_from_disk(str(folder)), str(folder), split)
        return
    files = sorted(one for one in folder.rglob("*") if one.is_file() and _suffix(one) in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{folder} holds no file of rows ({', '.join(SUFFIXES)}, or .gz of these)")
    names = sorted({_split_name(one) for one in files})
    if split is not None:
        files = [one for one in files if _is_of(one.relative_to(folder), split)]
    if not files or (split is None and len(names) > 1):
        raise ValueError(
            f"{folder} holds {', '.join(names)}, "
            + ("and which of them is meant is not said; name one with split" if split is None else f"and no {split}")
        )
    for file in files:
        yield from file_rows(file)


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _split_name(path: Path) -> str:
    """`data/train-00000-of-00002.parquet` -> `train`"""
    return _SHARD.sub("", path.name.removesuffix(".gz").removesuffix(_suffix(path)))


def _is_of(path: Path, split: str) -> bool:
    name = _split_name(path)
    return name == split or name.startswith((f"{split}-", f"{split}.")) or split in path.parts[:-1]


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of one file. ValueError, naming the file and the line, for what is no row; for a file without any."""
    suffix, empty = _suffix(path), True
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: rows are read from {', '.join(SUFFIXES)}, and from .gz of these")
    try:
        for row in _parquet_rows(path) if suffix == ".parquet" else _text_rows(path, suffix):
            empty = False
            yield row
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if empty:
        raise ValueError(f"{path} is empty: there is no row in it")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file that can be read: {error}") from error


def _text_rows(path: Path, suffix: str) -> Iterator[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="" if suffix == ".csv" else "\n") as file:
        if suffix == ".csv":
            yield from _csv_rows(path, file)
        elif suffix == ".json" and _begins_with_bracket(file):
            yield from _json_list(path, file)
        else:
            yield from _json_lines(path, file)


def _begins_with_bracket(file: TextIO) -> bool:
    """Whether a .json file holds a list; many hold a row a line."""
    while (character := file.read(1)).isspace():
        pass
    file.seek(0)
    return character == "["


def _json_list(path: Path, file: TextIO) -> Iterator[Row]:
    try:
        values = json.load(file)  # the whole of it: for many rows, a line each is the better form
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    for number, value in enumerate(values):
        yield _object(value, f"{path}, row {number}")


def _json_lines(path: Path, file: TextIO) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        yield _object(value, f"{path}, line {number}")


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {type(value).__name__}, not an object of columns")
    return value


def _csv_rows(path: Path, file: TextIO) -> Iterator[Row]:
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num} has more cells than the header has columns")
            yield row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV: {error}") from None
