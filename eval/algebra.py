"""Exact algebra for the grader: quotients of polynomials with rational coefficients over symbols, pi, e, i and square
roots of integers. Such a quotient is zero in one way only, so that equality is decided, never estimated.

Everything is bounded (`Undecided` beyond), since it runs in the caller's own process, where nothing can be killed.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

MAX_BITS = 4000  # of a coefficient on the way
MAX_TERMS = 60  # of a polynomial

# A monomial is a sorted tuple of (generator, exponent). The square root of a squarefree n is the
# generator "√" with "exponent" n, at most one in a monomial; i has the exponent 1 only. So a polynomial is zero exactly
# when it has no terms.

Monomial = tuple[tuple[str, int], ...]
Polynomial = dict[Monomial, Fraction]

ONE: Polynomial = {(): Fraction(1)}


class Undecided(Exception):
    """The exact reading does not reach this far."""


def constant(number: Fraction | int) -> Polynomial:
    return {(): Fraction(number)} if number else {}


def _bounded(p: Polynomial) -> Polynomial:
    if len(p) > MAX_TERMS:
        raise Undecided("too many terms")
    if any(max(c.numerator.bit_length(), c.denominator.bit_length()) > MAX_BITS for c in p.values()):
        raise Undecided("too many digits")
    return p


def add(p: Polynomial, q: Polynomial, factor: int = 1) -> Polynomial:
    total = dict(p)
    for monomial, coefficient in q.items():
        value = total.get(monomial, Fraction(0)) + factor * coefficient
        if value:
            total[monomial] = value
        else:
            total.pop(monomial, None)
    return _bounded(total)


def _times(m: Monomial, n: Monomial) -> tuple[int, Monomial]:
    """The product of two monomials, as a factor and a monomial: √6 √10 = 2 √15, i i = -1."""
    exponents, factor = dict(m), 1
    for name, exponent in n:
        if name not in exponents:
            exponents[name] = exponent
        elif name == "√":
            common = math.gcd(exponents[name], exponent)
            factor *= common
            exponents[name] = exponents[name] * exponent // common**2
            if exponents[name] == 1:
                del exponents[name]
        elif name == "i":
            factor = -factor
            del exponents[name]
        else:
            exponents[name] += exponent
    return factor, tuple(sorted(exponents.items()))


def multiply(p: Polynomial, q: Polynomial) -> Polynomial:
    if len(p) * len(q) > 10 * MAX_TERMS:
        raise Undecided("too many terms")
    total: Polynomial = {}
    for m, a in p.items():
        for n, b in q.items():
            factor, monomial = _times(m, n)
            value = total.get(monomial, Fraction(0)) + factor * a * b
            if value:
                total[monomial] = value
            else:
                total.pop(monomial, None)
    return _bounded(total)


def as_rational(p: Polynomial) -> Fraction | None:
    """The number that a polynomial without generators is."""
    if not p:
        return Fraction(0)
    return p.get(()) if len(p) == 1 else None


@dataclass(frozen=True, slots=True)
class Quotient:
    top: Polynomial
    bottom: Polynomial

    def __add__(self, other: "Quotient") -> "Quotient":
        if self.bottom == other.bottom:
            return Quotient(add(self.top, other.top), self.bottom)
        top = add(multiply(self.top, other.bottom), multiply(other.top, self.bottom))
        return Quotient(top, multiply(self.bottom, other.bottom))

    def __neg__(self) -> "Quotient":
        return Quotient({m: -c for m, c in self.top.items()}, self.bottom)

    def __mul__(self, other: "Quotient") -> "Quotient":
        return Quotient(multiply(self.top, other.top), multiply(self.bottom, other.bottom))

    def __truediv__(self, other: "Quotient") -> "Quotient":
        if not other.top:
            raise Undecided("division by zero")
        number = other.rational()
        if number is not None:  # keeps rational results over one denominator, so that they stay cheap
            return Quotient({m: c / number for m, c in self.top.items()}, self.bottom)
        return Quotient(multiply(self.top, other.bottom), multiply(self.bottom, other.top))

    def equals(self, other: "Quotient") -> bool:
        return multiply(self.top, other.bottom) == multiply(other.top, self.bottom)

    def rational(self) -> Fraction | None:
        top, bottom = as_rational(self.top), as_rational(self.bottom)
        return None if top is None or bottom is None else top / bottom

    def names(self) -> set[str]:
        """Its generators that are not numbers."""
        found = {name for p in (self.top, self.bottom) for monomial in p for name, _ in monomial}
        return found - {"√", "i", "π", "e"}


def number(value: Fraction | int) -> Quotient:
    return Quotient(_bounded(constant(value)), ONE)


def generator(name: str) -> Quotient:
    return Quotient({((name, 1),): Fraction(1)}, ONE)


def square_root(value: Quotient) -> Quotient:
    """√(p/q) = √(pq) / q, without squares under the root; i √n of a negative one."""
    n = value.rational()
    if n is None:
        raise Undecided("root of a symbol")
    radicand, outside = abs(n.numerator) * n.denominator, Fraction(1, n.denominator)
    root = math.isqrt(radicand)
    if root * root == radicand:
        outside, radicand = outside * root, 1
    elif radicand > 10**9:  # its squares would take long to find
        raise Undecided("root of a large number")
    factor = 2
    while factor**3 <= radicand:
        while radicand % factor**2 == 0:
            radicand, outside = radicand // factor**2, outside * factor
        factor += 1
    # What is left has no prime below its cube root twice: it is squarefree, or p² times such small primes.
    for small in range(1, factor):
        if radicand % small == 0:
            root = math.isqrt(radicand // small)
            if root > 1 and root * root * small == radicand:
                radicand, outside = small, outside * root
                break
    monomial: Monomial = (("√", radicand),) if radicand > 1 else ()
    if n < 0:
        monomial = tuple(sorted((*monomial, ("i", 1))))
    return Quotient({monomial: outside} if n else {}, ONE)


def power(base: Quotient, exponent: Quotient) -> Quotient:
    n = exponent.rational()
    if n is None:
        raise Undecided("an exponent that is no number")
    if n == Fraction(1, 2):
        return square_root(base)
    value = base.rational()
    if n.denominator != 1:
        return _root(value, n)
    if not base.top and n <= 0:
        raise Undecided("a power of zero")
    times = abs(n.numerator)
    if value is not None:
        if (
            value not in (0, 1, -1)
            and times * max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS
        ):
            raise Undecided("a large power")
        if value in (1, -1, 0):
            times = times % 2 or 2
        result = number(value**times)
    else:
        if times > 200:
            raise Undecided("a large power")
        result = number(1)
        for _ in range(times):
            result = result * base
    return number(1) / result if n < 0 else result


def _root(value: Fraction | None, exponent: Fraction) -> Quotient:
    """A rational power of a rational number, where it is rational."""
    k = exponent.denominator
    if value is None or value < 0 or k > 64 or abs(exponent.numerator) > 64:
        raise Undecided("a root")
    roots = [_integer_root(part, k) for part in (value.numerator, value.denominator)]
    if None in roots:
        raise Undecided("an irrational root")
    return power(number(Fraction(*roots)), number(exponent.numerator))  # type: ignore[arg-type]  # None is excluded above


def _integer_root(n: int, k: int) -> int | None:
    low, high = 0, 1 << (n.bit_length() // k + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**k <= n else (low, middle - 1)
    return low if low**k == n else None
