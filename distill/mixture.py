"""How much of each domain goes into the dataset: quotas in samples or tokens, drawn by a seed.

The last stage that drops rows. Which rows of a domain are taken is decided by a hash of seed and id, so it depends on
neither order nor on the other domains, and a larger quota takes the same rows and more.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from distill.recipe import Mix
from distill.records import Decision
from eval.sample import Record

Row = tuple[str, str, int | None]  # id, domain, tokens


def mix(rows: Iterable[Row], settings: Mix, seed: int) -> Iterator[Decision]:
    """One decision a row, in order: kept, or `over_quota`.

    A domain is filled in the order of its hashes until the next row would go beyond its quota. With quotas given, a
    domain without one gets nothing. Raises ValueError where tokens are to be counted and a row has no count.
    """
    if settings.counts is None and settings.shares is None:
        yield from (Decision(name) for name, _, _ in rows)
        return
    listed = [(name, domain, _size(name, tokens, settings)) for name, domain, tokens in rows]
    asked = quotas(_sums(listed, lambda name: True), settings)
    left = dict(asked)
    full: set[str] = set()
    kept: set[int] = set()
    order = sorted(range(len(listed)), key=lambda place: _draw(seed, listed[place][0]))
    for place in order:
        _, domain, size = listed[place]
        if domain in full or size > left.get(domain, 0):
            full.add(domain)
            continue
        left[domain] -= size
        kept.add(place)
    for place, (name, domain, _) in enumerate(listed):
        if place in kept:
            yield Decision(name)
        else:
            yield Decision(name, "over_quota", f"{domain}: {asked.get(domain, 0):,} {settings.unit}")


def quotas(available: Mapping[str, int], settings: Mix) -> dict[str, int]:
    """What is asked of each domain, in samples or tokens; {} where all is taken.

    Shares without a total take as much as the scarcest domain allows.

    >>> quotas({"math": 90, "code": 10}, Mix(shares={"math": 0.75, "code": 0.25}))
    {'math': 30, 'code': 10}
    """
    if settings.counts is not None:
        return dict(settings.counts)
    if settings.shares is None:
        return {}
    shares = {domain: share for domain, share in settings.shares.items() if share > 0}
    total = settings.total
    if total is None:
        # 1e-9: 10 / 0.1 is what 10 samples allow, although the binary 0.1 is a little more.
        total = min(int(available.get(domain, 0) / share + 1e-9) for domain, share in shares.items())
    return _apportioned(total, shares)


def _apportioned(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that sum to `total`, by largest remainders."""
    exact = {domain: total * share for domain, share in shares.items()}
    whole = {domain: int(value + 1e-9) for domain, value in exact.items()}
    by_remainder = sorted(exact, key=lambda domain: (whole[domain] - exact[domain], domain))
    for domain in by_remainder[: max(0, total - sum(whole.values()))]:
        whole[domain] += 1
    return whole


@dataclass(frozen=True, slots=True)
class Share(Record):
    """One domain of the mixture, in samples or tokens: what was there, was asked of it (None: all), and was taken."""

    domain: str
    available: int
    asked: int | None
    got: int

    @property
    def missing(self) -> int:
        """What the domain could not give. A last row that would not fit is not missing."""
        return 0 if self.asked is None else max(0, self.asked - self.available)


def shortfall(rows: Iterable[Row], kept: Collection[str], settings: Mix) -> list[Share]:
    """Asked against taken for each domain, in order of their names; `kept` are the ids that `mix` kept."""
    listed = [(name, domain, _size(name, tokens, settings)) for name, domain, tokens in rows]
    available = _sums(listed, lambda name: True)
    got = _sums(listed, kept.__contains__)
    asked = quotas(available, settings)
    return [
        Share(
            domain,
            available.get(domain, 0),
            asked.get(domain, 0) if asked else None,
            got.get(domain, 0),
        )
        for domain in sorted({*available, *asked})
    ]


def _sums(rows: Iterable[tuple[str, str, int]], chosen: Callable[[str], bool]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, domain, size in rows:
        if chosen(name):
            sums[domain] = sums.get(domain, 0) + size
    return sums


def _size(name: str, tokens: int | None, settings: Mix) -> int:
    if settings.unit == "samples":
        return 1
    if tokens is None:
        raise ValueError(
            f"{name} has no count of tokens (its endpoint reports none), and mix.unit is tokens: set mix.unit: samples"
        )
    return tokens


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
