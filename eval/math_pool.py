"""The caller's side of the workers in `math_worker.py`: one pool a process, used from any thread.

A call borrows a worker, waits for it until its deadline, and has it killed when that passes. There are as many workers
as there are calls at one time (few are kept afterwards), so that a call which spins takes nobody else's place.
"""

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from eval.math_worker import COMMAND, LENGTH, receive, send

MAX_WORKERS = 64  # calls in workers at one time; more wait, within their own time limit
KEPT = max(2, os.cpu_count() or 2)  # idle workers
CALLS = 500  # of one worker, which sympy's caches make larger
START_SECONDS = 60.0
LEAST_SECONDS = 0.4  # a call has at least this of a worker, though starting the zygote used up its time


class Timeout(Exception):
    """The time limit passed."""


class Failure(Exception):
    """The worker died, or gave up for a reason that is not the answer's being wrong."""


class _Worker:
    def __init__(self, channel: socket.socket, pid: int) -> None:
        self.channel, self.pid, self.calls = channel, pid, 0


class Pool:
    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the control socket and the list
        self._slots = threading.BoundedSemaphore(MAX_WORKERS)
        self._idle: list[_Worker] = []
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self, deadline: float) -> None:
        """Starts the zygote unless it runs. It takes about half a second once, and goes on starting after a Timeout."""
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Timeout("the workers are still starting")
        try:
            if self._zygote is not None and self._zygote.poll() is None and self._control is not None:
                return
            self._stop()
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-P", "-m", "eval.math_worker", str(theirs.fileno())]
            root = str(Path(__file__).parents[1])
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
            }
            with theirs:
                zygote = subprocess.Popen(
                    command, env=environment, pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                )  # fmt: skip
            ours.settimeout(START_SECONDS)
            ready = False
            with contextlib.suppress(OSError):
                ready = ours.recv(1) == b"R"
            stderr = zygote.stderr
            assert stderr is not None
            if not ready:
                zygote.kill()
                message = stderr.read().decode(errors="replace").strip()
                stderr.close()
                zygote.wait()
                ours.close()
                raise RuntimeError(
                    "the process that grades mathematics did not start; it needs the packages sympy and math-verify: "
                    f"{message.splitlines()[-1] if message else 'no message'}"
                )
            stderr.close()
            ours.settimeout(None)
            self._zygote, self._control = zygote, ours
        finally:
            self._lock.release()

    def call(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The worker's reply; Timeout or Failure."""
        deadline = time.monotonic() + seconds
        self.start(deadline + START_SECONDS)
        deadline = max(deadline, time.monotonic() + LEAST_SECONDS)
        if not self._slots.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Timeout(f"no worker was free within {seconds:g} s")
        try:
            while True:
                worker = self._borrow(deadline)
                try:
                    return self._ask(worker, {**request, "seconds": seconds}, deadline)
                except TimeoutError:
                    raise Timeout(f"no verdict within {seconds:g} s") from None
                except (EOFError, OSError):
                    # One that had died while it was idle is no fault of this request.
                    if worker.calls <= 1:
                        raise Failure("the worker died") from None
                    self.start(deadline)
        finally:
            self._slots.release()

    def _ask(self, worker: _Worker, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        reply: dict[str, Any] = {"error": ""}
        try:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            worker.channel.settimeout(remaining)
            send(worker.channel, request)
            # The time limit holds for all parts of the reply, which is short.
            reply = receive(worker.channel)
            return reply
        finally:
            worker.calls += 1
            self._give_back(worker, finished="error" not in reply)

    def _borrow(self, deadline: float) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            assert self._control is not None
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    socket.send_fds(self._control, [COMMAND.pack(b"F", 0)], [theirs.fileno()])
                except OSError:
                    ours.close()
                    self._control.close()
                    self._control = None  # the next call starts it again
                    raise Failure("the process that starts workers died") from None
        ours.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            (pid,) = LENGTH.unpack(ours.recv(LENGTH.size, socket.MSG_WAITALL))
        except Exception as error:
            ours.close()
            if isinstance(error, TimeoutError):
                raise Timeout("no worker started in time") from None
            raise Failure("a worker did not start") from None
        return _Worker(ours, pid)

    def _give_back(self, worker: _Worker, finished: bool) -> None:
        with self._lock:
            if finished and worker.calls < CALLS and len(self._idle) < KEPT:
                self._idle.append(worker)
                return
            if self._control is not None:
                with contextlib.suppress(OSError):
                    self._control.sendall(COMMAND.pack(b"K", worker.pid))
        worker.channel.close()

    def _stop(self) -> None:
        for worker in self._idle:
            worker.channel.close()
        self._idle.clear()
        if self._control is not None:
            self._control.close()  # the zygote sees the end, kills its workers and goes
            self._control = None
        if self._zygote is not None:
            try:
                self._zygote.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()
            self._zygote = None

    def stop(self) -> None:
        """Ends all its processes; the next call starts them again."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """In a forked child: these processes belong to the parent, and the sockets held open here would outlive it."""
        for channel in [self._control, *(worker.channel for worker in self._idle)]:
            if channel is not None:
                channel.close()
        if self._zygote is not None:
            self._zygote.returncode = 0  # not our child: its destructor must not wait for it


_pool = Pool()


def pool() -> Pool:
    return _pool


def _after_fork() -> None:
    global _pool
    _pool.forget()
    _pool = Pool()


def _at_exit() -> None:
    # Not the lock: a daemon thread may hold it for ever.
    _pool._stop()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
