"""What the teacher is asked of a problem, and how often: the rule of adaptive rejection sampling.

The samples of a problem have the indices 0, 1, 2, ... One by one, the rule would ask for the next while fewer than
`correct` were right, `most` at the most. `next_indices` asks for several at once where each of them would be asked
whatever the others turn out to be: the same samples, none in vain, whatever the order in which they come back.

`teacher.py` builds on this; nothing here waits for a model.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from distill.problems import messages
from distill.recipe import Teacher
from distill.records import Problem
from distill.run_dir import fingerprint
from eval.runner import sample_seed
from eval.sample import Graded
from eval.samplers import Message, Request, Sampler
from eval.store import Store, Stored, key
from eval.thinking import OPEN

if TYPE_CHECKING:
    from distill.verify import Verifier

Prompt = str | tuple[Message, ...]


def next_indices(asked: int, right: int, unknown: int, teacher: Teacher) -> range:
    """The samples to ask for, after the first `asked`: of these, `right` are right, and `unknown` may turn out to be
    (on their way, being judged, or failed).

    With 4 wanted of at most 16: four at first; after two wrong ones among them, two more.

    >>> teacher = Teacher(engine="transformers", model="m", temperature=1.0, max_tokens=9, correct=4, most=16)
    >>> next_indices(0, 0, 0, teacher), next_indices(4, 2, 0, teacher), next_indices(4, 1, 2, teacher)
    (range(0, 4), range(4, 6), range(4, 5))
    """
    return range(asked, min(teacher.most, asked + max(0, teacher.correct - right - unknown)))


@dataclass(frozen=True, slots=True)
class Place:
    """Sample `index` of a problem: its request, its key in the store, and what is stored."""

    index: int
    request: Request
    key: str
    stored: Stored | None


class Asking:
    """A teacher, its settings and a seed: prompts, requests, keys. All of it is a function of these and the problem."""

    def __init__(self, sampler: Sampler, teacher: Teacher, seed: int) -> None:
        self.sampler, self.teacher, self.seed = sampler, teacher, seed
        self.identity = sampler.identity
        settings = (teacher.prompt, teacher.system, teacher.open_thought, teacher.temperature, teacher.top_p)
        self.fingerprint = fingerprint(self.identity, *settings, teacher.max_tokens, seed)

    def prompt(self, problem: Problem) -> Prompt:
        turns = messages(problem, self.teacher.prompt, self.teacher.system)
        return self.sampler.render(turns, open_thought=self.teacher.open_thought)

    def request(self, problem: Problem, prompt: Prompt, index: int) -> Request:
        number = sample_seed(self.seed, "distill", problem.id, index)
        teacher = self.teacher
        return Request(prompt, number, teacher.max_tokens, float(teacher.temperature), float(teacher.top_p))

    def look_up(self, store: Store, problem: Problem, prompt: Prompt, indices: Iterable[int]) -> Iterator[Place]:
        """These samples of a problem, with what the store has of each."""
        requests = [(index, self.request(problem, prompt, index)) for index in indices]
        keys = [key(self.identity, request) for _, request in requests]
        for (index, request), name, stored in zip(requests, keys, store.get_many(keys), strict=True):
            yield Place(index, request, name, stored)

    def context(self, problem: Problem, prompt: Prompt, index: int) -> dict[str, Any]:
        """What stands beside a completion in the store: enough to show it, and to find the problem that it is judged
        by. `teacher` tells samples of these settings from those of others."""
        return {
            "stage": "traces",
            "teacher": self.fingerprint,
            "problem": problem.id,
            "source": problem.source,
            "index": index,
            "opened": opened(prompt),
            "question": problem.question,
            "answer": problem.answer,
        }


def opened(prompt: Prompt) -> bool | None:
    """Whether the prompt ends inside a thought; None where the endpoint renders it."""
    return prompt.rstrip().endswith(OPEN) if isinstance(prompt, str) else None


def with_verdict(context: Mapping[str, Any], graded: Graded) -> dict[str, Any]:
    return {**context, "graded": asdict(graded)}


def stored_verdict(context: Mapping[str, Any], problem: Problem, verifier: "Verifier") -> Graded | None:
    """The verdict that stands beside a completion; None where there is none, or where the grader is now another."""
    graded = context.get("graded")
    if graded is None or context["problem"] != problem.id or graded["grader"] != verifier.grader(problem):
        return None
    return Graded(**graded)


def of_shard(problems: Iterable[Problem], shard: tuple[int, int]) -> Iterator[Problem]:
    """Part i of n, by the ids alone: `shard` is (i, n), i from 0."""
    part, parts = shard
    if not 0 <= part < parts:
        raise ValueError(f"shard={shard}: give (i, n) with i from 0 to n - 1")
    return (problem for problem in problems if int(problem.id, 16) % parts == part)
