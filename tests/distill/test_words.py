"""Which writings are the same words, and which are not."""

# ruff: noqa: RUF001  # full-width and typographic characters are meant

import pytest

from distill.words import LETTER, NUMBER, OPERATOR, WORD, figures, sequence, windows, words

SAME = [
    ("Hello, World!", "hello world"),
    ("ＡＢＣ１２", "abc 12"),
    ("don't", "don’t"),
    ("don't", "dont"),
    ("1,234,567 people", "1234567 people"),
    ("x^{2}+1", "x ^ 2 + 1"),
    ("$\\dfrac{1}{2}$", "\\frac12"),
    ("\\left( a \\cdot b \\right)", "(a * b)"),
    ("3 × 4", "3 \\times 4"),
    ("**bold** text", "bold text"),
    ("- a list\n- of items", "a list of items"),
    ("48/2 = <<48/2=24>>24 clips", "48/2 = 24 clips"),
    ("你好，世界", "你 好 世 界"),
    ("a well-known fact", "a well known fact"),
    ("____ is", "is"),
    ("5 − 3", "5 - 3"),
]
OTHER = [
    ("2 + 3", "2 - 3"),
    ("1.5", "15"),
    ("12 34", "1234"),
    ("x < 3", "x > 3"),
    ("5%", "5"),
    ("a = 4", "a 4"),
    ("ab", "a b"),
    ("你好", "好你"),
    ("", "a"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_words(one, other):
    assert words(one).hashes.tolist() == words(other).hashes.tolist()
    assert sequence(words(one).hashes) == sequence(words(other).hashes)


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_other_words(one, other):
    assert words(one).hashes.tolist() != words(other).hashes.tolist()


def test_kinds():
    assert words("Add 3.5 + x = y2").kinds.tolist() == [WORD, NUMBER, OPERATOR, LETTER, OPERATOR, LETTER, NUMBER]
    assert words("Add 3 + x").without_operators().kinds.tolist() == [WORD, NUMBER, LETTER]


def test_windows_are_those_of_the_parts():
    hashes = words("one two three four five").hashes
    three = windows(hashes, 3)
    assert len(three) == 3
    assert [int(windows(hashes[n : n + 3], 3)[0]) for n in range(3)] == three.tolist()
    assert len({*three.tolist(), *windows(hashes[::-1], 3).tolist()}) == 6  # the order counts
    assert len(windows(hashes, 6)) == 0
    assert len(windows(hashes[:0], 1)) == 0


def test_figures():
    grid = "Solve:\n#.#\n.#.\n"
    assert figures(grid) == figures("solve this:\n#.#\n.#.")
    assert figures(grid) != figures("Solve:\n#.#\n.##\n")
    assert figures("Count:\n==  ==\n") != figures("Count:\n== == \n")
    assert figures("A cow, a pig and I.") == figures("The cow and the pig!")
    assert figures("1 then 2") != figures("2 then 1")
    assert figures("list\n----\n") == figures("list")
