r"""What a short written answer means, exactly, and whether two mean the same: pure, bounded, without sympy.

    text -> read() -> an answer: Value, Based, Sequence, Many, Matrix, Relation, Word or Opaque
    same(gold, answer, leaf) -> bool

Numbers and expressions are held as `algebra.py` holds them. Where that ends (sines, logarithms, cube roots, what is not
mathematics), a part is `Opaque` and `same` asks its `leaf` for it: in the caller's process that is `undecided`, in a
worker of `math_worker.py` it is math-verify and sympy. So there is one comparison of tuples, intervals, sets and units,
whichever process runs it.
"""

# Tables of the signs that are written for others, and of words: both read best as they are.
# ruff: noqa: RUF001, SIM905

import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

from eval.algebra import MAX_TERMS, ONE, Quotient, Undecided, generator, number, power, square_root

MAX_CHARS = 2000  # of an answer read here; longer ones go to a worker
MAX_DIGITS = 1000  # of one number
MAX_DEPTH = 40  # of brackets

# ---------------------------------------------------------------------------------------------------------------------
# What an answer can be.


@dataclass(frozen=True, slots=True)
class Value:
    """A number or expression; `unit` is "" where none is written that is known. `text` is what was read, everywhere."""

    value: Quotient
    unit: str = ""
    text: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Based:
    """A numeral with its base, as the question asks for it: 1112_3. Another base is another answer."""

    digits: str
    base: str
    text: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Sequence:
    """(a, b), [a, b), ...: a point or an interval, since both are written so. The brackets count."""

    opening: str
    closing: str
    items: tuple["Answer", ...]
    text: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Many:
    """Several answers in any order. `kind` is "list" (a, b), "set" {a, b} or "union" of intervals."""

    kind: str
    items: tuple["Answer", ...]
    text: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Matrix:
    determinant: bool
    rows: tuple[tuple["Answer", ...], ...]
    text: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Relation:
    """`sides[0] ops[0] sides[1] ...`."""

    ops: tuple[str, ...]
    sides: tuple["Answer", ...]
    text: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Word:
    """A word or sentence: a name, `even`, a choice's letter."""

    words: str
    text: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Opaque:
    """What the exact reading cannot read: cleaned LaTeX, without its unit."""

    latex: str
    unit: str = ""
    text: str = field(default="", compare=False)


Answer = Value | Based | Sequence | Many | Matrix | Relation | Word | Opaque

# ---------------------------------------------------------------------------------------------------------------------
# From the written form to cleaned LaTeX.

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "∙": r"\cdot ", "∗": "*", "÷": "/", "∕": "/", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ",
    "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "°": r"^\circ ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ",
    "φ": r"\phi ", "ω": r"\omega ", "≈": r"\approx ", "⟨": r"\langle ", "⟩": r"\rangle ", "，": ",", "、": ",",
    "（": "(", "）": ")", "；": ";", "。": ".", "％": "%", "€": r"\$", "£": r"\$", "¥": r"\$", "￥": r"\$",
    "∅": r"\emptyset ", "″": '"', "′": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u202f": " ",
}  # fmt: skip
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_VULGAR = {c: unicodedata.normalize("NFKC", c).split("⁄") for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒"}
_INVISIBLE = re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\x00-\x08\x0b\x0e-\x1f\x7f]")


def _unicode_to_latex(text: str) -> str:
    if text.isascii():
        return _INVISIBLE.sub("", text)
    text = _INVISIBLE.sub("", text)
    text = re.sub(f"[{''.join(_SUPERSCRIPTS)}]+", lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", text)
    text = re.sub(f"[{''.join(_SUBSCRIPTS)}]+", lambda m: "_{" + "".join(_SUBSCRIPTS[c] for c in m[0]) + "}", text)
    text = re.sub(f"[{''.join(_VULGAR)}]", lambda m: r"\frac{%s}{%s}" % tuple(_VULGAR[m[0]]), text)  # noqa: UP031  # braces
    text = "".join(_UNICODE.get(c, c) for c in text)
    text = unicodedata.normalize("NFKC", text)
    # Digits of other scripts are digits.
    return "".join(str(unicodedata.digit(c)) if not c.isascii() and c.isdecimal() else c for c in text)


_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![a-zA-Z])\s*(?:\.(?!\d))?")
_STYLES = re.compile(
    r"\\(?:displaystyle|textstyle|limits|quad|qquad|nolimits|rm|bf|it|enspace|hfill|null|strut)(?![a-zA-Z])"
)
# `\,` between digits joins a number: 1\,234. Elsewhere all of these are space.
_THIN_SPACE = re.compile(r"(?<=\d)(?:\\[,!;:]|\\ |~)+(?=\d{3}(?!\d))")
_SPACES = re.compile(r"(?<!\\)\\[,!;:> ]|~|\\\\(?=\s*$)")
_COMMA = re.compile(r",\s*\\!\s*|\{\s*,\s*\}")
_FONTS = re.compile(
    r"\\(?:mathrm|mathbf|mathit|mathsf|mathnormal|boldsymbol|bm|vec|hat|operatorname|mathcal)\s*\{\s*(\\?[a-zA-Z])\s*\}"
)
_TEXT = re.compile(
    r"\\(?:text|mbox|hbox|textrm|textbf|textit|textnormal|texttt|mathrm|mathbf|operatorname|emph)\s*\{([^{}]*)\}"
)
_POWER_IN_TEXT = re.compile(  # \mathrm{cm^2}
    r"\\(?:text|mbox|textrm|mathrm)\s*\{([A-Za-z ]{1,30}?)\s?\^\s?\{?([23])\}?\s?\}"
)
_DELIMITERS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("`", "`"),
    ('"', '"'),
    ("*", "*"),
)
_DECORATION = re.compile(
    r"\\(?:hspace|vspace|phantom|hphantom|color|textcolor)\*?\s*\{[^{}]*\}|\\underline(?=\s*\{)"
    r"|(?<=\\\\)\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in|px)\s*\]"  # \\[4pt]
    r"|(?<=\d)\s*\^\s*(?:\{\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}"  # 5^{\text{th}}
    r"|\\text\s*\{\s*(?:st|nd|rd|th)\s*\})"
    r"|(?<=\d)\\(?=_\s*[\d{])"  # 101\_2
)
_RENAMED = re.compile(
    r"\\(dfrac|tfrac|cfrac|lbrace|rbrace|lbrack|rbrack|leq|geq|leqslant|geqslant|neq|infin|lt|gt|land|lor|degree|degrees|bigcup|lvert|rvert|mid|vert|euro|pounds|varnothing)(?![a-zA-Z])"
)
_NEW_NAMES = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[",
    "rbrack": "]", "leq": r"\le ", "geq": r"\ge ", "leqslant": r"\le ", "geqslant": r"\ge ", "neq": r"\ne ",
    "infin": r"\infty ", "lt": "<", "gt": ">", "land": ",", "lor": ",", "degree": r"^\circ ", "degrees": r"^\circ ",
    "bigcup": r"\cup ", "lvert": "|", "rvert": "|", "mid": "|", "vert": "|", "euro": r"\$",
    "pounds": r"\$", "varnothing": r"\emptyset ",
}  # fmt: skip


