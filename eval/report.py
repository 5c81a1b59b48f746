"""Results as a person reads them: a table for the terminal, report.md, and report.html, a page that stands alone.

Every score has its interval beside it, and the published one where the protocol is the same; where it is not, the
report says what differs instead. All of it is computed from the files of `results.py` and the store.
"""

import hashlib
import html
import json
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from eval.metrics import Score
from eval.protocols import PROTOCOLS, Protocol, Settings
from eval.published import PublishedScore, published_scores
from eval.results import Results, Row, TaskResult, describe, read_results, read_rows
from eval.runner import STORE, Comparison, Regraded
from eval.sample import VERDICTS, Sample
from eval.store import Store
from eval.tasks import TASKS
from eval.thinking import split_thought

REPORT_MD, REPORT_HTML = "report.md", "report.html"
SHOWN = 300  # samples of a task on the page; all of them stand in graded.jsonl


@dataclass(frozen=True, slots=True)
class Reported:
    """A published score beside ours: `difference` in percentage points, or why the two are not compared."""

    published: PublishedScore
    difference: float | None
    inside: bool | None  # whether the published value lies in our interval
    reason: str


def reported(results: Results, task: TaskResult, model: str | None = None) -> list[Reported]:
    """The published scores of this model on a task. `model` is the name to look for, the evaluated one's by default."""
    lines = []
    for published in published_scores(model or str(results.model.get("model", "")), task.task):
        score = _score_for(published, task)
        reason = _not_comparable(results, task, published)
        if reason or score is None:
            missing = f"{published.metric} was not computed: it needs k = {published.metric.rpartition('@')[2]}"
            lines.append(Reported(published, None, None, reason or missing))
            continue
        low, high = (100 * end for end in score.interval)
        lines.append(Reported(published, 100 * score.value - published.value, low <= published.value <= high, ""))
    return lines


def _score_for(published: PublishedScore, task: TaskResult) -> Score | None:
    if published.metric in ("pass@1", "f1"):
        return task.score
    wanted = int(published.metric.removeprefix("cons@"))
    return task.cons_at_k if task.k == wanted else None


def _not_comparable(results: Results, task: TaskResult, published: PublishedScore) -> str:
    """What keeps a published score from being compared, "" if nothing does."""
    if results.protocol["name"] != published.protocol:
        return f"published under {published.protocol}, run under {results.protocol['name']}"
    paper = PROTOCOLS[published.protocol].settings(TASKS[task.task])
    if unlike := Settings(**task.settings).unlike(paper):
        return f"the settings are not the protocol's: {describe(unlike)}"
    if task.dataset["items"] != task.dataset["of"]:
        return f"only {task.dataset['items']:,} of {task.dataset['of']:,} questions were asked"
    if task.dataset["changed"]:
        return "the questions are not those of the published file"
    if task.unanswered:
        return f"{task.unanswered:,} completions failed; run again to ask for them"
    return ""


def _changed_settings(results: Results, task: TaskResult) -> str:
    """What an option of the run, or one's own protocol, changed in the settings of the published one, "" if nothing."""
    protocol = Protocol(**results.protocol)
    protocol = PROTOCOLS.get(protocol.base, protocol)
    if task.task not in TASKS or (protocol.only and task.task not in protocol.only):
        return ""
    here, paper = Settings(**task.settings), protocol.settings(TASKS[task.task])
    changed = here.unlike(paper)
    if here.samples != paper.samples:
        changed["samples"] = (here.samples, paper.samples)
    return ", ".join(f"{name} {ours!r} instead of {theirs!r}" for name, (ours, theirs) in changed.items())


# Text.


def points(score: Score) -> str:
    """The score alone, in per cent, where its interval stands beside it."""
    return f"{100 * score.value:.1f}"


def percent(score: Score) -> str:
    """`30.7 ± 5.2`: half the interval's width, which is not symmetric; `interval` has its ends."""
    return f"{100 * score.value:.1f} ± {50 * (score.interval[1] - score.interval[0]):.1f}"


def interval(score: Score) -> str:
    return f"[{100 * score.interval[0]:.1f}, {100 * score.interval[1]:.1f}]"


