"""Code, verified by running tests on it: the last Python block of an answer, in a limited process of its own.

    answer --extract_code--> program --code_runner.py, a child a run--> what it printed or returned --here--> Graded

**This is no security boundary.** It holds off accidents and the usual tricks: CPU, memory, file size and output are
limited; the working folder is empty and removed; the environment is empty; an audit hook of the interpreter refuses
processes, signals, sockets, foreign functions and writing outside of that folder; the whole process group is killed at
the end; where the kernel permits it (`unshare`), the process has no network device and counts its threads apart
(`network()` says which). A program that sets out to break out of an interpreter can. So nothing runs unless
`verify.code.allow` says so: run it on a machine, or in a container, where that is acceptable.

What a program should print or return is compared here, not in its process, so that ending early, patching what
compares or returning an object that equals everything passes nothing. Only statements without that form (a `check`
function of HumanEval) run beside the program, and could be misled by it.
"""

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from distill.code_cases import Test, decode, read_tests, same_output, short, steps
from distill.recipe import CodeTests
from eval.sample import Graded, Verdict

CODE_GRADER = "code/1"
OUTPUT_SLACK = 1 << 16  # bytes that a program may print beyond what is expected
WALL = 3  # seconds of the clock for one of the processor: a busy machine is no reason to fail
START_SECONDS = 30.0
_places = threading.BoundedSemaphore(os.cpu_count() or 1)  # a processor for each run, so that its clock is its own


# The program.

_FENCE = re.compile(r"^[ \t]*+(`{3,}+|~{3,}+)[ \t]*+([^\s`]*+)[^\n`]*+$", re.MULTILINE)  # possessive: linear
_PYTHON = ("python", "python3", "py", "")


def extract_code(answer: str) -> str | None:
    """The last complete fenced block that is marked as Python, else the last without a mark; None where there is none.

    A block in another language, or one that the budget cut, is no program to test.

    >>> extract_code("```python\\nprint(1)\\n```\\nIt prints:\\n```\\n1\\n```")
    'print(1)\\n'
    """
    marked: str | None = None
    bare: str | None = None
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(answer):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]) and not fence[2]:
            language, code = opening[2].lower(), textwrap.dedent(answer[opening.end() + 1 : fence.start()])
            if language in _PYTHON and code.strip():
                marked, bare = (code, bare) if language else (marked, code)
            opening = None
    return bare if marked is None else marked


# The verdict.


def grade_code(answer: str, tests: Any, limits: CodeTests) -> Graded:
    """`correct` if the program in the answer passes all tests; `timeout` if it takes too long; else `wrong`.

    `limits.seconds` is the processor's time for one run: a program with one input, or with all of its calls; the clock
    may show three times that. Raises ValueError unless `limits.allow`, and for tests that cannot be read.
    """
    if not limits.allow:
        raise ValueError(
            "verifying code runs what a model wrote, in a limited process that is no security boundary; run it where "
            "that is acceptable, and set verify.code.allow: true"
        )
    tests = read_tests(tests)
    code = extract_code(answer)
    if code is None:
        return Graded("no_answer", None, "no block of Python code", CODE_GRADER)
    whole = isinstance(tests[0], Mapping) and "input" in tests[0]
    verdict, detail = _grade_programs(code, tests, limits) if whole else _grade_calls(code, tests, limits)
    return Graded(verdict, code, detail, CODE_GRADER)


def _grade_programs(code: str, tests: Sequence[Any], limits: CodeTests) -> tuple[Verdict, str]:
    inputs = [{"input": one["input"], "limit": len(one["output"].encode()) + OUTPUT_SLACK} for one in tests]
    with _replies(code, limits, inputs=inputs) as replies:
        for number, test in enumerate(tests, 1):
            end = next(replies)
            if ended := _problem(end, limits):
                return ended[0], f"test {number} of {len(tests)}: {ended[1]}"
            if not same_output(end["output"], test["output"]):
                detail = f"printed {short(end['output'])}, not {short(test['output'])}"
                return "wrong", f"test {number} of {len(tests)}: {detail}"
    return "correct", f"{len(tests)} of {len(tests)} tests"


