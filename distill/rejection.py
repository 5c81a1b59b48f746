"""Asking the teacher: one call of `teacher.generate`, from the first problem to the last verdict.

    problems --asking.next_indices--> requests --sampler--> completions --> store --verifier, in threads--> verdicts
                    ^                                                                                          |
                    '------------------ how many are right, how many have no verdict yet ---------------------'

Problems are read as there is room, so that only those on their way are in memory.
"""

import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from distill.asking import Asking, Place, Prompt, next_indices, of_shard, stored_verdict, with_verdict
from distill.cost import Meter
from distill.recipe import Budget
from distill.records import Problem
from eval.runner import Progress
from eval.sample import Completion, Graded, Record
from eval.samplers import Request
from eval.store import Store

if TYPE_CHECKING:
    from distill.verify import Verifier

Problems = Callable[[], Iterable[Problem]]
"""Gives the problems from the first, each time that it is called; they are never held all at once."""

BACKLOG = 256  # completions that wait for their verdict before nothing more is asked
HOPELESS_PROBLEMS, HOPELESS_SAMPLES = 200, 1000  # of which none is right: something is wrong with the set-up
HOPELESS_FAILURES = 64  # and not one completion
EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Generated(Record):
    """What `generate` did, and what there is now.

    Problems are `solved` (as many right samples as the recipe wants), `unsolved` (asked as often as it allows) or
    `unfinished` (failures, the budget). Samples are `asked` in this call or `reused`; `failed` ones have no completion
    or no verdict, and are asked or judged again next time. Tokens and dollars are those of all these samples; `seconds`
    counts earlier calls that the caller named. `stopped` says which budget ended it, `incomplete` all that is missing.
    """

    problems: int
    solved: int
    unsolved: int
    unfinished: int
    asked: int
    reused: int
    failed: int
    right: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float
    seconds: float
    stopped: str
    incomplete: str

    def counts(self) -> dict[str, Any]:
        """For the manifest; failed samples stand there among the reasons."""
        names = ("problems", "solved", "unsolved", "unfinished", "asked", "reused", "right")
        return {name: getattr(self, name) for name in (*names, "prompt_tokens", "completion_tokens", "dollars")}


@dataclass(slots=True, eq=False)
class _Open:
    """A problem on its way. Of its first `asked` samples `right` are right and `unknown` have no verdict; `pending` of
    these are still to get one in this call, the others failed."""

    problem: Problem
    prompt: Prompt
    asked: int = 0
    right: int = 0
    unknown: int = 0
    pending: int = 0


@dataclass(frozen=True, slots=True)
class _Sample:
    """What a request's completion belongs to: its `tag`."""

    of: _Open
    index: int
    key: str
    context: dict[str, Any]