def score_rows(results: Results, model: str | None = None) -> list[list[str]]:
    """The table of scores, header first: a line for each task, and one for each further pass@k and for cons@k."""
    rows = [
        ["task", "measure", "score", "95 % interval", "items", "k", "cut", "no answer", "failed", "tokens", "reported"]
    ]
    for task in results.tasks:
        lines = {one.published.metric: one for one in reported(results, task, model)}
        first = "F1" if task.kind == "text" and task.task == "drop" else "pass@1"
        rates = [f"{100 * task.rates[name]:.1f} %" for name in ("truncated", "no_answer")]
        lost = f"{100 * (task.rates['failed'] + task.rates['timeout']):.1f} %"
        tokens = f"{task.completion_tokens.mean:,.0f}" if task.completion_tokens else "-"
        rows.append(
            [task.task, first, points(task.score), interval(task.score), f"{task.items:,}", f"{task.k}", *rates, lost,
             tokens, _reported_cell(lines.get("f1" if first == "F1" else "pass@1"))]
        )  # fmt: skip
        for k, score in task.pass_at.items():
            if k != "1":
                rows.append(["", f"pass@{k}", points(score), interval(score), *[""] * 7])
        if task.cons_at_k:
            cell = _reported_cell(lines.get(f"cons@{task.k}"))
            rows.append(["", f"cons@{task.k}", points(task.cons_at_k), interval(task.cons_at_k), *[""] * 6, cell])
    return rows


def _reported_cell(line: Reported | None) -> str:
    if line is None:
        return "-"
    if line.difference is None:
        return f"{line.published.value:.1f}, not compared"
    return f"{line.published.value:.1f} ({line.difference:+.1f}{'' if line.inside else ', outside'})"


def notes(results: Results, model: str | None = None) -> list[str]:
    """What a reader of the scores must know: what is incomplete, refused, not compared, and what we chose."""
    lines = []
    for task in results.tasks:
        if task.unanswered:
            lines.append(
                f"{task.task}: {task.unanswered:,} of {task.samples:,} completions failed and count as wrong; the same "
                "command asks for them again"
            )
        first = {one["detail"]: one for one in reversed(task.failures)}
        lines += [
            f"{task.task}: {task.verdicts['failed']:,} verdicts are 'failed', as of {one['id']}, sample "
            f"{one['index']}: {detail}"
            for detail, one in list(reversed(first.items()))[:3]
        ]
        lines += [f"{task.task}: {reason}" for reason in task.refused.values()]
        if changed := _changed_settings(results, task):
            name = results.protocol.get("base") or results.protocol["name"]
            lines.append(f"{task.task}: not the settings of {name}: {changed}")
        for one in reported(results, task, model):
            here = _score_for(one.published, task)
            what = f"{task.task}: {one.published.metric} reported {one.published.value} ({one.published.source})"
            if one.difference is None:
                lines.append(f"{what}: not compared, {one.reason}")
            elif here:
                lines.append(f"{what}; here {percent(here)}: {'inside' if one.inside else 'OUTSIDE'} our interval")
        if task.dataset["changed"]:
            lines.append(f"{task.task}: the questions are not those of the published file")
        if task.rates["truncated"] >= 0.05:
            lines.append(
                f"{task.task}: {100 * task.rates['truncated']:.0f} % of samples were cut by the budget of "
                f"{task.settings['max_tokens']:,} tokens and count as wrong"
            )
    for choice in dict.fromkeys(one for task in results.tasks for one in task.ours):
        names = [task.task for task in results.tasks if choice in task.ours]
        lines.append(f"our choice, where the paper is silent ({', '.join(names)}): {choice}")
    return lines


