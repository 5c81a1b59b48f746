"""How far a run is, on the terminal: a bar with rate and time left, or plain lines where it is not a terminal."""

import sys
import time
from typing import Any, TextIO

EVERY = 10.0  # seconds between plain lines


class Display:
    """To be called with (stage, done, total, note); a new stage, or a total that is reached, ends a bar.

    `clock` is a function of seconds, for tests.
    """

    def __init__(self, file: TextIO | None = None, clock: Any = time.monotonic) -> None:
        self._file = sys.stderr if file is None else file
        self._clock = clock
        self._stage = ""
        self._bar: Any = None
        self._started = self._last = 0.0
        self._first = 0

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage != self._stage:
            self._begin(stage, done, total)
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif done >= total or self._clock() - self._last >= EVERY:
            self._last = self._clock()
            print(self._line(stage, done, total, note), file=self._file, flush=True)
        if done >= total:
            self._end()

    def _begin(self, stage: str, done: int, total: int) -> None:
        self._end()
        self._stage, self._first = stage, done
        self._started = self._last = self._clock()
        if self._file.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=stage, file=self._file, dynamic_ncols=True)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""

    def _line(self, stage: str, done: int, total: int, note: str) -> str:
        seconds = self._clock() - self._started
        line = f"{stage}: {done:,}/{total:,}"
        if seconds > 0 and done > self._first:
            rate = (done - self._first) / seconds
            line += f", {rate:.3g}/s"
            if done < total:
                line += f", {duration((total - done) / rate)} left"
        return f"{line}, {note}" if note else line


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`.

    >>> duration(7500)
    '2 h 05 min'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