def _matching_pair(text: str, opening: str, closing: str) -> bool:
    """Whether the text is `opening ... closing` with neither in between."""
    inner = text[len(opening) : -len(closing)]
    ends = text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing) - 1
    return ends and opening not in inner and closing not in inner and not inner.endswith("\\")


def clean(text: str) -> str:
    """The answer in one spelling: ASCII, no delimiters, sizes, thin spaces or synonyms. The meaning stays."""
    text = " ".join(_unicode_to_latex(text).split())  # first: many spaces make the patterns below slow
    for _ in range(4):
        before = text
        text = text.strip().rstrip(".,;: \n") if not text.endswith(("\\,", "\\;", "\\:")) else text[:-2]
        for opening, closing in _DELIMITERS:
            if _matching_pair(text, opening, closing):
                text = text[len(opening) : -len(closing)].strip()
        if text == before:
            break
    # Delimiters around parts: the dollar of an amount of money stands escaped, or alone before a digit.
    if r"\begin" not in text:  # where no rows are broken, a doubled backslash is one that JSON escaped
        text = re.sub(r"\\\\(?=[a-zA-Z%$()])", lambda _: "\\", text)
    text = text.replace("\\(", " ").replace("\\)", " ")
    if text.count("$") - text.count("\\$") == 1:
        text = re.sub(r"(?<!\\)\$(?=\s*-?[\d.])", r"\\$", text)
    text = re.sub(r"(?<!\\)\$", " ", text)
    text = _SIZES.sub("", text)
    text = _STYLES.sub(" ", text)
    text = _DECORATION.sub("", text)
    text = _COMMA.sub(",", text)
    text = _THIN_SPACE.sub("", text)
    text = _SPACES.sub(" ", text)
    text = _RENAMED.sub(lambda m: _NEW_NAMES[m[1]], text)
    text = _POWER_IN_TEXT.sub(r"\\text{\1}^\2", text)
    text = _FONTS.sub(r" \1 ", text)
    text = text.replace("**", "^").replace(r"\%", "%").replace(r"\#", "#")
    text = _ARRAY.sub(lambda m: r"\begin{pmatrix}" if m[1] else r"\end{pmatrix}", text)
    if whole := _TEXT.fullmatch(text):
        text = whole[1] if re.search(r"\d", whole[1]) else text
    text = _LARGE.sub(lambda m: rf"{m[1]} \cdot 10^{{{_ZEROS[m[2].lower()]}}}", text)
    return " ".join(text.split())


