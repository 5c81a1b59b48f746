"""report.html, section by section in reading order. report_page.html is its template, with the browser of traces."""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from distill.charts import axis, columns_chart, curves, histogram, interval_mark, share_bar
from distill.records import REASONS
from distill.report_data import RATE_LABELS
from distill.report_tables import (
    LEARNED,
    Report,
    cost_rows,
    domain_rows,
    dropped,
    headline,
    interval,
    notes,
    optional,
    p_value,
    percent,
    provenance_rows,
    short,
    student_rows,
    totals,
    words,
)
from distill.scores import ALL
from eval.progress import duration
from eval.report import Page, escape, html_list, html_table

MINUS = "\N{MINUS SIGN}"
STAGES = {
    "problems": "well formed, not repeated",
    "prompts": "no copy, in no benchmark",
    "traces": "verified as right",
    "filter": "through the filters",
    "dedup": "no near copy",
    "decontaminate": "in no benchmark",
    "mix": "within the mixture",
}
RATE_COLOURS = ("dropped", "rate", "rate", "rate", "rate", "rate", "kept")
SERIES = ("s1", "s2", "s3", "s4", "s5", "s6")  # colours of students, in the recipe's order


def page(report: Report, traces: Sequence[Mapping[str, Any]], total: int) -> str:
    """report.html: no other file, no network. `traces` and `total` are what `shown_traces` gives."""
    template = Page(resources.files("distill").joinpath("report_page.html").read_text(encoding="utf-8"))
    sections = [one for one in _sections(report) if one[3]]
    nav = [*(one[:2] for one in sections), ("traces", "Traces"), ("provenance", "Provenance")]
    note = f"{len(traces):,} of {total:,}" if len(traces) < total else f"all {total:,}"
    return template.substitute(
        title=escape(report["name"]),
        description=escape(report["description"]),
        headline=escape(headline(report)),
        nav="".join(f'<a href="#{name}">{title}</a>' for name, title in nav),
        tiles=_tiles(report),
        notes=f"<div class=notes>{html_list(notes(report))}</div>" if notes(report) else "",
        sections="".join(f"<section id={name}><h2>{title}</h2>{body}</section>" for name, _, title, body in sections),
        traces_note=escape(note),
        provenance=html_table(provenance_rows(report), left=2),
        recipe=escape(json.dumps(report["recipe"], ensure_ascii=False, indent=1, sort_keys=True)),
        reasons=_embedded(REASONS),
        data=_embedded(list(traces)),
    )  # fmt: skip


