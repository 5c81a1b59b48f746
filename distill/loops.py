"""Whether a text runs in a loop, for `filtering.py`: words that come back again and again, in linear time.

Three ways to be stuck: a unit of words is repeated without a break ("Wait, Wait, Wait, "; the same line, the same ten
lines), one long word repeats itself ("hahaha..."), or most sentences were there before. What only looks like it is
allowed: tables, matrices, enumerations, long decimals, and checking a result by going through all of it once more.
"""

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from distill.words import UNSPACED

LONGEST_UNIT = 200  # words
# A unit of up to so many words is a loop from so many repetitions on (our choice): a path may go right twelve times,
# and nobody writes the same paragraph three times.
REPETITIONS = ((1, 20), (2, 10), (8, 6), (24, 4), (LONGEST_UNIT, 3))
WITHOUT_WORDS = 300  # units of numbers and symbols alone: as many tokens of them; a matrix has rows of zeros
TABLE_ROWS = 30  # equal rows of a table
LONG_WORD = (60, 240)  # characters that a unit within a word covers: with letters, without
REPEATED_SHARE = 0.6  # of the words stand in sentences that were there before; of a text gone through twice, half do
REPEATED_WORDS = 60

_TOKEN = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_HAS_WORD = re.compile(rf"[{UNSPACED}]|(?<![\\\w])[^\W\d_]{{2}}")  # a command of LaTeX is none
_WORD_UNIT = re.compile(r"(.{1,24}?)\1{7,}", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+|[。！？；\n]+")  # noqa: RUF001  # full-width marks are meant


def find_loop(text: str) -> str:
    """What is repeated, and how often; "" where nothing runs in a loop.

    >>> find_loop("So x = 3. " + "Wait, " * 40)
    "'wait,' 40 times"
    """
    lines = text.split("\n")
    prose = "\n".join(line for line in lines if not is_table_row(line))
    return equal_rows(lines) or repeated_unit(prose) or repeated_within_word(text) or repeated_sentences(prose)


def is_table_row(line: str) -> bool:
    """A row of Markdown, or of a LaTeX array."""
    return line.count("|") >= 2 or ("&" in line and "\\\\" in line[-20:])


def equal_rows(lines: list[str]) -> str:
    """A row of a table, or any other line, that follows itself."""
    count, last = 0, ""
    for line in lines:
        stripped = line.strip()
        count = count + 1 if stripped and stripped == last else 1
        last = stripped
        if count >= TABLE_ROWS:
            return f"{stripped[:60]!r} more than {TABLE_ROWS} times"
    return ""


def repeated_unit(text: str) -> str:
    """A unit of words that follows itself often enough."""
    tokens = _TOKEN.findall(text.lower())
    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(token, len(numbers)) for token in tokens], np.int32)
    for size in range(1, min(LONGEST_UNIT, len(tokens) // 3) + 1):
        times = next(times for longest, times in REPETITIONS if size <= longest)
        equal = codes[size:] == codes[:-size]
        needed = size * (times - 1)
        if np.count_nonzero(equal) < needed:
            continue
        for start, length in _runs(equal):
            if length < needed:
                continue
            unit = " ".join(tokens[start : start + size])
            if _HAS_WORD.search(unit) or length + size >= WITHOUT_WORDS:
                return f"{unit[:60]!r} {(length + size) // size} times"
    return ""


def _runs(equal: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(start, length) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8)))
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield start, end - start


def repeated_within_word(text: str) -> str:
    """A word without spaces that repeats a part of itself."""
    for token in text.split():
        if len(token) < LONG_WORD[0]:
            continue
        for found in _WORD_UNIT.finditer(token):
            letters = any(character.isalpha() for character in found[1])
            if len(found[0]) >= LONG_WORD[0 if letters else 1]:
                return f"{found[1]!r} {len(found[0]) // len(found[1])} times"
    return ""


def repeated_sentences(text: str) -> str:
    """Most words stand in sentences of five words or more that were there before."""
    seen: set[str] = set()
    total = repeated = 0
    last = ""
    for sentence in _SENTENCE_END.split(text.lower()):
        tokens = _TOKEN.findall(sentence)
        total += len(tokens)
        key = " ".join(tokens)
        if len(tokens) < 5 or not _HAS_WORD.search(key):
            continue
        if key in seen:
            repeated += len(tokens)
            last = key
        seen.add(key)
    if repeated >= REPEATED_WORDS and repeated > REPEATED_SHARE * total:
        return f"{repeated / total:.0%} of the words stand in repeated sentences, as {last[:60]!r}"
    return ""
