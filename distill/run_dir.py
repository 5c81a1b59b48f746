"""The folder of a run: tables of records in parquet, and the manifest that says which stage is done, on what.

    RUN/recipe.json            the recipe as resolved, with versions and commit
    RUN/manifest.json          for each finished stage: fingerprint, counts, seconds, hashes of what it wrote
    RUN/problems.parquet       Problem rows; decisions/problems.parquet and decisions/prompts.parquet judge them
    RUN/samples.sqlite         every completion of teacher and judge, by the content of what was asked
    RUN/traces.parquet         Trace rows; decisions/{traces,filter,dedup,decontaminate,mix}.parquet judge them
    RUN/dataset/               train.parquet and its card, README.md
    RUN/students/NAME/         labels.json, training/ (checkpoints, log), model/ (Hub layout)
    RUN/eval/NAME/             a run of `eval` for teacher, base and each student
    RUN/report.{json,md,html}

A file appears whole or not at all: it is written beside its place and renamed.
"""

import hashlib
import json
import os
import shutil
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from distill.records import Decision
from eval.sample import Record

R = TypeVar("R", bound=Record)
ROWS_PER_GROUP = 2048  # rows in memory at a time


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` (a file or a folder) when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    _remove(part)
    try:
        yield part
    except BaseException:
        _remove(part)
        raise
    if path.is_dir():
        _remove(path)
    os.replace(part, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# Tables. Columns are the fields of the record; tuples are lists of strings, mappings are JSON text.


@cache
def schema(record: type[Record]) -> Any:
    """The pyarrow schema of a frozen dataclass of str, int, float, bool, tuples of str, mappings and optional ones."""
    import pyarrow

    hints = typing.get_type_hints(record)
    return pyarrow.schema([(one.name, _arrow_type(hints[one.name])) for one in fields(record)])  # type: ignore[arg-type]


def _arrow_type(hint: Any) -> Any:
    import pyarrow

    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = (one for one in arguments if one is not type(None))
        return _arrow_type(hint)
    if origin is tuple:
        return pyarrow.list_(_arrow_type(arguments[0]))
    if origin is typing.Literal:
        return pyarrow.string()
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return pyarrow.string()
    return {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}[hint]


def write_table(path: Path, record: type[R], rows: Iterable[R]) -> int:
    """Writes the rows as they come, `ROWS_PER_GROUP` in memory at a time; returns their number."""
    count, rows = 0, iter(rows)
    with _writer(path, record) as write:
        while chunk := list(islice(rows, ROWS_PER_GROUP)):
            write(chunk)
            count += len(chunk)
    return count


def write_judged(path: Path, record: type[R], decisions: Path, rows: Iterable[tuple[R, Decision]]) -> int:
    """`write_table` of rows and of what was decided on them, side by side."""
    count, rows = 0, iter(rows)
    with _writer(path, record) as write_rows, _writer(decisions, Decision) as write_decisions:
        while chunk := list(islice(rows, ROWS_PER_GROUP)):
            write_rows([row for row, _ in chunk])
            write_decisions([decision for _, decision in chunk])
            count += len(chunk)
    return count


@contextmanager
def _writer(path: Path, record: type[R]) -> Iterator[Callable[[Sequence[Record]], None]]:
    import pyarrow
    import pyarrow.parquet

    columns = schema(record)  # type: ignore[arg-type]  # a class can be hashed
    with replacing(path) as part, pyarrow.parquet.ParquetWriter(part, columns, compression="zstd") as writer:
        yield lambda chunk: writer.write_table(pyarrow.Table.from_pylist([_to_row(row) for row in chunk], columns))


def _to_row(row: Record) -> dict[str, Any]:
    values = {one.name: getattr(row, one.name) for one in fields(row)}  # type: ignore[arg-type]  # every Record is one
    return {
        name: json.dumps(value, ensure_ascii=False, sort_keys=True) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }


def read_table(path: Path, record: type[R]) -> Iterator[R]:
    """The rows of `write_table`, `ROWS_PER_GROUP` in memory at a time."""
    import pyarrow.parquet

    hints = typing.get_type_hints(record)
    mappings = {name for name, hint in hints.items() if _is_mapping(hint)}
    tuples = {name for name, hint in hints.items() if typing.get_origin(hint) is tuple}
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_PER_GROUP):
            for values in batch.to_pylist():
                for name in mappings:
                    values[name] = json.loads(values[name])
                for name in tuples:
                    values[name] = tuple(values[name])
                yield record(**values)


def _is_mapping(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def table_rows(path: Path) -> int:
    """The number of rows, from the file's footer."""
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(path).num_rows)


# Fingerprints.


def fingerprint(*parts: Any) -> str:
    """16 hex digits over JSON values: equal where a stage would do the same work again."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def content_hash(path: Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files (not those that begin with a dot)."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    for file in files:
        if file.name.startswith("."):
            continue
        digest.update(str(file.relative_to(path.parent)).encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def fresh_folder(path: Path, fingerprint: str) -> Path:
    """A folder of work in progress, emptied where it is that of other work: its fingerprint stands in it."""
    mark = path / "fingerprint"
    if not mark.exists() or mark.read_text() != fingerprint:
        _remove(path)
        path.mkdir(parents=True)
        mark.write_text(fingerprint)
    return path


@dataclass(frozen=True, slots=True)
class Done(Record):
    """A finished stage. `counts` is what its line of the report shows ("in", "kept", one number a reason, tokens, ...);
    `incomplete` says in words what is missing ("" where nothing is): a budget that ended, faults that are left."""

    stage: str
    fingerprint: str
    seconds: float
    outputs: Mapping[str, str]
    counts: Mapping[str, Any] = field(default_factory=dict)
    incomplete: str = ""


class RunDir:
    """Paths and manifest of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def decisions(self, stage: str) -> Path:
        return self.path / "decisions" / f"{stage}.parquet"

    def manifest(self) -> dict[str, Done]:
        """The finished stages by name, in the order in which they finished; {} for a new run."""
        file = self.path / "manifest.json"
        if not file.exists():
            return {}
        return {values["stage"]: Done(**values) for values in read_json(file)["stages"]}

    def is_done(self, stage: str, fingerprint: str) -> Done | None:
        """The stage's entry if it finished on just this input and what it wrote is still there."""
        done = self.manifest().get(stage)
        if done is None or done.fingerprint != fingerprint or done.incomplete:
            return None
        return done if all((self.path / name).exists() for name in done.outputs) else None

    def finish(self, done: Done) -> None:
        stages = {**self.manifest()}
        stages.pop(done.stage, None)
        stages[done.stage] = done
        write_json(self.path / "manifest.json", {"stages": [asdict(one) for one in stages.values()]})

    def rows(self, table: str, record: type[R], *stages: str) -> Iterator[R]:
        """The rows of a table that every one of `stages` kept. Each stage decided on what the one before it had kept,
        in the order of the table."""
        rows: Iterable[R] = read_table(self.path / table, record)
        for stage in stages:
            rows = self._kept_by(stage, rows)
        yield from rows

    def _kept_by(self, stage: str, rows: Iterable[R]) -> Iterator[R]:
        for row, decision in zip(rows, read_table(self.decisions(stage), Decision), strict=True):
            if row.id != decision.id:  # type: ignore[attr-defined]  # what has decisions has an id
                raise ValueError(
                    f"{self.decisions(stage)} decides on {decision.id} where {row.id} stands: the tables are of "  # type: ignore[attr-defined]
                    "different runs; remove the folder, or that file, and run again"
                )
            if not decision.reason:
                yield row
