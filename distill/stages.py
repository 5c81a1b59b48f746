"""What a stage is, and how a list of them is run: each once, on just its inputs, in one process at a time.

A stage whose fingerprint (its part of the recipe, the contents of what it reads, its version) stands in the manifest is
done and is not run again. One that was stopped goes on by itself: what it made is kept as it comes, in its own files.
`pipeline.py` and `pretrain.py` list the stages of the two kinds of recipe.
"""

import fcntl
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distill.records import REASONS, Decision
from distill.run_dir import Done, RunDir, content_hash, fingerprint, read_json, write_json
from eval.yaml_files import nearest

PACKAGES = (
    "deepseek-hf", "torch", "transformers", "trl", "peft", "datasets", "datasketch", "py3langid", "reasoning-gym",
    "math-verify", "pyarrow",
)  # fmt: skip
GIGABYTE = 2**30

Say = Callable[[str], None]
"""Told one line for each stage."""


@dataclass(frozen=True)
class Outcome:
    """What a stage has done: its counts, and what is missing ("" for nothing)."""

    counts: Mapping[str, Any]
    incomplete: str = ""


@dataclass(frozen=True)
class Stage:
    """`version`, `settings`, the outputs of the stages `after` and the local `files` decide what `work` makes;
    `outputs` are names in the run's folder. The version is raised when a stage makes something else of the same."""

    name: str
    work: Callable[[], Outcome]
    version: int
    settings: Any
    after: tuple[str, ...]
    outputs: tuple[str, ...]
    files: tuple[str, ...] = ()

    def fingerprint(self, done: Mapping[str, Done]) -> str:
        """Of everything that it depends on; `done` holds the stages before it."""
        inputs = {name: dict(done[name].outputs) for name in self.after}
        return fingerprint(self.version, self.settings, inputs, {file: signature(Path(file)) for file in self.files})


def run_stages(
    stages: Sequence[Stage], recipe: BaseModel, run: RunDir, *, until: str | None = None, say: Say = lambda line: None
) -> str:
    """Runs what is not done, in order, up to `until`; returns what is incomplete, "" for nothing."""
    names = [stage.name for stage in stages]
    if until is not None and until not in names:
        raise ValueError(f"{until!r} is no stage.{nearest(until, names)} There are: {', '.join(names)}")
    with only_run(run):
        _start(recipe, run)
        done: dict[str, Done] = {}
        for stage in stages:
            done[stage.name] = _run_or_find(stage, run, done, say)
            if stage.name == until:
                break
    return "; ".join(f"{one.stage}: {one.incomplete}" for one in done.values() if one.incomplete)


def _run_or_find(stage: Stage, run: RunDir, done: Mapping[str, Done], say: Say) -> Done:
    print_of = stage.fingerprint(done)
    entry = run.is_done(stage.name, print_of)
    if entry is not None:
        say(f"{stage.name}: done before")
        return entry
    started = time.monotonic()
    outcome = stage.work()
    seconds = round(time.monotonic() - started, 3)
    outputs = {name: content_hash(run / name) for name in stage.outputs}
    entry = Done(stage.name, print_of, seconds, outputs, outcome.counts, outcome.incomplete)
    run.finish(entry)
    say(f"{stage.name}: {described(outcome.counts)}")
    return entry


@contextmanager
def only_run(run: RunDir) -> Iterator[None]:
    """BlockingIOError where another process runs in this folder."""
    run.path.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another process runs in {run.path}; wait for it, or give another folder with --run-dir"
            ) from None
        yield


def _start(recipe: BaseModel, run: RunDir) -> None:
    """Writes recipe.json; ValueError where the folder is that of another recipe."""
    file, values = run / "recipe.json", recipe.model_dump(mode="json")
    if file.exists() and (name := read_json(file)["recipe"]["name"]) != values["name"]:
        raise ValueError(
            f"{run.path} holds a run of the recipe {name!r}, not of {values['name']!r}: give another --run-dir"
        )
    write_json(file, {"recipe": values, "versions": versions(), "commit": _commit()})


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of this package's checkout, with `+` where files differ from it; None where it is none."""
    here = str(Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def signature(path: Path) -> str:
    """Of a local file or folder: its contents, or above a gigabyte the sizes and times of its files."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    if sum(file.stat().st_size for file in files) < GIGABYTE:
        return content_hash(path)
    return fingerprint([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


# The counts of a stage that decides.


class Counts:
    """In = kept + dropped by reason."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.reasons = dict.fromkeys(REASONS[stage], 0)
        self.kept = 0

    def counted(self, decision: Decision) -> Decision:
        if decision.reason:
            self.reasons[decision.reason] += 1
        else:
            self.kept += 1
        return decision

    def each(self, decisions: Iterable[Decision]) -> Iterator[Decision]:
        return map(self.counted, decisions)

    def as_dict(self) -> dict[str, int]:
        return {"in": self.kept + sum(self.reasons.values()), "kept": self.kept, **self.reasons}

    def some_left(self, otherwise: str) -> dict[str, int]:
        """`as_dict`; ValueError, with a word on what to do, where nothing was kept."""
        if self.kept == 0:
            raise ValueError(
                f"{self.stage}: nothing is left ({described(self.as_dict()) or 'nothing came'}); {otherwise}"
            )
        return self.as_dict()


def described(counts: Mapping[str, Any]) -> str:
    """`1,200 in, 1,180 kept, 20 repeated`: the whole numbers that are not zero."""
    named = {name.replace("_", " "): value for name, value in counts.items()}
    return ", ".join(f"{value:,} {name}" for name, value in named.items() if isinstance(value, int) and value)
