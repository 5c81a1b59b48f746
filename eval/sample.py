"""What is asked, what came back, what it was judged: three frozen records, JSON in and out.

Every other file of the package speaks in these.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

Verdict = Literal["correct", "wrong", "no_answer", "truncated", "timeout", "failed"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

FinishReason = Literal["stop", "length", "failed"]


class Record:
    """`to_json` and `from_json` for a frozen dataclass of JSON values. Tuples become lists and come back as tuples."""

    def to_json(self) -> str:
        """One line of JSON, keys sorted, so that equal records are equal bytes."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, sort_keys=True)  # type: ignore[call-overload]  # every subclass is a dataclass

    @classmethod
    def from_json(cls, line: str) -> Self:
        """The record of one line; ValueError where a field is unknown or missing."""
        values = json.loads(line)
        known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # as above
        if unknown := set(values) - set(known):
            raise ValueError(f"{cls.__name__} has no field {sorted(unknown)}; it has {sorted(known)}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@dataclass(frozen=True, slots=True)
class Sample(Record):
    """One question of a benchmark, without any template.

    `id` is unique within its task and does not depend on order or limit. `choices` stand as they are shown (after a
    permutation, if the protocol asks for one; `permutation[i]` is then the published position of the choice shown at
    i), and `gold` is the letter shown, for multiple choice; else the published answer. `group` is the line of the
    breakdown (a subject); `cluster` names what items share (a passage), and is empty where each stands alone.
    `meta` holds what only this task's template and grader read: JSON values.
    """

    id: str
    task: str
    question: str
    gold: str
    choices: tuple[str, ...] = ()
    permutation: tuple[int, ...] = ()
    group: str = ""
    cluster: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion(Record):
    """What a model wrote for one prompt: sample `index` of an item.

    `text` excludes the prompt and keeps the tags of the thought; `reasoning` is the endpoint's own field (`reasoning`,
    `reasoning_content`), None where there is none. `finish_reason` "length" means that the budget was used up, "failed"
    that no text was obtained, and `error` then says why. Tokens as the sampler or the endpoint counted them.
    `logprobs` belongs to the perplexity protocol: the summed natural log-probability of each choice, and
    `choice_tokens` the number of tokens of each; `choice_greedy` says whether greedy decoding would have written it.
    """

    text: str = ""
    reasoning: str | None = None
    finish_reason: FinishReason = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    logprobs: tuple[float, ...] = ()
    choice_tokens: tuple[int, ...] = ()
    choice_greedy: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Graded(Record):
    """A verdict and what led to it.

    `answer` is what was extracted (None: nothing), `detail` one line on how or why, `grader` the name and version of
    the code that judged (`math/1`). `credit` is the score in [0, 1]: 1 for correct and else 0, except where a
    benchmark publishes partial credit (DROP's F1).
    """

    verdict: Verdict
    answer: str | None = None
    detail: str = ""
    grader: str = ""
    credit: float = -1.0  # replaced below

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict={self.verdict!r} is none of {', '.join(VERDICTS)}")
        if self.credit == -1.0:
            object.__setattr__(self, "credit", 1.0 if self.verdict == "correct" else 0.0)
        if not 0.0 <= self.credit <= 1.0:
            raise ValueError(f"credit={self.credit} is not in [0, 1]")
