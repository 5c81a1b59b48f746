"""Quotas are met exactly where there is enough, drawn by the seed alone, and nested; what is missing is reported."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.mixture import Share, mix, quotas, shortfall
from distill.recipe import Mix
from distill.records import REASONS

ROWS = [(f"{domain}/{n}", domain, 10 + n % 7) for domain, size in (("math", 60), ("code", 30)) for n in range(size)]


def kept(settings: Mix, rows=ROWS, seed: int = 0) -> set[str]:
    return {one.id for one in mix(rows, settings, seed) if not one.reason}


def counts(names: set[str]) -> dict[str, int]:
    return dict(Counter(name.partition("/")[0] for name in names))


def test_nothing_asked_keeps_everything():
    assert len(kept(Mix())) == 90
    assert len(kept(Mix(unit="tokens"), [("a", "math", None)])) == 1


def test_counts_of_samples():
    assert counts(kept(Mix(counts={"math": 20, "code": 10}))) == {"math": 20, "code": 10}
    assert counts(kept(Mix(counts={"math": 20, "code": 100}))) == {"math": 20, "code": 30}
    assert counts(kept(Mix(counts={"math": 20}))) == {"math": 20}


def test_every_row_is_judged_once_and_in_order():
    decisions = list(mix(ROWS, Mix(counts={"math": 20}), 0))
    assert [one.id for one in decisions] == [name for name, _, _ in ROWS]
    dropped = [one for one in decisions if one.reason]
    assert {one.reason for one in dropped} == set(REASONS["mix"])
    assert {one.detail for one in dropped} == {"math: 20 samples", "code: 0 samples"}


def test_shares_of_what_the_scarcest_domain_allows():
    assert counts(kept(Mix(shares={"math": 0.5, "code": 0.5}))) == {"math": 30, "code": 30}
    assert counts(kept(Mix(shares={"math": 0.9, "code": 0.1}))) == {"math": 59, "code": 7}
    assert counts(kept(Mix(shares={"math": 0.0, "code": 1.0}))) == {"code": 30}


def test_shares_of_a_total():
    assert quotas({}, Mix(shares={"math": 0.7, "code": 0.3}, total=10)) == {"math": 7, "code": 3}
    assert quotas({}, Mix(shares={"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, total=10)) == {"a": 4, "b": 3, "c": 3}
    assert quotas({}, Mix(counts={"math": 7})) == {"math": 7}
    assert quotas({"math": 5}, Mix()) == {}


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 10_000_000))
def test_shares_sum_to_the_total(weights, total):
    shares = {str(n): weight / sum(weights) for n, weight in enumerate(weights)}
    asked = quotas({}, Mix(shares=shares, total=total))
    assert sum(asked.values()) == total
    assert all(abs(asked[name] - total * share) < 1 for name, share in shares.items())


def test_tokens_stay_within_the_quota():
    sizes = {name: size for name, _, size in ROWS}
    for quota in (0, 9, 100, 137, 10_000):
        chosen = kept(Mix(unit="tokens", counts={"math": quota}))
        total = sum(sizes[name] for name in chosen)
        assert total <= quota
        assert total > quota - 17 or len(chosen) == 60


def test_the_draw_depends_on_the_seed_alone():
    settings = Mix(counts={"math": 20, "code": 10})
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    assert kept(settings) == kept(settings, shuffled)
    assert kept(settings) != kept(settings, seed=1)
    assert {name for name in kept(settings) if "math" in name} == kept(Mix(counts={"math": 20}))


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_a_larger_quota_takes_the_same_rows_and_more(unit):
    chosen = [kept(Mix(unit=unit, counts={"math": quota, "code": quota})) for quota in range(0, 300, 3)]
    assert all(few <= many for few, many in pairwise(chosen))
    assert len(set(map(len, chosen))) > 20


def test_the_draw_is_fair():
    """Each of ninety rows is drawn in about a third of 600 seeds: five standard deviations either way."""
    drawn = Counter(name for seed in range(600) for name in kept(Mix(counts={"math": 20, "code": 10}), seed=seed))
    assert len(drawn) == 90
    assert all(abs(times - 200) < 5 * (600 * 2 / 9) ** 0.5 for times in drawn.values())


def test_tokens_that_nobody_counted():
    with pytest.raises(ValueError, match=r"a has no count of tokens .* set mix.unit: samples"):
        list(mix([("a", "math", None)], Mix(unit="tokens", counts={"math": 5}), 0))


def test_shortfall():
    settings = Mix(counts={"math": 20, "code": 100, "logic": 5})
    table = shortfall(ROWS, kept(settings), settings)
    assert table == [Share("code", 30, 100, 30), Share("logic", 0, 5, 0), Share("math", 60, 20, 20)]
    assert [one.missing for one in table] == [70, 5, 0]
    assert shortfall(ROWS, kept(Mix()), Mix()) == [Share("code", 30, None, 30), Share("math", 60, None, 60)]
    assert [one.missing for one in shortfall(ROWS, set(), Mix())] == [0, 0]


def test_a_last_row_that_does_not_fit_is_not_missing():
    settings = Mix(unit="tokens", counts={"math": 100})
    math = shortfall(ROWS, kept(settings), settings)[1]
    assert math.asked == 100 > math.got
    assert math.missing == 0
