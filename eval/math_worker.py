"""`python -m eval.math_worker`: the process that grades what only sympy can, in children that may be killed.

    caller --(socket)--> zygote, which has imported sympy once --fork--> worker --(its own socket)--> caller

The zygote only forks, kills and reaps: a worker that was killed is replaced in milliseconds. It ends when the caller's
end of the socket closes, however the caller ended, and kills its workers; they also die with it by themselves.

Protocol. To the zygote: 5 bytes, `F` and a file descriptor (a socket for a new worker), answered by the worker on that
socket with its process id; or `K` and the id to kill. To a worker: a length and JSON {gold, answer, seconds, memory};
back comes {equal} or {error}. This file is imported by the caller for the framing only, so sympy is imported late.
"""

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any

LENGTH = struct.Struct("!I")
COMMAND = struct.Struct("!cI")


def send(channel: socket.socket, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()  # ASCII: lone surrogates survive
    channel.sendall(LENGTH.pack(len(data)) + data)


def receive(channel: socket.socket) -> dict[str, Any]:
    """The next message; EOFError where the other end has closed."""
    (length,) = LENGTH.unpack(_exactly(channel, LENGTH.size))
    return json.loads(_exactly(channel, length))


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            raise EOFError("the other process is gone")
        data += part
    return data


# ---------------------------------------------------------------------------------------------------------------------
# The zygote.


def zygote(control: socket.socket) -> None:
    """Serves until the caller's end closes."""
    from eval.math_oracle import warm_up

    warm_up()
    gc.freeze()  # what the workers share is not copied by a collection
    children: set[int] = set()
    wakeup_read, wakeup_write = socket.socketpair()
    wakeup_write.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_write.fileno(), warn_on_full_buffer=False)
    # What the caller read was for errors until here.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    control.sendall(b"R")  # ready
    while True:
        ready, _, _ = select.select([control, wakeup_read], [], [])
        if wakeup_read in ready:
            wakeup_read.recv(4096)
            _reap(children)
        if control not in ready:
            continue
        data, descriptors, _, _ = socket.recv_fds(control, COMMAND.size, 1)
        if not data:
            break
        while len(data) < COMMAND.size:
            data += control.recv(COMMAND.size - len(data)) or sys.exit()
        command, child = COMMAND.unpack(data)
        if command == b"F" and descriptors:
            pid = os.fork()
            if pid == 0:
                for channel in (control, wakeup_read, wakeup_write):
                    channel.close()
                _worker(descriptors[0])
            children.add(pid)
            os.close(descriptors[0])
        elif command == b"K" and child in children:  # reaped ones are gone from the set: no id is killed twice
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _reap(children: set[int]) -> None:
    for child in list(children):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(child, os.WNOHANG)[0]:
                children.discard(child)


# ---------------------------------------------------------------------------------------------------------------------
# A worker.


def _worker(descriptor: int) -> None:
    """Serves one caller; never returns."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=descriptor) as channel, contextlib.suppress(EOFError, OSError):
        channel.sendall(LENGTH.pack(os.getpid()))
        while True:
            request = receive(channel)
            reply = _judge(request)
            send(channel, reply)
            if "error" in reply:  # its memory is torn: the next call gets a fresh one
                break
    os._exit(0)


def _die_with_parent() -> None:
    """Linux: SIGKILL when the zygote dies, even while a computation spins. Elsewhere the CPU limit ends it."""
    if sys.platform != "linux":
        return
    import ctypes

    PR_SET_PDEATHSIG = 1
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent != os.getppid():
        os._exit(1)


def _judge(request: dict[str, Any]) -> dict[str, Any]:
    from eval.exact import Undecided, same
    from eval.math_oracle import Unreadable, equal

    _limit(request["seconds"], request["memory"])
    sys.setrecursionlimit(3000)
    try:
        return {"equal": same(request["gold"], request["answer"], equal)}
    except (Undecided, Unreadable) as reason:
        return {"equal": False, "detail": f"not read as mathematics: {reason}"[:200]}
    except MemoryError:
        return {"error": "memory"}
    except RecursionError:
        return {"error": "nested too deeply"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}


def _limit(seconds: float, memory: int) -> None:
    """Limits from here on: the process may have used up some of both before. Wall time is the caller's to keep."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory, resource.RLIM_INFINITY))


def _address_space() -> int:
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 30


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as control:
        zygote(control)
