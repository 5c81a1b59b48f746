"""reasoning-gym's scores that read an answer as code, computed where it can do no harm.

    verify.py --JSON--> a supervisor that has imported the package --fork--> one limited child a score --> Graded

Of the package's datasets, several hand the answer to Python's `eval` (n_queens, binary_matrix, ...) or to sympy's
parser, which is built on it: what a teacher wrote would run in this process, or never end. So only the datasets of
`eval`, whose scores compare text and numbers, are scored here; every other one in a child with the limits and the hook
of `code_runner.py`, which is no security boundary either.
"""

import atexit
import contextlib
import json
import math
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from distill.code_runner import run_child
from distill.code_tests import WALL, unshare
from eval.reasoning_gym_tasks import DATASETS, RG_GRADER, grade, judge
from eval.sample import Graded, Sample

MEMORY = 4 << 30  # bytes of address space, most of which the package itself takes up
_one_at_a_time = threading.Lock()  # importing the package is not safe from several threads


def grade_reasoning_gym(sample: Sample, answer: str, dataset: str, seconds: float) -> Graded:
    """`eval.reasoning_gym_tasks.grade`, from any thread, for any dataset of the package and for any answer: one whose
    score takes more than `seconds` of the processor is `timeout`, one that breaks it `failed`."""
    if dataset in DATASETS:
        with _one_at_a_time:
            return grade(sample, answer, "", dataset)
    return _supervisors.grade(sample, answer, dataset, seconds)


class _Supervisors:
    """Processes that score, kept for the next call; as many as there are calls at one time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[str]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def grade(self, sample: Sample, answer: str, dataset: str, seconds: float) -> Graded:
        token = secrets.token_hex(16)
        job = {
            "sample": sample.to_json(), "answer": answer, "dataset": dataset, "token": token, "tests": 1,
            "cpu": math.ceil(seconds), "wall": WALL * seconds, "memory": MEMORY, "file": 0,
            "namespace": bool(unshare()),
        }  # fmt: skip
        process = self._borrow()
        try:
            replies = _ask(process, job)
        except BaseException:
            _end(process)
            raise
        with self._lock:
            self._idle.append(process)
        return _read(replies, token)

    def _borrow(self) -> "subprocess.Popen[str]":
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="score-")
        root = str(Path(__file__).parents[1])
        return subprocess.Popen(
            [*unshare(), sys.executable, "-P", "-m", "distill.confined_score"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=self._folder.name, text=True,
            env={
                **{name: os.environ[name] for name in ("HOME", "LD_LIBRARY_PATH", "PATH") if name in os.environ},
                "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
            },
        )  # fmt: skip

    def stop(self) -> None:
        with self._lock:
            for process in self._idle:
                _end(process)
            self._idle.clear()
            if self._folder is not None:
                self._folder.cleanup()
                self._folder = None


def _ask(process: "subprocess.Popen[str]", job: dict[str, Any]) -> list[dict[str, Any]]:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the process that scores answers of reasoning-gym died")
    return list(json.loads(line))


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def _read(replies: list[dict[str, Any]], token: str) -> Graded:
    *results, end = replies
    if end["end"] == "time":
        return Graded("timeout", None, "no score in time", RG_GRADER)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        ((reply,),) = [[json.loads(one["line"]) for one in results]]
        if reply["token"] == token:
            return Graded(**reply["graded"])
    said = end["error"].strip().rpartition("\n")[2]
    return Graded("failed", None, f"reasoning-gym gave no score ({end['end']}): {said or 'no message'}", RG_GRADER)


_supervisors = _Supervisors()
atexit.register(_supervisors.stop)


# The supervisor.


def _main() -> None:
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    for line in requests:
        job = json.loads(line)
        with contextlib.suppress(Exception):  # the child says what is wrong
            judge(job["dataset"])
        reply = run_child(job, partial(_score, job), None, 1 << 20, replies.fileno())
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _score(job: dict[str, Any], results: int) -> None:
    token, leave, write = job["token"], os._exit, os.write
    graded = grade(Sample.from_json(job["sample"]), job["answer"], "", job["dataset"])
    write(results, json.dumps({"token": token, "graded": asdict(graded)}).encode())
    leave(0)


if __name__ == "__main__":
    _main()
