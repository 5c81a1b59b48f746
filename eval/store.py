"""Samples by the content of what was asked, in one SQLite file: killed anywhere, the next run asks what is missing.

The key is the sha256 of the sampler's identity and of the request, so a changed parameter finds nothing old, another k
finds all that is there, and two tasks that ask the same share the answer.

- Every `put` is a transaction of its own in the write-ahead log. After SIGKILL at any moment the file is whole and
  holds every completion whose `put` returned: lost are those in flight. After a power cut the last puts may be missing
  too (the log is not flushed for each), and nothing else.
- One writer, any number of readers at the same time, in any process. A second writer is refused.
- A stored sample is never overwritten; a failed one is replaced when it is asked again.
- A file that is not ours, or damaged, is an error, and is left as it is.
- There is no clock in it: the same samples read back the same.

Put it on a local disk: the log needs memory that all its processes share, which network file systems do not give.
"""

import errno
import fcntl
import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from eval.sample import Completion
from eval.samplers import Request

APPLICATION_ID = 0x44534556  # "DSEV" in the header of the file
VERSION = 1
CHUNK = 500  # keys to a query, below SQLite's oldest limit on parameters

_SCHEMA = """
CREATE TABLE samples (
    key BLOB PRIMARY KEY,
    failed INTEGER NOT NULL,
    completion BLOB NOT NULL,
    context BLOB NOT NULL
);
CREATE INDEX failed ON samples (key) WHERE failed;
"""

_open_writers: set[str] = set()  # a process does not exclude itself by a record lock


