"""What generation costs: dollars, where a budget ends it, and how much a whole run will take, from a pilot of it.

Functions of numbers: no clock, no store. `teacher.py` counts with a `Meter`; the plan of a recipe is an `estimate`.
"""

import hashlib
import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from distill.recipe import Budget, Price
from distill.records import Problem
from eval.sample import Completion, Record


def dollars(price: Price, prompt_tokens: float, completion_tokens: float, seconds: float) -> float:
    """Tokens at an endpoint's price, and seconds of the machine at its own."""
    return (
        prompt_tokens / 1e6 * price.prompt_per_million
        + completion_tokens / 1e6 * price.completion_per_million
        + seconds / 3600 * price.machine_per_hour
    )


@dataclass(slots=True)
class Meter:
    """What was used so far, against the budget. `max_tokens` stands for the length of a completion until one came.

    The budget is one of the whole generation, however often it was interrupted: its caller adds what is stored, too.
    """

    budget: Budget
    price: Price
    max_tokens: int
    samples: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, completion: Completion) -> None:
        """Counts a completion. ValueError where the budget is in tokens, or in dollars for them, and none were counted
        for it: such a budget would never end."""
        if completion.finish_reason == "failed":
            return
        self.samples += 1
        self.prompt_tokens += completion.prompt_tokens or 0
        self.completion_tokens += completion.completion_tokens or 0
        limits = {"tokens": self.budget.tokens is not None, "dollars": self._pays_for_tokens}
        for limit, counted in limits.items():
            if counted and completion.completion_tokens is None:
                raise ValueError(
                    f"budget.{limit} cannot be kept: the engine does not count its tokens (no `usage` in its answers); "
                    "set budget.hours instead"
                )

    @property
    def _pays_for_tokens(self) -> bool:
        priced = self.price.prompt_per_million or self.price.completion_per_million
        return self.budget.dollars is not None and bool(priced)

    def dollars(self, seconds: float) -> float:
        return dollars(self.price, self.prompt_tokens, self.completion_tokens, seconds)

    def ended(self, seconds: float) -> str:
        """Which budget is used up, in words; "" while none is. `seconds` is the time of generation so far."""
        budget, spent = self.budget, self.dollars(seconds)
        if budget.tokens is not None and self.completion_tokens >= budget.tokens:
            return f"the budget of {budget.tokens:,} completion tokens is used up ({self.completion_tokens:,})"
        if budget.dollars is not None and spent >= budget.dollars:
            return f"the budget of ${budget.dollars:,.2f} is used up (${spent:,.2f})"
        if budget.hours is not None and seconds >= budget.hours * 3600:
            return f"the budget of {budget.hours:g} hours is used up"
        return ""

    def room(self, in_flight: int, seconds: float) -> bool:
        """Whether one more request is likely to stay within the budget, if those in flight turn out as long as the mean
        so far: near its end fewer and fewer are asked at a time, one by one at last, so that it is hardly overdrawn."""
        if not in_flight:
            return True
        mean = self.completion_tokens / self.samples if self.samples else self.max_tokens
        prompt = self.prompt_tokens / self.samples if self.samples else 0.0
        budget, more = self.budget, in_flight + 1
        if budget.tokens is not None and self.completion_tokens + more * mean > budget.tokens:
            return False
        return budget.dollars is None or (
            self.dollars(seconds) + dollars(self.price, more * prompt, more * mean, 0.0) <= budget.dollars
        )


# The plan.


@dataclass(frozen=True, slots=True)
class Spent(Record):
    """What one problem of a pilot took: samples until it was done, their tokens, and whether it was solved."""

    samples: int
    prompt_tokens: int
    completion_tokens: int
    solved: bool


@dataclass(frozen=True, slots=True)
class Range(Record):
    """An expected total and its 95 % interval."""

    expected: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate(Record):
    """What generation will take for `problems` problems, from `pilot` of them, which are included."""

    problems: int
    pilot: int
    samples: Range
    solved: Range
    prompt_tokens: Range
    completion_tokens: Range
    hours: Range
    dollars: Range


def pilot(problems: Iterable[Problem], size: int, seed: int) -> list[Problem]:
    """`size` problems drawn at random from all of them, by a hash of seed and id; each source has its share. Only these
    are held in memory. Sorted by id."""

    def place(problem: Problem) -> bytes:
        return hashlib.sha256(f"{seed}\0pilot\0{problem.id}".encode()).digest()

    return sorted(heapq.nsmallest(size, problems, key=place), key=lambda problem: problem.id)


def estimate(spent: Sequence[Spent], problems: int, price: Price, seconds: float) -> Estimate:
    """The totals for all `problems`, from what a random pilot of them took, `seconds` in all.

    The rest is predicted: its total varies with the pilot's mean and in itself, so that with n of N problems known
    the variance is s^2 (N - n)^2 (1/n + 1/(N - n)); Student's t gives the interval. Hours are tokens at the pilot's
    rate, which a longer run with a fuller batch may exceed. ValueError for fewer than two problems.
    """
    if len(spent) < 2:
        raise ValueError(f"a pilot of {len(spent)} problems says nothing of how much they differ: take two at least")
    if problems < len(spent):
        raise ValueError(f"a pilot of {len(spent)} problems cannot be part of {problems}")
    written = sum(one.completion_tokens for one in spent)

    def time(one: Spent) -> float:
        return seconds * (one.completion_tokens / written if written else 1 / len(spent))

    def total(value: Callable[[Spent], float]) -> Range:
        return _total([value(one) for one in spent], problems)

    solved = total(lambda one: one.solved)
    return Estimate(
        problems=problems,
        pilot=len(spent),
        samples=total(lambda one: one.samples),
        solved=replace(solved, high=min(solved.high, problems)),
        prompt_tokens=total(lambda one: one.prompt_tokens),
        completion_tokens=total(lambda one: one.completion_tokens),
        hours=total(lambda one: time(one) / 3600),
        dollars=total(lambda one: dollars(price, one.prompt_tokens, one.completion_tokens, time(one))),
    )


def _total(values: Sequence[float], problems: int) -> Range:
    """The sum over all problems; never less than what the pilot itself took."""
    n, rest = len(values), problems - len(values)
    known, mean = math.fsum(values), math.fsum(values) / n
    expected = known + rest * mean
    if not rest:
        return Range(expected, expected, expected)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = _t(n - 1) * math.sqrt(variance * rest**2 * (1 / n + 1 / rest))
    return Range(expected, max(known, expected - half), expected + half)


@cache
def _t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))
