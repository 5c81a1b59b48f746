"""From verdicts to numbers: a score with its interval, pass@k, cons@k, two models on the same items, rates, lengths.

Questions are a sample of the questions that could have been asked (Miller 2024, arXiv 2411.00640), so every error here
is one of questions, not of completions: an item's k samples are averaged first, and items that share a context (the
questions on one passage) count as one cluster.

The interval of a score is Wilson's, with the effective number of items in the place of n:

    n_eff = max(n, p (1 - p) / v)        n: items, or (sum of sizes)^2 / (sum of squared sizes) for clusters
    v = (t / z)^2 (1 + m4 / m2^2) m2 / N^2    m2, m4: sums of squared, of fourth powers of the clusters' residuals;
                                              N: items; t: Student's quantile at n - 1; z: the normal one

At k = 1 this is the plain Wilson interval. With more samples the spread of the items' means decides. That spread is
itself an estimate, and a low one where few items carry all of it: the plain t interval covers 78 to 90 % there.
`1 + m4 / m2^2` allows for that: m2^2 / m4 is the number of items that carry the variance (in the binary case it adds
one more pair of discordant items, as Agresti and Min do). No interval leaves [0, 1], none has zero width.

Coverage in per cent over 19 distributions of item difficulty (Beta from (1, 19) and (0.1, 1.9) to (9, 1), constant,
two-point with mass at 0 and 1), 8,000 draws each (4,000 at n = 500), lowest and highest; in the last column the items
stand in clusters of geometric sizes, 10, 31 and 175 of them, that share difficulty:

    n    k    plain t       this rule     this rule, clusters
    30   1    25.9 - 96.0   93.4 - 97.6   95.8 - 98.7
    30   4    70.2 - 95.4   95.3 - 97.7   95.6 - 98.5
    30   16   78.5 - 95.5   93.0 - 97.5   90.9 - 98.5
    30   64   77.8 - 95.7   92.9 - 97.3   90.7 - 98.4
    100  1    63.4 - 95.1   92.3 - 96.9   93.9 - 97.9
    100  16   90.2 - 95.2   93.9 - 97.0   93.2 - 98.1
    500  1    87.1 - 95.0   94.2 - 96.7   94.5 - 97.2
    500  4    92.6 - 95.2   94.1 - 96.2   94.3 - 96.1
    500  16   93.6 - 95.3   94.3 - 95.9   94.0 - 95.7
    500  64   94.2 - 95.5   94.2 - 96.1   94.6 - 95.8

What lies outside 93 to 97 is discreteness (one item of 30 moves the score by 3 %) or fewer than five informative items.
The paired difference uses the same variance around the mean difference; see `paired_difference`.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from eval.sample import VERDICTS, Verdict

Item = float | Sequence[float]
"""The score of an item: one number in [0, 1], or one for each of its samples."""

Classes = Callable[[Sequence[str | None]], Sequence[int | None]]

Z95 = 1.959963984540054  # the standard normal quantile at 0.975
Z80 = 0.8416212335729143  # and at 0.8


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that one of k samples is right, from n samples of which c are: 1 - C(n - c, k) / C(n, k).

    Unbiased (Chen et al. 2021, arXiv 2107.03374) and exact: integers up to the last division.
    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    for name, value in (("n", n), ("c", c), ("k", k)):
        if value < 0 or int(value) != value:
            raise ValueError(f"{name}={value} is not a count")
    if c > n:
        raise ValueError(f"c={c} correct samples of n={n}: there cannot be more than there are samples")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} is not in 1 to n={n}: pass@{k} needs at least {k} samples of every item; sample more")
    n, c, k = int(n), int(c), int(k)
    draws = math.comb(n, k)
    return (draws - math.comb(n - c, k)) / draws


def cons_at_k(
    answers: Sequence[str | None],
    gold: str,
    *,
    classes: Classes | None = None,
    equivalent: Callable[[str, str], bool] | None = None,
    credits: Sequence[float] | None = None,
) -> float:
    r"""The credit of the majority answer of one item: a vote over classes of equivalent answers.

    `1/2`, `0.5` and `\frac{1}{2}` are one class; two wrong answers are two. None, no answer, never forms a class, so
    with nothing but None the credit is 0. Tie rule: among the largest classes the credit is shared, which is the
    expectation of a fair draw between them; the order of the answers says nothing.

    `classes` numbers a list's classes (`eval.answers.answer_classes`, mathematics, by default); or `equivalent`
    compares two answers. Right is the class that `gold` falls into; with `credits` (each sample's, as a grader gave
    it), the credit of a class is the mean of its members', and `gold` is not looked at.

    >>> cons_at_k(["4", "4", "5", None], "4", equivalent=str.__eq__)
    1.0
    >>> cons_at_k(["4", "5", None, None, None], "4", equivalent=str.__eq__)
    0.5
    """
    if credits is not None and len(credits) != len(answers):
        raise ValueError(f"{len(credits)} credits for {len(answers)} answers; give one for each")
    if classes is None and equivalent is None:
        from eval.answers import answer_classes

        classes = answer_classes
    texts = list(answers) if credits is not None else [*answers, gold]
    numbers = classes(texts) if classes is not None else _classes_by(texts, equivalent)
    right = numbers[-1] if credits is None else None
    members: dict[int, list[float]] = {}
    for place, (answer, number) in enumerate(zip(answers, numbers, strict=False)):
        if answer is not None and number is not None:
            members.setdefault(number, []).append(float(number == right) if credits is None else credits[place])
    if not members:
        return 0.0
    largest = max(map(len, members.values()))
    winners = [math.fsum(one) / largest for one in members.values() if len(one) == largest]
    return math.fsum(winners) / len(winners)


def _classes_by(texts: Sequence[str | None], equivalent: Callable[[str, str], bool] | None) -> list[int | None]:
    assert equivalent is not None
    founders: list[str] = []
    numbers: list[int | None] = []
    for text in texts:
        if text is None:
            numbers.append(None)
            continue
        found = next((number for number, one in enumerate(founders) if equivalent(text, one)), None)
        if found is None:
            found = len(founders)
            founders.append(text)
        numbers.append(found)
    return numbers


def same_text(texts: Sequence[str | None]) -> list[int | None]:
    """Classes of letters and the like: equal texts, but for case and spaces around them."""
    numbers: dict[str, int] = {}
    return [None if text is None else numbers.setdefault(text.strip().casefold(), len(numbers)) for text in texts]


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over items with its 95 % interval.

    `standard_error` is the plain estimate, clustered (Miller 2024, equation 4): 0 where all items agree, None for
    one item or one cluster alone. The interval does not come from it alone (see the module), and is not symmetric.
    """

    value: float
    interval: tuple[float, float]
    standard_error: float | None
    items: int
    samples: int
    clusters: int


