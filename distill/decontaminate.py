"""Which prompts and traces hold an item of a benchmark, so that no student is tested on what it was taught.

DeepSeek's rule is a 10-gram in common with a question or a reference solution (v1, section 3). It says nothing of items
shorter than ten words, and drops every problem of a template that a benchmark uses too. So, our choice:

- A phrase of four words (numbers and letters as blanks) that stands in many items of a benchmark is boilerplate. An
  n-gram is evidence where at least half of its words stand outside of such phrases.
- A question without any evidence, short or templated, is matched as a whole: its words, numbers and operators in order,
  anywhere in the text. Where the question alone says too little ("Which of these is true?"), its choices must be
  there too.
- A text that is just a question, or a question with its choices, is always matched.

Words are those of `words.py`, so case, punctuation and spacing do not count. A match names the item, never its text:
some benchmarks may not be printed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.recipe import Decontaminate
from distill.records import Decision, Problem, Trace
from distill.words import LETTER, NUMBER, OPERATOR, Hashes, Words, hash_text, sequence, windows, words
from eval.benchmark import load
from eval.sample import Record, Sample
from eval.tasks import TASKS, get_task

PHRASE = 4  # words
RECURS = (5, 1000)  # a phrase is boilerplate in more items than 5, or than one in a thousand
TELLING = 5  # words of a question that, unique in its benchmark, needs no choices beside it

_BLANK = np.uint64(hash_text(""))


@dataclass(frozen=True, slots=True)
class Match(Record):
    """The item that a text holds; `how` is "exact", "10-gram" (or another n) or "containment"."""

    benchmark: str
    item: str
    how: str

    def __str__(self) -> str:
        return f"{self.benchmark} {self.item}, {self.how}"


def load_benchmarks(settings: Decontaminate) -> Iterator[Sample]:
    """All items of the benchmarks, one benchmark after the other. Raises ValueError for one that cannot be had."""
    for name in TASKS if settings.benchmarks == "all" else settings.benchmarks:
        task = get_task(name)
        try:
            samples = load(task, None if settings.data is None else Path(settings.data))
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"decontaminate: the benchmark {name} cannot be read: {error}. Make it available, or name in "
                f"decontaminate.benchmarks those to look for, without {name}: scores on it would then prove nothing"
            ) from error
        yield from samples


def load_index(settings: Decontaminate) -> "Index":
    """The index of the benchmarks that a recipe names."""
    return Index.build(load_benchmarks(settings), settings.ngram)


def prompts(problems: Iterable[Problem], index: "Index") -> Iterator[Decision]:
    """One decision a problem, by its question and choices."""
    for problem in problems:
        yield _decision(problem.id, index.match("\n".join((problem.question, *problem.choices))))


def traces(rows: Iterable[Trace], index: "Index") -> Iterator[Decision]:
    """One decision a trace, by its thought and by its response."""
    for trace in rows:
        yield _decision(trace.id, index.match(trace.thought) or index.match(trace.response))


def _decision(name: str, match: Match | None) -> Decision:
    return Decision(name) if match is None else Decision(name, "contaminated", str(match))


@dataclass(frozen=True, slots=True)
class Whole:
    """A question that is matched as a whole: `hashes` are its words and operators, `size` of them words, `lead` the
    operators that come first. It is looked for where its words from the `offset`-th on stand, whose hash is `anchor`,
    and with each of `choices`."""

    item: int
    hashes: Hashes
    size: int
    lead: int
    anchor: int
    offset: int
    choices: tuple[Hashes, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """What `match` looks up: 12 bytes for each n-gram, some hundred for each whole question."""

    ngram: int
    items: Sequence[tuple[str, str]]  # benchmark, id
    grams: Hashes  # sorted, each once
    owners: NDArray[np.int32]  # the item of each
    exact: Mapping[int, int]  # hash of a whole text: item
    wholes: Sequence[Whole]
    anchors: Mapping[int, tuple[Hashes, NDArray[np.int32]]]  # by length: sorted hashes, the place in `wholes` of each

    @classmethod
    def build(cls, samples: Iterable[Sample], ngram: int = 10) -> "Index":
        """The index of benchmarks whose samples stand together, one benchmark after the other."""
        items: list[tuple[str, str]] = []
        exact: dict[int, int] = {}
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        wholes: list[Whole] = []
        for benchmark, group in groupby(samples, key=lambda sample: sample.task):
            read = []
            for sample in group:
                read.append(_read(sample, len(items)))
                whole = words("\n".join((sample.question, *sample.choices))) if sample.choices else read[-1].question
                for text in (read[-1].question, whole):
                    exact.setdefault(sequence(text.hashes), len(items))
                items.append((benchmark, sample.id))
            texts = {sequence(text.hashes): (one.item, text) for one in reversed(read) for text in one.texts()}
            evidence = _evidence(texts, len(read), ngram)
            hashes += evidence.values()
            owners += [np.full(len(own), texts[key][0], np.int32) for key, own in evidence.items()]
            wholes += _wholes([one for one in read if not len(evidence[sequence(one.question.hashes)])], read, ngram)
        exact.pop(sequence(np.empty(0, np.uint64)), None)
        grams, places = np.unique(np.concatenate(hashes), return_index=True)
        return cls(ngram, items, grams, np.concatenate(owners)[places], exact, wholes, _anchors(wholes, ngram))

    def match(self, text: str) -> Match | None:
        """The first item that is found in a text: as the whole text, by an n-gram, as a part of it."""
        found = words(text)
        if (item := self.exact.get(sequence(found.hashes))) is not None:
            return Match(*self.items[item], "exact")
        plain = found.without_operators().hashes
        if (item := self._by_gram(plain)) is not None:
            return Match(*self.items[item], f"{self.ngram}-gram")
        if (item := self._by_whole(found, plain)) is not None:
            return Match(*self.items[item], "containment")
        return None

    def _by_gram(self, plain: Hashes) -> int | None:
        searched = windows(plain, self.ngram)
        hits = searched[_in(searched, self.grams)]
        return int(self.owners[np.searchsorted(self.grams, hits[0])]) if len(hits) else None

    def _by_whole(self, found: Words, plain: Hashes) -> int | None:
        positions = np.flatnonzero(found.kinds != OPERATOR)
        for length, (hashes, places) in self.anchors.items():
            searched = windows(plain, length)
            first, last = np.searchsorted(hashes, searched, "left"), np.searchsorted(hashes, searched, "right")
            for at in np.flatnonzero(last > first).tolist():
                for place in places[first[at] : last[at]].tolist():
                    whole = self.wholes[place]
                    if _stands(whole, found.hashes, positions, at) and all(_holds(plain, one) for one in whole.choices):
                        return whole.item
        return None


def _in(searched: Hashes, listed: Hashes) -> NDArray[np.bool_]:
    """Which values stand in a sorted array; np.isin would sort it each time."""
    if not len(listed):
        return np.zeros(len(searched), np.bool_)
    entries = np.minimum(np.searchsorted(listed, searched), len(listed) - 1)
    return np.asarray(listed[entries] == searched)


def _stands(whole: Whole, hashes: Hashes, positions: NDArray[np.intp], at: int) -> bool:
    """Whether all of a question stands where the text's words from the `at`-th on are its words at `offset`."""
    first = at - whole.offset
    if first < 0 or first + whole.size > len(positions):
        return False
    start = positions[first] - whole.lead
    return bool(start >= 0 and np.array_equal(hashes[start : start + len(whole.hashes)], whole.hashes))


