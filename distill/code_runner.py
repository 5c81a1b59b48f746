"""The process in which `code_tests.py` runs programs: started by file name, stands alone, imports the standard library.

    caller --JSON on stdin--> supervisor --fork--> one child for each program run; --a line of JSON each--> caller

The supervisor never runs the program itself: every run is a child with limits and an audit hook, and ends with it. What
a program ought to print or return is not sent here, so it cannot be found here either.
"""

import contextlib
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MAX_THREADS = 64  # where the kernel counts them for this run alone: in a user namespace, not for root
MAX_FILES = 100  # that one run may open to write, make or rename
STDERR = 10_000  # bytes of it that are kept
REFUSED = (
    "ctypes.", "fcntl.", "socket.", "pty.", "subprocess.", "signal.pthread_kill", "resource.setrlimit", "os.exec",
    "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.system", "os.chflags", "os.chmod", "os.chown",
    "os.setxattr", "os.removexattr", "os.link", "os.symlink",
)  # fmt: skip
"""Audit events that end in an error: processes, signals, network, foreign functions, limits, other files."""
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime", "shutil.rmtree")


class Refused(ImportError):
    """An ImportError, so that packages which can do without ctypes do."""


def main() -> None:
    job = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as reports:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nowhere, standard)

        def report(**values: Any) -> None:
            reports.write(json.dumps(values) + "\n")
            reports.flush()

        if job["tests"]:
            for reply in run_child(job, lambda results: _run_tests(job, results), None, job["limit"], reports.fileno()):
                report(**reply)
        for one in job["inputs"]:
            for reply in run_child(
                job, lambda _: _run_program(job["code"]), one["input"], one["limit"], reports.fileno()
            ):
                report(**reply)


def run_child(
    job: Mapping[str, Any], work: Callable[[int], None], given: str | None, limit: int, reports: int
) -> list[dict[str, Any]]:
    """Runs `work` in a child of its own. What it wrote to its results (a line of JSON each), then {"end": how it ended,
    "output", "error"}."""
    with tempfile.TemporaryFile() as stdin:
        stdin.write((given or "").encode("utf-8", "surrogatepass"))
        stdin.seek(0)
        pipes = [os.pipe() for _ in range(3)]  # output, error, results
        pid = os.fork()
        if pid == 0:
            try:
                for standard, descriptor in enumerate((stdin.fileno(), pipes[0][1], pipes[1][1])):
                    os.dup2(descriptor, standard)
                results = pipes[2][1]
                for descriptor in (reports, *(end for pipe in pipes for end in pipe if end != results)):
                    os.close(descriptor)
                _confine(job)
                work(results)
            except BaseException as error:  # nothing of the supervisor's may go on in here
                with contextlib.suppress(BaseException):
                    os.write(2, f"{type(error).__name__}: {error}"[:500].encode("utf-8", "replace"))
            finally:
                os._exit(1)
    for _, end in pipes:
        os.close(end)
    output, stderr, results = ends = [end for end, _ in pipes]
    said: dict[int, bytearray] = {end: bytearray() for end in ends}
    limits = {output: limit, stderr: STDERR, results: limit}
    how = _wait(pid, said, limits, job)
    for end in ends:
        os.close(end)
    lines = bytes(said[results]).split(b"\n") if job["tests"] else []
    replies: list[dict[str, Any]] = [{"line": line.decode("utf-8", "replace")} for line in lines if line]
    ending = {
        "end": how,
        "output": said[output].decode("utf-8", "replace"),
        "error": said[stderr].decode("utf-8", "replace"),
    }
    return [*replies, ending]


def _wait(pid: int, said: dict[int, bytearray], limits: Mapping[int, int], job: Mapping[str, Any]) -> str:
    """Reads what the child writes until it ends, is too late or writes too much; kills it then. Says how it ended."""
    open_ends, deadline = list(said), time.monotonic() + job["wall"]
    while (remaining := deadline - time.monotonic()) > 0:
        # Not only until the pipes end: the child may close them and go on.
        ready, _, _ = select.select(open_ends, [], [], min(remaining, 0.05 if open_ends else 0.002))
        for end in ready:
            part = os.read(end, 65536)
            said[end] += part
            if not part:
                open_ends.remove(end)
            elif limits[end] == STDERR:
                del said[end][:-STDERR]
            elif len(said[end]) > limits[end]:
                _reap(pid)
                return "output"
        if not ready:
            done, status, used = os.wait4(pid, os.WNOHANG)
            if done:
                return _ending(status, used.ru_utime + used.ru_stime, job["cpu"])
    _reap(pid)
    return "time"