class Generation:
    """One call of `teacher.generate`. All of it runs in the caller's thread, but for the verdicts."""

    def __init__(
        self, problems: Problems, asking: Asking, store: Store, verifier: "Verifier", progress: Progress | None,
        shard: tuple[int, int], seconds_before: float,
    ) -> None:  # fmt: skip
        self.problems, self.asking, self.store, self.verifier = problems, asking, store, verifier
        self.progress, self.shard = progress, shard
        self.began = time.monotonic() - seconds_before
        teacher = asking.teacher
        self.spent = Meter(teacher.budget, teacher.price, teacher.max_tokens)  # of the budget: all that is stored
        self.used = Meter(Budget(), teacher.price, teacher.max_tokens)  # for the samples of these problems
        self.ready: deque[Request] = deque()
        self.in_flight = self.judging = 0
        self.judged: queue.SimpleQueue[tuple[_Sample, Completion, Future[Graded]]] = queue.SimpleQueue()
        self.counts: Counter[str] = Counter()
        self.verdicts: Counter[str] = Counter()
        self.examples: list[str] = []
        self.total = 0
        self.failure = self.stopped = ""
        self.error: Exception | None = None

    def run(self, pool: ThreadPoolExecutor) -> Generated:
        """Everything; `teacher.generate` says what it raises."""
        self.pool = pool
        self.total = sum(1 for _ in self._mine()) if self.progress else 0
        self._count_spent()
        requests = self._requests()
        first = next(requests, None)  # goes through what is stored, up to the first sample that is not
        if first is not None:
            self.asking.sampler.check(self._prompts())
            for request, completion in self.asking.sampler.sample(chain([first], requests)):
                self._came(request.tag, completion)
        if self.error is not None:
            raise self.error
        if self.in_flight:
            raise RuntimeError(f"the sampler gave nothing back for {self.in_flight} requests")
        if self.verdicts and not self.verdicts["correct"] and not (self.stopped or self.counts["failed"]):
            raise ValueError(self._hopeless())
        return self._result()

    def _mine(self) -> Iterator[Problem]:
        return of_shard(self.problems(), self.shard)

    def _count_spent(self) -> None:
        """What earlier calls spent of a budget of tokens or dollars."""
        budget = self.asking.teacher.budget
        if budget.tokens is None and budget.dollars is None:
            return
        for stored in self.store:
            if stored.context.get("teacher") == self.asking.fingerprint:
                self.spent.add(stored.completion)

    def _prompts(self) -> Iterator[Request]:
        """A request for every problem: all of them are rendered and checked before the first is asked."""
        for done, problem in enumerate(self._mine(), 1):
            yield self.asking.request(problem, self.asking.prompt(problem), 0)
            if self.progress:
                self.progress("checking prompts", done, self.total, "")

    # Asking. `_requests` is read by the sampler whenever it has room.

    def _requests(self) -> Iterator[Request | None]:
        problems = self._mine()
        while True:
            self._collect()
            self._watch_budget()
            if self.ready:
                if self.spent.room(self.in_flight, self._seconds()):
                    self.in_flight += 1
                    self.counts["asked"] += 1
                    yield self.ready.popleft()
                else:
                    yield None  # the budget is nearly used up: wait for what is on its way
            elif self.judging >= BACKLOG:
                self._collect(wait=True)
            elif self.error is None and (problem := next(problems, None)) is not None:
                self._go_on(_Open(problem, self.asking.prompt(problem)))
            elif self.in_flight:
                yield None
            elif self.judging:
                self._collect(wait=True)
            else:
                return

    def _go_on(self, one: _Open) -> None:
        """Asks for what a problem wants next, as far as that is known; closes it when nothing is on its way."""
        while indices := next_indices(one.asked, one.right, one.unknown, self.asking.teacher):
            for place in self.asking.look_up(self.store, one.problem, one.prompt, indices):
                one.asked += 1
                one.unknown += 1
                self._take(one, place)
        if not one.pending:
            self._close(one)

    def _take(self, one: _Open, place: Place) -> None:
        """A sample that is wanted: reused if it is there, and judged if it has no verdict; else asked for."""
        stored = place.stored
        if stored is None or stored.completion.finish_reason == "failed":
            if not self._over:
                one.pending += 1
                context = self.asking.context(one.problem, one.prompt, place.index)
                self.ready.append(replace(place.request, tag=_Sample(one, place.index, place.key, context)))
            return
        self.counts["reused"] += 1
        self.used.add(stored.completion)
        graded = stored_verdict(stored.context, one.problem, self.verifier)
        sample = _Sample(one, place.index, place.key, stored.context)
        if one.problem.kind == "none" or (graded is not None and graded.verdict != "failed"):
            self._known(sample, stored.completion, graded)
        elif self.error is None:
            self._judge(sample, stored.completion)

    def _close(self, one: _Open) -> None:
        teacher, counts = self.asking.teacher, self.counts
        counts["problems"] += 1
        if one.right >= teacher.correct:
            counts["solved"] += 1
        elif one.unknown:
            counts["unfinished"] += 1
        else:
            counts["unsolved"] += 1
        if counts["unsolved"] >= HOPELESS_PROBLEMS and not counts["solved"]:
            self._give_up_if_none_is_right()
        if self.progress:
            self.progress("asking the teacher", counts["problems"], self.total, self._note())

    def _note(self) -> str:
        judged = sum(self.verdicts.values())
        parts = [f"{self.verdicts['correct'] / judged:.0%} right"] if judged else []
        parts.append(f"{_short(self.used.completion_tokens)} tokens")
        if dollars := self.used.dollars(self._seconds()):
            parts.append(f"${dollars:,.2f}")
        if self.counts["failed"]:
            parts.append(f"{self.counts['failed']:,} failed")
        return ", ".join(parts)

    @property
    def _over(self) -> bool:
        """Nothing more is asked; what is on its way is waited for."""
        return bool(self.stopped) or self.error is not None

    def _watch_budget(self) -> None:
        if not self._over:
            self.stopped = self.spent.ended(self._seconds())
        while self._over and self.ready:
            one = self.ready.popleft().tag.of
            one.pending -= 1
            self._go_on(one)

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    # What comes back: completions, stored before anything else is done with them, and verdicts.

    def _came(self, sample: _Sample, completion: Completion) -> None:
        self.in_flight -= 1
        sample.of.pending -= 1
        self.store.put(sample.key, completion, sample.context)
        if completion.finish_reason == "failed":
            self._fails(completion.error or "")
            if self.counts["failed"] >= HOPELESS_FAILURES and not self.used.samples and self.error is None:
                failed = self.counts["failed"]
                self.error = ValueError(f"the first {failed} completions all failed, the last with: {self.failure}")
            self._go_on(sample.of)
            return
        self.used.add(completion)
        try:
            self.spent.add(completion)
        except ValueError as error:  # a budget that cannot be kept
            self.error = self.error or error
        if sample.of.problem.kind == "none":
            self._known(sample, completion, None)
            self._go_on(sample.of)
        else:
            self._judge(sample, completion)

    def _judge(self, sample: _Sample, completion: Completion) -> None:
        sample.of.pending += 1
        self.judging += 1
        future = self.pool.submit(self.verifier.grade, sample.of.problem, completion, sample.context["opened"])
        future.add_done_callback(lambda done: self.judged.put((sample, completion, done)))

    def _collect(self, wait: bool = False) -> None:
        """Takes the verdicts that are there; with `wait`, at least one."""
        while wait or not self.judged.empty():
            wait = False
            sample, completion, future = self.judged.get()
            self.judging -= 1
            sample.of.pending -= 1
            try:
                graded = future.result()
            except Exception as error:  # the judge cannot be reached, say: it ends the call when all is stored
                self.error = self.error or error
            else:
                self.store.set_context(sample.key, with_verdict(sample.context, graded))
                if graded.verdict == "failed":
                    self._fails(graded.detail)
                else:
                    self._known(sample, completion, graded)
            self._go_on(sample.of)

    def _known(self, sample: _Sample, completion: Completion, graded: Graded | None) -> None:
        """Counts a sample that has its verdict, or that needs none."""
        one = sample.of
        one.unknown -= 1
        if graded is None:
            one.right += 1
            return
        one.right += graded.verdict == "correct"
        self.verdicts[graded.verdict] += 1
        if len(self.examples) < EXAMPLES and graded.verdict != "correct":
            self.examples.append(_example(one.problem, completion, graded))
        if sum(self.verdicts.values()) >= HOPELESS_SAMPLES:
            self._give_up_if_none_is_right()

    def _give_up_if_none_is_right(self) -> None:
        if not self.verdicts["correct"] and self.error is None:
            self.error = ValueError(self._hopeless())

    def _fails(self, why: str) -> None:
        self.counts["failed"] += 1
        self.failure = why

    # The end.

    def _hopeless(self) -> str:
        shown = ", ".join(f"{count:,} {verdict}" for verdict, count in self.verdicts.most_common())
        return (
            f"none of the first {sum(self.verdicts.values()):,} samples is right ({shown}): the prompt, the answers or "
            "the teacher must be wrong. All samples are kept, and judged again when an answer or a grader has changed. "
            "Examples:\n  " + "\n  ".join(self.examples)
        )

    def _result(self) -> Generated:
        counts, used, seconds = self.counts, self.used, self._seconds()
        missing = [self.stopped] if self.stopped else []
        if counts["failed"]:
            missing.append(
                f"{counts['failed']:,} samples failed (the last: {self.failure}), and are asked again next time"
            )
        if counts["unfinished"]:
            missing.append(f"{counts['unfinished']:,} of {counts['problems']:,} problems are unfinished")
        generated = Generated(
            problems=counts["problems"], solved=counts["solved"], unsolved=counts["unsolved"],
            unfinished=counts["unfinished"], asked=counts["asked"], reused=counts["reused"], failed=counts["failed"],
            right=self.verdicts["correct"], prompt_tokens=used.prompt_tokens, completion_tokens=used.completion_tokens,
            dollars=used.dollars(seconds), seconds=seconds, stopped=self.stopped, incomplete="; ".join(missing),
        )  # fmt: skip
        assert generated.problems == generated.solved + generated.unsolved + generated.unfinished
        return generated


def _short(number: int) -> str:
    """`980`, `12.3k`, `4.56M`"""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _example(problem: Problem, completion: Completion, graded: Graded) -> str:
    end = " ".join(completion.text[-200:].split())
    return (
        f"problem {problem.id} ({problem.source}, row {problem.row}): {graded.verdict}, {graded.detail}; read "
        f"{graded.answer!r}, the answer is {problem.answer!r}; the text ends in {end!r}"
    )
