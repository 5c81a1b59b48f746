"""Functions run by several processes that talk through gloo, on CPU: what a test of several devices stands on."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# Forked from a server that has everything imported, so that a pair of processes costs no import of torch each time.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.spread"])
LIMIT = 180  # seconds for one call, which takes one or two; the first waits for the imports


def on_ranks(folder: Path, function: Callable[..., None], *args: Any, ranks: int = 2) -> None:
    """Runs `function(folder, *args)` in each of the processes, which find each other by a file in `folder`.

    Raises:
        AssertionError: with the traceback of every rank that failed or did not end in time.
    """
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    meeting.mkdir(parents=True)
    processes = [
        CONTEXT.Process(target=_run, args=(rank, ranks, meeting, function, folder, args)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    ends = time.monotonic() + LIMIT
    # One that fails leaves the others waiting for it: a second for theirs to be told too, then they are ended.
    while any(process.exitcode is None for process in processes) and time.monotonic() < ends:
        if any(process.exitcode for process in processes):
            ends = min(ends, time.monotonic() + 1)
        time.sleep(0.02)
    told = []
    for rank, process in enumerate(processes):
        if process.exitcode is None:
            process.kill()
        process.join()
        report = meeting / f"rank{rank}.txt"
        if process.exitcode:
            told.append(f"rank {rank}, exit code {process.exitcode}:\n{report.read_text() if report.exists() else ''}")
    assert not told, "\n".join(told)


def _run(rank: int, ranks: int, meeting: Path, function: Callable[..., None], folder: Path, args: tuple) -> None:
    # What torchrun sets; and no GPU, whose number here is smaller than that of the ranks.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(ranks)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=LIMIT)
        )
        function(folder, *args)
        dist.destroy_process_group()
    except BaseException:
        (meeting / f"rank{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
