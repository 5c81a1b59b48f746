"""SIGKILL at random moments of a run: the files of the resumed run are those of one that was never interrupted."""

import multiprocessing
import random
import signal
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from eval.results import GRADED, RESULTS
from eval.runner import STORE
from eval.store import Store
from tests.eval.arithmetic import evaluate_with_log

SAMPLES, WINDOW, PAUSE = 128, 8, 0.002  # of `evaluate_with_log`; the pause makes the asking last as long as the rest


def start(out: Path, log: Path, order: int) -> ForkServerProcess:
    """A process of its own, forked from one that has everything imported, so that the run itself is what is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.eval.arithmetic", "eval.runner", "eval.answers", "scipy.special"])
    process = context.Process(target=evaluate_with_log, args=(str(out), str(log), order, PAUSE))
    process.start()
    return process


def finish(process: ForkServerProcess) -> None:
    process.join(60)
    assert process.exitcode == 0


def files(out: Path) -> tuple[bytes, bytes]:
    return (out / RESULTS).read_bytes(), (out / GRADED).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[bytes, bytes], float]:
    """The files of such a run, and how long one takes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(start(folder / "first", folder / "log", 0))
    began = time.monotonic()
    finish(start(folder / "out", folder / "log", 1))
    seconds = time.monotonic() - began
    assert files(folder / "first") == files(folder / "out")
    return files(folder / "out"), seconds


def killed_at(moment: float, folder: Path, order: int) -> tuple[Path, Path]:
    """A run that was killed, with what it left; begun anew and killed earlier if it was done by then."""
    while True:
        out, log = folder / f"out-{moment}", folder / f"log-{moment}"
        log.touch()
        process = start(out, log, order)
        process.join(moment)
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            return out, log
        moment *= 0.9


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, uninterrupted: tuple[tuple[bytes, bytes], float], seed: int
) -> None:
    expected, seconds = uninterrupted
    moment = random.Random(seed).random() * seconds
    out, log = killed_at(moment, tmp_path, seed)
    before = Counter(log.read_text().split())
    stored: set[str] = set()
    if (out / STORE).exists() and before:
        with Store(out / STORE) as store:  # nobody else holds it; it is whole
            stored = {one.key for one in store}
    assert len(before) - len(stored) <= WINDOW  # what was lost was in flight

    finish(start(out, log, seed + 100))
    calls = Counter(log.read_text().split())
    again = calls - before
    assert not set(again) & stored  # nothing that is stored is asked again
    assert len(calls) == SAMPLES
    assert calls.total() <= SAMPLES + WINDOW
    assert files(out) == expected


def test_a_run_killed_again_and_again_gets_there(
    tmp_path: Path, uninterrupted: tuple[tuple[bytes, bytes], float]
) -> None:
    expected, seconds = uninterrupted
    log, kills, generator = tmp_path / "log", 0, random.Random(0)
    while True:
        process = start(tmp_path / "out", log, kills)
        process.join(seconds * generator.uniform(0.1, 0.6) if kills < 8 else 60)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills >= 2
    calls = Counter(log.read_text().split())
    assert len(calls) == SAMPLES
    assert calls.total() <= SAMPLES + kills * WINDOW
    assert files(tmp_path / "out") == expected
