"""Worked solutions against reasoning-gym's own answers and questions."""

import pytest

from distill.worked import WORKED, worked
from eval.reasoning_gym_tasks import problems


@pytest.mark.parametrize("dataset", WORKED)
def test_every_worked_answer_is_the_package_s(dataset):
    for row in problems(dataset, 500, 7):
        assert worked(dataset, row["question"])[1] == row["answer"]


@pytest.mark.parametrize(
    ("dataset", "question", "steps", "answer"),
    [
        ("spell_backward", "Spell this word backward (example: sun -> nus): cat", "c1 a2 t3\nt3 a2 c1", "tac"),
        (
            "letter_counting",
            'How many times does the letter "e" appear in the text: "Three bees"?',
            "thre1e2 be3e4s",
            "4",
        ),
        (
            "chain_sum",
            "State the final answer to the following arithmetic problem: 98 + 93 - 70 + 0 =",
            "98 + 90 = 188\n188 + 3 = 191\n191 - 70 = 121\n121 + 0 = 121",
            "121",
        ),
        (
            "gcd",
            "Find the Greatest Common Divisor (GCD) of these numbers: 30, 54. Give only the GCD as your final answer.",
            "54 = 1 * 30 + 24\n30 = 1 * 24 + 6\n24 = 4 * 6 + 0",
            "6",
        ),
        (
            "leg_counting",
            "How many legs are there in total if you have 1 sea slug, 3 butterflys, 2 crabs?",
            "sea slug 0 * 1 = 0\nbutterfly 6 * 3 = 18\ncrab 10 * 2 = 20\n18 + 20 = 38",
            "38",
        ),
    ],
)
def test_steps(dataset, question, steps, answer):
    assert worked(dataset, question) == (steps, answer)


def test_other_words_are_an_error_that_shows_them():
    with pytest.raises(ValueError, match="'What is 2 \\+ 2\\?' is not worded as reasoning-gym does"):
        worked("chain_sum", "What is 2 + 2?")
    with pytest.raises(ValueError, match="'zebra_puzzles'; there are for: spell_backward"):
        worked("zebra_puzzles", "")
    with pytest.raises(ValueError, match="'unicorns' is no animal"):
        worked("leg_counting", "legs if you have 2 unicorns?")