def text_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0, 1)) -> str:
    """Columns aligned, those of `left` to the left; wide (Chinese) characters count twice."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell + " " * (width - _width(cell)) if place in left else " " * (width - _width(cell)) + cell
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def summary_lines(results: Results) -> list[str]:
    """Who was asked, how, and how many samples became what: the counts add up."""
    counts = ", ".join(
        f"{results.verdicts[one]:,} {one.replace('_', ' ')}" for one in VERDICTS if results.verdicts[one]
    )
    return [
        f"model {results.model.get('model', '?')}, protocol {results.protocol['name']} ({results.protocol['source']})",
        f"{results.samples:,} samples = {counts}; seed {results.seed}",
    ]


def text(results: Results, model: str | None = None) -> str:
    """What the terminal shows at the end of a run."""
    parts = ["\n".join(summary_lines(results)), text_table(score_rows(results, model))]
    if lines := notes(results, model):
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts)


def markdown(results: Results, model: str | None = None) -> str:
    """report.md: scores, notes, verdicts, groups, settings, provenance."""
    parts = [
        f"# {_title(results)}",
        "\n".join(f"{line}  " for line in summary_lines(results)),
        markdown_table(score_rows(results, model)),
        "\n".join(f"- {line}" for line in notes(results, model)),
        "## Verdicts",
        markdown_table(verdict_rows(results)),
    ]
    for task in results.tasks:
        parts += [f"## {task.title}", f"{task.citation}. Licence: {task.licence}."]
        if task.groups:
            parts.append(markdown_table(group_rows(task)))
        parts.append(markdown_table([["setting", "value"], *provenance_rows(results, task)]))
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict_rows(results: Results) -> list[list[str]]:
    head = ["task", "samples", *(verdict.replace("_", " ") for verdict in VERDICTS)]
    return [head] + [
        [task.task, f"{task.samples:,}", *(f"{task.verdicts[verdict]:,}" for verdict in VERDICTS)]
        for task in results.tasks
    ]


def group_rows(task: TaskResult) -> list[list[str]]:
    rows = [["group", "score", "95 % interval", "items"]]
    for group, score in task.groups.items():
        rows.append([group or "(none)", points(score), interval(score), f"{score.items:,}"])
    return rows


def provenance_rows(results: Results, task: TaskResult) -> list[list[str]]:
    """Everything that is needed to run a task again."""
    dataset = task.dataset
    values: dict[str, Any] = {
        **task.settings,
        "questions": f"{dataset['items']:,} of {dataset['of']:,}, {dataset['repeated']:,} of them repeated, "
        f"sha256 {dataset['hash'][:16]}",
        "score of guessing": f"{100 * task.chance:.1f}" if task.chance else None,
        "source": f"{dataset['hub']} {dataset['split']} at {dataset['revision']}; {dataset['file']}",
        "thoughts": ", ".join(f"{count:,} {state}" for state, count in task.thoughts.items()) or "none",
        "graders": ", ".join(task.graders),
        "tokens": _lengths(task),
        "seed": results.seed,
    }
    return [[name, str(value)] for name, value in values.items() if value is not None]


def _lengths(task: TaskResult) -> str:
    one = task.completion_tokens
    if one is None:
        return "not counted"
    return f"mean {one.mean:,.0f}, median {one.median:,.0f}, 95th percentile {one.p95:,.0f}, total {one.total:,}"


def _title(results: Results) -> str:
    return f"{results.model.get('model', 'model')} by {results.protocol['name']}"


def comparison_text(comparison: Comparison) -> str:
    """What `deepseek-eval compare A B` prints: paired differences, a minus b, in percentage points."""
    rows = [["task", "a", "b", "a - b", "95 % interval", "items", "won/lost/tied", "p", "McNemar", "detectable"]]
    for task, one in comparison.differences.items():
        low, high = one.interval
        rows.append(
            [task, f"{100 * one.mean_a:.1f}", f"{100 * one.mean_b:.1f}", f"{100 * one.difference:+.1f}",
             f"[{100 * low:+.1f}, {100 * high:+.1f}]", f"{one.items:,}", f"{one.wins}/{one.losses}/{one.ties}",
             f"{one.p_value:.3g}", "-" if one.mcnemar_p is None else f"{one.mcnemar_p:.3g}",
             f"{100 * one.detectable:.1f}"]
        )  # fmt: skip
    lines = [f"a: {comparison.model_a.get('model', '?')}", f"b: {comparison.model_b.get('model', '?')}", ""]
    lines += [text_table(rows), "", "Differences in percentage points, on the same items. `detectable` is the"]
    lines += ["difference that such a comparison would find in 80 % of cases, at 5 % two-sided."]
    lines += [
        f"{task}: {a:,} completions of a and {b:,} of b failed and count as wrong; run again before comparing"
        for task, (a, b) in comparison.unanswered.items()
        if a or b
    ]
    lines += [f"only in a: {', '.join(comparison.only_a)}"] if comparison.only_a else []
    lines += [f"only in b: {', '.join(comparison.only_b)}"] if comparison.only_b else []
    return "\n".join(lines)


def regrade_text(regraded: Regraded) -> str:
    """What `deepseek-eval regrade` prints: the flips, and each score before and after."""
    rows = [["task", "item", "sample", "before", "after", "answer before", "answer after"]]
    for flip in regraded.flips[:50]:
        answers = [
            one if one is None or len(one) <= 30 else one[:29] + "…" for one in (flip.answer_before, flip.answer_after)
        ]
        rows.append([flip.task, flip.id, str(flip.index), flip.before, flip.after, *(one or "-" for one in answers)])
    lines = [f"{len(regraded.flips):,} of {regraded.after.samples:,} verdicts flipped"]
    lines += [f"  {before} -> {after}: {count:,}" for (before, after), count in regraded.counts.items()]
    if regraded.flips:
        lines += ["", text_table(rows)]
    if len(regraded.flips) > 50:
        lines.append(f"... and {len(regraded.flips) - 50:,} more, in flips.jsonl")
    scores = [["task", "measure", "before", "after"]]
    for before, after in zip(regraded.before.tasks, regraded.after.tasks, strict=True):
        scores.append([before.task, "score", percent(before.score), percent(after.score)])
    return "\n".join([*lines, "", text_table(scores)])


# The page.


class Page(Template):
    delimiter = "@@"  # the page's own scripts use the dollar sign


def page(results: Results, samples: Iterable[Mapping[str, Any]], *, note: str = "", model: str | None = None) -> str:
    """report.html: no other file, no network. `samples` are what `shown_samples` yields."""
    template = Page(resources.files("eval").joinpath("report_page.html").read_text(encoding="utf-8"))
    # `<` is escaped, so that no text of a model can end the script element that holds it.
    data = json.dumps(list(samples), ensure_ascii=False).replace("<", "\\u003c")
    who, counts = summary_lines(results)
    return template.substitute(
        title=escape(_title(results)),
        subtitle=escape(f"{who}. {counts}."),
        warnings=html_list(notes(results, model)),
        scores=html_table(score_rows(results, model), left=2),
        plot=_plot(results, model),
        legend="".join(
            f'<span><i class="key" style="background: var(--{verdict})"></i>{verdict.replace("_", " ")}</span>'
            for verdict in VERDICTS
        ),
        verdicts=_verdict_bars(results),
        tasks="".join(_task_section(results, task) for task in results.tasks),
        samples_note=escape(note),
        data=data,
    )


def escape(value: object) -> str:
    return html.escape(str(value))


def html_list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def html_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    def line(row: Sequence[str], tag: str) -> str:
        cells = (
            f"<{tag}{'' if place < left else ' class=n'}{' scope=col' if tag == 'th' else ''}>{escape(cell)}</{tag}>"
            for place, cell in enumerate(row)
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f"<table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table>"


def _verdict_bars(results: Results) -> str:
    rows = []
    for task in results.tasks:
        parts = "".join(
            f'<span style="width:{100 * task.rates[verdict]:.3f}%;background:var(--{verdict})"></span>'
            for verdict in VERDICTS
            if task.verdicts[verdict]
        )
        said = ", ".join(f"{task.verdicts[one]:,} {one.replace('_', ' ')}" for one in VERDICTS if task.verdicts[one])
        rows.append(
            f"<tr><th scope=row>{escape(task.task)}</th><td style='width:50%'><div class=bar role=img "
            f"aria-label='{escape(said)}'>{parts}</div></td><td>{escape(said)}</td>"
            f"<td class=n>{task.samples:,}</td></tr>"
        )
    columns = ("task", "share", "counts", "samples")
    head = "<tr>" + "".join(f"<th scope=col>{column}</th>" for column in columns) + "</tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _plot(results: Results, model: str | None) -> str:
    """Points and intervals from 0 to 100, one line a score, as SVG."""
    lines: list[tuple[str, Score, float | None]] = []
    for task in results.tasks:
        shown = {one.published.metric: one for one in reported(results, task, model) if one.difference is not None}
        first = shown.get("pass@1") or shown.get("f1")
        lines.append((task.task, task.score, first.published.value if first else None))
        if task.cons_at_k:
            cons = shown.get(f"cons@{task.k}")
            lines.append((f"{task.task} cons@{task.k}", task.cons_at_k, cons.published.value if cons else None))
    left, right, step = 190, 700, 26
    height = step * len(lines) + 30

    def x(value: float) -> float:
        return left + (right - left) * value / 100

    parts = [
        f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="6" y2="{height - 24}"/>'
        f'<text x="{x(tick)}" y="{height - 8}" text-anchor="middle">{tick}</text>'
        for tick in range(0, 101, 20)
    ]
    for number, (name, score, published) in enumerate(lines):
        y = step * number + 18
        low, high = (x(100 * end) for end in score.interval)
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<line class="ci" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke-opacity=".45"/>')
        parts.append(f'<circle class="point" cx="{x(100 * score.value):.1f}" cy="{y}" r="4.5"/>')
        if published is not None:
            at = x(published)
            parts.append(
                f'<path class="reported" d="M{at:.1f} {y - 7}l6 7l-6 7l-6 -7z">'
                f"<title>reported {published}</title></path>"
            )
    return (
        '<div class="wide"><svg role="img" aria-label="scores with 95 % intervals" '
        f'viewBox="0 0 {right + 20} {height}" width="{right + 20}" height="{height}">{"".join(parts)}</svg></div>'
    )


def _task_section(results: Results, task: TaskResult) -> str:
    groups = f"<h3>By group</h3><div class=wide>{html_table(group_rows(task))}</div>" if task.groups else ""
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in provenance_rows(results, task)
    )
    return (
        f"<details><summary>{escape(task.title)}: {percent(task.score)} {interval(task.score)}</summary>"
        f"<p>{escape(task.citation)}. Licence: {escape(task.licence)}.</p>{groups}"
        f"<h3>Settings and provenance</h3><div class=wide><table><tbody>{rows}</tbody></table></div></details>"
    )


def shown_samples(out: str | Path, results: Results, *, show_questions: bool = False) -> Iterator[dict[str, Any]]:
    """The samples on the page, in the order of graded.jsonl: of each task at most `SHOWN`, by the hash of their key.

    The texts of a confidential task (GPQA), its gold answers included, are left out unless `show_questions`.
    """
    chosen: dict[str, set[str]] = {}
    for task in results.tasks:
        keys = (row.key for row in read_rows(out, results) if row.task == task.task)
        chosen[task.task] = set(nsmallest(SHOWN, keys, key=lambda one: hashlib.sha256(one.encode()).digest()))
    confidential = {task.task for task in results.tasks if task.confidential and not show_questions}
    with Store(Path(out) / STORE, readonly=True) as store:
        for row in read_rows(out, results):
            if row.key in chosen[row.task]:
                yield _shown(store, row, hidden=row.task in confidential)


def _shown(store: Store, row: Row, *, hidden: bool) -> dict[str, Any]:
    shown: dict[str, Any] = dict(
        task=row.task, id=row.id, index=row.index, verdict=row.verdict, detail=row.detail, tokens=row.completion_tokens,
        answer=row.answer, gold=row.gold, question=None, thought=None, response=None,
    )  # fmt: skip
    stored = store.get(row.key)
    if hidden:
        return {
            **shown,
            "gold": None,
            "detail": "",
            "question": "(hidden: its authors ask that it never stand in plain text)",
        }
    if stored is None:
        return shown
    sample, completion = Sample.from_json(stored.context["sample"]), stored.completion
    thought = split_thought(
        completion.text,
        opened=stored.context["opened"],
        reasoning=completion.reasoning,
        finish_reason=completion.finish_reason,
    )
    choices = "".join(f"\n{letter}) {choice}" for letter, choice in zip("ABCDEFGHIJ", sample.choices, strict=False))
    response = completion.error if completion.finish_reason == "failed" else thought.answer
    if completion.logprobs:
        response = "log-probabilities: " + ", ".join(f"{one:.3f}" for one in completion.logprobs)
    return {**shown, "question": sample.question + choices, "thought": thought.thought, "response": response}


def write_report(out: str | Path, *, show_questions: bool = False, model: str | None = None) -> Results:
    """Writes report.md and report.html beside the results, and gives these back.

    Raises what `read_results` and `read_rows` raise where no run was finished there.
    """
    out = Path(out)
    results = read_results(out)
    samples = list(shown_samples(out, results, show_questions=show_questions))
    note = f"{len(samples):,} of {results.samples:,} samples; all verdicts stand in graded.jsonl."
    (out / REPORT_MD).write_text(markdown(results, model), encoding="utf-8")
    content = page(results, samples, note=note, model=model)
    (out / REPORT_HTML).write_text(content, encoding="utf-8", errors="backslashreplace")
    return results