def score_interval(scores: Sequence[Item], clusters: Sequence[Hashable] | None = None) -> Score:
    """The mean score of items with its 95 % interval.

    `scores` holds one number in [0, 1] for each item, or a sequence of them, one for each sample. `clusters` names for
    each item what it shares with others; None and "" stand alone.
    """
    means, samples = _item_means(scores, "scores")
    value = math.fsum(means) / len(means)
    spread = _spread([mean - value for mean in means], clusters)
    value = min(max(value, 0.0), 1.0)
    n_eff = spread.units
    if spread.variance > 0:
        # Var <= p (1 - p) for values in [0, 1], so there are never fewer effective items than items.
        n_eff = max(n_eff, value * (1 - value) / (spread.variance * (spread.quantile / Z95) ** 2))
    low, high = _wilson(value, n_eff)
    return Score(value, (low, high), spread.standard_error, len(means), samples, spread.clusters)


def _wilson(p: float, n: float) -> tuple[float, float]:
    z2 = Z95**2
    centre, scale = p + z2 / (2 * n), 1 + z2 / n
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    # At 0 and 1 the ends are those exactly; rounding would leave 1e-17.
    low = 0.0 if p == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if p == 1 else min(1.0, (centre + half) / scale)
    return low, high


@dataclass(frozen=True, slots=True)
class _Spread:
    """The variance of a mean, from residuals: see the formulas above the module."""

    variance: float  # with the allowance; 0 where all residuals are 0
    standard_error: float | None  # without it
    units: float  # effective number of independent items
    clusters: int
    quantile: float  # of Student's t at units - 1


def _spread(residuals: Sequence[float], clusters: Sequence[Hashable] | None) -> _Spread:
    from scipy.special import stdtrit  # 0.3 s to import: not for those who only grade

    n = len(residuals)
    if clusters is None:
        sums, sizes = list(residuals), [1] * n
    else:
        if len(clusters) != n:
            raise ValueError(f"{len(clusters)} clusters for {n} items; give one for each, None for an item alone")
        parts: dict[Hashable, list[float]] = {}
        for place, (cluster, residual) in enumerate(zip(clusters, residuals, strict=True)):
            alone = cluster is None or cluster == ""
            parts.setdefault(("alone", place) if alone else ("cluster", cluster), []).append(residual)
        sums, sizes = [math.fsum(part) for part in parts.values()], [len(part) for part in parts.values()]
    groups = len(sums)
    units = n * n / sum(size * size for size in sizes)
    m2 = math.fsum(one * one for one in sums)
    if m2 <= 1e-24 * n:  # rounding of the mean
        m2 = 0.0
    m4 = math.fsum(one**4 for one in sums)
    return _Spread(
        variance=(m2 + m4 / m2) / (n * n) if m2 else 0.0,
        standard_error=math.sqrt(m2 * groups / (groups - 1)) / n if groups > 1 else None,
        units=units,
        clusters=groups,
        quantile=float(stdtrit(max(units - 1, 1.0), 0.975)),
    )


