"""Functions run by several processes that talk through gloo, on CPU: what a test of several devices stands on."""

import functools
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Forked from a server that has everything imported.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.spread"])
LIMIT = 180  # seconds for one call, which takes one or two; the first waits for the imports


class Ranks:
    """So many processes in one group. They stay from call to call: most of what a first one takes is what torch and
    transformers find out once a process."""

    def __init__(self, count: int, folder: Path):
        self.connections: list[Connection] = []
        self.processes = []
        meeting = folder / f"meeting-{time.monotonic_ns()}"
        for rank in range(count):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_work, args=(rank, count, meeting, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, order: tuple) -> str:
        """What went wrong on each rank, by tracebacks; "" where nothing did."""
        for connection in self.connections:
            connection.send(order)
        waiting, told, ends = dict(zip(self.connections, range(len(self.connections)), strict=True)), [], LIMIT
        started = time.monotonic()
        while waiting and (left := ends - (time.monotonic() - started)) > 0:
            for connection in wait(list(waiting), left):
                rank = waiting.pop(connection)
                try:
                    report = connection.recv()
                except (EOFError, ConnectionError):
                    self.processes[rank].join()
                    report = f"ended with exit code {self.processes[rank].exitcode}"
                if report:
                    told.append(f"rank {rank}:\n{report}")
                    ends = min(ends, time.monotonic() - started + 1)  # one that fails leaves others waiting for it
        return "\n".join(told + [f"rank {rank} did not end" for rank in waiting.values()])

    def end(self) -> None:
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.kill()
            process.join()
            connection.close()


STANDING: dict[int, Ranks] = {}  # by how many


def on_ranks(folder: Path, function: Callable[..., None], *args: Any, ranks: int = 2, alone: bool = False) -> None:
    """Runs `function(folder, *args)` in each of the processes; in new ones that end with it where it leaves something
    behind (`alone`).

    Raises:
        AssertionError: with the traceback of every rank that failed or did not end in time.
    """
    group = Ranks(ranks, folder) if alone or ranks not in STANDING else STANDING.pop(ranks)
    told = group.run((function, folder, args))
    if told or alone:
        group.end()
    else:
        STANDING[ranks] = group
    assert not told, told


def _work(rank: int, ranks: int, meeting: Path, orders: Connection) -> None:
    # What torchrun sets; and no GPU, whose number here is smaller than that of the ranks.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(ranks)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timedelta(seconds=LIMIT)
    )
    # Each mesh is made of groups with threads and sockets of their own, which nothing takes down.
    dist.init_device_mesh = functools.cache(dist.init_device_mesh)
    while True:
        try:
            function, folder, args = orders.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            function(folder, *args)
            orders.send("")
        except BaseException:
            orders.send(traceback.format_exc())
