"""Texts as arrays of 64-bit word hashes: what `dedup.py` and `decontaminate.py` compare. Pure functions of strings.

Two writings of one text give the same words: case, width, punctuation, spacing and the layout commands of LaTeX do not
count, `1,000` is `1000`, and where a script has no spaces every character is a word. Numbers and operators are words of
their own, since they are what two problems of one template differ in.
"""

# ruff: noqa: RUF001  # full-width and mathematical characters are meant

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

# Scripts without spaces between words: Thai to Burmese, Khmer, kana, Han.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)

_ALPHANUMERIC = re.compile(r"[^\W_]")
_CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations, which no reader sees
_LAYOUT = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|quad|qquad|limits|"
    r"text(?:bf|it|rm|normal)?|math(?:rm|bf|it|bb|cal|sf)|operatorname|mbox|hbox)(?![a-z])\*?|\\[,;:! ]"
)
_SYNONYMS = (
    (re.compile(r"^[ \t>]*[-*+•][ \t]+", re.MULTILINE), " "),  # bullets
    (re.compile(r"\\[dt](frac|binom)(?![a-z])"), r"\\\1"),
    (re.compile(r"\\(frac|binom)\s*(\d)(?=\d)"), r"\\\1 \2 "),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-z])|[×·∙⋅]"), "*"),
    (re.compile(r"\\div(?![a-z])|÷"), "/"),
    (re.compile(r"[−–](?=\s*\d)"), "-"),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),  # 1,000
    (re.compile(r"(?<=[^\W\d_])['’](?=[^\W\d_])"), ""),  # don't
)
_NUMBER_PATTERN = r"\d+(?:\.\d+)?"
# An operator other than = stands before a number, a bracket or a variable of one letter, or ends the text; a hyphen
# between letters, a bullet, and the stars and rules of Markdown are punctuation.
_OPERATOR_PATTERN = (
    r"(?<![=<>])=(?!=)|(?<=\d)%"
    r"|(?:[<>=]=|(?<![-*])[-*](?![-*])|[+/^<>≤≥≠])(?=\s*(?:-?[\d.(\\{]|-?[^\W\d_](?![^\W\d_])|\?|$))"
)
_WORD = re.compile(rf"{_NUMBER_PATTERN}|[{UNSPACED}]|[^\W\d_{UNSPACED}]+|{_OPERATOR_PATTERN}")
_FIGURE = re.compile(
    rf"{_NUMBER_PATTERN}|{_OPERATOR_PATTERN}|(?<![^\W_])[b-hj-z](?![^\W_'’])"
    r"|[#@&~¬_]|[\u2190-\u22ff\u2300-\u27bf\u2900-\u2bff\U0001f300-\U0001faff]"
)

WORD, NUMBER, OPERATOR, LETTER = range(4)  # kinds; a letter is one that stands alone


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a text in order, and their kinds."""

    hashes: Hashes
    kinds: NDArray[np.uint8]

    def without_operators(self) -> "Words":
        chosen = self.kinds != OPERATOR
        return Words(self.hashes[chosen], self.kinds[chosen])


def normalized(text: str) -> str:
    """The text as `words` reads it, before it is cut into words."""
    text = unicodedata.normalize("NFKC", text).casefold()
    if "<<" in text:
        text = _CALCULATION.sub(" ", text)
    if "\\" in text:
        text = _LAYOUT.sub(" ", text)
    for pattern, replacement in _SYNONYMS:
        text = pattern.sub(replacement, text)
    return text


def words(text: str) -> Words:
    """The words of a text.

    >>> sequence(words("Is $1,000 = \\\\dfrac{x}{2}$?").hashes) == sequence(words("is 1000 = \\\\frac x 2").hashes)
    True
    >>> words("8 - 3").kinds.tolist(), words("well-known").kinds.tolist()
    ([1, 2, 1], [0, 0])
    """
    found = [_word(one) for one in _WORD.findall(normalized(text))]
    return Words(np.array([one for one, _ in found], np.uint64), np.array([kind for _, kind in found], np.uint8))


@lru_cache(maxsize=1 << 16)
def _word(word: str) -> tuple[int, int]:
    """Hash and kind of what `_WORD` found."""
    if not word[0].isalnum():
        return hash_text(word), OPERATOR
    if word[0].isdigit():
        return hash_text(word), NUMBER
    return hash_text(word), LETTER if len(word) == 1 and word.isascii() else WORD


def hash_text(text: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def figures(text: str) -> int:
    """A hash of what is no prose, in order: numbers, operators, letters that stand alone, symbols, lines of a drawing.

    >>> figures("Add 2 and 3.") == figures("add 2, then 3"), figures("Is 2 + 3 even?") == figures("Is 2 - 3 even?")
    (True, False)
    """
    found = _FIGURE.findall(normalized(text))
    drawn = (line.rstrip() for line in text.split("\n") if not _ALPHANUMERIC.search(line))
    found += [line for line in drawn if len(set(line)) > 1]  # "----" is a rule
    return hash_text("\n".join(found))


def windows(hashes: Hashes, length: int) -> Hashes:
    """A hash for each `length` successive words, in order: max(0, n - length + 1) of them."""
    count = len(hashes) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    return folded(hashes[offset : offset + count] for offset in range(length))


def sequence(hashes: Hashes) -> int:
    """One hash of all words in order."""
    return int.from_bytes(hashlib.blake2b(hashes.tobytes(), digest_size=8).digest(), "little")


def folded(parts: Iterable[Hashes]) -> Hashes:
    """One hash of the first values of all parts, one of the second, and so on; their order counts."""
    total = np.zeros(1, np.uint64)
    for part in parts:
        total = total * _BASE + part
    return mixed(total)


def mixed(values: Hashes) -> Hashes:
    """MurmurHash3's finaliser, a bijection of 64 bits that spreads them evenly."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's bits are lost however long the window
