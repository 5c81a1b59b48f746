"""Numbers against scipy, numpy, formulas of papers and tables by hand; coverage of the intervals by simulation."""

import math
import random
import subprocess
import sys
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from eval.metrics import (
    cons_at_k,
    mean_pass_at_k,
    paired_difference,
    pass_at_k,
    same_text,
    score_interval,
    token_lengths,
    verdict_counts,
    verdict_rates,
)
from eval.sample import VERDICTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (4, 1, 2, 0.5),
        (5, 2, 3, 0.9),
        (10, 3, 1, 0.3),
        (64, 64, 64, 1.0),
        (64, 1, 64, 1.0),
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == expected


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == sum(map(any, draws)) / len(draws)


def test_pass_at_k_equals_the_estimator_of_human_eval() -> None:
    """`estimate_pass_at_k` of openai/human-eval: 1 - prod(1 - k / arange(n - c + 1, n + 1))."""
    for n, c, k in [(200, 3, 1), (200, 3, 10), (200, 3, 100), (64, 20, 16), (64, 20, 50), (1000, 1, 999)]:
        theirs = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
        assert pass_at_k(n, c, k) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 1, 5, "at least 5 samples"),
        (4, 5, 2, "c=5"),
        (4, -1, 2, "c=-1"),
        (-1, 0, 1, "n=-1"),
        (4, 1, 0, "k=0"),
        (0, 0, 1, "needs at least 1"),
        (4, 1.5, 2, "c=1.5"),
    ],
)
def test_pass_at_k_is_refused(n: int, c: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def test_pass_at_k_over_items_is_refused_naming_the_items_that_lack_samples() -> None:
    table = {"a": [True, False, False, False], "b": [False] * 4}
    assert mean_pass_at_k(table, 2).value == 0.25
    assert mean_pass_at_k(table, 1).value == 0.125
    with pytest.raises(ValueError, match=r"2 of 3 have fewer: c \(1\), d \(3\)"):
        mean_pass_at_k({"a": [True] * 4, "c": [True], "d": [True] * 3}, 4)


CONS = [
    (["4", "4", "5"], 1.0),
    (["5", "5", "4"], 0.0),
    (["4", "5"], 0.5),
    (["4", "5", "6"], 1 / 3),
    (["5", "5", "6", "6", "4"], 0.0),  # the gold class is not among the largest
    (["4", "4", "5", "5", "6"], 0.5),
    (["4", None, None, None], 1.0),  # no answer is no class
    ([None, None], 0.0),
    ([], 0.0),
]


@pytest.mark.parametrize(("answers", "expected"), CONS)
def test_cons_at_k_and_its_ties_do_not_depend_on_order(answers: list[str | None], expected: float) -> None:
    for order in set(permutations(answers)):
        assert cons_at_k(order, "4", classes=same_text) == expected
        assert cons_at_k(order, "4", equivalent=str.__eq__) == expected


def test_cons_at_k_votes_over_classes_not_texts_and_not_right_or_wrong() -> None:
    values = {"1/2": 0.5, "0.5": 0.5, "3": 3.0, "three": 3.0, "7": 7.0}

    def equivalent(one: str, other: str) -> bool:
        return values[one] == values[other]

    # By texts "3" would win with two votes; as right or wrong, wrong would win with three.
    assert cons_at_k(["1/2", "0.5", "0.5", "3", "3", "7"], "0.5", equivalent=equivalent) == 1.0
    assert cons_at_k(["1/2", "3", "three"], "0.5", equivalent=equivalent) == 0.0


def test_cons_at_k_takes_the_credit_that_the_grader_gave_the_winning_class() -> None:
    answers = ["rome", "Rome", "paris", None]
    assert cons_at_k(answers, "", classes=same_text, credits=[0.5, 1.0, 0.0, 0.0]) == 0.75
    with pytest.raises(ValueError, match="1 credits for 2 answers"):
        cons_at_k(["a", "b"], "a", credits=[1.0])


def test_at_one_sample_the_interval_is_wilsons() -> None:
    for n in (1, 5, 30, 198, 500):
        for right in {0, 1, n // 3, n - 1, n}:
            expected = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
            score = score_interval([1.0] * right + [0.0] * (n - right))
            assert score.interval == pytest.approx((expected.low, expected.high), abs=1e-12)
            assert score.value == pytest.approx(right / n)


def test_the_interval_of_0_and_of_n_right_has_width_and_an_exact_end() -> None:
    for k in (1, 16):
        for n in (1, 30, 500):
            low, high = score_interval([[0.0] * k] * n).interval
            assert low == 0.0
            assert 0 < high < 1
            low, high = score_interval([[1.0] * k] * n).interval
            assert high == 1.0
            assert 0 < low < 1


def test_standard_error_is_that_of_the_items_means() -> None:
    generator = np.random.default_rng(0)
    scores = generator.random((40, 8))
    score = score_interval(scores.tolist())
    assert score.standard_error == pytest.approx(stats.sem(scores.mean(axis=1)))
    assert (score.items, score.samples, score.clusters) == (40, 320, 40)
    assert score_interval([0.5]).standard_error is None


def test_clustered_standard_error_is_the_formula_of_miller_2024() -> None:
    """Equation 4: sqrt(sum over clusters, over pairs within, of the residuals' products) / n, and its G / (G - 1)."""
    generator = np.random.default_rng(1)
    scores, clusters = generator.random(24), ["p"] * 10 + ["q"] * 3 + ["r"] * 4 + ["s"] * 7
    residuals = scores - scores.mean()
    pairs = sum(residuals[i] * residuals[j] for i in range(24) for j in range(24) if clusters[i] == clusters[j])
    score = score_interval(scores.tolist(), clusters)
    assert score.standard_error == pytest.approx(math.sqrt(pairs * 4 / 3) / 24)
    assert score.clusters == 4


def test_items_without_a_cluster_stand_alone() -> None:
    scores = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert score_interval(scores, ["", None, "", None, ""]) == score_interval(scores)
    # One passage with five questions is one observation.
    together = score_interval([1.0] * 5, ["p"] * 5)
    assert together.interval == score_interval([1.0]).interval


def test_the_interval_does_not_depend_on_the_order_of_items() -> None:
    generator = random.Random(0)
    rows = [([generator.random() for _ in range(4)], generator.choice("abc")) for _ in range(50)]
    shuffled = generator.sample(rows, len(rows))
    one, other = (score_interval([row[0] for row in table], [row[1] for row in table]) for table in (rows, shuffled))
    assert one.value == pytest.approx(other.value, abs=1e-15)
    assert one.interval == pytest.approx(other.interval, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "clusters", "message"),
    [
        ([], None, "empty"),
        ([[1.0], []], None, "item 1 has no samples"),
        ([1.0, 1.5], None, "item 1 has a score of 1.5"),
        ([math.nan], None, "score of nan"),
        ([1.0, 0.0], ["a"], "1 clusters for 2 items"),
    ],
)
def test_scores_are_checked(scores: list[float], clusters: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_interval(scores, clusters)


DIFFICULTIES = {
    "uniform": lambda generator, shape: generator.beta(1, 1, shape),
    "bimodal": lambda generator, shape: generator.beta(0.5, 0.5, shape),
    "hard": lambda generator, shape: generator.beta(2, 8, shape),
    "easy": lambda generator, shape: generator.beta(9, 1, shape),
    "mostly solved": lambda generator, shape: generator.beta(0.2, 0.05, shape),
    "all alike": lambda generator, shape: np.full(shape, 0.9),
    "rarely anything": lambda generator, shape: np.full(shape, 0.03),
}
MEANS = dict(zip(DIFFICULTIES, (0.5, 0.5, 0.2, 0.9, 0.8, 0.9, 0.03), strict=True))


@pytest.mark.parametrize("n", [30, 500])
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_93_to_97_per_cent_of_the_intervals_cover(difficulty: str, n: int) -> None:
    """k = 16. The standard error of these coverages is 0.5 %."""
    generator, draws, k = np.random.default_rng(7), 2000, 16
    scores = generator.binomial(k, DIFFICULTIES[difficulty](generator, (draws, n))) / k
    intervals = [score_interval(row).interval for row in scores.tolist()]
    covered = np.mean([low <= MEANS[difficulty] <= high for low, high in intervals])
    assert 0.93 <= covered <= 0.97


def test_intervals_cover_with_unequal_clusters() -> None:
    """120 clusters of 1 to 12 items that share their difficulty: as if they stood alone, 77 % would cover."""
    generator, draws, k = np.random.default_rng(8), 1500, 16
    sizes = np.minimum(generator.geometric(0.25, 120), 12)
    clusters = np.repeat(np.arange(120), sizes)
    scores = generator.binomial(k, generator.beta(1, 2, (draws, 120))[:, clusters]) / k
    covered = np.mean(
        [
            low <= 1 / 3 <= high
            for low, high in (score_interval(row, clusters.tolist()).interval for row in scores.tolist())
        ]
    )
    assert 0.93 <= covered <= 0.97
    alone = np.mean([low <= 1 / 3 <= high for low, high in (score_interval(row).interval for row in scores.tolist())])
    assert alone < 0.85


def test_paired_difference_against_scipy() -> None:
    generator = np.random.default_rng(2)
    a = generator.random((300, 4))
    b = np.clip(a + generator.normal(0.02, 0.2, a.shape), 0, 1)
    found = paired_difference(a.tolist(), b.tolist())
    theirs = stats.ttest_rel(a.mean(axis=1), b.mean(axis=1))
    assert found.difference == pytest.approx((a - b).mean())
    assert found.standard_error == pytest.approx(found.difference / theirs.statistic)
    # The allowance of the variance is 1 + kurtosis / n: it moves p and the interval a little, to the safe side.
    assert theirs.pvalue < found.p_value < theirs.pvalue + 0.01
    low, high = theirs.confidence_interval(0.95)
    assert found.interval == pytest.approx((low, high), abs=(high - low) / 100)
    assert found.interval[0] < low
    assert found.interval[1] > high
    assert found.detectable == pytest.approx((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * found.standard_error)
    assert found.mcnemar_p is None
    assert found.wins + found.losses + found.ties == found.items == 300


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (6, 0), (9, 2), (5, 5), (30, 50)])
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int) -> None:
    a, b = [1] * wins + [0] * losses + [1, 0, 0], [0] * wins + [1] * losses + [1, 0, 0]
    found = paired_difference(a, b)
    assert (found.wins, found.losses, found.ties) == (wins, losses, 3)
    assert found.mcnemar_p == pytest.approx(stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0)
    assert found.difference == pytest.approx((wins - losses) / (wins + losses + 3))


