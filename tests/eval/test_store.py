"""The store under everything that may happen to it: kills, two writers, full disks, damaged and foreign files."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from eval.sample import Completion
from eval.samplers import Request
from eval.store import CHUNK, Store, key

IDENTITY = {"model": "deepseek-ai/DeepSeek-R1", "revision": "56d4cbb", "dtype": "bfloat16"}
REQUEST = Request(prompt="2 + 2 =", seed=1, max_tokens=8, temperature=0.6, top_p=0.95, stop=("\n",))


def numbered(number: int) -> str:
    return f"{number:064x}"


def run_python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],  # where the package is
    )


def test_the_key_is_the_hash_of_canonical_json() -> None:
    """Literal, by sha256sum of the line in the comment: a release that changes it would ask everything again."""
    # [1,{"a":1,"b":"é"},{"choices":[],"max_tokens":8,"prompt":"p","seed":3,"stop":["x"],"temperature":0.0,"top_p":1.0}]
    # with the é as \u00e9
    request = Request(prompt="p", seed=3, max_tokens=8, stop=("x",))
    assert key({"b": "é", "a": 1}, request) == "3a281bd44d74dbbf780ac0cd30b56390440b62505b5909ff3ced8e2674fbd7d3"


@pytest.mark.parametrize(
    "changed",
    [
        replace(REQUEST, prompt="2 + 2 = "),
        replace(REQUEST, prompt=({"role": "user", "content": "2 + 2 ="},)),
        replace(REQUEST, seed=2),
        replace(REQUEST, max_tokens=9),
        replace(REQUEST, temperature=0.7),
        replace(REQUEST, top_p=0.9),
        replace(REQUEST, stop=()),
        replace(REQUEST, choices=(" A", " B")),
    ],
    ids=["prompt", "messages", "seed", "max_tokens", "temperature", "top_p", "stop", "choices"],
)
def test_a_changed_parameter_is_another_key(changed: Request) -> None:
    assert key(IDENTITY, changed) != key(IDENTITY, REQUEST)


def test_what_says_nothing_about_the_sample_is_not_in_the_key() -> None:
    assert key(IDENTITY, replace(REQUEST, tag=object())) == key(IDENTITY, REQUEST)
    assert key(dict(reversed(IDENTITY.items())), REQUEST) == key(IDENTITY, REQUEST)
    assert key(IDENTITY, replace(REQUEST, temperature=1)) == key(IDENTITY, replace(REQUEST, temperature=1.0))
    assert key({**IDENTITY, "revision": "main"}, REQUEST) != key(IDENTITY, REQUEST)


@pytest.mark.parametrize("identity", [{"model": object()}, {"loss": float("nan")}])
def test_an_identity_that_cannot_be_compared_is_refused(identity: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be JSON values"):
        key(identity, REQUEST)


@pytest.mark.parametrize(
    "completion",
    [
        Completion("<think>né</think>\n\\boxed{4}", None, "length", 12, 400),
        Completion("", "thought apart", "stop"),
        Completion(finish_reason="failed", error="HTTP 500"),
        Completion(logprobs=(-0.1, -2.5e-300), choice_tokens=(1, 2)),
        Completion("half a pair: \ud83d, a null: \0"),
    ],
)
def test_what_goes_in_comes_out(tmp_path: Path, completion: Completion) -> None:
    context = {"id": "q1", "sample": {"question": "né\ud83d", "meta": {"x": [1, None, 0.5]}}}
    with Store(tmp_path / "s.sqlite") as store:
        store.put(numbered(1), completion, context)
    with Store(tmp_path / "s.sqlite", readonly=True) as store:
        found = store.get(numbered(1))
        assert found is not None
        assert (found.completion, found.context) == (completion, context)
        assert store.get(numbered(2)) is None
        assert len(store) == 1


def test_missing_are_those_not_there_and_those_that_failed(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite") as store:
        store.put(numbered(1), Completion("one"))
        store.put(numbered(2), Completion(finish_reason="failed", error="HTTP 503"))
        keys = [numbered(number) for number in (3, 2, 1, 0)]
        assert list(store.missing(keys)) == [numbered(3), numbered(2), numbered(0)]
        assert [one.key for one in store.failed()] == [numbered(2)]
        store.put(numbered(2), Completion(finish_reason="failed", error="HTTP 429"))
        assert [one.completion.error for one in store.failed()] == ["HTTP 429"]
        store.put(numbered(2), Completion("two"))
        assert list(store.failed()) == []
        assert list(store.missing(keys)) == [numbered(3), numbered(0)]


def test_what_is_stored_is_not_overwritten(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite") as store:
        store.put(numbered(1), Completion("first"), {"id": 1})
        store.put(numbered(1), Completion("second"), {"id": 2})
        store.put(numbered(1), Completion(finish_reason="failed", error="gone"))
        found = store.get(numbered(1))
        assert found is not None
        assert (found.completion.text, found.context) == ("first", {"id": 1})
        store.set_context(numbered(1), {"id": 3})
        found = store.get(numbered(1))
        assert found is not None
        assert (found.completion.text, found.context) == ("first", {"id": 3})


def test_more_keys_than_a_query_takes(tmp_path: Path) -> None:
    n = 2 * CHUNK + 7
    with Store(tmp_path / "s.sqlite") as store:
        for number in random.Random(0).sample(range(n), n):
            if number % 3:
                store.put(numbered(number), Completion(str(number)))
        keys = [numbered(number) for number in reversed(range(n))]
        assert list(store.missing(keys)) == [numbered(number) for number in reversed(range(n)) if number % 3 == 0]
        texts = [found and found.completion.text for found in store.get_many(keys)]
        assert texts == [str(number) if number % 3 else None for number in reversed(range(n))]
        assert [one.completion.text for one in store] == [str(number) for number in range(n) if number % 3]


def test_one_may_write_while_reading(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite") as store, Store(tmp_path / "s.sqlite", readonly=True) as reader:
        for number in range(CHUNK + 5):
            store.put(numbered(number), Completion(str(number)))
        seen = 0
        for one in store:
            store.put(numbered(10_000 + seen), Completion("later"))
            seen += 1
            if one.completion.text == "later":
                break
        assert seen == CHUNK + 6
        assert len(reader) == len(store)
        with pytest.raises(OSError, match="cannot be read or written"):
            reader.put(numbered(1), Completion("x"))


WRITER = """
import sys
from eval.sample import Completion
from eval.store import Store
store = Store(sys.argv[1])
start = len(store)
for number in range(start, 1_000_000):
    print(number, "begins", flush=True)
    store.put(f"{number:064x}", Completion(f"text {number} " * 50), {"id": number})
    print(number, "stored", flush=True)
