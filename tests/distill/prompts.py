"""Prompts as they are planted in tests: any number of different ones, and near copies of some of them."""

import random
from collections.abc import Iterator

from distill.records import Problem

# fmt: off
WORDS = (
    "farmer", "baker", "river", "bottle", "window", "garden", "train", "market", "silver", "ticket", "candle",
    "bridge", "doctor", "letter", "orange", "planet", "forest", "engine", "museum", "carpet", "tunnel", "basket",
    "hammer", "pencil", "island", "guitar", "temple", "ladder", "copper", "meadow", "castle", "saddle",
)
# fmt: on


def question(number: int) -> str:
    """One of about a hundred words, different for each number in most of them."""
    draw = random.Random(number)
    sentences = []
    for _ in range(8):
        first, second, third, fourth = draw.sample(WORDS, 4)
        sentences.append(
            f"The {first} near the {second} holds {draw.randint(2, 99)} of the {third}s for each {fourth}."
        )
    return " ".join([*sentences, "How many are there in all?"])


def prose(number: int) -> str:
    """Sixty words without any phrase that comes back, other ones for each number."""
    return f"{' '.join(random.Random(number).choices(WORDS, k=60))}."


def copy_of(text: str, draw: random.Random) -> str:
    """The same prompt with another name, a word more, or another case and punctuation."""
    words = text.split()
    way, names = draw.randrange(3), [place for place, word in enumerate(words) if word in WORDS]
    if way == 0 and names:
        words[draw.choice(names)] = draw.choice(["zeppelin", "teapot", "violin"])
    elif way <= 1:
        words.insert(draw.randrange(len(words)), "really")
    else:
        words = " ".join(words).replace(".", " !").replace(",", "").upper().split()
    return " ".join(words)


def planted(count: int, every: int = 10) -> Iterator[tuple[Problem, int | None]]:
    """`count` problems; each `every`-th is a copy of the one so many places earlier, whose number stands beside it."""
    for number in range(count):
        source = number - every + 1 if number % every == every - 1 else None
        text = question(number) if source is None else copy_of(question(source), random.Random(number))
        yield problem(f"{number:08d}", text), source


def problem(name: str, text: str, answer: str = "7") -> Problem:
    return Problem(id=name, kind="math", domain="math", question=text, answer=answer, source="test", row=0)
