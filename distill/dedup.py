"""Near copies of prompts and of traces, found in linear time: MinHash signatures, banded, and every match verified.

Beside `decontaminate.py`, which compares with benchmarks, this compares the rows of a run with each other.

A text is the set of its shingles, three successive words each; two texts are near copies where the Jaccard similarity
of the sets reaches the threshold. In a long template that is not enough, since only its figures make the problem: near
copies of prompts also have the same figures (`words.figures`: numbers, operators, symbols, drawings, in order) and the
same answer, near copies of traces the same figures or the same problem.

Signatures are datasketch's MinHash. Its index is not used: it holds a Python set for each row and band, where the
arrays here take 8 bytes. Rows whose signatures agree in a band are candidates; these are read again, and only the true
similarity of their sets drops one. So no collision drops a row, and the rows are read twice: what gives them is a
function that begins anew at each call.
"""

import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TypeVar

import numpy as np
from numpy.typing import NDArray

from distill.records import Decision, Problem, Trace
from distill.words import Hashes, figures, folded, hash_text, mixed, sequence, windows, words

PERMUTATIONS = 128
SHINGLE = 3  # words
MISSED = 1e-3  # the probability, at most, that two texts just at the threshold share no band
CANDIDATES = 32  # kept rows of one bucket that a row is compared with: so that no bucket, however full, costs more


@dataclass(frozen=True, slots=True)
class Text:
    """What is compared. Only rows that share a label, each at its place, can be near copies; of those that are, the one
    with the smallest `rank` stays, the first one among equals."""

    text: str
    labels: tuple[int, ...]
    rank: int = 0


def prompts(problems: Callable[[], Iterable[Problem]], threshold: float | None) -> Iterator[Decision]:
    """One decision a problem, in order: of near copies the first stays. None keeps all."""
    return near_copies(problems, _prompt, threshold)


def traces(rows: Callable[[], Iterable[Trace]], threshold: float | None) -> Iterator[Decision]:
    """One decision a trace, in order. Of near copies the best stays, and all are right: the shorter one (our choice;
    it costs less to learn and to write), the first one among equals. None keeps all."""
    return near_copies(rows, _trace, threshold)


def _prompt(problem: Problem) -> Text:
    text = "\n".join((problem.question, *problem.choices))
    answer = problem.answer
    if problem.kind == "choice" and len(answer) == 1 and 0 <= (place := ord(answer) - ord("A")) < len(problem.choices):
        answer = problem.choices[place]  # the letter depends on the order
    return Text(text, (hash_text(f"{figures(text)} {' '.join(answer.casefold().split())}"),))


def _trace(trace: Trace) -> Text:
    text = f"{trace.thought}\n{trace.response}"
    return Text(text, (hash_text(f"problem {trace.problem_id}"), figures(text)), rank=len(text))


def content(text: str) -> Hashes:
    """The words, or the text as one word where it has nothing but symbols."""
    found = words(text).hashes
    return found if len(found) else np.array([hash_text(" ".join(text.split()))], np.uint64)


