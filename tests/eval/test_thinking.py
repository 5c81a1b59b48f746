"""Where a thought ends, by hand, for every form in which models and servers send it."""

import pytest

from eval.thinking import complete_part, split_thought

CASES = {
    # text, opened by the template, the endpoint's field, finish reason -> state, thought, answer
    "closed": ("<think>2+2</think>\n4", False, None, "stop", "closed", "2+2", "\n4"),
    "closed, empty": ("<think>\n\n</think>\n\n4", False, None, "stop", "closed", "\n\n", "\n\n4"),
    "words before the tag": ("Sure. <think>2+2</think>4", False, None, "stop", "closed", "2+2", "4"),
    "opened by the template": ("2+2</think>4", True, None, "stop", "opened", "2+2", "4"),
    "opened, and nobody told us": ("2+2</think>4", False, None, "stop", "opened", "2+2", "4"),
    "opened, and it cannot be known": ("2+2</think>4", None, None, "stop", "opened", "2+2", "4"),
    "cut off, own tag": (r"<think>so \boxed{4}, or", False, None, "length", "truncated", r"so \boxed{4}, or", ""),
    "ended by the model inside": (r"<think>so \boxed{4}", False, None, "stop", "truncated", r"so \boxed{4}", ""),
    "cut off, opened by the template": (r"so \boxed{4}", True, None, "length", "truncated", r"so \boxed{4}", ""),
    "never closed, opened by the template": (r"\boxed{4}", True, None, "stop", "truncated", r"\boxed{4}", ""),
    "cut off, and it cannot be known": (r"so \boxed{4}", None, None, "length", "truncated", r"so \boxed{4}", ""),
    "no thought, and it cannot be known": (r"\boxed{4}", None, None, "stop", "absent", "", r"\boxed{4}"),
    "absent": ("4", False, None, "stop", "absent", "", "4"),
    "absent, answer cut off": ("4 and then", False, None, "length", "absent", "", "4 and then"),
    "empty text": ("", False, None, "stop", "absent", "", ""),
    "the model quotes the tag in its thought": (
        "<think>the tag <think> opens</think>4", False, None, "stop", "nested", "the tag <think> opens", "4",
    ),
    "opened by the template and again by the model": (
        "<think>2+2</think>4", True, None, "stop", "nested", "<think>2+2", "4",
    ),
    "closed twice": ("a</think>b</think>4", True, None, "stop", "nested", "a</think>b", "4"),
    "two thoughts": ("<think>a</think>3<think>b</think>4", False, None, "stop", "nested", "a</think>3<think>b", "4"),
    "a second thought is cut off": (
        r"<think>a</think>\boxed{3}<think>b", False, None, "length", "truncated", r"a</think>\boxed{3}<think>b", "",
    ),
    "field": ("4", False, "2+2", "stop", "field", "2+2", "4"),
    "field, no answer": ("", False, "2+2", "stop", "field", "2+2", ""),
    "field, cut off": ("", False, "2+2", "length", "truncated", "2+2", ""),
    "field, and the close is still in the text": ("x</think>4", False, "2+2", "stop", "nested", "2+2x", "4"),
    "field, and a thought begins again": ("<think>x", False, "2+2", "length", "truncated", "2+2x", ""),
    "empty field": ("<think>2+2</think>4", False, "", "stop", "closed", "2+2", "4"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_split(case):
    text, opened, reasoning, finish_reason, *expected = CASES[case]
    thought = split_thought(text, opened=opened, reasoning=reasoning, finish_reason=finish_reason)
    assert [thought.state, thought.thought, thought.answer] == expected


def test_a_truncated_thought_has_no_answer_to_grade():
    for text, opened, reasoning, finish_reason, state, *_ in CASES.values():
        answer = split_thought(text, opened=opened, reasoning=reasoning, finish_reason=finish_reason).answer
        assert not (state == "truncated" and answer)


@pytest.mark.parametrize(
    ("answer", "complete"),
    [
        ("Answer: 12", ""),  # may have been going to be 123
        ("Answer: 12\nSo", "Answer: 12\n"),
        (r"so \boxed{12} and", r"so \boxed{12}"),
        (r"so \boxed{12", ""),
        ("", ""),
    ],
)
def test_complete_part_of_an_answer_that_was_cut(answer, complete):
    assert complete_part(answer) == complete