def key(identity: Mapping[str, Any], request: Request) -> str:
    """sha256, in hex, of the canonical JSON of all that a sample depends on: `request.tag` is not in it."""
    prompt = request.prompt if isinstance(request.prompt, str) else [dict(message) for message in request.prompt]
    asked = {
        "prompt": prompt,
        "seed": int(request.seed),
        "max_tokens": int(request.max_tokens),
        "temperature": float(request.temperature),  # 1 and 1.0 are one temperature
        "top_p": float(request.top_p),
        "stop": list(request.stop),
        "choices": list(request.choices),
    }
    try:
        text = json.dumps([VERSION, identity, asked], sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the identity of a sampler must be JSON values, which can be compared: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Stored:
    """One row: the completion, and what its writer put beside it (what it was asked for, how to grade it)."""

    key: str
    completion: Completion
    context: dict[str, Any]


class Store:
    """The samples of a file, which is made if it is not there. Close it, or use it in a `with`.

    Raises, naming the file and the way out: ValueError (not a store, another version, damaged), BlockingIOError
    (another writer), FileNotFoundError (nothing to read), OSError (no room, from `put`; what is stored stays).
    """

    def __init__(self, path: str | Path, *, readonly: bool = False) -> None:
        self.path = Path(path)
        self.readonly = readonly
        self._lock: int | None = None
        self._lock_name = f"{self.path.resolve()}.lock"
        self._check_is_ours_or_new()
        if readonly:
            if not self.path.exists():
                raise FileNotFoundError(f"there is no store at {self.path}; run an evaluation first")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._only_writer()
        try:
            self._db = self._connect()
        except BaseException:
            self._release()
            raise

    def _check_is_ours_or_new(self) -> None:
        """Before SQLite touches it: it would take an empty file, and make a journal beside a foreign one."""
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder; name the file of a store")
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb") as file:
                if file.read(16) != b"SQLite format 3\0":
                    raise ValueError(f"{self.path} is not a store of samples, and is left as it is; name another file")

    def _only_writer(self) -> int:
        """A record lock on a file beside: the kernel drops it with the process, however that ends. Workers forked from
        the writer do not hold it, as they would an flock."""
        if self._lock_name in _open_writers:
            raise BlockingIOError(f"{self.path} is already open for writing in this process; close it, or share it")
        lock = os.open(self._lock_name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise BlockingIOError(
                f"process {holder or 'unknown'} is writing to {self.path}; wait for it or end it, or use another folder"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        _open_writers.add(self._lock_name)
        return lock

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            _open_writers.discard(self._lock_name)

    def _connect(self) -> sqlite3.Connection:
        mode = "ro" if self.readonly else "rwc"
        # Samplers read `missing` from threads of their own; SQLite is compiled to serialise, and each call is one
        # statement whose rows are fetched at once.
        with self._clear_errors():
            db = sqlite3.connect(
                f"{self.path.resolve().as_uri()}?mode={mode}",
                uri=True,
                timeout=60,
                isolation_level=None,
                check_same_thread=False,
            )
        try:
            with self._clear_errors():
                self._check_or_create(db)
        except BaseException:
            db.close()
            raise
        return db

    def _check_or_create(self, db: sqlite3.Connection) -> None:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        new = not (application or version or tables)  # also what a kill before the first transaction leaves
        if not new and application != APPLICATION_ID:
            raise ValueError(f"{self.path} is another program's database, and is left as it is; name another file")
        if not new and version != VERSION:
            raise ValueError(
                f"{self.path} has version {version} of the store, and this is version {VERSION}; use another folder, "
                "or the release that wrote it"
            )
        if self.readonly:
            if new:
                raise FileNotFoundError(f"the store at {self.path} is empty; run an evaluation first")
            return
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        if new:
            db.executescript(
                f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION};"
                f"{_SCHEMA} COMMIT;"
            )
        elif (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise ValueError(self._damaged(found))

    def _damaged(self, what: object) -> str:
        return f"{self.path} is damaged ({what}), and is left as it is; restore a copy, or move it away and ask again"

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            # The low byte is the class of the error: https://sqlite.org/rescode.html
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_FULL:
                raise OSError(
                    errno.ENOSPC,
                    f"no room to store a sample ({error}): free some and run again; what is stored stays",
                    str(self.path),
                ) from error
            if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise OSError(
                    errno.EIO, f"the store cannot be read or written ({error}); what is stored stays", str(self.path)
                ) from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise ValueError(self._damaged(error)) from error
            raise

    def close(self) -> None:
        self._db.close()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, key: str, completion: Completion, context: Mapping[str, Any] | None = None) -> None:
        """Stores a completion, for good when this returns. One that is there stays, unless it had failed."""
        failed = completion.finish_reason == "failed"
        row = (bytes.fromhex(key), failed, _pack(completion.to_json()), _pack(_canonical(context or {})))
        with self._clear_errors():
            self._db.execute(
                "INSERT INTO samples VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
                "failed = excluded.failed, completion = excluded.completion, context = excluded.context WHERE failed",
                row,
            )

    def set_context(self, key: str, context: Mapping[str, Any]) -> None:
        """Replaces what stands beside a completion (a question's gold answer was mended, say)."""
        with self._clear_errors():
            self._db.execute(
                "UPDATE samples SET context = ? WHERE key = ?", (_pack(_canonical(context)), bytes.fromhex(key))
            )

    def get(self, key: str) -> Stored | None:
        """One row, a failed one too; None where nothing was asked."""
        return next(self.get_many([key]))

    def get_many(self, keys: Iterable[str]) -> Iterator[Stored | None]:
        """A row, or None, for each key, in the order of the keys; read in chunks as it is consumed."""
        for chunk in _chunks(keys):
            rows = {row[0]: row for row in self._select("key, completion, context", chunk)}
            for one in chunk:
                row = rows.get(bytes.fromhex(one))
                yield self._unpacked(row) if row else None

    def present(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that have a completion which did not fail."""
        return {row[0].hex() for chunk in _chunks(keys) for row in self._select("key, failed", chunk) if not row[1]}

    def missing(self, keys: Iterable[str]) -> Iterator[str]:
        """Those that are still to be asked, in order: not there, or failed. Read in chunks as it is consumed."""
        for chunk in _chunks(keys):
            present = self.present(chunk)
            yield from (one for one in chunk if one not in present)

    def failed(self) -> Iterator[Stored]:
        """The failed ones, in the order of their keys."""
        return self._scan("failed AND ")

    def __iter__(self) -> Iterator[Stored]:
        """All rows in the order of their keys; bounded memory, and one may write meanwhile."""
        return self._scan("")

    def __len__(self) -> int:
        with self._clear_errors():
            return int(self._db.execute("SELECT count(*) FROM samples").fetchone()[0])

    def _select(self, columns: str, keys: Sequence[str]) -> list[Any]:
        marks = ",".join("?" * len(keys))
        with self._clear_errors():
            return self._db.execute(
                f"SELECT {columns} FROM samples WHERE key IN ({marks})", [bytes.fromhex(one) for one in keys]
            ).fetchall()

    def _scan(self, condition: str) -> Iterator[Stored]:
        last = b""
        while True:
            with self._clear_errors():
                rows = self._db.execute(
                    "SELECT key, completion, context FROM samples "
                    f"WHERE {condition} key > ? ORDER BY key LIMIT {CHUNK}",
                    (last,),
                ).fetchall()
            if not rows:
                return
            yield from map(self._unpacked, rows)
            last = rows[-1][0]

    def _unpacked(self, row: tuple[bytes, bytes, bytes]) -> Stored:
        key, completion, context = row
        try:
            return Stored(key.hex(), Completion.from_json(_unpack(completion)), json.loads(_unpack(context)))
        except (zlib.error, ValueError) as error:
            raise ValueError(self._damaged(f"sample {key.hex()[:16]}: {error}")) from error


def _chunks(keys: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(keys)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _pack(text: str) -> bytes:
    # An endpoint may send half of a surrogate pair, which plain UTF-8 refuses.
    return zlib.compress(text.encode("utf-8", "surrogatepass"))


def _unpack(packed: bytes) -> str:
    return zlib.decompress(packed).decode("utf-8", "surrogatepass")
