"""Whether two expressions are equal, by math-verify's LaTeX parser and sympy. Only workers import this.

math-verify 0.9.0 says "equal" of some unequal pairs, for four reasons, each closed here:
- its normalisation drops what it takes for a unit (`\\mathrm{e}`, `\\text{...}`), quotes and subscripts of numbers:
  texts are cleaned by `exact.clean` instead, and what the parser would drop is refused (`Unreadable`);
- numbers are compared after `evalf(chop=True)` at 15 digits, so that 1/2^99 equals 1/2^98: here as many digits are
  taken as the difference needs, and decimals are exact fractions;
- letters are put in one case and words are products of letters, so that god equals dog;
- exceptions are caught on the way, also MemoryError, and become "unequal": here they reach the worker.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache

import math_verify.grader
import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from sympy import And, Basic, Eq, Expr, Float, MatrixBase, Rational, Symbol
from sympy.core.relational import Relational

from eval.exact import ANGLE, FUNCTIONS

logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
math_verify.grader.TIMEOUT_WARNING_SHOWN = True  # no time-out of its own is wanted: the process is killed instead

DIGITS = 15
MAX_DIGITS = 400  # to tell a small difference from none
NORMALIZE = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")

# What the parser reads as something else, or leaves out.
_REFUSED = re.compile(
    r"\d\s*_|\\text|\\mbox|[\"`@;?]|\\(?:ldots|dots|cdots|overline|bar|dot|approx|sim|href|input|write|def|let|url|not)(?![a-zA-Z])"
    r"|\.\.\.|[^\x00-\x7f]|(?<![\\A-Za-z])(?!(?:" + "|".join(sorted(FUNCTIONS)) + r"|sqrt|pi)(?![A-Za-z]))[A-Za-z]{4,}"
)
_PLAIN_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan|pi)(?![A-Za-z])"
)
_POINT = re.compile(r"\d*\.\d+|\d+\.(?!\d)")


class Unreadable(Exception):
    """The text is no mathematics that the parser is known to read."""


@lru_cache(maxsize=256)  # one gold is compared with many samples, and parsing is what takes the time
def parse(text: str) -> Basic | MatrixBase:
    """The expression, symbols without assumptions, decimals as exact fractions."""
    environments = re.sub(r"\\(?:begin|end)\s*\{[a-z]*\}", " ", text)
    if found := _REFUSED.search(environments):
        raise Unreadable(f"{found[0]!r}")
    latex = _PLAIN_FUNCTION.sub(r"\\\1 ", text)
    latex = re.sub(r"\\(sqrt|exp)\s*\(([^()]*)\)", r"\\\1{\2}", latex)
    latex = re.sub(r"\\exp\s*(\{)", r"e^\1", latex)
    latex = re.sub(r"\\(sin|cos|tan)\s*\^\s*\{\s*-\s*1\s*\}", r"\\arc\1 ", latex)
    latex = re.sub(r"\\frac\s*\\pi\s*(\d)", r"\\frac{\\pi}{\1}", latex)
    latex = _in_radians(latex)
    latex = _POINT.sub(lambda m: _fraction(m[0]), latex)
    latex = normalize_latex(latex, NORMALIZE)
    try:
        parsed = latex2sympy(latex, is_real=False, convert_degrees=False, normalization_config=None)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # the parser raises bare Exception at whatever it does not read
        raise Unreadable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if not isinstance(parsed, Basic | MatrixBase):
        raise Unreadable(f"read as {type(parsed).__name__}")
    return _plain(parsed)


_DEGREES = re.compile(
    r"(\d+(?:\.\d*)?(?:\s*\\[a-zA-Z]+|\s*[a-zA-Z])?|(?<![\\a-zA-Z])[a-zA-Z]|\\[a-z]+|\([^()]*\)|\{[^{}]*\})"
    r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))"
)


def _in_radians(latex: str) -> str:
    """Degrees within a function: the parser leaves the sign out. Elsewhere they are a unit."""
    if not ANGLE.search(latex):
        return latex
    latex = _DEGREES.sub(lambda m: rf"(\frac{{({m[1].strip('{}')}) \pi}}{{180}})", latex)
    if r"\circ" in latex:
        raise Unreadable("degrees")
    return latex


def _fraction(decimal: str) -> str:
    value = Fraction(decimal)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator != 1 else str(value)


def _plain(parsed: Basic | MatrixBase) -> Basic | MatrixBase:
    """One symbol for one name, whatever the parser assumed of it; e and i are numbers."""
    constants = {"e": sympy.E, "i": sympy.I}
    symbols = {s: constants.get(s.name, Symbol(s.name)) for s in parsed.free_symbols if isinstance(s, Symbol)}
    parsed = parsed.xreplace(symbols)
    return parsed.xreplace({f: Rational(str(f)) for f in parsed.atoms(Float)})


def equal(gold: str, answer: str) -> bool:
    """Whether two texts in cleaned LaTeX are the same expression, equation or set."""
    a, b = parse(gold), parse(answer)
    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        if not (isinstance(a, MatrixBase) and isinstance(b, MatrixBase)) or a.shape != b.shape:
            return False
        return all(_same_expression(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Expr) and isinstance(b, Expr):
        return _same_expression(a, b)
    if isinstance(a, Eq) and isinstance(b, Eq):
        return _same_equation(a, b)
    if isinstance(a, Expr) or isinstance(b, Expr):
        return False
    relations = [isinstance(x, Relational | And) for x in (a, b)]
    if any(relations):
        return all(relations) and _same_inequality(a, b)
    if type(a) is not type(b) and not (isinstance(a, sympy.Set) and isinstance(b, sympy.Set)):
        return False
    return bool(math_verify.verify(a, b, timeout_seconds=None, raise_on_error=True))


def _same_expression(a: Expr, b: Expr) -> bool:
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    names = sorted(s.name for s in (a - b).free_symbols | a.free_symbols | b.free_symbols)
    agreed = 0
    for point in _points(names):
        difference = _is_zero(a.xreplace(point), b.xreplace(point))
        if difference is False:
            return False
        agreed += difference is True
        if agreed == (1 if not names else 4):
            return True
    if agreed or (a - b).has(sympy.nan, sympy.zoo):
        return False
    # Nowhere to be evaluated: sums and integrals that stay symbolic.
    return bool(sympy.simplify(a - b) == 0)


def _points(names: list[str]) -> list[dict[Symbol, Rational]]:
    """Points at which equal expressions agree and others do not: rationals of no pattern, of both signs."""
    if not names:
        return [{}]
    points = []
    for k in range(10):
        sign = -1 if k % 3 == 2 else 1
        values = [
            Rational(sign * (97 + 41 * k + 59 * j * (k + 1)) % (300 + 7 * j), 101 + 2 * k) for j in range(len(names))
        ]
        points.append(
            {Symbol(name): (value if sign > 0 else -value) for name, value in zip(names, values, strict=True)}
        )
    return points


def _is_zero(a: Expr, b: Expr) -> bool | None:
    """Whether two numbers are equal, exactly or by as many digits as it takes; None where they are no numbers."""
    difference = a - b
    if difference.has(sympy.nan, sympy.zoo, sympy.oo):
        return None
    if difference.is_Rational:
        return difference == 0
    value = difference.evalf(DIGITS, maxn=MAX_DIGITS)
    if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo):
        return None
    real, imaginary = value.as_real_imag()
    parts = [part for part in (real, imaginary) if part != 0]
    if not all(part.is_Float or part.is_Integer for part in parts):
        return None
    # A precision of 1 bit means that no digit of it is known, after MAX_DIGITS: it is zero.
    return all(part.is_Float and part._prec <= 1 for part in parts)


def _same_equation(a: Eq, b: Eq) -> bool:
    """Equal up to a constant factor."""
    first, second = a.lhs - a.rhs, b.lhs - b.rhs
    if not isinstance(first, Expr) or not isinstance(second, Expr):
        return bool(a.lhs == b.lhs and a.rhs == b.rhs)
    if _same_expression(first, second) or _same_expression(first, -second):
        return True
    ratio = sympy.cancel(sympy.together(first / second))
    return bool(ratio.is_number and ratio.is_nonzero)


_OPPOSITE = {sympy.Lt: sympy.Gt, sympy.Le: sympy.Ge, sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}


def _same_inequality(a: Basic, b: Basic) -> bool:
    chains = [list(getattr(x, "_unsorted_args", x.args)) if isinstance(x, And) else [x] for x in (a, b)]
    if len(chains[0]) != len(chains[1]):
        return False
    for x, y in zip(*chains, strict=True):
        if type(x) is type(y):
            same = _same_expression(x.lhs - x.rhs, y.lhs - y.rhs)
        else:
            same = _OPPOSITE.get(type(x)) is type(y) and _same_expression(x.lhs - x.rhs, y.rhs - y.lhs)
        if not same:
            return False
    return True


def warm_up() -> None:
    """Lets the parser's tables grow once, before the workers are forked: an ordinary text then takes half the time."""
    for text in (r"\frac{\sqrt[3]{2} x}{3} + \sin(2 x)", r"e^{x+1} = 5", r"\log_{2}(x) - |y| \cdot 3^{n}", "x^2 y - 1"):
        parse(text)
