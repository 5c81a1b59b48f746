"""Two small benchmarks with answers that can be worked out by hand, and a model that answers from its seed alone."""

import hashlib
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.benchmark import Benchmark, Source
from eval.multiple_choice import grade_choice
from eval.protocols import Protocol
from eval.sample import Completion, Graded, Sample
from eval.samplers import Message, Request

_SOURCE = Source(hub="none/none", split="test", file="none.jsonl", rows=0)


def sums(n: int) -> list[Sample]:
    return [
        Sample(id=f"sum-{i}", task="sums", question=f"{i} + {i + 1} = ?", gold=str(2 * i + 1), group=f"by {i % 3}")
        for i in range(n)
    ]


def colours(n: int) -> list[Sample]:
    """The gold letter goes round; four questions share a passage."""
    return [
        Sample(
            id=f"colour-{i}", task="colours", question=f"Which is colour {i}?", gold="ABCD"[i % 4],
            choices=tuple(f"shade {i}.{j}" for j in range(4)), cluster=f"passage {i // 4}",
        )
        for i in range(n)
    ]  # fmt: skip


def grade_sum(sample: Sample, answer: str, chain: str) -> Graded:
    """The last integer in braces: exact, and in this process."""
    if "the grader breaks" in answer:
        raise ZeroDivisionError("as it was asked to")
    start = answer.rfind("{")
    if start == -1:
        return Graded("no_answer", None, "no braces", "sums/1")
    found = answer[start + 1 :].split("}")[0]
    return Graded("correct" if found == sample.gold else "wrong", found, "", "sums/1")


SUMS = Benchmark(
    name="sums", title="Sums", source=_SOURCE, licence="none", citation="none", kind="math",
    to_sample=lambda row, index: Sample(**row), grade=grade_sum, grader="sums/1",
    prompts={
        "plain": lambda sample, shots: sample.question,
        "few_shot": lambda sample, shots: "".join(f"{s.question} {s.gold}\n" for s in shots) + sample.question,
    },
    fixed_exemplars=tuple(Sample(id=f"shot-{i}", task="sums", question=f"{i} + 0 = ?", gold=str(i)) for i in range(2)),
    stop=("\n",),
)  # fmt: skip

COLOURS = Benchmark(
    name="colours", title="Colours", source=_SOURCE, licence="none", citation="none", kind="choice",
    to_sample=lambda row, index: Sample(**row), grader="choice/1", chance=0.25, confidential=True,
    chains=("default", "mmlu_pro"),
    grade=lambda sample, answer, chain: grade_choice(answer, sample.gold, len(sample.choices), chain),
    prompts={"plain": lambda sample, shots: "\n".join([sample.question, *sample.choices, "Answer:"])},
)  # fmt: skip


def protocol(**settings: Any) -> Protocol:
    """Two samples at temperature 1 of up to 100 tokens, inside a chat that opens the thought."""
    defaults = dict(mode="chat", template="plain", samples=2, temperature=1.0, max_tokens=100, open_thought=True)
    return Protocol(name="test", source="these tests", defaults={**defaults, **settings})


def fraction(*parts: object) -> float:
    """In [0, 1), by sha256 of the parts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8]) / 2**64


class SeededModel:
    """Right in about 60 % of its samples, at times without an answer or cut off; the same for the same request.

    Requests are read `window` at a time and come back in an order of their own. `calls` are the keys asked, also
    appended to the file `log`; `fails` says of a request that it fails; `pause` is the time that a completion takes.
    """

    def __init__(
        self, *, name: str = "seeded", window: int = 4, order: int = 0, context_length: int | None = None,
        fails: Any = None, log: Path | None = None, pause: float = 0.0,
    ) -> None:  # fmt: skip
        self.identity = {"model": name, "revision": "1"}
        self.context_length = context_length
        self.window, self.order, self.fails, self.log, self.pause = window, order, fails, log, pause
        self.calls: list[str] = []
        self.checked: list[Request] = []
        self.requests: list[Request] = []

    def render(self, messages: Sequence[Message], *, open_thought: bool) -> str:
        text = "".join(f"<{one['role']}>{one['content']}" for one in messages)
        return text + "<assistant>" + ("<think>\n" if open_thought else "")

    def check(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.checked.append(request)
            if self.context_length and len(request.prompt) + request.max_tokens > self.context_length:
                raise ValueError(f"the prompt does not fit into context_length={self.context_length}")

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        shuffle = random.Random(self.order).shuffle
        window: list[Request] = []
        for request in requests:
            self._called(request)
            window.append(request)
            if len(window) == self.window:
                shuffle(window)
                yield from ((one, self._completion(one)) for one in window)
                window = []
        yield from ((one, self._completion(one)) for one in window)

    def _called(self, request: Request) -> None:
        self.calls.append(request.tag.key)
        self.requests.append(request)
        if self.log:
            with self.log.open("a") as file:
                file.write(request.tag.key + "\n")

    def _completion(self, request: Request) -> Completion:
        if self.pause:
            time.sleep(self.pause)
        if self.fails and self.fails(request):
            return Completion(finish_reason="failed", error="HTTP 500")
        sample: Sample = request.tag.sample
        draw = fraction(self.identity, request.prompt, request.seed, request.temperature)
        if request.choices:
            logprobs = tuple(-10 * fraction(self.identity, request.prompt, one) for one in request.choices)
            return Completion(logprobs=logprobs, choice_tokens=(1,) * len(logprobs))
        answer = sample.gold if draw < 0.6 else "B" if sample.choices else "7"
        text = f"thinking</think>The answer is {{{answer}}}" if not sample.choices else f"</think>Answer: {answer}"
        tokens = int(1000 * draw)
        if 0.8 < draw < 0.85:
            return Completion("I shall never", None, "length", 10, 100)
        if 0.85 < draw < 0.9:
            return Completion("hm</think>I do not know", None, "stop", 10, tokens)
        return Completion(text, None, "stop", 10, tokens)


def evaluate_with_log(out: str, log: str, order: int, pause: float) -> None:
    """A whole evaluation, to be run in a process that may be killed."""
    from eval.runner import evaluate

    model = SeededModel(window=8, order=order, log=Path(log), pause=pause)
    items = {"sums": sums(16), "colours": colours(16)}
    evaluate(model, [SUMS, COLOURS], protocol(samples=4), out, items=items, pass_at=[2])


def reply(prompt: str, noise: int) -> str:
    """What an honest endpoint writes: right in about half of its samples."""
    number = int(prompt.split()[0]) if prompt[0].isdigit() else 0
    return f"<think>{'so ' * (noise % 9)}</think>{{{2 * number + noise % 2}}}"


def evaluate_endpoint(out: str, url: str) -> None:
    """As `evaluate_with_log`, against a server."""
    from eval.endpoint_sampler import EndpointSampler
    from eval.runner import evaluate

    sampler = EndpointSampler(url, "stub", concurrency=4, timeout=2.0, first_delay=0.001)
    evaluate(sampler, [SUMS], protocol(samples=8, open_thought=False), out, items={"sums": sums(16)}, pass_at=[4])