"""


def test_after_a_kill_everything_is_there_whose_put_returned(tmp_path: Path) -> None:
    path, generator = tmp_path / "s.sqlite", random.Random(0)
    for _ in range(8):
        writer = run_python(WRITER, path)
        assert writer.stdout is not None
        writer.stdout.readline()  # it is writing
        time.sleep(generator.random() * 0.1)
        writer.send_signal(signal.SIGKILL)
        lines = writer.communicate()[0].splitlines(keepends=True)
        stored = [int(line.split()[0]) for line in lines if line.endswith("stored\n")]
        with Store(path) as store:  # the lock is free, the file is whole
            numbers = [one.context["id"] for one in store]
            assert numbers == list(range(len(numbers)))
            assert [one.completion.text for one in store] == [f"text {number} " * 50 for number in numbers]
            last = stored[-1] if stored else -1
            assert last < len(numbers)
            assert len(numbers) <= int(lines[-1].split()[0]) + 1 if lines else True
    assert len(numbers) > 100


@pytest.mark.parametrize("size", [0, "header"])
def test_a_file_whose_making_was_killed_is_new(tmp_path: Path, size: object) -> None:
    path = tmp_path / "s.sqlite"
    path.touch()
    if size == "header":  # journal_mode is written before the first transaction
        database = sqlite3.connect(path)
        database.execute("PRAGMA journal_mode = WAL")
        database.close()
    with pytest.raises(FileNotFoundError, match="run an evaluation first"):
        Store(path, readonly=True)
    with Store(path) as store:
        store.put(numbered(1), Completion("x"))
        assert len(store) == 1


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        store.put(numbered(1), Completion("x"))
        with pytest.raises(BlockingIOError, match="already open for writing in this process"):
            Store(path)
        (tmp_path / "link.sqlite").symlink_to(path)
        with pytest.raises(BlockingIOError, match="already open"):
            Store(tmp_path / "link.sqlite")
        other = run_python("import sys; from eval.store import Store; Store(sys.argv[1])", path)
        assert f"process {os.getpid()} is writing to" in other.communicate()[1]
        store.put(numbered(2), Completion("y"))
    with Store(path) as store:
        assert len(store) == 2


def test_a_worker_that_outlives_a_killed_writer_does_not_hold_the_lock(tmp_path: Path) -> None:
    code = """
import os, sys, time
from eval.store import Store
store = Store(sys.argv[1])
pid = os.fork()
if pid == 0:
    time.sleep(60)