_ARRAY = re.compile(r"[(\[]\s*\\(begin)\s*\{array\}\s*(?:\{[lcr| ]*\})?|\\end\s*\{array\}\s*[)\]]")
_ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LARGE = re.compile(rf"(\d)\s*(?:\\text\s*\{{\s*)?({'|'.join(_ZEROS)})(?![a-zA-Z])\s*\}}?", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------------------
# Units.

_UNITS = {
    "°": "° degree degrees deg", "%": "percent percentage pct %", "$": "$ dollar dollars usd bucks",
    "cent": "cent cents", "cm": "cm centimeter centimeters centimetre centimetres", "mm": "mm millimeter millimeters",
    "m": "m meter meters metre metres", "km": "km kilometer kilometers kilometre kilometres kms",
    "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard yards", "mi": "mi mile miles",
    "s": "s sec secs second seconds", "min": "min mins minute minutes", "h": "h hr hrs hour hours",
    "day": "day days", "week": "week weeks", "month": "month months", "year": "year years yr yrs",
    "g": "g gram grams", "kg": "kg kilogram kilograms kgs", "lb": "lb lbs pound pounds", "oz": "oz ounce ounces",
    "L": "l liter liters litre litres", "mL": "ml milliliter milliliters", "gal": "gal gallon gallons",
    "mph": "mph", "km/h": "kmh kph", "rad": "rad radian radians", "pm": "pm p.m", "am": "am a.m",
}  # fmt: skip
_UNIT = {spelling: unit for unit, spellings in _UNITS.items() for spelling in spellings.split()}
_LETTER_UNITS = frozenset("m s h g l".split())  # unless in \text{}, a letter is a variable
# Words behind a number that make another number of it, or say that it is not the answer.
_NOT_A_UNIT = frozenset(
    "dozen dozens score k half halves third thirds quarter quarters fourth "
    "fourths fifth fifths tenth tenths hundredth hundredths thousandth thousandths squared cubed factorial or and plus "
    "minus over mod modulo pi root roots negative positive to through between not if when where but remainder base "
    "hundreds thousands millions billions choose divided multiplied power sqrt sin cos tan log ln exp infinity".split()
)
_LINKS = frozenset("per a an the of in each for on at by total more less fewer his her their all away ago".split())
_NOUN = re.compile(r"[A-Za-z]?[a-z']*[aeiouyAEIOUY][a-z']*")


def _unit_of_words(words: str, in_text: bool) -> str | None:
    """The unit that words behind a number name: "" for things that are counted, None where it is no unit."""
    words = words.strip().strip(".").replace("/", " per ").replace("-", " ").lower()
    power = ""
    for prefix, exponent in (("square ", "2"), ("sq ", "2"), ("sq. ", "2"), ("cubic ", "3"), ("cu ", "3")):
        if words.startswith(prefix):
            words, power = words[len(prefix) :], exponent
    tokens = words.split()
    if not tokens:
        return ""
    if any(not re.fullmatch(r"[a-z.']+", token) or token in _NOT_A_UNIT for token in tokens):
        return None
    if len(tokens) == 1 and tokens[0] in _UNIT:
        if tokens[0] in _LETTER_UNITS and not in_text:
            return None
        return _UNIT[tokens[0]] + power
    if tokens[0] in _UNIT and tokens[0] not in _LETTER_UNITS:
        # "miles per hour", "dollars each": the first noun is what two answers are compared by.
        return _UNIT[tokens[0]] + ("" if "per" in tokens or "each" in tokens else power)
    for token in tokens:
        if token in _LINKS or token in _UNIT:
            continue
        if not in_text and ((len(token) < 4 and token not in _SHORT_NOUNS) or not _NOUN.fullmatch(token)):
            return None
    return ""


_SHORT_NOUNS = frozenset(
    "egg day cup box man men bag car dog cat pie pen toy bus ton hat bee ant cow pig hen fox boy kid job tie can jar "
    "pan pot tin fan map key ice oil tea ham bun fig nut cap bat owl ape elk eel rat age way bed lap row win fee tip "
    "bar pin pad log net set bit eye leg arm toe ear lip gum jam mat mug rug tub van zip pair yes no".split()
)
ANGLE = re.compile(r"(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_TAIL_DEGREE = re.compile(r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?:[CF]|\\text\s*\{\s*[CF]\s*\})?\s*$")
_TAIL_CHINESE = re.compile(  # measures, and counters; not 千, 万, 倍, which make another number of it
    r"(?<=[\d}])\s?(?:(元|角|[千厘分毫]?米|公里|千?克|公斤|吨|(?:平方|立方)[千厘分]?米|毫?升|小时|分钟|秒|天|周|个月|年|岁)"
    r"|[个只本人名支张条颗块页棵件辆次种套双台朵把根头位箱瓶])$"
)
_TAIL_TEXT = re.compile(_TEXT.pattern + r"\s*(?:\^\s*\{?\s*([23])\s*\}?)?\s*$")
_TAIL_WORDS = re.compile(r"(?<=[\d}\)\]%])\s*-?\s*([A-Za-z][A-Za-z .'/-]*?)(?:\^\s*\{?\s*([23])\s*\}?)?$")


def split_unit(text: str) -> tuple[str, str]:
    r"""`text` without what names its unit, and the unit: "5\text{ cm}^2" -> ("5", "cm2"), "18 eggs" -> ("18", "")."""
    unit = ""
    money = re.match(r"^(-?)\s*\\\$\s*", text)
    if money:
        text, unit = money[1] + text[money.end() :], "$"
    for _ in range(3):
        # Within a function, degrees are no unit that one might leave out: sin 30° is not sin 30.
        if (match := _TAIL_DEGREE.search(text)) and not ANGLE.search(text):
            text, unit = text[: match.start()], unit or "°"
        elif text.endswith("%"):
            text, unit = text[:-1].rstrip(), "%"
        elif match := _TAIL_CHINESE.search(text):
            text, unit = text[: match.start()], unit or match[1] or ""
        elif text.endswith(r"\$"):
            text, unit = text[:-2].rstrip(), "$"
        elif match := _TAIL_TEXT.search(text) or _TAIL_WORDS.search(text):
            if not text[: match.start()].strip():
                break
            named = _unit_of_words(match[1], in_text=match.re is _TAIL_TEXT)
            if named is None or (named == "°" and ANGLE.search(text)):
                break
            text, unit = text[: match.start()].rstrip(), unit or (named + (match[2] or "") if named else "")
        else:
            break
    return text.strip(), unit


# ---------------------------------------------------------------------------------------------------------------------
# Reading.

_TOKEN = re.compile(
    r"""(?P<repeating>\d*\.\d*\\(?:overline|bar|dot)\s*(?:\{\s*\d+\s*\}|\d))
    |(?P<scientific>(?:\d+(?:\.\d*)?|\.\d+)[eE][+-]?\d+(?![\d.a-zA-Z]))
    |(?P<thousands>\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?)
    |(?P<spaced>\d{1,3}(?:\ \d{3})+(?![\d/])(?:\.\d+)?)
    |(?P<number>\d+(?:\.\d*)?|\.\d+)
    |(?P<environment>\\(?:begin|end)\s*\{\s*[a-zA-Z]+\*?\s*\}(?:\s*\{[lcr|]+\})?)
    |(?P<words>\\(?:text|mbox|hbox|textrm|textbf|textit|textnormal|texttt|mathrm|mathbf|operatorname|emph)\s*\{[^{}]*\})
    |(?P<command>\\[a-zA-Z]+|\\.)
    |(?P<letters>[A-Za-z]+)
    |(?P<space>\s+)
    |(?P<sign><=|>=|!=|==|:=|.)""",
    re.VERBOSE | re.DOTALL,
)
_OPENING = {"(": ")", "[": "]", r"\{": r"\}", "{": "}", r"\langle": r"\rangle"}
_CLOSING = {")", "]", r"\}", "}", r"\rangle"}
_RELATIONS = {
    "=": "=", "==": "=", ":=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", r"\le": "<=", r"\ge": ">=",
    r"\ne": "!=", "!=": "!=", r"\in": "in", r"\equiv": "=",
}  # fmt: skip
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc log ln lg exp arcsin arccos arctan sinh cosh tanh det gcd lcm max min mod arg deg lim sup "
    "re im tr abs floor ceil sum prod int rank vol".split()
)
_GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi chi psi omega "
    "varphi varepsilon vartheta ell Gamma Delta Theta Lambda Sigma Phi Psi Omega".split()
)
_SPELLED = {"pi": r"\pi", "sqrt": r"\sqrt", "infinity": r"\infty", "inf": r"\infty", "theta": r"\theta"}


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    start: int
    end: int