def _reap(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _ending(status: int, used: float, cpu: int) -> str:
    if os.WIFSIGNALED(status):
        # SIGXCPU can be ignored; SIGKILL a second later cannot.
        return "time" if os.WTERMSIG(status) == signal.SIGXCPU or used >= cpu else f"signal {os.WTERMSIG(status)}"
    return f"exit {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else "ended"


def _confine(job: Mapping[str, Any]) -> None:
    """Limits and the hook, for this process from here on; neither can be taken back."""

    def limit(what: int, most: int, hard: int | None = None) -> None:
        resource.setrlimit(what, (most, most if hard is None else hard))

    seconds = job["cpu"]
    limit(resource.RLIMIT_CPU, seconds, seconds + 1)  # SIGXCPU, then SIGKILL
    limit(resource.RLIMIT_AS, job["memory"])
    limit(resource.RLIMIT_FSIZE, job["file"])
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NOFILE, 64)
    if job["namespace"]:
        limit(resource.RLIMIT_NPROC, MAX_THREADS)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead, which the program can tell
    sys.addaudithook(_hook(os.path.realpath(os.getcwd())))


def _hook(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Refuses what a program that is tested has no need of. The functions it uses are its own, whatever is patched."""
    inside, real, fsdecode = folder + os.sep, os.path.realpath, os.fsdecode
    made = 0

    def check(path: Any) -> None:
        nonlocal made
        if isinstance(path, int) or path in ("/dev/null", b"/dev/null"):
            return
        made += 1
        if made > MAX_FILES or not real(fsdecode(path)).startswith(inside):
            raise Refused(f"a program that is tested may write {MAX_FILES} files in its own folder, not {path!r}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & WRITES:
                check(path)
        elif event in CHANGES:
            check(arguments[0])
            if event == "os.rename":
                check(arguments[1])
        elif event.startswith(REFUSED):
            raise Refused(f"a program that is tested may not: {event}")

    return hook


# In the child.


def _module() -> dict[str, Any]:
    """An empty `__main__`, without names of this file."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # for as long as the process lives
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    return vars(module)


def _run_program(code: str) -> None:
    """A whole program: its input stands in stdin, its exit status says whether it failed."""
    import atexit
    import threading

    leave, flush = os._exit, (lambda: sys.stdout.flush())
    status = 0
    try:
        try:
            exec(compile(code, "program.py", "exec"), _module())
        finally:
            threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter does at its end: waits
            atexit._run_exitfuncs()  # many programs print in one go, here
            flush()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        with contextlib.suppress(Exception):
            flush()
    except BaseException as error:
        os.write(2, _told(error))
        status = 1
    leave(status & 0xFF)


def _run_tests(job: Mapping[str, Any], results: int) -> None:
    """The program, then expressions and statements in its namespace. A result counts only with the token, which the
    program has not got: ending early, or writing to every descriptor, passes no test."""
    code, tests, token, write, dumps, leave = job["code"], job["tests"], job["token"], os.write, json.dumps, os._exit

    def tell(**values: Any) -> None:
        text = (dumps({"token": token, **values}) + "\n").encode()
        while text:
            text = text[write(results, text) :]

    number = -1
    try:
        names = _module()
        exec(compile(code, "program.py", "exec"), names)
        for number, test in enumerate(tests):
            if "run" in test:
                exec(compile(test["run"], "test.py", "exec"), names)
                tell(test=number)
            else:
                _bind(names, test.get("function"))
                tell(test=number, value=encode(eval(compile(test["value"], "test.py", "eval"), names)))
    except SystemExit:
        tell(test=number, error="the program ended itself")
    except BaseException as error:
        tell(test=number, error=_told(error).decode("utf-8", "replace"))
    leave(0)


def _bind(names: dict[str, Any], function: str | None) -> None:
    """A method of LeetCode's `class Solution` under its own name."""
    if function and function not in names and hasattr(names.get("Solution"), function):
        names[function] = getattr(names["Solution"](), function)


def _told(error: BaseException) -> bytes:
    try:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    except BaseException:  # an error whose own words fail
        text = "an error without words"
    return text[:500].encode("utf-8", "replace")


def encode(value: Any) -> Any:
    """Plain data as JSON that keeps its types; TypeError for anything else, whose `==` would be the program's own."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int.__add__(value, 0)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return {"float": float.__repr__(value)}
    if isinstance(value, complex):
        return {"complex": [float.__repr__(value.real), float.__repr__(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    for name, kind in (("list", list), ("tuple", tuple), ("set", set | frozenset)):
        if isinstance(value, kind):
            return {name: [encode(one) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(one)] for key, one in value.items()]}
    module = type(value).__module__
    if module.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist())
    if module in ("decimal", "fractions"):
        return encode(int(value) if value == int(value) else float(value))
    raise TypeError(f"the value is a {type(value).__name__}, and plain data is compared")


if __name__ == "__main__":
    main()
