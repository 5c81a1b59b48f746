"""SIGKILL at random moments of a run: the files of the resumed run are those of one that was never interrupted."""

import multiprocessing
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from eval.results import GRADED, RESULTS
from eval.runner import STORE
from eval.store import Store
from tests.eval.arithmetic import evaluate_endpoint, evaluate_with_log, reply
from tests.eval.stub_server import StubServer

SAMPLES, WINDOW, PAUSE = 128, 8, 0.002  # of `evaluate_with_log`; the pause makes the asking last as long as the rest


def started(run: Callable[..., None], *arguments: object) -> ForkServerProcess:
    """A process of its own, forked from one that has everything imported, so that the run itself is what is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.eval.arithmetic", "eval.runner", "eval.answers", "eval.endpoint_sampler", "scipy.special"]
    )
    process = context.Process(target=run, args=arguments)
    process.start()
    return process


def start(out: Path, log: Path, order: int) -> ForkServerProcess:
    return started(evaluate_with_log, str(out), str(log), order, PAUSE)


def finish(process: ForkServerProcess) -> None:
    process.join(60)
    assert process.exitcode == 0


def kill_after(process: ForkServerProcess, calls: Callable[[], int], more: int) -> bool:
    """Kills the run once it has made so many more calls; False if it is done before."""
    until = calls() + more
    while calls() < until and process.exitcode is None:
        time.sleep(0.001)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


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
    expected, _ = uninterrupted
    log, kills, generator = tmp_path / "log", 8, random.Random(0)
    log.touch()
    for order in range(kills):
        process = start(tmp_path / "out", log, order)
        assert kill_after(process, lambda: len(log.read_text().split()), generator.randrange(1, 15))
    finish(start(tmp_path / "out", log, kills))
    calls = Counter(log.read_text().split())
    assert len(calls) == SAMPLES
    assert calls.total() <= SAMPLES + kills * WINDOW
    assert files(tmp_path / "out") == expected


def test_a_client_of_an_endpoint_with_faults_killed_again_and_again_gets_there(tmp_path: Path) -> None:
    """Killed against a server that fails 30 % of its calls, to the bytes of a run that met neither."""
    with StubServer(answer=reply) as server:
        finish(started(evaluate_endpoint, str(tmp_path / "calm"), server.url))
        assert server.calls == SAMPLES
    kills, generator = 6, random.Random(0)
    with StubServer(answer=reply, faults=0.3, kinds=("429", "500", "null", "torn", "disconnect"), delay=0.01) as server:
        for _ in range(kills):
            process = started(evaluate_endpoint, str(tmp_path / "out"), server.url)
            assert kill_after(process, lambda: server.answered, generator.randrange(1, 15))
        finish(started(evaluate_endpoint, str(tmp_path / "out"), server.url))
        assert len(server.asked) == SAMPLES
        # The sampler has up to twice its concurrency on the way.
        assert server.answered <= SAMPLES + kills * 2 * 4
    assert files(tmp_path / "out") == files(tmp_path / "calm")
