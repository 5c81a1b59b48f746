"""Dollars, budgets, and the estimate of a whole run from a pilot."""

import random
from collections import Counter
from statistics import fmean

import pytest

from distill.cost import Meter, Spent, dollars, estimate, pilot
from distill.recipe import Budget, Price
from eval.sample import Completion
from tests.distill.teaching import problem, sums

PRICE = Price(prompt_per_million=0.5, completion_per_million=2.0, machine_per_hour=3.0)


def test_dollars_are_those_of_tokens_and_of_the_machine() -> None:
    assert dollars(PRICE, 2_000_000, 500_000, 1800) == pytest.approx(1.0 + 1.0 + 1.5)
    assert dollars(Price(), 10**9, 10**9, 10**9) == 0


def completion(tokens: int | None, prompt: int | None = 10) -> Completion:
    return Completion("text", None, "stop", prompt, tokens)


def meter(price: Price = PRICE, **budget: float) -> Meter:
    return Meter(Budget.model_validate(budget), price, max_tokens=100)


def test_a_meter_says_which_budget_has_ended() -> None:
    for one, seconds, said in [
        (meter(tokens=100), 0.0, "the budget of 100 completion tokens is used up (120)"),
        (meter(dollars=0.0002), 0.0, "the budget of $0.00 is used up ($0.00)"),
        (meter(dollars=3.0), 3600.0, "the budget of $3.00 is used up ($3.00)"),
        (meter(hours=2.5), 9000.0, "the budget of 2.5 hours is used up"),
    ]:
        assert one.ended(0.0) == ""
        for _ in range(2):
            one.add(completion(60))
        assert one.ended(seconds) == said
    free = meter()
    free.add(completion(10**9))
    assert free.ended(10**9) == ""
    assert free.room(10**6, 10**9)


def test_near_its_end_a_budget_leaves_room_for_fewer_requests() -> None:
    one = meter(tokens=1000)
    assert [one.room(flying, 0.0) for flying in (0, 9, 10)] == [True, True, False]  # each may have max_tokens=100
    for _ in range(10):
        one.add(completion(50))  # 500 left, and the mean is 50
    assert [one.room(flying, 0.0) for flying in (9, 10)] == [True, False]
    one.add(completion(490))
    assert not one.room(1, 0.0)
    assert one.room(0, 0.0)  # one by one to the end
    priced = meter(Price(prompt_per_million=1e4, completion_per_million=1e4), dollars=6.0)
    for _ in range(5):
        priced.add(completion(50))  # $0.6 each with its prompt of 10
    assert [priced.room(flying, 0.0) for flying in (4, 5)] == [True, False]


def test_a_failed_completion_costs_nothing_and_an_uncounted_one_cannot_be_budgeted() -> None:
    one = meter(tokens=100)
    one.add(Completion(finish_reason="failed", error="x", completion_tokens=50))
    assert (one.samples, one.completion_tokens) == (0, 0)
    with pytest.raises(ValueError, match=r"budget\.tokens cannot be kept"):
        one.add(completion(None))
    with pytest.raises(ValueError, match=r"budget\.dollars cannot be kept"):
        meter(dollars=1.0).add(completion(None))
    by_the_hour = meter(Price(machine_per_hour=1.0), dollars=1.0, hours=1.0)
    by_the_hour.add(completion(None))
    assert by_the_hour.samples == 1


def test_a_pilot_is_drawn_from_all_sources_by_the_seed_alone() -> None:
    problems = [problem(number, source="first" if number < 900 else "second") for number in range(1000)]
    drawn = pilot(iter(problems), 100, seed=0)
    assert len(drawn) == 100
    assert drawn == pilot(problems[::-1], 100, seed=0)
    assert {one.id for one in drawn} != {one.id for one in pilot(problems, 100, seed=1)}
    assert 3 < Counter(one.source for one in drawn)["second"] < 20
    assert {one.id for one in pilot(problems, 50, seed=0)} < {one.id for one in drawn}
    assert len(pilot(sums(3), 10, seed=0)) == 3


def test_the_estimate_of_a_whole_that_is_known_is_the_whole() -> None:
    spent = [Spent(1, 10, 100, True), Spent(3, 30, 500, False)]
    found = estimate(spent, 2, PRICE, seconds=7200.0)
    assert (found.samples.expected, found.samples.low, found.samples.high) == (4, 4, 4)
    assert found.completion_tokens.expected == 600
    assert found.prompt_tokens.expected == 40
    assert found.solved.expected == 1
    assert found.hours.expected == pytest.approx(2.0)
    assert found.dollars.expected == pytest.approx(40 * 0.5e-6 + 600 * 2e-6 + 6.0)


def test_an_estimate_by_hand() -> None:
    """Two of four known, of 1 and 3: mean 2, s = sqrt 2; 12.7062 is the quantile of t with one degree of freedom."""
    found = estimate([Spent(1, 0, 1, True), Spent(3, 0, 3, True)], 4, Price(), seconds=4.0)
    half = 12.7062 * (2 * 2**2 * (1 / 2 + 1 / 2)) ** 0.5
    assert found.samples.expected == 8
    assert found.samples.high == pytest.approx(8 + half, rel=1e-5)
    assert found.samples.low == 4  # what the pilot itself took
    assert found.solved.high == 4  # of four
    assert found.hours.expected == pytest.approx(8 / 3600)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Skewed as such costs are: most problems take a few samples, some take all sixteen."""
    noise, held, runs = random.Random(0), Counter[str](), 200
    for _ in range(runs):
        everything = []
        for _ in range(300):
            chance = noise.random()
            samples = next((n for n in range(1, 16) if noise.random() < chance), 16)
            tokens = sum(noise.randrange(50, 200) for _ in range(samples))
            everything.append(Spent(samples, 20 * samples, tokens, samples < 16))
        found = estimate(everything[:60], 300, PRICE, seconds=60.0)
        truth = {
            "samples": sum(one.samples for one in everything),
            "completion_tokens": sum(one.completion_tokens for one in everything),
            "solved": sum(one.solved for one in everything),
        }
        for name, value in truth.items():
            held[name] += getattr(found, name).low <= value <= getattr(found, name).high
    assert all(0.91 <= held[name] / runs <= 0.99 for name in ("samples", "completion_tokens")), held
    assert fmean(held.values()) / runs >= 0.9


def test_an_estimate_needs_two_problems_of_the_whole() -> None:
    with pytest.raises(ValueError, match="a pilot of 1 problems"):
        estimate([Spent(1, 1, 1, True)], 10, PRICE, 1.0)
    with pytest.raises(ValueError, match="cannot be part of 1"):
        estimate([Spent(1, 1, 1, True)] * 2, 1, PRICE, 1.0)
