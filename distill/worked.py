"""Worked solutions of reasoning-gym problems: what the tiny teacher is pre-trained on.

Each function reads a question as reasoning-gym words it and returns the steps that lead to its answer, one small step
a line, and the answer. Nothing here knows the package's own answer: a problem goes into the corpus only where the two
agree. The notation is ours; it is written for a model that reads characters.

    worked("chain_sum", "State the final answer to the following arithmetic problem: 98 + 93 - 77 =")
    -> ("98 + 90 = 188\\n188 + 3 = 191\\n191 - 70 = 121\\n121 - 7 = 114", "114")
"""

import re
from collections.abc import Callable, Mapping

from eval.reasoning_gym_tasks import animal_legs


def worked(dataset: str, question: str) -> tuple[str, str]:
    """(steps, answer) of a question of one of `WORKED`; ValueError where the question is worded otherwise."""
    if dataset not in WORKED:
        raise ValueError(f"there are no worked solutions for {dataset!r}; there are for: {', '.join(WORKED)}")
    steps, answer = WORKED[dataset](question.strip())
    return steps, answer


def spell_backward(question: str) -> tuple[str, str]:
    """Letters with their places, then the same from the last to the first: "c1 a2 t3", "t3 a2 c1"."""
    (word,) = _read(r": (\S+)$", question)
    places = [f"{letter}{place}" for place, letter in enumerate(word, start=1)]
    return " ".join(places) + "\n" + " ".join(reversed(places)), word[::-1]


def letter_counting(question: str) -> tuple[str, str]:
    """The text in small letters, with the count so far behind each letter that counts: "thr1ee"."""
    letter, text = _read(r'letter "(.)" appear in the text: "(.*)"', question)
    count, steps = 0, []
    for character in text.lower():
        steps.append(character)
        if character == letter:
            count += 1
            steps.append(str(count))
    return "".join(steps), str(count)


def chain_sum(question: str) -> tuple[str, str]:
    """Term by term from the left, the tens of a term before its ones."""
    (chain,) = _read(r": (.*) =$", question)
    first, *rest = chain.split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        lines, total = _add(total, sign, int(term))
        steps += lines
    return "\n".join(steps), str(total)


def gcd(question: str) -> tuple[str, str]:
    """Euclid's divisions, the larger number first, until nothing remains."""
    (listed,) = _read(r"numbers: ([\d, ]+)\.", question)
    numbers = [int(number) for number in listed.split(", ")]
    divisor, steps = numbers[0], []
    for number in numbers[1:]:
        larger, smaller = max(divisor, number), min(divisor, number)
        while smaller:
            quotient, remainder = divmod(larger, smaller)
            steps.append(f"{larger} = {quotient} * {smaller} + {remainder}")
            larger, smaller = smaller, remainder
        divisor = larger
    return "\n".join(steps), str(divisor)


def leg_counting(question: str) -> tuple[str, str]:
    """For each animal its legs times their number, then the sum so far: "dog 4 * 3 = 12", "6 + 10 = 16"."""
    (listed,) = _read(r"if you have (.*)\?$", question)
    total, steps = 0, []
    for entry in listed.split(", "):
        number, name = entry.split(" ", 1)
        animal, legs = animal_legs(name)
        steps.append(f"{animal} {legs} * {number} = {legs * int(number)}")
        if total == 0:
            total = legs * int(number)
        else:
            lines, total = _add(total, "+", legs * int(number))
            steps += lines
    return "\n".join(steps), str(total)


def _add(total: int, sign: str, term: int) -> tuple[list[str], int]:
    """The lines that add or subtract the tens of a term, then its ones; and the result."""
    lines, tens, ones = [], term // 10 * 10, term % 10
    for part in [part for part in (tens, ones) if part] or [0]:
        result = total + part if sign == "+" else total - part
        lines.append(f"{total} {sign} {part} = {result}")
        total = result
    return lines, total


def _read(pattern: str, question: str) -> tuple[str, ...]:
    found = re.search(pattern, question, re.DOTALL)
    if found is None:
        raise ValueError(f"the question {question!r} is not worded as reasoning-gym does (expected {pattern!r})")
    return found.groups()


# From easy to hard for a small model.
WORKED: Mapping[str, Callable[[str], tuple[str, str]]] = {
    "spell_backward": spell_backward,
    "letter_counting": letter_counting,
    "chain_sum": chain_sum,
    "gcd": gcd,
    "leg_counting": leg_counting,
}
