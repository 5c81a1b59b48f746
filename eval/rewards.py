"""The graders as reward functions for TRL: what a policy is trained on is what it is evaluated by.

    GRPOTrainer(..., reward_funcs=[MathReward(), ThoughtReward()])      # the dataset has a column `answer`

TRL's own `accuracy_reward` gives "The answer is 42" nothing and multiple choice None, and its `think_format_reward`
gives nothing where the template has already opened `<think>`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.answers import grade_math_many
from eval.multiple_choice import grade_choice
from eval.sample import Graded
from eval.thinking import Thought, split_thought

Completions = Sequence[str | Sequence[dict[str, Any]]]
LogExtra = Callable[[str, list[Any]], None]


@dataclass(frozen=True)
class MathReward:
    """1.0 where the final answer equals the column `answer` (or `solution`), else 0.0.

    `thinking` says that the prompt's template opens the thought: a completion that never closes it is then truncated,
    and earns nothing whatever stands in it. The verdicts go into the trainer's table of completions.
    """

    thinking: bool = False
    __name__ = "math_reward"  # TRL names its metrics by it

    def __call__(
        self,
        completions: Completions,
        answer: Sequence[str] | None = None,
        solution: Sequence[str] | None = None,
        log_extra: LogExtra | None = None,
        **columns: Any,
    ) -> list[float]:
        golds = _golds(answer, solution, len(completions))
        thoughts = [_split(one, self.thinking) for one in completions]
        judged = iter(
            grade_math_many(
                [(one.answer, gold) for one, gold in zip(thoughts, golds, strict=True) if one.state != "truncated"]
            )
        )
        graded = [Graded("truncated") if one.state == "truncated" else next(judged) for one in thoughts]
        return _rewards(graded, log_extra)


@dataclass(frozen=True)
class ChoiceReward:
    """1.0 where the letter chosen is the column `answer` (or `solution`), else 0.0; a miss is never a letter.

    `n_choices` is the number of choices of every row; `chain` the extraction (`eval.multiple_choice`).
    """

    n_choices: int = 4
    chain: str = "default"
    thinking: bool = False
    __name__ = "choice_reward"

    def __call__(
        self,
        completions: Completions,
        answer: Sequence[str] | None = None,
        solution: Sequence[str] | None = None,
        log_extra: LogExtra | None = None,
        **columns: Any,
    ) -> list[float]:
        graded = []
        for completion, gold in zip(completions, _golds(answer, solution, len(completions)), strict=True):
            thought = _split(completion, self.thinking)
            if thought.state == "truncated":
                graded.append(Graded("truncated"))
            else:
                graded.append(grade_choice(thought.answer, gold, self.n_choices, self.chain))
        return _rewards(graded, log_extra)


@dataclass(frozen=True)
class ThoughtReward:
    """1.0 where there is one thought, closed, and an answer after it, else 0.0. `thinking` as in `MathReward`."""

    thinking: bool = False
    __name__ = "thought_reward"

    def __call__(self, completions: Completions, **columns: Any) -> list[float]:
        thoughts = [_split(one, self.thinking) for one in completions]
        return [float(one.state in ("closed", "opened", "field") and bool(one.answer.strip())) for one in thoughts]


def _split(completion: str | Sequence[dict[str, Any]], thinking: bool) -> Thought:
    """Plain text, or the messages of a conversation: the assistant's last one, its own field included."""
    if isinstance(completion, str):
        return split_thought(completion, opened=thinking)
    message = completion[-1]
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return split_thought(message.get("content") or "", opened=thinking and reasoning is None, reasoning=reasoning)


def _golds(answer: Sequence[str] | None, solution: Sequence[str] | None, rows: int) -> Sequence[str]:
    golds = answer if answer is not None else solution
    if golds is None:
        raise ValueError(
            "the dataset has neither a column `answer` nor `solution`; rename the one with the gold answers"
        )
    if len(golds) != rows:
        raise ValueError(f"{len(golds)} gold answers for {rows} completions; one is needed for each")
    return golds


def _rewards(graded: Sequence[Graded], log_extra: LogExtra | None) -> list[float]:
    if log_extra is not None:
        log_extra("verdict", [one.verdict for one in graded])
    return [one.credit for one in graded]
