"""How far a judge can be trusted: answers whose verdict rules know, and how many of them a judge knew.

Pure; `judge.Judging.calibrate` asks the judge.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from distill.problems import CHOICE_STYLE
from distill.records import Problem
from distill.run_dir import fingerprint
from eval.metrics import score_interval
from eval.multiple_choice import LETTERS, render_choices
from eval.sample import Graded, Record, Verdict

UNREADABLE = "no judgement can be read"
"""How the detail of a verdict begins where a judge said nothing that can be read."""


@dataclass(frozen=True, slots=True)
class Known(Record):
    """An answer whose verdict a rule knows: what the judge is tried on."""

    question: str
    reference: str
    answer: str
    correct: bool


def known(problem: Problem, answer: str, verdict: Verdict | None) -> Known | None:
    """What a rule's verdict on an answer (without its thought) is worth for calibration; None for any other verdict
    than right and wrong. The letter of a choice goes with its text."""
    if verdict not in ("correct", "wrong") or not answer.strip():
        return None
    question, reference = problem.question, problem.answer
    if problem.choices:
        question = f"{question}\n{render_choices(problem.choices, CHOICE_STYLE)}"
        reference = f"{reference}) {problem.choices[LETTERS.index(reference)]}"
    return Known(question, reference, answer, verdict == "correct")


@dataclass(frozen=True, slots=True)
class Calibration(Record):
    """How a judge did on answers whose verdict is known. `agreement` is the mean of the shares of right and of wrong
    answers that it knew, so that one which always says the same has a half, and `interval` its 95 % interval.

    `right_kept`, `right_refused`, `wrong_kept` and `wrong_refused` add up to `items`. `exchanged` of them are right
    answers beside another question's published answer, which is wrong; `unreadable` counts, among those refused,
    answers for which no judgement could be read.
    """

    agreement: float
    interval: tuple[float, float]
    items: int
    right_kept: int
    right_refused: int
    wrong_kept: int
    wrong_refused: int
    exchanged: int
    unreadable: int
    floor: float


def choose(items: Iterable[Known], number: int) -> tuple[list[Known], int]:
    """Up to `number` of the items, half of them right and half wrong, chosen by hash: their order says nothing, and no
    more than twice as many are held in memory. Also how many of them were made.

    A good teacher is seldom wrong. Missing wrong answers are made: a right one beside the published answer of another
    question. ValueError where there are no right ones, or no two published answers that differ.
    """
    half = (number + 1) // 2
    right, wrong = _Smallest(2 * half), _Smallest(half)
    for item in items:
        (right if item.correct else wrong).add(item.to_json())
    rights, wrongs = ([Known.from_json(line) for line in one.lines()] for one in (right, wrong))
    if not rights:
        raise ValueError(
            "a judge is calibrated on answers whose verdict rules know, and of those none is right: add problems of "
            "kind math, choice or reasoning_gym which the teacher can solve"
        )
    made: list[Known] = []
    missing = min(half, len(rights)) - len(wrongs)
    pool = [*rights[half:], *rights[:half]]  # those first that are not asked as they are
    for place, one in enumerate(pool):
        later = (*pool[place + 1 :], *pool[:place])
        other = next((two for two in later if two.reference.strip() != one.reference.strip()), None)
        if other is not None and len(made) < missing:
            made.append(replace(one, reference=other.reference, correct=False))
    if not wrongs and not made:
        raise ValueError(
            "a judge is calibrated on right and on wrong answers, and here are only right ones, all to one published "
            "answer: add problems of kind math, choice or reasoning_gym"
        )
    return [*rights[:half], *wrongs, *made], len(made)


class _Smallest:
    """The `size` different lines of smallest hash, whatever the order in which they are added."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.heap: list[tuple[int, str]] = []  # heapq has the smallest first: of the negated hashes, the one to go
        self.ranks: set[int] = set()

    def add(self, line: str) -> None:
        rank = -int(fingerprint("calibration", line), 16)
        if rank in self.ranks:
            return
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, (rank, line))
        elif rank > self.heap[0][0]:
            self.ranks.discard(heapq.heapreplace(self.heap, (rank, line))[0])
        else:
            return
        self.ranks.add(rank)

    def lines(self) -> list[str]:
        return [line for _, line in sorted(self.heap, reverse=True)]


def measured(chosen: Sequence[Known], judged: Sequence[Graded], exchanged: int, floor: float) -> Calibration:
    verdicts = [(item.correct, one.verdict == "correct") for item, one in zip(chosen, judged, strict=True)]
    right, wrong = [kept for known, kept in verdicts if known], [not kept for known, kept in verdicts if not known]
    return Calibration(
        agreement=(sum(right) / len(right) + sum(wrong) / len(wrong)) / 2,
        interval=_interval(right, wrong),
        items=len(chosen),
        right_kept=sum(right),
        right_refused=len(right) - sum(right),
        wrong_kept=len(wrong) - sum(wrong),
        wrong_refused=sum(wrong),
        exchanged=exchanged,
        unreadable=sum(one.detail.startswith(UNREADABLE) for one in judged),
        floor=floor,
    )


def _interval(right: Sequence[bool], wrong: Sequence[bool]) -> tuple[float, float]:
    """Newcombe's interval of a sum of two independent shares, halved: each end from the Wilson ends of both."""
    scores = [score_interval([float(one) for one in half]) for half in (right, wrong)]
    middle = sum(one.value for one in scores) / 2
    below = sum((one.value - one.interval[0]) ** 2 for one in scores) ** 0.5 / 2
    above = sum((one.interval[1] - one.value) ** 2 for one in scores) ** 0.5 / 2
    return max(0.0, middle - below), min(1.0, middle + above)


def below_floor(model: str, found: Calibration) -> str:
    low, high = found.interval
    return (
        f"the judge {model} agrees with the rules on {found.agreement:.1%} [{low:.1%}, {high:.1%}] of {found.items} "
        f"answers, and verify.judge.floor is {found.floor:.1%}: it kept {found.right_kept} of "
        f"{found.right_kept + found.right_refused} right answers and {found.wrong_kept} of "
        f"{found.wrong_kept + found.wrong_refused} wrong ones"
        + (f"; on {found.unreadable} it gave nothing that can be read" if found.unreadable else "")
        + ". Take a stronger judge, or leave out the problems of kind text; its judgements are kept"
    )
