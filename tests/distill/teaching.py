"""Problems, and a teacher that answers from prompt and seed alone, as far as a test of the sampling needs them."""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.recipe import Teacher, Verify
from distill.records import Decision, Problem, Trace
from distill.teacher import generate, traces
from eval.sample import Completion, Graded
from eval.samplers import Message, Request
from eval.store import Store, key


def problem(number: int, **changes: Any) -> Problem:
    values = dict(
        id=hashlib.sha256(str(number).encode()).hexdigest()[:16], kind="math", domain="math",
        question=f"{number} + {number} =", answer=str(2 * number), source="sums", row=number,
    )  # fmt: skip
    return Problem(**{**values, **changes})


def sums(count: int, first: int = 0) -> list[Problem]:
    return [problem(number) for number in range(first, first + count)]


def settings(**changes: Any) -> Teacher:
    """Two right samples of at most eight, at temperature 1."""
    values = dict(
        engine="transformers", model="stub", temperature=1.0, max_tokens=100, correct=2, most=8,
        prompt="Work out {question}",
    )  # fmt: skip
    return Teacher(**{**values, **changes})


def fraction(*parts: object) -> float:
    """In [0, 1), by sha256 of the parts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8]) / 2**64


def chance(question: str) -> float:
    """How often the teacher is right: from never to always, each problem its own."""
    return max(0.0, min(1.0, 1.4 * fraction("chance", question) - 0.2))


def reply(prompt: str, seed: int) -> str:
    """Right as often as `chance` says. The prompt ends in a question of `sums`."""
    question = prompt[prompt.index("Work out ") :].removeprefix("Work out ").partition("<")[0]
    number = int(question.split()[0])
    right = fraction("draw", question, seed) < chance(question)
    steps = "so " * (seed % 9)
    return f"{steps}it is twice {number}.</think>\\boxed{{{2 * number if right else 2 * number + 1}}}"


class StubTeacher:
    """Requests are read `window` at a time, and come back in an order drawn from `order`.

    `calls` are the keys asked, also appended to the file `log`; `fails` says of a request that it fails.
    """

    def __init__(
        self, *, name: str = "stub", window: int = 4, order: int = 0, context_length: int | None = None,
        fails: Callable[[Request], bool] | None = None, log: Path | None = None, pause: float = 0.0,
        answer: Callable[[str, int], str] = reply, counts: bool = True,
    ) -> None:  # fmt: skip
        self.identity: dict[str, Any] = {"model": name}
        self.context_length = context_length
        self.window, self.order, self.fails, self.log, self.pause = window, order, fails, log, pause
        self.answer, self.counts = answer, counts
        self.calls: list[str] = []
        self.checked = 0
        self.most_waiting = 0

    def render(self, messages: Sequence[Message], *, open_thought: bool) -> str:
        return f"<user>{messages[-1]['content']}<assistant>" + ("<think>\n" if open_thought else "")

    def check(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.checked += 1
            if self.context_length and len(request.prompt) + request.max_tokens > self.context_length:
                raise ValueError(f"the prompt does not fit into context_length={self.context_length}")

    def sample(self, requests: Iterable[Request | None]) -> Iterator[tuple[Request, Completion]]:
        noise, source, waiting = random.Random(self.order), iter(requests), list[Request]()
        exhausted = False
        while not exhausted or waiting:
            while not exhausted and len(waiting) < self.window:
                try:
                    request = next(source)
                except StopIteration:
                    exhausted = True
                    break
                if request is None:
                    if not waiting:
                        raise RuntimeError("None, and nothing is on its way")
                    break
                self._called(request)
                waiting.append(request)
            self.most_waiting = max(self.most_waiting, len(waiting))
            if waiting:
                request = waiting.pop(noise.randrange(len(waiting)))
                yield request, self.completion(request)

    def _called(self, request: Request) -> None:
        name = key(self.identity, request)
        self.calls.append(name)
        if self.log:
            with self.log.open("a") as file:
                file.write(name + "\n")

    def completion(self, request: Request) -> Completion:
        if self.pause:
            time.sleep(self.pause)
        if self.fails and self.fails(request):
            return Completion(finish_reason="failed", error="HTTP 500")
        text = self.answer(str(request.prompt), request.seed)
        tokens = (10, 5 + len(text) // 4) if self.counts else (None, None)
        return Completion(text, None, "stop", *tokens)


@dataclass
class Exact:
    """A verifier that compares the box as text, and counts how often it was asked."""

    version: str = "exact/1"
    settings: Verify = Verify()  # noqa: RUF009  # frozen
    breaks: Callable[[Problem, Completion], bool] = lambda problem, completion: False
    graded: int = 0

    def grader(self, problem: Problem) -> str:
        return self.version

    def grade(self, problem: Problem, completion: Completion, opened: bool | None) -> Graded:
        self.graded += 1
        if self.breaks(problem, completion):
            return Graded("failed", None, "the grader failed: as it was asked to", self.version)
        _, box, rest = completion.text.rpartition("\\boxed{")
        if not box:
            return Graded("no_answer", None, "no box", self.version)
        found = rest.partition("}")[0]
        return Graded("correct" if found == problem.answer else "wrong", found, "", self.version)


def by_the_rule(problems: Iterable[Problem], teacher: Teacher, seed: int, answer: Callable[[str, int], str] = reply):
    """(problem id, index, right) of each sample that asking one by one takes: the rule, spelled out."""
    from eval.runner import sample_seed

    for one in problems:
        right = index = 0
        while right < teacher.correct and index < teacher.most:
            text = answer(f"Work out {one.question}<", sample_seed(seed, "distill", one.id, index))
            is_right = f"{{{one.answer}}}" in text
            yield one.id, index, is_right
            right, index = right + is_right, index + 1


def rows(
    problems: Iterable[Problem], sampler: Any, teacher: Teacher, store: Store, verifier: Any, seed: int = 0
) -> list[str]:
    """The traces and decisions of a run as lines."""
    found: Iterator[tuple[Trace, Decision]] = traces(problems, sampler, teacher, seed, store, verifier)
    return [one.to_json() + decision.to_json() for one, decision in found]


def run_with_log(folder: str, log: str, order: int, pause: float, count: int) -> None:
    """A whole generation, to be run in a process that may be killed: RUN/samples.sqlite and RUN/traces."""
    problems, teacher, verifier = sums(count), settings(), Exact()
    sampler = StubTeacher(window=8, order=order, log=Path(log), pause=pause)
    with Store(Path(folder) / "samples.sqlite") as store:
        generated = generate(lambda: problems, sampler, teacher, 0, store, verifier)  # type: ignore[arg-type]
        assert not generated.incomplete
        lines = rows(problems, sampler, teacher, store, verifier)
    (Path(folder) / "traces").write_text("\n".join(lines))