def test_the_p_value_says_what_the_interval_says() -> None:
    generator = random.Random(3)
    for _ in range(300):
        n = generator.choice([5, 20, 80])
        a = [generator.random() < 0.7 for _ in range(n)]
        b = [generator.random() < 0.4 for _ in range(n)]
        found = paired_difference(a, b)
        assert (found.p_value < 0.05) == (not found.interval[0] <= 0 <= found.interval[1])


def test_equal_models_have_an_interval_with_width() -> None:
    found = paired_difference([1, 0, 1, 1] * 25, [1, 0, 1, 1] * 25)
    # Tango's interval without discordant pairs: +- z^2 / (n + z^2), here with Student's quantile.
    t2 = stats.t.ppf(0.975, 99) ** 2
    assert found.interval == pytest.approx((-t2 / (100 + t2), t2 / (100 + t2)))
    assert (found.difference, found.p_value, found.mcnemar_p) == (0, 1, 1)
    assert 0 < found.detectable < 1
    swept = paired_difference([1.0] * 100, [0.0] * 100)
    assert swept.interval[0] < swept.interval[1] == 1
    assert swept.p_value < 1e-9


def test_paired_difference_by_id_joins_on_the_ids() -> None:
    a, b = {"x": 1.0, "y": 0.0, "z": 0.0}, {"z": 0.0, "y": 1.0, "x": 1.0}
    assert paired_difference(a, b) == paired_difference([1.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    both = paired_difference(
        {"x": [1, 1], "y": [0, 1], "z": [0, 0]},
        {"x": [1, 0], "y": [0, 0], "z": [0, 1]},
        clusters={"x": "p", "y": "p", "z": "q"},
    )
    assert (both.clusters, both.items, both.wins, both.losses) == (2, 3, 2, 1)


@pytest.mark.parametrize(
    ("a", "b", "clusters", "message"),
    [
        ([1, 0], [1], None, "a has 2 items and b has 1"),
        ({"x": 1, "y": 0}, {"x": 1, "w": 0}, None, r"1 only in a \(y\); 1 only in b \(w\)"),
        ({"x": 1}, [1], None, "both be"),
        ([], [], None, "a is empty"),
        ([1], [2], None, "b: item 0 has a score of 2"),
        ({"x": 1}, {"x": 1}, {"y": "p"}, "clusters lacks 1 items: x"),
        ({"x": 1}, {"x": 1}, ["p"], "must be one too"),
    ],
)
def test_paired_difference_is_refused(a: Any, b: Any, clusters: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b, clusters=clusters)


@pytest.mark.parametrize("n", [30, 500])
@pytest.mark.parametrize("k", [1, 16])
def test_93_to_97_per_cent_of_the_paired_intervals_cover(n: int, k: int) -> None:
    generator, draws = np.random.default_rng(9), 2000
    base = stats.norm.ppf(generator.beta(1, 1, (draws, n)))
    shift = generator.normal(0.25, 0.3, (draws, n))
    chances = stats.norm.cdf(base + shift), stats.norm.cdf(base - shift)
    many = generator.normal(0.25, 0.3, 4_000_000), stats.norm.ppf(generator.random(4_000_000))
    truth = float(np.mean(stats.norm.cdf(many[1] + many[0]) - stats.norm.cdf(many[1] - many[0])))
    a, b = (generator.binomial(k, chance) / k for chance in chances)
    covered = np.mean(
        [
            low <= truth <= high
            for low, high in (
                paired_difference(one, other).interval for one, other in zip(a.tolist(), b.tolist(), strict=True)
            )
        ]
    )
    assert 0.93 <= covered <= 0.97


def test_the_detectable_difference_is_detected_in_80_per_cent() -> None:
    generator, n, draws = np.random.default_rng(10), 400, 1500
    noise = generator.uniform(-0.26, 0.26, (draws, n))
    detectable = paired_difference((0.5 + noise[0]).tolist(), [0.5] * n).detectable
    found = np.mean([paired_difference((0.5 + detectable + row).tolist(), [0.5] * n).p_value < 0.05 for row in noise])
    assert 0.75 < found < 0.85


def test_counts_add_up_and_rates_to_one() -> None:
    counts = verdict_counts(["correct", "wrong", "correct", "failed"])
    assert list(counts) == list(VERDICTS)
    assert counts == {"correct": 2, "wrong": 1, "no_answer": 0, "truncated": 0, "timeout": 0, "failed": 1}
    assert verdict_rates(counts)["failed"] == 0.25
    assert sum(verdict_rates(counts).values()) == 1
    with pytest.raises(KeyError):
        verdict_counts(["right"])  # type: ignore[list-item]  # refused, as is seen


def test_token_lengths_against_numpy() -> None:
    generator = random.Random(4)
    for n in (1, 2, 3, 19, 20, 21, 100):
        tokens = [generator.randrange(1000) for _ in range(n)]
        found = token_lengths([*tokens, None])
        assert found is not None
        assert (found.known, found.unknown, found.total) == (n, 1, sum(tokens))
        assert (found.mean, found.median, found.p95) == pytest.approx(
            (np.mean(tokens), np.median(tokens), np.percentile(tokens, 95))
        )
    assert token_lengths([None]) is None


def test_importing_the_metrics_is_cheap() -> None:
    code = "import sys; from eval.metrics import pass_at_k; print({'numpy', 'scipy', 'torch'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "set()"