def shingles(found: Hashes) -> NDArray[np.uint32]:
    """The set of hashes of three successive words, sorted. The ends are padded, so that every word is in three."""
    ends = np.zeros(SHINGLE - 1, np.uint64)
    hashes = windows(np.concatenate([ends, found, ends]), SHINGLE)
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def jaccard(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    """|A and B| / |A or B| of two sorted arrays without repetition."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of each): the widest bands that still find a pair at the threshold with probability 1 - `MISSED`.

    A pair of similarity s agrees in a band of r rows with probability s^r, so it is missed with (1 - s^r)^b.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is no similarity; give a number above 0, up to 1, or null for none")
    for width in range(PERMUTATIONS, 0, -1):
        count = PERMUTATIONS // width
        if (1 - threshold**width) ** count <= MISSED:
            return count, width
    raise ValueError(
        f"threshold={threshold} is too small for {PERMUTATIONS} permutations: pairs would be missed more often than "
        f"{MISSED:g}; give at least 0.06"
    )


R = TypeVar("R", Problem, Trace)


def near_copies(
    rows: Callable[[], Iterable[R]], read: Callable[[R], Text], threshold: float | None
) -> Iterator[Decision]:
    """One decision a row, in order. A row is dropped where one that stays is a copy of smaller rank, or an earlier copy
    of the same rank."""
    if threshold is None:
        yield from (Decision(row.id) for row in rows())
        return
    sketches = _sketch(rows(), read, *bands(threshold))
    if sketches is None:
        return
    found = _same_words(sketches)
    alive = np.ones(len(sketches.ids), np.bool_)
    alive[list(found)] = False
    buckets = _buckets(sketches.bands, alive)
    with tempfile.TemporaryFile() as file:
        sets = _Sets(file, len(sketches.ids))
        for place, row in enumerate(rows()):
            if buckets.shared[place]:
                sets.write(place, shingles(content(read(row).text)))
        near = _near(buckets, sketches, sets, threshold)
    # What a row repeats word for word may be a near copy of a third, which is the one that stays.
    found = {copy: near.get(original, (original, 1.0)) for copy, (original, _) in found.items()} | near
    for place, name in enumerate(sketches.ids):
        if place in found:
            original, similarity = found[place]
            yield Decision(name, "near_duplicate", f"{sketches.ids[original]}, similarity {similarity:.3f}")
        else:
            yield Decision(name)


Found = dict[int, tuple[int, float]]  # a row that is dropped: the row that it repeats, and their similarity


@dataclass(frozen=True, slots=True)
class _Sketches:
    """Of n rows: ids, ranks, labels, a hash of all words, and one of each band of the signature with each label."""

    ids: Sequence[str]
    ranks: NDArray[np.int64]
    labels: Hashes  # [n, labels]
    contents: Hashes  # [n]
    bands: NDArray[np.uint32]  # [n, labels * bands]


def _sketch(rows: Iterable[R], read: Callable[[R], Text], count: int, width: int) -> _Sketches | None:
    from datasketch import MinHash  # imports scipy

    empty = MinHash(PERMUTATIONS, seed=1, hashfunc=int)
    ids: list[str] = []
    ranks, marks, contents, banded = array("q"), array("Q"), array("Q"), array("I")
    numbers = np.arange(count, dtype=np.uint64)
    for row in rows:
        compared, signature = read(row), empty.copy()
        found = content(compared.text)
        hashes = shingles(found)
        for start in range(0, len(hashes), 4096):  # datasketch takes 512 bytes for each
            signature.update_batch(hashes[start : start + 4096].tolist())
        values: Hashes = signature.hashvalues[: count * width].astype(np.uint64).reshape(count, width)
        labels = np.array(compared.labels, np.uint64)
        by_label = mixed(folded([numbers, *values.T])[None, :] ^ labels[:, None])
        ids.append(row.id)
        ranks.append(compared.rank)
        marks.extend(compared.labels)
        contents.append(hash_text(f"{sequence(found)} {compared.labels[-1]}"))
        banded.frombytes((by_label >> np.uint64(32)).astype(np.uint32).tobytes())
    if not ids:
        return None
    return _Sketches(
        ids,
        np.frombuffer(ranks, np.int64),
        np.frombuffer(marks, np.uint64).reshape(len(ids), -1),
        np.frombuffer(contents, np.uint64),
        np.frombuffer(banded, np.uint32).reshape(len(ids), -1),
    )


def _same_words(sketches: _Sketches) -> Found:
    """Rows that repeat another word for word, each with the best of those that it repeats."""
    found: Found = {}
    order = np.lexsort((sketches.ranks, sketches.contents))  # stable: the first one among equals
    best = -1
    for place in order.tolist():
        if best >= 0 and sketches.contents[place] == sketches.contents[best]:
            found[place] = (best, 1.0)
        else:
            best = place
    return found


@dataclass(frozen=True, slots=True)
class _Buckets:
    """The rows that agree in one column of bands are a bucket: `starts[row, column]` is its first place in
    `kept[:, column]`, which has one for each of its rows. `shared` are rows that are not alone in all buckets."""

    starts: NDArray[np.int32]  # [n, columns]
    kept: NDArray[np.int32]  # [n, columns], -1 where no row stands
    shared: NDArray[np.bool_]  # [n]


def _buckets(banded: NDArray[np.uint32], alive: NDArray[np.bool_]) -> _Buckets:
    starts = np.zeros(banded.shape, np.int32)
    shared = np.zeros(len(banded), np.bool_)
    places = np.flatnonzero(alive)
    for column in range(banded.shape[1]):
        values = banded[places, column]
        order = np.argsort(values, kind="stable")
        new = np.ones(len(order), np.bool_)
        new[1:] = values[order[1:]] != values[order[:-1]]
        first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
        starts[places[order], column] = first
        alone = new & np.append(new[1:], True)
        shared[places[order[~alone]]] = True
    return _Buckets(starts, np.full(banded.shape, -1, np.int32), shared)


def _near(buckets: _Buckets, sketches: _Sketches, sets: "_Sets", threshold: float) -> Found:
    """Rows in the order of their ranks: each is compared with the kept rows of its buckets, and kept or found."""
    found: Found = {}
    places = np.flatnonzero(buckets.shared)
    for place in places[np.argsort(sketches.ranks[places], kind="stable")].tolist():
        starts = buckets.starts[place].tolist()
        candidates: dict[int, None] = {}
        ends = []
        for column, start in enumerate(starts):
            # One place of the bucket is still free, since this row is not in it.
            slots = buckets.kept[start : start + CANDIDATES, column].tolist()
            size = slots.index(-1) if -1 in slots else CANDIDATES
            candidates.update(dict.fromkeys(slots[:size]))
            ends.append(size)
        own, labels = sets.read(place), sketches.labels[place]
        alike = [one for one in candidates if (labels == sketches.labels[one]).any()]
        similarity, best = max(((jaccard(own, sets.read(one)), -one) for one in alike), default=(0.0, 0))
        if similarity >= threshold:
            found[place] = (-best, similarity)
            continue
        for column, (start, size) in enumerate(zip(starts, ends, strict=True)):
            if size < CANDIDATES:
                buckets.kept[start + size, column] = place
    return found


class _Sets:
    """Shingles of the rows that have candidates, in a file: of long traces they are as large as the text."""

    def __init__(self, file: IO[bytes], rows: int) -> None:
        self._file = file
        self._at = np.zeros((rows, 2), np.int64)  # offset and size in bytes

    def write(self, place: int, values: NDArray[np.uint32]) -> None:
        self._at[place] = self._file.tell(), values.nbytes
        self._file.write(values.tobytes())

    def read(self, place: int) -> NDArray[np.uint32]:
        self._file.flush()
        offset, size = self._at[place].tolist()
        return np.frombuffer(os.pread(self._file.fileno(), size, offset), np.uint32)
