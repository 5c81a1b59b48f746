"""What flows through a run: a problem, a trace of the teacher, a decision. Frozen, JSON in and out, rows of parquet.

Every stage of `pipeline.py` decides on each row that it is given, once: kept, or dropped for one of `REASONS`. So the
counts of a stage add up, and `distill why ID` can tell the whole path of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from eval.sample import FinishReason, Record, Verdict

Kind = Literal["math", "choice", "code", "text", "reasoning_gym", "none"]
"""How an answer is verified. `math`: `eval.answers`; `choice`: `eval.multiple_choice`; `code`: by running tests;
`text`: by a judge model; `reasoning_gym`: by that package's own score; `none`: there is no answer to compare with."""
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Problem(Record):
    """A prompt of the training set.

    `id` is 16 hex digits of the sha256 of what is asked and what is right (kind, question, choices, answer, and `meta`
    where the verifier reads it), so it does not depend on order, file or run. `answer` is the published answer, a
    letter for `choice`, "" where there is none. `domain` is the line of the mixture (math, code, logic, ...). `source`
    and `row` say where it came from: a name of the recipe's `problems`, and the row there. `meta` holds what only the
    verifier of its kind reads: `{"tests": [...]}` for code, `{"dataset": ..., "entry": ...}` for reasoning_gym.
    """

    id: str
    kind: Kind
    domain: str
    question: str
    answer: str
    source: str
    row: int
    choices: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trace(Record):
    """One sample of the teacher: thought and answer, and what the verifier said.

    `id` is `{problem_id}/{index}`; `key` finds the raw completion in the store. `thought` is what stands inside the
    tags, stripped; `response` what follows them, stripped. `state` is that of `eval.thinking.Thought`. `verdict` None
    stands for what nothing verified (kind `none`). Tokens are the sampler's count.
    """

    id: str
    problem_id: str
    index: int
    key: str
    seed: int
    thought: str
    response: str
    state: str
    finish_reason: FinishReason
    verdict: Verdict | None
    extracted: str | None
    detail: str
    grader: str
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class Decision(Record):
    """What one stage did with one row: `reason` "" is kept, else one of `REASONS[stage]`; `detail` says more (the
    duplicate's id and similarity, the benchmark item that was matched, the paragraph that was too long)."""

    id: str
    reason: str = ""
    detail: str = ""


REASONS: Mapping[str, Mapping[str, str]] = {
    "problems": {
        "empty": "no question, or no answer where the kind needs one",
        "malformed": "the row does not have the form of its kind",
        "repeated": "the same problem stood in an earlier row",
    },
    "prompts": {
        "near_duplicate": "almost the same words as a prompt that was kept",
        "contaminated": "shares an n-gram, or the whole of a short item, with a benchmark",
    },
    "traces": {
        "wrong": "the verifier disagrees with the answer",
        "no_answer": "no answer was found",
        "truncated": "the budget of tokens ended it",
        "timeout": "the verifier ran out of time",
        "failed": "no completion was obtained, or the verifier failed; the next run asks again",
    },
    "filter": {
        "mixed_languages": "the thought changes its language",
        "long_paragraph": "a paragraph of the thought is too long",
        "code_block": "a code block stands in the thought",
        "repetition": "the thought or the answer runs in a loop",
        "empty_thought": "there is nothing between the tags",
        "empty_answer": "nothing follows the thought",
        "doubled_tags": "more than one thought, or a tag inside the thought or the answer",
        "cut": "the sample ended before its end of sequence",
        "too_short": "fewer tokens than the recipe wants",
        "too_long": "more tokens than the recipe wants",
    },
    "dedup": {"near_duplicate": "almost the same words as a better trace that was kept"},
    "decontaminate": {"contaminated": "shares an n-gram, or the whole of a short item, with a benchmark"},
    "mix": {"over_quota": "its domain was full"},
}