def _grade_calls(code: str, tests: Sequence[Test], limits: CodeTests) -> tuple[Verdict, str]:
    wanted = [step for test in tests for step in steps(test)]
    token = secrets.token_hex(16)
    job = [{key: step[key] for key in ("run", "value", "function") if key in step} for step in wanted]
    done = 0
    with _replies(code, limits, tests=job, token=token) as replies:
        for reply in replies:
            if "end" in reply:
                if ended := _problem(reply, limits):
                    return ended[0], f"after {done} of {len(wanted)} tests: {ended[1]}"
                break
            result = _result(reply["line"], token)
            if result is None:
                return "wrong", "the program wrote into the results of its tests"
            if "error" in result:
                where = f"test {result['test'] + 1} of {len(wanted)}: " if result["test"] >= 0 else ""
                return "wrong", f"{where}{result['error']}"
            if result["test"] != done:
                return "wrong", "the program wrote into the results of its tests"
            step = wanted[done]
            if "value" in step and (problem := _unlike(step, result["value"])):
                return "wrong", f"test {done + 1} of {len(wanted)}: {step['value']} {problem}"
            done += 1
    if done < len(wanted):
        return "wrong", f"the program ended itself after {done} of {len(wanted)} tests"
    return "correct", f"{done} of {done} tests"


def _unlike(step: Mapping[str, Any], value: Any) -> str:
    """What is wrong with the value of an expression; "" where it is the one expected."""
    try:
        found = decode(value)
        return "" if step["equal"](found) else f"is {short(found)}"
    except RecursionError:
        return "is nested too deeply to be compared"


def _problem(end: Mapping[str, Any], limits: CodeTests) -> tuple[Verdict, str] | None:
    """The verdict on how a run ended, None if well."""
    how, error = end["end"], end["error"].strip().rpartition("\n")[2]
    if how == "ended":
        return None
    if how == "time":
        return "timeout", f"not done within {limits.seconds:g} s"
    if how == "output":
        return "wrong", "it printed far more than was expected"
    return "wrong", f"{how}: {error}" if error else how


def _result(line: str, token: str) -> dict[str, Any] | None:
    """A line of the results, None where the runner did not write it."""
    try:
        result = json.loads(line)
    except RecursionError:
        return {"test": -1, "error": "the value of a test is nested too deeply to be compared"}
    except ValueError:
        return None
    if not isinstance(result, dict) or result.get("token") != token:
        return None
    return result


# The process.


@contextlib.contextmanager
def _replies(
    code: str, limits: CodeTests, *, inputs: Sequence[Any] = (), tests: Sequence[Any] = (), token: str = ""
) -> Iterator[Iterator[dict[str, Any]]]:
    """What `code_runner.py` reports, as it comes; leaving the block ends everything that runs there."""
    cpu = math.ceil(limits.seconds)
    runner = str(Path(__file__).with_name("code_runner.py"))
    wall = WALL * limits.seconds
    job = {
        "code": code, "inputs": list(inputs), "tests": list(tests), "token": token, "limit": 1 << 24,
        "cpu": cpu, "wall": wall, "memory": limits.memory_mb << 20, "file": limits.file_mb << 20,
        "namespace": bool(unshare()),
    }  # fmt: skip
    with (
        _places,
        tempfile.TemporaryDirectory(prefix="code-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stderr,
    ):
        stdin.write(json.dumps(job).encode())  # ASCII: lone surrogates survive
        stdin.seek(0)
        process = subprocess.Popen(
            [*unshare(), sys.executable, "-P", "-s", "-B", "-X", "utf8", runner],
            stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, cwd=folder, start_new_session=True,
            env={
                "HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8",
                "PYTHONHASHSEED": "0",  # the order of sets is the same in every run
                "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            },
        )  # fmt: skip
        # The runner keeps the time of each run itself; this is for a runner that hangs.
        watch = threading.Timer(START_SECONDS + (wall + 1) * max(1, len(inputs)), _kill, [process])
        watch.daemon = True
        watch.start()
        try:
            assert process.stdout is not None
            yield _lines_of(process, stderr)
        finally:
            watch.cancel()
            _kill(process)
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]


def _lines_of(process: "subprocess.Popen[bytes]", stderr: IO[bytes]) -> Iterator[dict[str, Any]]:
    """RuntimeError when there are no more: the caller knows how many to read."""
    assert process.stdout is not None
    yield from map(json.loads, process.stdout)
    stderr.seek(0)
    said = stderr.read(1 << 16).decode(errors="replace").strip().rpartition("\n")[2]
    raise RuntimeError(f"the process that runs programs died: {said or 'no message'}")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """The whole group, which its members cannot leave."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@cache
def unshare() -> tuple[str, ...]:
    """The command before the interpreter's that takes the network away; empty where the kernel does not permit it."""
    command = shutil.which("unshare")
    if command is None:
        return ()
    prefix = (command, "--user", "--net")
    try:
        return prefix if subprocess.run([*prefix, "true"], capture_output=True, timeout=10).returncode == 0 else ()
    except (OSError, subprocess.TimeoutExpired):
        return ()


def network() -> str:
    """How a program that is tested is kept from the network on this machine, in words."""
    hook = "an audit hook refuses sockets"
    return (
        f"no network device (unshare), and {hook}" if unshare() else f"{hook}; a user namespace is not permitted here"
    )