print(pid, flush=True)
time.sleep(60)
"""
    writer = run_python(code, tmp_path / "s.sqlite")
    assert writer.stdout is not None
    worker = int(writer.stdout.readline())
    try:
        writer.kill()
        writer.wait()
        Store(tmp_path / "s.sqlite").close()
    finally:
        os.kill(worker, signal.SIGKILL)
        writer.communicate()


def foreign_text(path: Path) -> None:
    path.write_text("my thesis\n" * 100)


def foreign_database(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE samples (thesis TEXT)")
    database.commit()
    database.close()


def foreign_application(path: Path) -> None:
    """Another program's, without tables as yet."""
    database = sqlite3.connect(path)
    database.execute("PRAGMA application_id = 17")
    database.commit()
    database.close()


def newer_version(path: Path) -> None:
    Store(path).close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.commit()
    database.close()


def filled(path: Path) -> None:
    with Store(path) as store:
        for number in range(400):
            store.put(numbered(number), Completion(f"{random.Random(number).random()}" * 9))


def truncated(path: Path) -> None:
    filled(path)
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path: Path) -> None:
    filled(path)
    with path.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 4096 * 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign_text, "is not a store of samples"),
        (foreign_database, "another program's database"),
        (foreign_application, "another program's database"),
        (newer_version, "version 99"),
        (truncated, "is damaged"),
        (overwritten, "is damaged"),
        (Path.mkdir, "is a folder"),
    ],
)
def test_foreign_and_damaged_files_are_errors_and_stay_as_they_are(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "s.sqlite"
    make(path)
    before = None if path.is_dir() else path.read_bytes()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            Store(path)
    assert (None if path.is_dir() else path.read_bytes()) == before
    assert {one.name for one in tmp_path.iterdir()} <= {"s.sqlite", "s.sqlite.lock"}


def test_a_damaged_sample_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    filled(path)
    text = sqlite3.connect(path)
    body = text.execute("SELECT completion FROM samples WHERE key = ?", (bytes.fromhex(numbered(7)),)).fetchone()[0]
    text.close()
    content = path.read_bytes()
    path.write_bytes(content.replace(body[8:], bytes(one ^ 1 for one in body[8:])))
    with Store(path) as store:
        assert store.get(numbered(6)) is not None
        with pytest.raises(ValueError, match=r"is damaged \(sample 0000"):
            store.get(numbered(7))


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no store"):
        Store(tmp_path / "s.sqlite", readonly=True)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_clear_error_and_what_is_stored_stays(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        store._db.execute("PRAGMA max_page_count = 20")
        stored = 0
        with pytest.raises(OSError, match="no room to store a sample"):  # noqa: PT012  # how many go in is its result
            for number in range(1000):
                store.put(numbered(number), Completion(os.urandom(500).hex()))
                stored += 1
        assert stored > 10
        assert len(store) == stored
    with Store(path) as store:
        assert len(list(store)) == stored
        store.put(numbered(5000), Completion("there is room again"))


def test_a_limit_on_the_file_is_a_clear_error_too(tmp_path: Path) -> None:
    """The kernel refuses the write itself, as a quota does."""
    code = """
import os, resource, sys
from eval.sample import Completion
from eval.store import Store
store = Store(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for number in range(1000):
    store.put(f"{number:064x}", Completion(os.urandom(500).hex()))
    print(number, flush=True)
"""
    writer = run_python(code, tmp_path / "s.sqlite")
    out, err = writer.communicate()
    assert "OSError" in err
    assert "what is stored stays" in err
    stored = len(out.splitlines())
    assert 10 < stored < 1000
    with Store(tmp_path / "s.sqlite") as store:
        assert len(list(store)) == stored


def test_rows_do_not_depend_on_the_order_in_which_they_came(tmp_path: Path) -> None:
    """No clock, no counter: two runs that completed in another order read the same."""
    rows = []
    for name, seed in (("a", 1), ("b", 2)):
        with Store(tmp_path / name) as store:
            for number in random.Random(seed).sample(range(50), 50):
                store.put(numbered(number), Completion(str(number)), {"z": 1, "a": number})
            rows.append(list(store))
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_half_a_million_samples_in_bounded_memory(tmp_path: Path) -> None:
    code = """
import sys
from eval.sample import Completion
from eval.store import Store
n = 500_000
with Store(sys.argv[1]) as store:
    for number in range(n):
        store.put(f"{number * 2654435761 % 2**61:064x}", Completion("a thought " * 50), {"id": number})
    keys = (f"{number * 2654435761 % 2**61:064x}" for number in range(n + 10))
    print(sum(1 for _ in store.missing(keys)), sum(1 for _ in store))
# Not ru_maxrss, which starts at what the parent had.
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024)
"""
    out, err = run_python(code, tmp_path / "s.sqlite").communicate()
    counts, megabytes = out.splitlines()
    assert counts == "10 500000", err
    assert int(megabytes) < 100