def tokens_of(text: str) -> list[Token]:
    tokens = []
    for match in _TOKEN.finditer(text):
        kind, word = str(match.lastgroup), match[0]
        if kind == "space":
            continue
        if kind == "letters" and word in _SPELLED:
            kind, word = "command", _SPELLED[word]
        if kind == "letters" and word in ("and", "or"):
            kind, word = "sign", ","
        if kind == "words" and word[word.index("{") + 1 : -1].strip(" ,") in ("and", "or"):
            kind, word = "sign", ","
        if kind == "sign" and not word.isascii():
            raise Undecided(f"{word} is not read")
        tokens.append(Token(kind, word, match.start(), match.end()))
    return tokens


def _split(tokens: list[Token], separators: set[str]) -> tuple[list[list[Token]], list[str]]:
    """The parts between separators that stand outside all brackets, and the separators."""
    parts: list[list[Token]] = [[]]
    found, stack = [], []
    for token in tokens:
        if token.text in _OPENING or token.text.startswith(r"\begin"):
            stack.append(token.text)
        elif token.text in _CLOSING or token.text.startswith(r"\end"):
            if not stack:
                raise Undecided("brackets do not match")
            stack.pop()
        if not stack and token.text in separators and token.kind in ("sign", "command"):
            found.append(token.text)
            parts.append([])
        else:
            parts[-1].append(token)
        if len(stack) > MAX_DEPTH:
            raise Undecided("deep brackets")
    if stack:
        raise Undecided("brackets do not match")
    return parts, found


def _encloses(tokens: list[Token]) -> bool:
    """Whether the first bracket is closed by the last token."""
    depth = 0
    for position, token in enumerate(tokens):
        if token.text in _OPENING:
            depth += 1
        elif token.text in _CLOSING:
            depth -= 1
        if depth == 0:
            return position == len(tokens) - 1
    return False


