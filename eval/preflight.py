"""What an endpoint ignores: a score taken at a temperature that the server dropped is not the score of the protocol.

A few tiny requests to every endpoint; each finding says what was asked and what came back.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from eval.endpoint_sampler import EndpointSampler
from eval.sample import Completion
from eval.samplers import Request

Status = Literal["honoured", "ignored", "unknown", "refused"]

QUESTION = "Write a line of random words, then a random number between one and a million."
TOKENS = 24


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether one endpoint honours one parameter, and how that was seen."""

    endpoint: str
    parameter: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """Findings of every endpoint. `str(report)` is what to show."""

    findings: tuple[Finding, ...] = field(default=())

    @property
    def ignored(self) -> tuple[Finding, ...]:
        """What is not as asked."""
        return tuple(one for one in self.findings if one.status in ("ignored", "refused"))

    @property
    def serious(self) -> tuple[Finding, ...]:
        """What makes the results others than those of the protocol. Samples that cannot be drawn again are still
        samples, and this package needs no `n`; what it needs log-probabilities for, it says itself."""
        return tuple(one for one in self.ignored if one.parameter not in ("seed", "n", "logprobs"))

    def __str__(self) -> str:
        lines = []
        for endpoint in dict.fromkeys(one.endpoint for one in self.findings):
            mine = [one for one in self.findings if one.endpoint == endpoint]
            lines.append(f"{endpoint}: {', '.join(one.parameter for one in mine if one.status == 'honoured')} honoured")
            lines += [f"  {one.parameter} {one.status}: {one.detail}" for one in mine if one.status != "honoured"]
        return "\n".join(lines)


def preflight(sampler: EndpointSampler, *, chat: bool | None = None, question: str = QUESTION) -> PreflightReport:
    """Asks every endpoint of `sampler` about 20 tiny requests. `chat` False asks `/completions`; None as the sampler
    would render a chat. An endpoint that cannot be reached raises ConnectionError."""
    if chat is None:
        chat = sampler.tokenizer is None
    messages = [{"role": "user", "content": question}]
    prompt: Any = question
    if chat or sampler.tokenizer is not None:
        prompt = tuple(messages) if chat else sampler.render(messages)
    findings: list[Finding] = []
    for one in sampler.each():
        findings += _probe(one, Request(prompt, seed=1, max_tokens=TOKENS, temperature=0.0))
    return PreflightReport(tuple(findings))


def _probe(sampler: EndpointSampler, greedy: Request) -> Iterable[Finding]:
    (endpoint,) = sampler.base_urls

    def ask(*requests: Request) -> list[Completion]:
        numbered = [replace(request, tag=index) for index, request in enumerate(requests)]
        return [completion for _, completion in sorted(sampler.sample(numbered), key=lambda pair: pair[0].tag)]

    def one_by_one(*requests: Request) -> list[str]:
        return [_written(ask(request)[0]) for request in requests]

    def finding(parameter: str, honoured: bool | None, good: str, bad: str) -> Finding:
        status: Status = "unknown" if honoured is None else "honoured" if honoured else "ignored"
        return Finding(endpoint, parameter, status, good if honoured else bad)

    first = ask(greedy)[0]
    if first.finish_reason == "failed":
        yield Finding(endpoint, "requests", "refused", str(first.error))
        return
    at_zero = {_written(first), *one_by_one(replace(greedy, seed=2), replace(greedy, seed=3))}
    hot = replace(greedy, temperature=2.0)
    seeds = [11, 12, 13, 14]
    at_two = one_by_one(*(replace(hot, seed=seed) for seed in seeds))
    varied = len(set(at_two)) > 1
    yield finding(
        "temperature",
        len(at_zero) == 1 and varied,
        "temperature 0 gives one text, 2 gives several",
        f"temperature 0 gave {len(at_zero)} texts in 3 requests, temperature 2 gave {len(set(at_two))} in 4"
        + ("" if varied else "; perhaps the server decodes greedily whatever it is asked"),
    )
    narrow = one_by_one(*(replace(hot, seed=seed, top_p=1e-6) for seed in seeds[:3]))
    yield finding(
        "top_p",
        len(set(narrow)) == 1 if varied else None,
        "a tiny top_p gives one text",
        f"top_p=1e-6 gave {len(set(narrow))} texts in 3 requests" if varied else "nothing varies that it could narrow",
    )
    again = one_by_one(*(replace(hot, seed=seed) for seed in seeds))
    together = [_written(completion) for completion in ask(*(replace(hot, seed=seed) for seed in seeds * 2))]
    apart = sum(a != b for a, b in zip(again, at_two, strict=True))
    crowded = sum(a != b for a, b in zip(together, at_two * 2, strict=True))
    yield finding(
        "seed",
        not apart and not crowded if varied else None,
        "the same seed gives the same text, also among others; other seeds give others",
        f"asked again, 4 seeds gave {apart} other texts one by one, and 8 requests at a time {crowded}: samples are "
        "random, but cannot be drawn again"
        if varied
        else "every seed gives the same text",
    )
    short = ask(replace(greedy, max_tokens=3))[0]
    count = short.completion_tokens
    cut = count <= 3 if count is not None else len(_written(short)) < len(_written(first))
    whole = first.completion_tokens is not None and first.completion_tokens <= 3
    yield finding(
        "max_tokens",
        None if cut and whole else cut and short.finish_reason == "length",
        "a budget of 3 tokens is kept, and finish_reason says so",
        "the answer is shorter than 3 tokens by itself"
        if cut and whole
        else f"a budget of 3 gave {count} tokens with finish_reason={short.finish_reason!r}",
    )
    text = first.text or first.reasoning or ""
    pieces = (text[at : at + 4] for at in range(len(text) // 2, len(text) - 4))
    # The sign for broken bytes stands for bytes that no stop string can name.
    stop = next((one for one in pieces if one.isprintable() and one.strip() and "\ufffd" not in one), "")
    usable = bool(first.text and stop) and len(at_zero) == 1
    cut_text = ask(replace(greedy, stop=(stop,)))[0].text if usable else ""
    yield finding(
        "stop",
        stop not in cut_text and len(cut_text) < len(text) if usable else None,
        "a stop string ends the text",
        f"stop={stop!r} stands in the answer" if usable else "there was no text to stop in that comes back as it was",
    )
    yield from _probe_body(sampler, hot, endpoint)


def _probe_body(sampler: EndpointSampler, hot: Request, endpoint: str) -> Iterable[Finding]:
    """What only the answer's JSON shows."""
    chat = not isinstance(hot.prompt, str)
    for name, extra in (
        ("n", {"n": 2}),
        ("logprobs", {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}),
    ):
        try:
            answer = sampler.raw(hot, extra)
        except ValueError as error:
            yield Finding(endpoint, name, "refused", str(error))
            continue
        choices = answer.get("choices") or [{}]
        if name == "n":
            kept, seen = (
                len(choices) == 2,
                f"n=2 gave {len(choices)} choices; k samples are asked for one by one anyway",
            )
        else:
            kept, seen = bool(choices[0].get("logprobs")), "the answer has no logprobs"
        yield Finding(endpoint, name, "honoured" if kept else "ignored", "" if kept else seen)


def _written(completion: Completion) -> str:
    """All that a model wrote: a thought in its own field is sampled as any text."""
    return f"{completion.reasoning or ''}\0{completion.text}"