def _embedded(value: Any) -> str:
    """JSON inside the page; `<` is escaped, so that no text of a model can end the script element that holds it."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def _sections(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """(anchor, short name, title, content) of each; "" where there is nothing to show yet."""
    yield "scores", "Scores", "Scores", _scores(report)
    yield "funnel", "Funnel", "From prompts to examples", _funnel(report)
    yield "problems", "Difficulty", "How hard the problems were", _problems(report)
    yield "lengths", "Lengths", "How long the traces are", _lengths(report)
    yield "dataset", "Dataset", "The dataset", _dataset(report)
    yield "training", "Training", "Training", _training(report)
    yield "cost", "Cost", "Time and tokens", _cost(report)


def _tiles(report: Report) -> str:
    """The few numbers that one looks for first: value, unit, what it is."""
    lines, total = {line["stage"]: line for line in report["funnel"]}, totals(report)
    tiles = []
    for one in [one for one in report["differences"] if one["task"] in (ALL, _only_task(report))][:2]:
        said = f"{one['a']} {MINUS} {one['b']} {interval(one['interval'], True)}"
        tiles.append((percent(one["difference"], True).replace("-", MINUS), "points", said.replace("-", MINUS)))
    if "traces" in lines:
        verified = lines["traces"]
        share = 100 * verified["kept"] / verified["in"] if verified["in"] else 0
        tiles.append((f"{share:.0f}", "%", f"of {verified['in']:,} traces are right"))
    if "mix" in lines:
        tiles.append((f"{lines['mix']['kept']:,}", "", "training examples"))
    if total["completion_tokens"]:
        tiles.append((short(total["completion_tokens"]), "", "tokens generated"))
    spent = f", ${total['dollars']:,.2f}" if total["dollars"] else ""
    tiles.append((duration(total["seconds"]), "", f"for all stages{spent}"))
    return "".join(
        f"<div class=tile><b>{escape(value)} <small>{unit}</small></b><span>{escape(what)}</span></div>"
        for value, unit, what in tiles
    )


def _only_task(report: Report) -> str | None:
    tasks = {one["task"] for one in report["scores"]}
    return next(iter(tasks)) if len(tasks) == 1 else None


def _colours(report: Report) -> dict[str, str]:
    students = {name: SERIES[place % len(SERIES)] for place, name in enumerate(_traces_first(report))}
    return {"teacher": "teacher", "base": "base", **students}


def _traces_first(report: Report) -> list[str]:
    return sorted(report["students"], key=lambda name: report["students"][name]["target"] != "trace")


def _scores(report: Report) -> str:
    """A line for each model under each task, and the paired differences below."""
    if not report["scores"]:
        return ""
    colours, parts = _colours(report), []
    for task in _tasks(report["scores"]):
        own = [one for one in report["scores"] if one["task"] == task]
        rows = [
            _forest_row(
                one["model"], one, "score", (0, 1), colours.get(one["model"], "dim"),
                more=(optional(one["tokens"]), f"{100 * one['truncated']:.1f} %"),
            )
            for one in own
        ]  # fmt: skip
        samples = f"{own[0]['items']:,} questions" + (f" &times; {own[0]['k']} samples" if own[0]["k"] else "")
        parts.append(_group(f"{escape(task)} <small>{samples}</small>", 5, rows))
    ticks = [(tick / 100, str(tick)) for tick in range(0, 101, 25)]
    keys = [_key(colours.get(name, "dim"), said) for name, said in _models(report)]
    return (
        f"<p class=legend>{''.join(keys)}</p>"
        f"{_forest(('model', 'pass@1, %', 'mean tokens', 'cut'), ticks, parts)}"
        "<p class=dim>Points are means over questions, bars their 95 % intervals.</p>"
        f"{_differences(report)}"
    )


def _models(report: Report) -> Iterator[tuple[str, str]]:
    """(name, what it is) of every evaluated model."""
    for name in dict.fromkeys(one["model"] for one in report["scores"]):
        if student := report["students"].get(name):
            yield name, f"{name}: has learned {LEARNED[student['target']]}"
        elif name == "teacher":
            yield name, f"teacher: {report['recipe']['teacher']['model']}"
        else:
            yield name, f"{name}: before training"


def _differences(report: Report) -> str:
    lines = report["differences"]
    if not lines:
        return ""
    reach = max(max(map(abs, one["interval"])) for one in lines)
    limit = next(step for step in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if reach <= step or step == 1.0)
    colours, parts = _colours(report), []
    for a, b in dict.fromkeys((one["a"], one["b"]) for one in lines):
        own = [one for one in lines if (one["a"], one["b"]) == (a, b)]
        own.sort(key=lambda one: one["task"] != ALL)
        rows = [
            _forest_row(
                one["task"], one, "difference", (-limit, limit), colours.get(a, "dim"), solid=_apart(one),
                more=(f"{one['wins']} / {one['losses']} / {one['ties']}", p_value(one["p_value"])),
            )
            for one in own
        ]  # fmt: skip
        parts.append(_group(f"{escape(a)} {MINUS} {escape(b)}", 5, rows))
    places = (-limit, -limit / 2, 0, limit / 2, limit)
    ticks = [((one + limit) / (2 * limit), f"{100 * one:+.0f}".replace("-", MINUS) if one else "0") for one in places]
    return (
        "<h3>Paired differences, on the same questions</h3>"
        f"{_forest(('task', 'points', 'won / lost / tied', 'p'), ticks, parts, 'zero')}"
        "<p class=dim>A full point: the 95 % interval leaves out 0. An open one: it does not.</p>"
    )


def _forest(names: Sequence[str], ticks: Sequence[tuple[float, str]], parts: Sequence[str], kind: str = "") -> str:
    first, value, *more = names
    head = (
        f"<thead><tr><th scope=col>{first}</th><th scope=col class=mark>{axis(ticks)}</th>"
        f"<th scope=col class=n>{value}</th>"
        + "".join(f"<th scope=col class='n more'>{name}</th>" for name in more)
        + "</tr></thead>"
    )
    return f"<table class='forest {kind}'>{head}{''.join(parts)}</table>"


def _group(title: str, columns: int, rows: Sequence[str]) -> str:
    head = f"<tr class=group><th colspan={columns} scope=rowgroup>{title}</th></tr>"
    return f"<tbody>{head}{''.join(rows)}</tbody>"


def _forest_row(
    name: str, one: Mapping[str, Any], value: str, scale: tuple[float, float], colour: str, *,
    more: Sequence[str], solid: bool = True,
) -> str:  # fmt: skip
    signed = scale[0] < 0
    mark = interval_mark(one["interval"][0], one[value], one["interval"][1], scale, colour, solid)
    said = f"<b>{percent(one[value], signed)}</b> <small>{interval(one['interval'], signed)}</small>"
    said = said.replace("-", MINUS)
    cells = "".join(f"<td class='n more'>{cell}</td>" for cell in more)
    return f"<tr><th scope=row>{escape(name)}</th><td class=mark>{mark}</td><td class=n>{said}</td>{cells}</tr>"


def _key(colour: str, said: str) -> str:
    return f'<span><i class=key style="background:var(--{colour})"></i>{escape(said)}</span>'


def _apart(one: Mapping[str, Any]) -> bool:
    return not one["interval"][0] <= 0 <= one["interval"][1]


def _tasks(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted(dict.fromkeys(one["task"] for one in scores), key=lambda task: task != ALL)


def _funnel(report: Report) -> str:
    """A bar for each stage, as wide as what its unit began with: kept, and dropped."""
    lines, parts = report["funnel"], []
    for unit in dict.fromkeys(line["unit"] for line in lines):
        own = [line for line in lines if line["unit"] == unit]
        said = f"{own[0]['in']:,} {unit}"
        if unit == "traces":
            asked, solved = (sum(one[name] for one in report["sources"]) for name in ("asked", "solved"))
            said += f" <small>of {asked:,} prompts, {solved:,} of which were solved</small>"
        parts.append(_group(said, 3, [_stage(line, own[0]["in"]) for line in own]))
    legend = f"<p class=legend>{_key('kept', 'kept')}{_key('dropped', 'dropped')}</p>"
    return f"{legend}<table class=funnel>{''.join(parts)}</table>" if lines else ""


def _stage(line: Mapping[str, Any], whole: int) -> str:
    lost = line["in"] - line["kept"]
    bar = share_bar(
        [(line["kept"], "kept", f"{line['kept']:,} kept"), (lost, "dropped", f"{lost:,} dropped")], whole,
        f"{line['in']:,} in, {line['kept']:,} kept, dropped: {dropped(line)}",
    )  # fmt: skip
    meaning = REASONS[line["stage"]]
    reasons = " ".join(
        f'<a class=chip href="#fate={line["stage"]}:{reason}" title="{escape(meaning[reason])}">'
        f"{count:,} {words(reason)}</a>"
        for reason, count in line["dropped"].items()
    )
    return (
        f"<tr><th scope=row>{STAGES[line['stage']]}</th><td class=n>{line['kept']:,}<small> of {line['in']:,}</small>"
        f"</td><td class=bars>{bar}<div class=chips>{reasons}</div></td></tr>"
    )


def _problems(report: Report) -> str:
    cards = []
    for one in report["sources"]:
        if not sum(one["pass_rates"]):
            continue
        counts = ", ".join(f"{name}: {count:,}" for name, count in zip(RATE_LABELS, one["pass_rates"], strict=True))
        chart = columns_chart(RATE_LABELS, one["pass_rates"], RATE_COLOURS, f"problems by pass rate: {counts}")
        solved = f"{one['solved']:,} of {one['asked']:,} solved, {one['samples'] / one['asked']:.1f} samples each"
        cards.append(
            f"<figure><figcaption>{escape(one['source'])}<br><small>{solved}</small></figcaption>{chart}</figure>"
        )
    if not cards:
        return ""
    most, right = report["recipe"]["teacher"]["most"], report["recipe"]["teacher"]["correct"]
    until = f"{right:,} {'is' if right == 1 else 'are'} right, {most:,} times at the most"
    return (
        "<p class=dim>Problems by their pass rate: the share of right samples among those asked. A problem is asked "
        f"until {until}.</p><div class=cards>{''.join(cards)}</div>"
    )


def _lengths(report: Report) -> str:
    traces = report["traces"]
    if not traces or not traces["kept_bins"]:
        return ""
    bins = {"kept": traces["kept_bins"], "dropped": traces["dropped_bins"]}
    legend = "".join(
        _key(
            name,
            f"{size['known']:,} {name}: median {size['median']:,.0f}, mean {size['mean']:,.0f}, 95th percentile "
            f"{size['p95']:,.0f}",
        )
        for name in bins
        if (size := traces[f"{name}_tokens"])
    )
    chart = histogram(bins, traces["bin_width"], "traces by number of tokens")
    return f"<p class=legend>{legend}</p>{chart}<p class='dim under'>completion tokens</p>"


def _dataset(report: Report) -> str:
    if not report["domains"]:
        return ""
    head, *rows = domain_rows(report)
    if not any(one["wanted"] for one in report["domains"]):
        head, *rows = (row[:-1] for row in (head, *rows))
    bars = [share_bar([(one["share"], "kept", "")], 1, f"{100 * one['share']:.1f} %") for one in report["domains"]]
    return _table_with_bars(head, rows, bars, after=2)


def _training(report: Report) -> str:
    students = report["students"]
    if not students:
        return ""
    lines = {name: students[name]["loss"] for name in _traces_first(report) if students[name]["loss"]}
    chart = ""
    if lines:
        colours = _colours(report)
        keys = [
            _key(colours[name], f"{name}: from {line[0][1]:.3f} to {line[-1][1]:.3f}") for name, line in lines.items()
        ]
        drawn = curves(lines, colours, "training loss by step")
        chart = f"<p class=legend>{''.join(keys)}</p>{drawn}<p class='dim under'>training loss by step</p>"
    table = f"<div class=wide>{html_table(student_rows(report), left=4)}</div>"
    return chart + table + "".join(_labels(name, students[name]["shown"]) for name in _traces_first(report))


def _labels(name: str, shown: str) -> str:
    """The first row of a student: what it reads is dim, what it learns is not."""
    if not shown:
        return ""
    read, _, learnt = shown.removeprefix("⟦").partition("⟧")
    return (
        f"<h3>The first row of {escape(name)} <small>read, and <mark>learned</mark></small></h3>"
        f"<pre class=labels><span class=dim>{escape(read)}</span><mark>{escape(learnt)}</mark></pre>"
    )


def _cost(report: Report) -> str:
    if not report["costs"]:
        return ""
    head, *rows = cost_rows(report)
    whole = totals(report)["seconds"] or 1
    bars = [
        share_bar([(one["seconds"], "rate", "")], whole, f"{100 * one['seconds'] / whole:.0f} % of the time")
        for one in report["costs"]
    ]
    return _table_with_bars(head, rows, [*bars, ""], after=1, kind="totals")


def _table_with_bars(
    head: Sequence[str], rows: Sequence[Sequence[str]], bars: Sequence[str], *, after: int, kind: str = ""
) -> str:
    """A table with a column of bars behind column `after`; a bare dash becomes an empty cell."""
    cells = [f"<th scope=col{' class=n' if place else ''}>{escape(name)}</th>" for place, name in enumerate(head)]
    lines = ["".join([*cells[:after], "<th class=bars></th>", *cells[after:]])]
    for row, bar in zip(rows, bars, strict=True):
        name, *numbers = [escape("" if cell == "-" else cell) for cell in row]
        cells = [f"<th scope=row>{name}</th>", *(f"<td class=n>{cell}</td>" for cell in numbers)]
        lines.append("".join([*cells[:after], f"<td class=bars>{bar}</td>", *cells[after:]]))
    body = "".join(f"<tr>{line}</tr>" for line in lines[1:])
    return (
        f"<div class=wide><table class='{kind}'><thead><tr>{lines[0]}</tr></thead><tbody>{body}</tbody></table></div>"
    )