def _item_means(scores: Sequence[Item], name: str) -> tuple[list[float], int]:
    """The mean of each item's samples, and how many samples there are in all."""
    if not len(scores):
        raise ValueError(f"{name} is empty: there is no score without items")
    means, samples = [], 0
    for place, item in enumerate(scores):
        values = [item] if _is_number(item) else list(item)  # type: ignore[arg-type]  # told apart by then
        if not values:
            raise ValueError(f"{name}: item {place} has no samples; leave it out, or sample it")
        for value in values:
            if not 0 <= value <= 1:  # type: ignore[operator]  # NaN fails too
                raise ValueError(f"{name}: item {place} has a score of {value}, which is not in [0, 1]")
        means.append(math.fsum(values) / len(values))  # type: ignore[arg-type]  # numbers by now
        samples += len(values)
    return means, samples


def _is_number(item: Any) -> bool:
    return not hasattr(item, "__len__") and not hasattr(item, "__iter__")


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of `a` minus mean of `b` on the same items.

    `wins` are items where `a` scores higher. `mcnemar_p` is McNemar's exact test (binomial, two-sided) where every
    score is 0 or 1 and items stand alone, else None. `p_value` belongs to the interval, for any k: it is below 0.05
    where the interval leaves out 0. `detectable` is the difference that would be found in 80 % of such comparisons, at
    5 % two-sided: 2.8 standard errors.
    """

    difference: float
    interval: tuple[float, float]
    standard_error: float | None
    p_value: float
    mcnemar_p: float | None
    detectable: float
    items: int
    clusters: int
    wins: int
    losses: int
    ties: int
    mean_a: float
    mean_b: float


def paired_difference(
    a: Sequence[Item] | Mapping[str, Item],
    b: Sequence[Item] | Mapping[str, Item],
    *,
    clusters: Sequence[Hashable] | Mapping[str, Hashable] | None = None,
) -> PairedDifference:
    """Two models on the same items: the difference, its 95 % interval and tests.

    `a` and `b` are scores in [0, 1], one number or one for each sample of an item: two sequences in the same order, or
    two mappings by id. ValueError, naming what differs, if they are not on the same items.

    The interval is Student's around the mean difference, with the variance of the module's docstring; where all
    differences are equal it is that of n ties (Tango 1998), q^2 / (n + q^2) to both sides. Coverage over 17 pairs of
    models (correlated difficulty, abilities equal to 2 probits apart), in per cent: n = 500: 94.0 - 96.2 for k of 1 to
    64; n = 100: 92.1 - 99.2; n = 30: 93.9 and more where at least five items differ, but down to 84 where four
    do, all one way; more than 97 where two or fewer differ. With clusters, in the most skewed of these: 91.6 at
    n = 500, 86 at n = 100, 79.5 at n = 30.
    """
    scores_a, scores_b, shared = _paired(a, b, clusters)
    means_a, _ = _item_means(scores_a, "a")
    means_b, _ = _item_means(scores_b, "b")
    differences = [
        0.0 if abs(one - other) < 1e-12 else one - other for one, other in zip(means_a, means_b, strict=True)
    ]
    n = len(differences)
    difference = math.fsum(differences) / n
    spread = _spread([one - difference for one in differences], shared)
    q = spread.quantile
    half = q * math.sqrt(spread.variance) if spread.variance else q * q / (spread.units + q * q)
    wins, losses = sum(one > 0 for one in differences), sum(one < 0 for one in differences)
    binary = all(mean in (0.0, 1.0) for mean in (*means_a, *means_b))
    return PairedDifference(
        difference=difference,
        interval=(max(-1.0, difference - half), min(1.0, difference + half)),
        standard_error=spread.standard_error,
        p_value=_p_value(difference, spread),
        mcnemar_p=_sign_test(wins, losses) if binary and spread.clusters == n else None,
        detectable=min(1.0, (Z95 + Z80) * (spread.standard_error or half / q)),
        items=n,
        clusters=spread.clusters,
        wins=wins,
        losses=losses,
        ties=n - wins - losses,
        mean_a=math.fsum(means_a) / n,
        mean_b=math.fsum(means_b) / n,
    )


def _p_value(difference: float, spread: _Spread) -> float:
    from scipy.special import stdtr

    if spread.variance:
        statistic = abs(difference) / math.sqrt(spread.variance)
        return min(1.0, 2 * float(stdtr(max(spread.units - 1, 1.0), -statistic)))
    if abs(difference) < 1e-12:
        return 1.0
    return min(1.0, 2.0 ** (1 - spread.units))  # every item moved alike: the sign test


def _sign_test(wins: int, losses: int) -> float:
    """The two-sided exact binomial test of wins = losses; 1 without either."""
    n, few = wins + losses, min(wins, losses)
    tail = Fraction(sum(math.comb(n, one) for one in range(few + 1)), 2**n)
    return float(min(Fraction(1), 2 * tail))


def _paired(a: Any, b: Any, clusters: Any) -> tuple[list[Item], list[Item], list[Hashable] | None]:
    if isinstance(a, Mapping) != isinstance(b, Mapping):
        raise ValueError("a and b must both be sequences or both be mappings from id to score")
    if isinstance(a, Mapping):
        if a.keys() != b.keys():
            parts = [
                f"{len(only)} only in {name} ({_some(only)})"
                for name, only in (("a", a.keys() - b.keys()), ("b", b.keys() - a.keys()))
                if only
            ]
            raise ValueError(f"a and b are not on the same items: {'; '.join(parts)}. Compare on the shared ones")
        ids = sorted(a)
        if isinstance(clusters, Mapping):
            if missing := [one for one in ids if one not in clusters]:
                raise ValueError(f"clusters lacks {len(missing)} items: {_some(missing)}")
            clusters = [clusters[one] for one in ids]
        elif clusters is not None:
            raise ValueError("a and b are mappings, so clusters must be one too, from id to cluster")
        return [a[one] for one in ids], [b[one] for one in ids], clusters
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} items and b has {len(b)}: they are not on the same items")
    if isinstance(clusters, Mapping):
        raise ValueError("a and b are sequences, so clusters must be one too")
    return list(a), list(b), None if clusters is None else list(clusters)


def _some(names: Iterable[Any], most: int = 5) -> str:
    ordered = sorted(map(str, names))
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def mean_pass_at_k(
    correct: Mapping[str, Sequence[bool]], k: int, *, clusters: Mapping[str, Hashable] | None = None
) -> Score:
    """pass@k over a table of items: id to whether each of its samples is right.

    Raises ValueError, naming them, if any item has fewer than k samples: leaving such items out, or taking what is
    there, would be another measure.
    """
    if short := [f"{name} ({len(samples)})" for name, samples in correct.items() if len(samples) < k]:
        raise ValueError(
            f"pass@{k} needs {k} samples of every item; {len(short)} of {len(correct)} have fewer: {_some(short)}. "
            "Run again to sample what is missing, or ask for a smaller k"
        )
    ids = sorted(correct)
    values = [pass_at_k(len(correct[one]), sum(map(bool, correct[one])), k) for one in ids]
    score = score_interval(values, None if clusters is None else [clusters[one] for one in ids])
    samples = sum(len(one) for one in correct.values())
    return Score(score.value, score.interval, score.standard_error, score.items, samples, score.clusters)


def verdict_counts(verdicts: Iterable[Verdict]) -> dict[Verdict, int]:
    """How many of each, zeros too, in the order of `VERDICTS`: the values add up to the number of samples."""
    counts: dict[Verdict, int] = dict.fromkeys(VERDICTS, 0)
    for verdict in verdicts:
        counts[verdict] += 1
    return counts


def verdict_rates(counts: Mapping[Verdict, int]) -> dict[Verdict, float]:
    """The share of each verdict; they add up to 1."""
    total = sum(counts.values())
    return {verdict: counts[verdict] / total if total else 0.0 for verdict in counts}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens. `unknown` counts the completions for which no number was given."""

    known: int
    unknown: int
    total: int
    mean: float
    median: float
    p95: float


def token_lengths(tokens: Iterable[int | None]) -> Lengths | None:
    """Mean, median and 95th percentile (linear between neighbours, as numpy's); None where no number is known."""
    known: list[int] = []
    unknown = 0
    for one in tokens:
        if one is None:
            unknown += 1
        else:
            known.append(one)
    if not known:
        return None
    known.sort()
    total = sum(known)
    return Lengths(len(known), unknown, total, total / len(known), _percentile(known, 50), _percentile(known, 95))


def _percentile(ordered: Sequence[int], percent: int) -> float:
    whole, rest = divmod((len(ordered) - 1) * percent, 100)
    if not rest:
        return float(ordered[whole])
    return ordered[whole] + (ordered[whole + 1] - ordered[whole]) * rest / 100