class Expression:
    """Recursive descent over the tokens of one expression. Raises Undecided at whatever it does not know."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.position, self.depth, self.work = tokens, 0, 0, 0

    def peek(self) -> str:
        return self.tokens[self.position].text if self.position < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.position].kind if self.position < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> Token:
        if self.position >= len(self.tokens) or (expected is not None and self.peek() != expected):
            raise Undecided(f"{expected or 'something'} is missing")
        self.position += 1
        return self.tokens[self.position - 1]

    def whole(self) -> Quotient:
        value = self.sum()
        if self.position < len(self.tokens):
            raise Undecided(f"{self.peek()!r} is not read")
        return value

    def sum(self) -> Quotient:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Undecided("deep brackets")
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = self.take().text
            term = self.product()
            value = value + (term if sign == "+" else -term)
        self.depth -= 1
        return value

    def product(self) -> Quotient:
        value = self.signed()
        while True:
            self.work += len(value.top) + len(value.bottom) - 2
            if self.work > 20 * MAX_TERMS:
                raise Undecided("a long product")
            sign = self.peek()
            if sign in ("*", r"\cdot", r"\times"):
                self.take()
                value = value * self.signed()
            elif sign in ("/", r"\div"):
                self.take()
                value = value / self.signed()
            elif self.starts_atom():
                if self.kind() in _NUMBER:  # "2 3" is neither 23 nor 6
                    raise Undecided("two numbers side by side")
                value = value * self.power()
            else:
                return value

    def signed(self) -> Quotient:
        if self.peek() in ("+", "-"):
            sign = self.take().text
            if self.peek() in ("+", "-"):
                raise Undecided("two signs")
            return self.signed() if sign == "+" else -self.signed()
        return self.power()

    def starts_atom(self) -> bool:
        text, kind = self.peek(), self.kind()
        return (
            kind in ("letters", *_NUMBER) or text in ("(", "[", "{") or (kind == "command" and text not in _NOT_ATOMS)
        )

    def power(self) -> Quotient:
        value = self.atom()
        while self.peek() in ("!", "^"):
            if self.take().text == "!":
                value = _factorial(value)
            else:
                value = power(value, self.argument(signed=True))
                if self.peek() == "^":
                    raise Undecided("a tower")
        return value

    def argument(self, signed: bool = False) -> Quotient:
        """What a command takes: a group, or one token."""
        if self.kind() in _NUMBER:
            return number(_number(self.take()))  # no mixed number: \sqrt2\frac13 is a product
        if signed and self.peek() == "-":
            self.take()
            return -self.argument()
        token = self.tokens[self.position] if self.position < len(self.tokens) else None
        if token is not None and token.kind == "letters" and len(token.text) > 1:
            raise Undecided("letters after a command")
        return self.atom()

    def digit(self) -> Quotient:
        r"""An argument of \frac: a group, or one digit or letter of what follows, as TeX reads it: \frac12."""
        token = self.tokens[self.position] if self.position < len(self.tokens) else None
        if token is not None and token.kind in ("number", "letters") and len(token.text) > 1:
            if token.kind == "letters" or not token.text.isdigit() or len(token.text) != 2:
                raise Undecided("\\frac without braces")
            here = self.position
            self.tokens = [
                *self.tokens[:here],
                *(Token("number", c, 0, 0) for c in token.text),
                *self.tokens[here + 1 :],
            ]
        return self.argument()

    def atom(self) -> Quotient:
        token = self.take()
        if token.kind in _NUMBER:
            return self.mixed(_number(token))
        if token.kind == "letters":
            return self.letters(token)
        if token.text in ("(", "[", "{"):
            value = self.sum()
            self.take(_OPENING[token.text])
            return value
        if token.text == "|":
            value = self.sum()
            self.take("|")
            inside = value.rational()
            if inside is None:
                raise Undecided("absolute value of a symbol")
            return number(abs(inside))
        if token.kind != "command":
            raise Undecided(f"{token.text!r} is not read")
        return self.command(token.text[1:])

    def command(self, name: str) -> Quotient:
        if name == "pi":
            return generator("π")
        if name in _GREEK:
            return self.symbol(name)
        if name == "frac":
            top = self.digit()
            if self.kind() == "number" and len(self.peek()) > 1 and self.tokens[self.position - 1].text == "}":
                raise Undecided(r"\frac without braces")
            bottom = self.digit()
            return top / bottom
        if name == "sqrt":
            if self.peek() == "[":
                self.take()
                degree = self.sum()
                self.take("]")
                return power(self.argument(), number(1) / degree)
            return square_root(self.argument())
        if name in ("binom", "dbinom", "tbinom"):
            n, k = self.digit().rational(), self.digit().rational()
            if n is None or k is None or n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 1000:
                raise Undecided("a binomial coefficient")
            return number(math.comb(int(n), int(k)))
        raise Undecided(f"\\{name} is not read")

    def letters(self, token: Token) -> Quotient:
        if token.text in FUNCTIONS or len(token.text) > 3 or (len(token.text) > 2 and _NOUN.fullmatch(token.text)):
            raise Undecided("a word")
        first, last = token.text[:-1], token.text[-1]
        value = number(1)
        for letter in first:
            value = value * generator(letter)
        if self.peek() == "_" or self.peek() == "'":
            return value * self.symbol(last)
        # In ab^2 the power belongs to b.
        if first and self.peek() in ("^", "!"):
            self.take("^")
            return value * power(generator(last), self.argument(signed=True))
        return value * generator(last)

    def symbol(self, name: str) -> Quotient:
        if self.peek() == "_":
            self.take()
            group = [self.take()]
            if group[0].text == "{":
                while group[-1].text != "}":
                    group.append(self.take())
            name += "_" + "".join(token.text for token in group).strip("{}")
        while self.peek() == "'":
            name += self.take().text
        return generator(name)

    def mixed(self, whole: Fraction) -> Quotient:
        r"""1\frac{1}{2} and 1 1/2 are one and a half, where the fraction is written in digits and below one."""
        after = self.tokens[self.position : self.position + 7]
        texts, size = [token.text for token in after], 0
        if whole.denominator != 1 or not texts:
            return number(whole)
        if texts[0] == r"\frac":
            if len(texts) == 7 and texts[1] == texts[4] == "{" and texts[3] == texts[6] == "}":
                top, bottom, size = texts[2], texts[5], 7
            elif len(texts) > 1 and re.fullmatch(r"\d\d", texts[1]):
                top, bottom, size = texts[1][0], texts[1][1], 2
        elif len(texts) > 2 and texts[0].isdigit() and texts[1] == "/" and texts[2].isdigit():
            top, bottom, size = texts[0], texts[2], 3
        if size and top.isdigit() and bottom.isdigit() and len(top + bottom) < 20 and 0 < int(top) < int(bottom):
            following = self.tokens[self.position + size].text if self.position + size < len(self.tokens) else ""
            if following not in ("^", "!", "_"):
                self.position += size
                return number(whole + Fraction(int(top), int(bottom)))
        return number(whole)


_NUMBER = ("number", "thousands", "spaced", "scientific", "repeating")
_NOT_ATOMS = {r"\cdot", r"\times", r"\div", r"\}", r"\rangle", r"\\", r"\$", r"\pm", r"\mp"}


def _number(token: Token) -> Fraction:
    text = token.text.replace(",", "").replace(" ", "")
    if len(text) > MAX_DIGITS:
        raise Undecided("too many digits")
    if token.kind == "repeating":
        head, _, repeated = re.sub(r"\\[a-z]+|[{}\s]", "|", text).partition("|")
        repeated = repeated.strip("|")
        places = len(head.partition(".")[2])
        return Fraction(head + "0") + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**places)
    if token.kind == "scientific" and abs(int(re.split("[eE]", text)[1][:6])) > MAX_DIGITS:
        raise Undecided("too many digits")
    return Fraction(text)


def _factorial(value: Quotient) -> Quotient:
    n = value.rational()
    if n is None or n.denominator != 1 or not 0 <= n <= 500:
        raise Undecided("a factorial")
    return number(math.factorial(int(n)))


_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]{2,})*[.]?")


def plain_words(text: str) -> str | None:
    r"""The text of an answer in words, in one spelling: `\text{(C)}` -> "C", "The ellipse." -> "ellipse".

    None for mathematics: letters without a vowel are a product (xy), and so are single ones.
    """
    inner = " ".join(_TEXT.sub(r" \1 ", text).split()).strip(" .,;:'\"")
    if match := re.fullmatch(r"\(\s*(\w+)\s*\)", inner):
        inner = match[1]
    words = inner.split()
    if not words or not all(_WORD.fullmatch(word) and word.lower() not in FUNCTIONS for word in words):
        return None
    if len(inner) == 1:
        return inner if inner != text else None
    if inner in _SPELLED or all(len(word) == 1 for word in words):
        return None
    if all(len(word) < 4 and not re.search(r"[aeiouAEIOU]|[^\x00-\x7f]", word) for word in words):
        return None
    return re.sub(r"^(the|an|a) ", "", inner.lower())


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBER_WORDS = {word: n for n, word in enumerate(_ONES)} | {
    ten + (f"-{_ONES[one]}" if one else ""): 10 * n + one for n, ten in enumerate(_TENS, 2) for one in range(10)
}
_IN_WORDS = re.compile(r"(?<=[\d} ])\s?(?:\\text\s?\{\s?\(([A-Za-z-]+)\)\s?\}|\(([A-Za-z-]+)\))$")


@lru_cache(maxsize=4096)
def read(text: str) -> Answer:
    """The meaning of an answer. What cannot be read is `Opaque`; never raises, and its time is bounded."""
    if len(text) > MAX_CHARS:
        cleaned = clean(text)
        return Opaque(cleaned, text=cleaned)
    return _read(clean(text), 0)


def _read(text: str, depth: int) -> Answer:
    if not text or depth > 8:
        return Opaque(text, text=text)
    words = plain_words(text)
    if words in _NUMBER_WORDS:
        return Value(number(_NUMBER_WORDS[words]), text=text)
    if words is not None:
        return Word(words, text)
    if twice := _IN_WORDS.search(text):  # 7 (seven)
        digits = _read(text[: twice.start()], depth + 1)
        spelled = _NUMBER_WORDS.get((twice[1] or twice[2]).lower())
        if spelled is not None and isinstance(digits, Value) and digits.value.rational() == spelled:
            return digits
    try:
        return _structure(text, depth)
    except Undecided:
        bare, unit = split_unit(text)
        return Opaque(bare, unit, text)


def _parts(tokens: list[Token], text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """The parts of the text between separators outside all brackets, and the separators."""
    parts, found = _split(tokens, separators)
    return [text[part[0].start : part[-1].end] if part else "" for part in parts], found


def _structure(text: str, depth: int) -> Answer:
    tokens = tokens_of(text)
    if not tokens:
        raise Undecided("nothing")

    def inside(part: str) -> Answer:
        return _read(part, depth + 1)

    # A list: a, b / a; b / a and b.
    parts, found = _parts(tokens, text, {",", ";"})
    if found:
        parts = [part for part in parts if part]
        if len(parts) < 2:
            return inside(parts[0]) if parts else Opaque(text, text=text)
        return Many("list", _flat(map(inside, parts)), text)
    parts, found = _parts(tokens, text, set(_RELATIONS))
    if found:
        if not all(parts):
            raise Undecided("a relation without a side")
        return _relation(tuple(_RELATIONS[op] for op in found), tuple(map(inside, parts)), text)
    parts, found = _parts(tokens, text, {r"\approx"})
    if len(found) == 1 and all(parts):  # 5\sqrt2 \approx 7.07: the exact one is meant
        value, decimal = map(inside, parts)
        if _is_number(value) and _is_number(decimal) and "." in parts[1]:
            return value
        raise Undecided("a number that is not exact")
    parts, found = _parts(tokens, text, {r"\cup"})
    if found:
        return Many("union", _flat(map(inside, parts)), text)
    parts, found = _parts(tokens, text, {":"})
    if found:
        return Sequence(":", ":", tuple(map(inside, parts)), text)
    first, last = tokens[0].text, tokens[-1].text
    if first in ("(", "[", r"\langle", r"\{") and last in (")", "]", r"\rangle", r"\}") and _encloses(tokens):
        parts, found = _parts(tokens[1:-1], text, {",", ";"})
        if first == r"\{" and last == r"\}":
            if any(token.text in ("|", ":") for token in tokens):
                raise Undecided("a set by its property")
            return Many("set", _flat(inside(part) for part in parts if part), text)
        if found and not any(token.text in _SIGNS for token in tokens):
            if not all(parts):
                raise Undecided("an empty place")
            return Sequence(first, last, tuple(map(inside, parts)), text)
    if any(token.text in _SIGNS for token in tokens):
        return _both_signs(tokens, text, depth)
    if first.startswith(r"\begin") and "matrix" in first and last.startswith(r"\end"):
        return _matrix(tokens, text, depth)

    if based := _BASED.fullmatch(text):
        base = based[2] or based[3] or based[4]
        base = str(_NUMBER_WORDS.get(base, base))
        if base != "10":
            return Based(based[1].lstrip("0") or "0", base, text)
        return inside(based[1])
    bare, unit = split_unit(text)
    if bare != text:
        inner = inside(bare)
        if isinstance(inner, Value):
            return Value(inner.value, unit or inner.unit, text)
        return inner if isinstance(inner, Many) else Opaque(bare, unit, text)
    if infinite := re.fullmatch(r"([+-]?)\s*\\infty", text):
        return Value(-generator("∞") if infinite[1] == "-" else generator("∞"), text=text)
    return Value(Expression(tokens).whole(), text=text)


_SIGNS = (r"\pm", r"\mp")
_BASED = re.compile(
    r"\(?\s*((?=[A-F]*\d)[0-9A-F]+)\s*\)?\s*_\s*"
    r"(?:\{\s*(?:\\text\s*\{)?\s*(\d+)\s*\}?\s*\}|(\d+)|\{\s*(?:\\text\s*\{\s*)?([a-z]+)\s*\}?\s*\})"
)


def _flat(items: Iterable[Answer]) -> tuple[Answer, ...]:
    """Lists inside a list (from ±) belong to it."""
    flat: list[Answer] = []
    for item in items:
        flat.extend(item.items if isinstance(item, Many) and item.kind == "list" else [item])
    return tuple(flat)


def _both_signs(tokens: list[Token], text: str, depth: int) -> Answer:
    r"""1 \pm \sqrt{2} is the list of its two values; \mp goes the other way."""
    signs = [token for token in tokens if token.text in _SIGNS]
    if len(signs) > 4 or depth > 4:
        raise Undecided("many signs")
    values = []
    for upper, lower in ("+-", "-+"):
        written, position = "", 0
        for token in signs:
            written += text[position : token.start] + (upper if token.text == r"\pm" else lower)
            position = token.end
        values.append(_read((written + text[position:]).strip(), depth + 1))
    return Many("list", _flat(values), text)


def _matrix(tokens: list[Token], text: str, depth: int) -> Answer:
    if any("matrix" in token.text for token in tokens[1:-1]) or len(tokens) > 1000:
        raise Undecided("a matrix in a matrix, or a large one")
    lines, _ = _split(tokens[1:-1], {"\\\\"})
    rows = []
    for line in lines:
        if line:
            cells, _ = _parts(line, text, {"&"})
            if not all(cells):
                raise Undecided("an empty place")
            rows.append(tuple(_read(cell, depth + 1) for cell in cells))
    if not rows or len({len(row) for row in rows}) != 1:
        raise Undecided("rows of different lengths")
    return Matrix("vmatrix" in tokens[0].text.lower(), tuple(rows), text)


def _is_name(side: Answer) -> bool:
    r"""Whether a side of an equation only names what is computed: x, (x, y), f(x), m_1, AB, \angle ABC, Area."""
    if isinstance(side, Word):
        return True
    if isinstance(side, Sequence | Many):
        return all(_is_name(item) for item in side.items)
    if isinstance(side, Opaque):
        return bool(_NAMED.match(side.latex)) and not re.search(r"\d", side.latex)
    if not isinstance(side, Value):
        return False
    if re.fullmatch(r"[A-Za-z]+'*\s*\(\s*[a-zA-Z0-9, -]+\s*\)", side.text):  # f(x), P(A), f(-1)
        return True
    if side.value.bottom != ONE or len(side.value.top) != 1:
        return False
    (monomial, coefficient), *_ = side.value.top.items()
    if coefficient != 1 or any(name in ("√", "π", "∞") or exponent != 1 for name, exponent in monomial):
        return False
    names = [name for name, _ in monomial]
    if len(names) == 1:
        return names[0] not in ("e", "i")
    return bool(names) and all(name[0].isupper() for name in names)


_NAMED = re.compile(r"\\(?:angle|overline|triangle|text|mathrm|det|Pr|operatorname)(?![a-zA-Z])")


def _is_number(side: Answer) -> bool:
    return isinstance(side, Value) and not side.value.names()


def _relation(ops: tuple[str, ...], sides: tuple[Answer, ...], text: str) -> Answer:
    """Chains are shortened: x = 3 + 4 = 7 is x = 7, and 3 + 4 = 7 is 7. An inequality of one symbol is an interval."""
    if set(ops) == {"="}:
        if all(_is_number(side) for side in sides):
            return sides[-1]
        if len(ops) > 1 and _is_name(sides[0]):
            return Relation(("=",), (sides[0], sides[-1]), f"{sides[0].text} = {sides[-1].text}")
    elif ops == ("in",):
        return Relation(("=",), sides, text)
    elif all(op in _FLIP for op in ops) and len({op[0] for op in ops}) == 1 and len(ops) <= 2:
        interval = _interval(ops, sides, text)
        if interval is not None:
            return interval
    return Relation(ops, sides, text)


_FLIP = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def _interval(ops: tuple[str, ...], sides: tuple[Answer, ...], text: str) -> Sequence | None:
    """What a < x <= b says of x."""
    if ops[0][0] == ">":
        ops, sides = tuple(_FLIP[op] for op in reversed(ops)), sides[::-1]
    infinity = generator("∞")
    if len(ops) == 1 and _is_symbol(sides[0]):
        ops, sides = ("<", *ops), (Value(-infinity, text=r"-\infty"), *sides)
    elif len(ops) == 1:
        ops, sides = (*ops, "<"), (*sides, Value(infinity, text=r"\infty"))
    low, middle, high = sides
    bounds_known = all(_is_number(x) or (isinstance(x, Value) and x.value.names() == {"∞"}) for x in (low, high))
    if not (_is_symbol(middle) and bounds_known):
        return None
    return Sequence("(" if ops[0] == "<" else "[", ")" if ops[1] == "<" else "]", (low, high), text)


def _is_symbol(side: Answer) -> bool:
    return isinstance(side, Value) and _is_name(side) and len(side.value.names()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Comparing.

Leaf = Callable[[str, str], bool]


def undecided(gold: str, answer: str) -> bool:
    """The leaf of a process that has no sympy."""
    raise Undecided(f"{gold!r} and {answer!r} are not read exactly")


def same(gold: str, answer: str, leaf: Leaf = undecided) -> bool:
    """Whether the answer means what the gold means. `leaf` decides on parts that are not read exactly.

    The two are not quite alike: the gold says which unit was asked for.
    """
    a, b = clean(gold), clean(answer)
    if not a or not b:
        return False
    if a == b or (_sentence(a) is not None and _sentence(a) == _sentence(b)):
        return True
    integers = [_plain_integer(text) for text in (a, b)]
    if None not in integers:  # of any length: no int() of a million digits
        return integers[0] == integers[1]
    if (letter := _CHOICE.fullmatch(a)) and (labelled := _LABELLED.fullmatch(b)):
        return letter[1] == (labelled[1] or labelled["bare"])
    first, second = read(gold), read(answer)
    # 100,200 is a number, and also two numbers written without a space.
    if _GROUPED.fullmatch(b) and isinstance(first, Many | Sequence):
        second = read(b.replace(",", ", "))
    elif _GROUPED.fullmatch(a) and isinstance(second, Many | Sequence):
        first = read(a.replace(",", ", "))
    return _same(first, second, leaf)


# A gold that is a choice's letter, and an answer that is the letter in parentheses and its text: (A) 5.
_CHOICE = re.compile(r"(?:\\text(?:bf|rm)?\s?\{\s?)?\(?([A-J])\)?\s?\}?")
_LABELLED = re.compile(
    r"(?:\\text(?:bf|rm)?\s?\{\s?\(([A-J])\)\s?\}\s?|\((?P<bare>[A-J])\) )"
    r"(?![-+*/^=!_,;<>|&(]|\\(?!text|frac|sqrt|\$))(?:(?!(?<![A-Za-z\\])[A-J](?![A-Za-z])).)+"
)


def _sentence(text: str) -> str | None:
    r"""A text with a word in it, without the commands around: \text{June 20} is June 20."""
    text = _TEXT.sub(r" \1 ", text) if re.search(r"[A-Za-z]{3}", _TEXT.sub(r"\1", text)) else ""
    text = " ".join(text.replace("p.m.", "pm").replace("a.m.", "am").split()).lower()
    return text if text and "\\" not in text and re.search(r"[a-z]{3}", text) else None


_GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+")
_INTEGER = re.compile(r"([+-]?)\s*(\d{1,3}(?:,\d{3})+|\d+)(?:\.0*)?")


def _plain_integer(text: str) -> str | None:
    match = _INTEGER.fullmatch(text)
    if not match:
        return None
    digits = match[2].replace(",", "").lstrip("0")
    return (match[1].strip("+") + digits) if digits else "0"


def _same(a: Answer, b: Answer, leaf: Leaf) -> bool:
    a, b = _without_name(a, b)
    if isinstance(a, Word) or isinstance(b, Word):
        words = plain_words(a.text) or a.text, plain_words(b.text) or b.text
        return words[0] == words[1]
    if isinstance(a, Based):
        # Digits without a base: the question said it.
        return a == b or _plain_integer(b.text) == a.digits
    if isinstance(b, Based):
        return False
    if isinstance(a, Value) and isinstance(b, Value):
        return _same_values(a, b)
    if isinstance(a, Relation) and isinstance(b, Relation):
        return _same_relations(a, b, leaf)
    if isinstance(a, Opaque) or isinstance(b, Opaque):
        units = {getattr(x, "unit", "") for x in (a, b)} - {""}
        if len(units) > 1 or _is_prose(_bare(a)) or _is_prose(_bare(b)):
            return False
        return leaf(_bare(a), _bare(b))
    if isinstance(a, Matrix) and isinstance(b, Matrix):
        shapes = [[len(row) for row in x.rows] for x in (a, b)]
        cells = [tuple(cell for row in x.rows for cell in row) for x in (a, b)]
        return a.determinant == b.determinant and shapes[0] == shapes[1] and _all_same(cells[0], cells[1], leaf)
    if isinstance(a, Many) and isinstance(b, Many):
        if {a.kind, b.kind} == {"union", "set"}:
            return False
        return _same_in_any_order(a.items, b.items, leaf)
    if isinstance(a, Sequence) and isinstance(b, Sequence):
        brackets = {x.opening + x.closing for x in (a, b)}
        return (len(brackets) == 1 or brackets == {"()", r"\langle\rangle"}) and _all_same(a.items, b.items, leaf)
    # (1, 2) without its parentheses, in its order.
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Sequence) and isinstance(y, Many) and y.kind == "list" and x.opening + x.closing == "()":
            return _all_same(a.items, b.items, leaf)  # type: ignore[union-attr]  # both have items
    return False


def _without_name(a: Answer, b: Answer) -> tuple[Answer, Answer]:
    """x = 5 against 5, or 5 = x: the name of what was computed is dropped where only one has it."""
    if isinstance(a, Relation) != isinstance(b, Relation):
        a, b = _named_value(a), _named_value(b)
    # m + n = 25 answers what m + n is. As a gold it is an equation, which 25 is not.
    if isinstance(b, Relation) and b.ops == ("=",) and not isinstance(a, Relation):
        for total, value in (b.sides, b.sides[::-1]):
            if _TOTAL.fullmatch(total.text) and _is_number(value):
                return a, value
    return a, b


_TOTAL = re.compile(r"(?:[a-zA-Z]|[A-Z]{2})(?: ?\+ ?(?:[a-zA-Z]|[A-Z]{2}))+")


def _named_value(x: Answer) -> Answer:
    if isinstance(x, Relation) and x.ops == ("=",):
        for name, value in (x.sides, x.sides[::-1]):
            if _is_name(name):
                return value
    return x


def _is_prose(text: str) -> bool:
    words = re.findall(r"(?<![\\A-Za-z])(?:[A-Za-z]{4,}|not|was|are|has|the|you)(?![A-Za-z])", text)
    return any(word.lower() not in FUNCTIONS and word not in _SPELLED and "matrix" not in word for word in words)


def _bare(x: Answer) -> str:
    return split_unit(x.text)[0] if isinstance(x, Opaque | Value) else x.text


def _same_values(a: Value, b: Value) -> bool:
    """Units that contradict each other make a difference; one that is missing does not.

    A percentage is read both ways, since "what percent" is answered by 10 and by 10%; but 0.5 is not 0.5%.
    """
    equal = a.value.equals(b.value)
    if a.unit == b.unit:
        return equal
    if {a.unit, b.unit} == {"%", ""}:
        hundred = number(100)
        if a.unit:
            return equal or (a.value / hundred).equals(b.value)
        asked = a.value.rational()
        return a.value.equals(b.value / hundred) or (equal and asked is not None and abs(asked) >= 1)
    return equal and "" in (a.unit, b.unit)


def _same_relations(a: Relation, b: Relation, leaf: Leaf) -> bool:
    if a.ops == b.ops == ("=",) and all(_is_name(x.sides[0]) for x in (a, b)):
        try:
            if _all_same(a.sides, b.sides, leaf):
                return True
        except Undecided:
            pass  # the whole equation may still be read
    if len(a.ops) == len(b.ops) == 1:
        values = [side.value for side in (*a.sides, *b.sides) if isinstance(side, Value)]
        if len(values) < 4:
            return leaf(a.text, b.text)
        first, second = values[0] + -values[1], values[2] + -values[3]
        return _proportional(first, a.ops[0], second, b.ops[0])
    if a.ops == b.ops:
        return _all_same(a.sides, b.sides, leaf)
    if tuple(_FLIP.get(op, op) for op in reversed(a.ops)) == b.ops:
        return _all_same(a.sides[::-1], b.sides, leaf)
    return False


def _proportional(first: Quotient, op: str, second: Quotient, other: str) -> bool:
    """Whether `first op 0` and `second other 0` differ by a constant factor only, positive for < and >.

    Denominators count, since 1/x = 0 and x = 0 differ.
    """
    if not first.top or not second.top:
        return not first.top and not second.top and op == other
    ratio = first / second
    lead = min(ratio.bottom)
    if lead not in ratio.top:
        return False
    factor = ratio.top[lead] / ratio.bottom[lead]
    if {m: c / factor for m, c in ratio.top.items()} != ratio.bottom:
        return False
    return other == (_FLIP[op] if factor < 0 and op in _FLIP else op)


def _all_same(first: tuple[Answer, ...], second: tuple[Answer, ...], leaf: Leaf) -> bool:
    """The cheap pairs first, so that one plain difference needs no worker."""
    if len(first) != len(second):
        return False
    later = []
    for x, y in zip(first, second, strict=True):
        try:
            if not _same(x, y, undecided):
                return False
        except Undecided:
            later.append((x, y))
    return all(_same(x, y, leaf) for x, y in later)


def _same_in_any_order(first: tuple[Answer, ...], second: tuple[Answer, ...], leaf: Leaf) -> bool:
    if len(first) != len(second):
        return False
    if len(first) > 60:
        raise Undecided("a long list")
    left = list(second)
    for x in first:
        match = next((k for k, y in enumerate(left) if _same(x, y, leaf)), None)
        if match is None:
            return False
        del left[match]
    return True
