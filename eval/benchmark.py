"""What a benchmark is, and how its rows are read: from the Hub, or from files in the layout their authors gave them.

Each benchmark is a file of its own beside this one, with a `Source`, templates, `to_sample` and `grade`;
`tasks.TASKS` lists them. Rows are checked before anything is asked: a changed file or a lost row is an error, since a
score on other questions is not the score that was published.
"""

import csv
import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from eval.sample import Graded, Sample

Row = Mapping[str, Any]
Template = Callable[[Sample, Sequence[Sample]], str]

csv.field_size_limit(1 << 24)


@dataclass(frozen=True)
class Source:
    """Where rows come from and what they must be.

    On the Hub: `hub` (dataset id), `config` (several are read one after the other; each row then has its own as
    `_config`), `split`, `revision`. Locally: `file`, a path inside a data folder, as in
    `gsm8k/test.jsonl`; of an archive or a folder, the `members` to read (a glob; each row then has the member's name
    as `_file`). `columns` names those of a CSV without header. `sha256` is the file's; "" where none is known. `rows`
    is the number that must be there. `requires` are the columns without which a row cannot be used. `expand` makes the
    rows of what stands in a file, where the authors nested them. A source that `generate`s its rows has no other.
    """

    hub: str
    split: str
    file: str
    rows: int
    config: str | tuple[str, ...] | None = None
    revision: str = "main"
    members: str = ""
    columns: tuple[str, ...] = ()
    sha256: str = ""
    requires: tuple[str, ...] = ()
    expand: Callable[[Row], Iterable[Row]] | None = None
    generate: Callable[[], Iterable[Row]] | None = None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its rows, its prompts, its grader.

    `prompts` holds the templates by name (`simple_evals`, `boxed`, `few_shot`, ...); a protocol names the one it uses.
    `grade(sample, answer, chain)` judges the text of the answer, the thought removed; `chain` names the extraction,
    which is part of a protocol. `confidential` texts never stand in plain text in a log or a page.
    """

    name: str
    title: str
    source: Source
    licence: str
    citation: str
    kind: Literal["math", "choice", "text"]
    to_sample: Callable[[Row, int], Sample]
    prompts: Mapping[str, Template]
    grade: Callable[[Sample, str, str], Graded]
    grader: str
    exemplars: Source | None = None  # rows for the few-shot prompt
    fixed_exemplars: tuple[Sample, ...] = ()  # or the ones that a paper prints
    chains: tuple[str, ...] = ("default",)  # the extractions that `grade` knows
    stop: tuple[str, ...] = ()  # ends a few-shot completion
    confidential: bool = False
    chance: float = 0.0  # the score of guessing


def load(benchmark: Benchmark, data: Path | Mapping[str, Path] | None = None, *, changed: bool = False) -> list[Sample]:
    """All questions of a benchmark, in the order of its source.

    `data` is a folder that holds the source's file (or a mapping of task name to file or folder); None reads from the
    Hub. With `changed`, another hash or row count than the published one is accepted.
    Raises FileNotFoundError and ValueError, naming the file, the value found and the one expected.
    """
    path = None if benchmark.source.generate else _path_for(benchmark.name, data)
    rows = read_rows(benchmark.source, path, changed=changed)
    samples = [benchmark.to_sample(row, index) for index, row in enumerate(rows)]
    ids = {sample.id for sample in samples}
    if len(ids) != len(samples):
        raise ValueError(f"{benchmark.name}: {len(samples) - len(ids)} of {len(samples)} ids stand twice")
    return samples


def exemplars(benchmark: Benchmark, sample: Sample, pool: Sequence[Sample], shots: int) -> tuple[Sample, ...]:
    """The first `shots` worked examples for a question: the printed ones, else those of its own group in `pool`."""
    candidates: Sequence[Sample] = benchmark.fixed_exemplars or [
        one for one in pool if not one.group or not sample.group or one.group == sample.group
    ]
    if len(candidates) < shots:
        raise ValueError(
            f"{benchmark.name} has {len(candidates)} worked examples for {sample.group or 'its questions'}, and the "
            f"protocol asks for shots={shots}; ask for at most {len(candidates)}"
        )
    return tuple(candidates[:shots])


def duplicates(samples: Sequence[Sample]) -> list[tuple[str, ...]]:
    """The ids of each question that stands more than once with the same choices. Published sets have some, and they
    stay in: without them a score would be on another set."""
    places: dict[tuple[Any, ...], list[str]] = {}
    for one in samples:
        places.setdefault((one.question, one.choices, one.meta.get("passage")), []).append(one.id)
    return [tuple(ids) for ids in places.values() if len(ids) > 1]


def dataset_hash(samples: Sequence[Sample]) -> str:
    """sha256 of all that is asked and graded, independent of the order: equal hashes are equal questions."""
    lines = sorted(sample.to_json() for sample in samples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _path_for(name: str, data: Path | Mapping[str, Path] | None) -> Path | None:
    if not isinstance(data, Mapping):
        return data
    if name not in data:
        raise ValueError(f"no data is named for the task {name}; named are {', '.join(sorted(data))}: add {name}=PATH")
    return data[name]


def read_rows(source: Source, data: Path | None, *, changed: bool = False) -> list[Row]:
    """The rows of a source, checked. `data` is the folder above `source.file`, or the file or folder itself."""
    if source.generate:
        rows, where = list(source.generate()), source.hub
    elif data is None:
        rows, where = list(_hub_rows(source)), f"{source.hub} ({source.split}, revision {source.revision})"
    else:
        path = _local_path(source, Path(data))
        if path.is_file() and source.sha256 and not changed:
            _check_hash(path, source.sha256)
        rows, where = list(_file_rows(path, source)), str(path)
    for column in source.requires:
        for number, row in enumerate(rows):
            if row.get(column) is None:
                raise ValueError(
                    f"{where}: row {number} has no column {column!r}; it has {', '.join(map(str, row))}. "
                    "Give the file in its original layout"
                )
    if len(rows) != source.rows and not changed:
        raise ValueError(
            f"{where} has {len(rows)} rows, and the published set has {source.rows}; get the original, or accept "
            "other rows with --changed-data (the report will say so)"
        )
    return rows


def _local_path(source: Source, data: Path) -> Path:
    if data.is_file():
        return data
    for path in (data / source.file, (data / source.file).with_suffix("")):  # an archive may have been unpacked
        if path.exists():
            return path
    if data.is_dir() and source.members and any(True for _ in _folder_members(data, source.members)):
        return data
    raise FileNotFoundError(
        f"there is no {source.file} under {data}; put the file there in its original layout, or leave out the data "
        f"folder to read {source.hub} from the Hub"
    )


def _check_hash(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise ValueError(
            f"{path} has sha256 {found[:16]}..., and the published file {expected[:16]}...: its questions may be "
            "others; get the original, or accept it with --changed-data (the report will say so)"
        )


def _hub_rows(source: Source) -> Iterator[Row]:
    import datasets  # slow to import, and not needed for local files

    several = isinstance(source.config, tuple)
    try:
        parts = {
            config: datasets.load_dataset(source.hub, config, split=source.split, revision=source.revision)
            for config in (source.config if isinstance(source.config, tuple) else (source.config,))
        }
    except (
        OSError,
        ValueError,
    ) as error:  # no network, no such id: both subclasses of these in datasets and its client
        raise ConnectionError(
            f"cannot read {source.hub} from the Hub ({type(error).__name__}: {error}); with no network, name a folder "
            f"that holds {source.file}"
        ) from error
    for config, rows in parts.items():
        yield from ({**row, "_config": config} for row in rows) if several else rows


def _file_rows(path: Path, source: Source) -> Iterator[Row]:
    """Rows of one file, or of the members of an archive or folder in the order of their names."""
    if path.is_dir():
        for member in sorted(_folder_members(path, source.members)):
            yield from _parse(member.read_bytes(), member.name, source, member.relative_to(path).as_posix())
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(one for one in archive.namelist() if _is_member(one, source.members)):
                yield from _parse(archive.read(name), PurePosixPath(name).name, source, name)
    else:
        yield from _parse(path.read_bytes(), path.name, source, "")


def _folder_members(folder: Path, members: str) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and _is_member(path.relative_to(folder).as_posix(), members):
            yield path


def _is_member(name: str, members: str) -> bool:
    """A member matches from the end of its path, since an archive may have a folder on top that its copy lacks."""
    parts, pattern = name.split("/"), members.split("/")
    return len(parts) >= len(pattern) and fnmatch("/".join(parts[-len(pattern) :]), members)


def _parse(content: bytes, name: str, source: Source, member: str) -> Iterator[Row]:
    extra = {"_file": member} if member else {}
    if name.endswith(".gz"):
        content, name = gzip.decompress(content), name[: -len(".gz")]
    suffix = PurePosixPath(name).suffix
    if suffix == ".parquet":
        import pyarrow.parquet  # comes with datasets

        yield from ({**row, **extra} for row in pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist())
        return
    text = content.decode("utf-8-sig")
    if suffix in (".jsonl", ".txt"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield {**json.loads(line), **extra}
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name}, line {number} is not JSON: {error}") from None
    elif suffix == ".json":
        values = json.loads(text)
        for row in values if isinstance(values, list) else [values]:
            yield from ({**one, **extra} for one in (source.expand(row) if source.expand else [row]))
    elif suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), fieldnames=source.columns or None)
        yield from ({**row, **extra} for row in reader)
    else:
        raise ValueError(f"{name}: rows are read from jsonl, json, csv, parquet, gz of these, zip and folders")