def _holds(plain: Hashes, part: Hashes) -> bool:
    return bool((windows(plain, len(part)) == windows(part, len(part))).any())


# Building.


@dataclass(frozen=True, slots=True)
class _Item:
    item: int
    question: Words
    choices: tuple[Words, ...]
    others: tuple[Words, ...]  # reference solution, passage

    def texts(self) -> tuple[Words, ...]:
        return (self.question, *self.choices, *self.others)


def _read(sample: Sample, item: int) -> _Item:
    others = [str(sample.meta[name]) for name in ("solution", "passage") if sample.meta.get(name)]
    return _Item(item, words(sample.question), tuple(map(words, sample.choices)), tuple(map(words, others)))


def _evidence(texts: Mapping[int, tuple[int, Words]], items: int, ngram: int) -> dict[int, Hashes]:
    """The n-grams of each text that are evidence. A passage that many questions share is one text."""
    seen = [np.unique(windows(_blanked(text.without_operators()), PHRASE)) for _, text in texts.values()]
    phrases, counts = np.unique(np.concatenate(seen), return_counts=True)
    common = phrases[counts > max(RECURS[0], items // RECURS[1])]
    evidence = {}
    for key, (_, text) in texts.items():
        plain = text.without_operators()
        boilerplate = np.zeros(len(plain.hashes), np.int64)
        for start in np.flatnonzero(_in(windows(_blanked(plain), PHRASE), common)).tolist():
            boilerplate[start : start + PHRASE] = 1
        sums = np.concatenate([[0], np.cumsum(boilerplate)])
        telling = (sums[ngram:] - sums[:-ngram]) * 2 <= ngram
        evidence[key] = windows(plain.hashes, ngram)[telling]
    return evidence


def _blanked(text: Words) -> Hashes:
    return np.where((text.kinds == NUMBER) | (text.kinds == LETTER), _BLANK, text.hashes)


def _wholes(chosen: Sequence[_Item], read: Sequence[_Item], ngram: int) -> list[Whole]:
    """The chosen questions, to be matched as a whole where their rarest n-gram among them stands."""
    repeated = Counter(sequence(one.question.hashes) for one in read)
    plain = [one.question.without_operators().hashes for one in chosen]
    counts = Counter(gram for one in plain for gram in windows(one, ngram).tolist())
    found = []
    for one, own in zip(chosen, plain, strict=True):
        if not len(own):
            continue  # symbols alone: only as an exact text
        grams = windows(own, min(ngram, len(own))).tolist()
        _, offset = min((counts[gram], place) for place, gram in enumerate(grams))
        says_enough = len(own) >= TELLING and repeated[sequence(one.question.hashes)] == 1
        choices = [choice.without_operators().hashes for choice in one.choices]
        lead = int(np.flatnonzero(one.question.kinds != OPERATOR)[0])
        required = () if says_enough else tuple(choice for choice in choices if len(choice))
        found.append(Whole(one.item, one.question.hashes, len(own), lead, grams[offset], offset, required))
    return found


def _anchors(wholes: Sequence[Whole], ngram: int) -> dict[int, tuple[Hashes, NDArray[np.int32]]]:
    """By the number of words of an anchor (`ngram`, or all of a shorter question): its hashes, sorted."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    for place, whole in enumerate(wholes):
        by_length.setdefault(min(ngram, whole.size), []).append((whole.anchor, place))
    anchors = {}
    for length, pairs in sorted(by_length.items()):
        pairs.sort()
        anchors[length] = (
            np.array([one for one, _ in pairs], np.uint64),
            np.array([one for _, one in pairs], np.int32),
        )
    return anchors
