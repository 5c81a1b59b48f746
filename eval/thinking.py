"""A reasoning model's text, split into the thought and the answer.

Only the answer is graded. A thought that was never closed is `truncated`: whatever stands in it, box or letter, is not
an answer, and grading it is how other harnesses give points to texts that the budget cut.
"""

# ruff: noqa: RUF001  # a full-width colon is meant

from dataclasses import dataclass
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"

State = Literal["closed", "opened", "field", "nested", "absent", "truncated"]


@dataclass(frozen=True, slots=True)
class Thought:
    """`state` says how the thought was found, `thought` is its text without tags, `answer` what follows it.

    - `closed`: `<think>...</think>` in the text.
    - `opened`: the prompt's template wrote `<think>`, the text only closes it.
    - `field`: the endpoint sent the thought apart (`reasoning`, `reasoning_content`).
    - `nested`: a tag stands more than once. No released template nests, so a second tag is the model quoting or
      repeating itself: the thought goes on to the last `</think>`.
    - `absent`: no tag, and none was to be expected; all of the text is the answer.
    - `truncated`: opened and never closed, by the budget or by the model; `answer` is "".
    """

    state: State
    thought: str
    answer: str


def split_thought(
    text: str, *, opened: bool | None = False, reasoning: str | None = None, finish_reason: str = "stop"
) -> Thought:
    """Splits what a model wrote.

    `opened` says whether the prompt ended inside a thought: True, False, or None where it cannot be known (an endpoint
    renders its template itself); then a text without any tag that used up its budget counts as a thought cut off.

    >>> split_thought("2 + 2 is 4.</think>\\\\boxed{4}", opened=True)
    Thought(state='opened', thought='2 + 2 is 4.', answer='\\\\boxed{4}')
    >>> split_thought("<think>so \\\\boxed{4}? no,").state
    'truncated'
    """
    if reasoning is not None and reasoning.strip():
        inner = split_thought(text, finish_reason=finish_reason)
        if inner.state == "absent" and not text.strip() and finish_reason == "length":
            return Thought("truncated", reasoning, "")
        if inner.state == "absent":
            return Thought("field", reasoning, text)
        # Tags in the text beside the field: the endpoint's parser stopped too early, or the model began again.
        state: State = "truncated" if inner.state == "truncated" else "nested"
        return Thought(state, reasoning + inner.thought, inner.answer)

    last_open, last_close = text.rfind(OPEN), text.rfind(CLOSE)
    if last_close == -1 and last_open == -1:
        if opened or (opened is None and finish_reason == "length"):
            return Thought("truncated", text, "")
        return Thought("absent", "", text)

    first_open = text.find(OPEN)
    if last_open > last_close:  # a thought is open at the end of the text
        return Thought("truncated", text[first_open + len(OPEN) :], "")
    # What stands before the first tag is thought too, if the template opened it.
    start = first_open + len(OPEN) if first_open != -1 and not opened else 0
    thought, answer = text[start:last_close], text[last_close + len(CLOSE) :]
    if text.count(OPEN) + bool(opened) > 1 or text.count(CLOSE) > 1:
        return Thought("nested", thought, answer)
    return Thought("opened" if first_open == -1 else "closed", thought, answer)


# How the prompts of few-shot evaluation begin a question: a base model goes on with one of its own.
_NEXT_QUESTION = ("\nQuestion:", "\nQ:", "\nProblem:", "\nThe following are multiple choice", "\n题目：", "\n问题：")


def before_next_question(answer: str) -> str:
    """What stands before the first question that the text asks; all of it where it asks none.

    The caller looks for its answer there first and in the whole text then: a model may also begin by repeating the
    question it was asked.
    """
    return answer[: min((at for line in _NEXT_QUESTION if (at := answer.find(line)) != -1), default=len(answer))]


def complete_part(answer: str) -> str:
    """What of an answer that the budget cut may be graded: up to its last line break or closing brace.

    `Answer: 12` may have been going to be `Answer: 123`; a box that is closed stays what it is.
    """
    return answer[: max(answer.rfind("\n"), answer.rfind("}")) + 1]
