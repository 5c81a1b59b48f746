"""The charts of the page, in HTML and a little SVG: pure functions of numbers, no library, no script.

Everything is placed in per cent of its box, so that a chart is as wide as there is room and its letters stay readable.
Colours are names of the page's variables. What a chart shows stands beside it in words or numbers too.
"""

import math
from collections.abc import Mapping, Sequence

from eval.report import escape


def interval_mark(
    low: float, value: float, high: float, scale: tuple[float, float], colour: str, solid: bool = True
) -> str:
    """A point with its interval on a track from scale[0] to scale[1]."""

    def at(x: float) -> float:
        return 100 * (min(max(x, scale[0]), scale[1]) - scale[0]) / (scale[1] - scale[0])

    kind = "dot" if solid else "dot open"
    return (
        f'<div class=track style="--c:var(--{colour})"><i class=ci style="left:{at(low):.2f}%;'
        f'width:{at(high) - at(low):.2f}%"></i><i class="{kind}" style="left:{at(value):.2f}%"></i></div>'
    )


def axis(ticks: Sequence[tuple[float, str]]) -> str:
    """Labels below or above a chart; places from 0 to 1."""
    spans = "".join(f'<span style="left:{100 * place:.2f}%">{escape(label)}</span>' for place, label in ticks)
    return f"<div class=axis aria-hidden=true>{spans}</div>"


def share_bar(parts: Sequence[tuple[float, str, str]], whole: float, label: str) -> str:
    """A bar of (amount, colour, words); what is missing to `whole` stays empty."""
    spans = "".join(
        f'<span style="width:{100 * amount / whole if whole else 0:.3f}%;background:var(--{colour})" '
        f'title="{escape(words)}"></span>'
        for amount, colour, words in parts
        if amount
    )
    return f'<div class=bar role=img aria-label="{escape(label)}">{spans}</div>'


def columns_chart(labels: Sequence[str], counts: Sequence[int], colours: Sequence[str], label: str) -> str:
    """A column for each label, its count above it."""
    top = max(counts, default=0) or 1
    columns = "".join(
        f'<div class=column title="{escape(f"{name}: {count:,}")}"><b>{f"{count:,}" if count else ""}</b>'
        f'<i style="height:{80 * count / top:.2f}%;background:var(--{colour})"></i></div>'
        for name, count, colour in zip(labels, counts, colours, strict=True)
    )
    names = "".join(f"<span>{escape(name).replace(' %', '&nbsp;%')}</span>" for name in labels)
    return (
        f'<div class=columns role=img aria-label="{escape(label)}">{columns}</div>'
        f"<div class=names aria-hidden=true>{names}</div>"
    )


def histogram(bins: Mapping[str, Sequence[int]], width: int, label: str) -> str:
    """Stacked columns of equal width, the first series below; `width` is that of a bin. Names are colours."""
    totals = [sum(column) for column in zip(*bins.values(), strict=True)]
    top = max(totals, default=0)
    high = 1.06 * (top or 1)
    ticks = nice_ticks(0, high, 5)
    columns = []
    for place, column in enumerate(zip(*bins.values(), strict=True)):
        said = ", ".join(f"{count:,} {name}" for name, count in zip(bins, column, strict=True))
        parts = "".join(
            f'<i style="height:{100 * count / high:.2f}%;background:var(--{name})"></i>'
            for name, count in reversed(list(zip(bins, column, strict=True)))
        )
        columns.append(
            f'<div title="{escape(f"{place * width:,} to {(place + 1) * width - 1:,}: {said}")}">{parts}</div>'
        )
    end = len(totals) * width
    across = [(tick / end, f"{tick:,.0f}") for tick in nice_ticks(0, end, 6)] if end else []
    return _framed(f"<div class=bins>{''.join(columns)}</div>", ticks, high, across, label)


def curves(lines: Mapping[str, Sequence[Sequence[float]]], colours: Mapping[str, str], label: str) -> str:
    """Lines through (x, y) points; y begins at 0."""
    points = [point for line in lines.values() for point in line]
    right = max((x for x, _ in points), default=1) or 1
    # A few wild first steps shall not press the rest to the ground.
    values = sorted(y for _, y in points if math.isfinite(y))
    most = min(values[-1], 3 * values[int(0.9 * (len(values) - 1))]) if values else 1
    high = 1.04 * (most or 1)
    ticks = nice_ticks(0, high, 5)
    paths = "".join(
        f'<polyline style="stroke:var(--{colours[name]})" points="'
        + " ".join(f"{100 * x / right:.2f},{100 - 100 * min(y, high) / high:.2f}" for x, y in line if math.isfinite(y))
        + '"/>'
        for name, line in lines.items()
    )
    svg = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden=true>{paths}</svg>'
    across = [(tick / right, f"{tick:,.0f}") for tick in nice_ticks(0, right, 6)]
    return _framed(svg, ticks, high, across, label)


def _framed(plot: str, ticks: Sequence[float], high: float, across: Sequence[tuple[float, str]], label: str) -> str:
    at = {tick: f'style="bottom:{100 * tick / high:.2f}%"' for tick in ticks}
    lines = "".join(f"<i class=grid {at[tick]}></i><span class=tick {at[tick]}>{tick:,.4g}</span>" for tick in ticks)
    inside = f"<div class=plot>{lines}{plot}</div>{axis(across)}"
    return f'<div class=frame role=img aria-label="{escape(label)}">{inside}</div>'


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 multiples of 1, 2 or 5 times a power of ten, from low to high.

    >>> nice_ticks(0, 47, 5)
    [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 10) for place in range(first, math.floor(high / step + 1e-9) + 1)]
