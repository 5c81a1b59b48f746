"""Scores of teacher, base and students side by side: what `eval` found, and the paired differences of the students.

Beside each task stands `ALL`, where every question of every task counts once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.run_dir import Done, RunDir
from eval.metrics import PairedDifference, paired_difference, score_interval
from eval.results import RESULTS, Results, read_results, read_rows
from eval.runner import compare

ALL = "all tasks"
Credits = tuple[dict[str, list[float]], dict[str, str]]  # by task and item: the samples' credits; the cluster


def evaluations(
    run: RunDir, recipe: Mapping[str, Any], manifest: Mapping[str, Done]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Scores of every evaluated model, the paired differences of the students, and what a reader must know of them."""
    students = list(recipe.get("students") or {})
    names = [one.removeprefix("eval:") for one in manifest if one.startswith("eval:")]
    names.sort(key=lambda name: place(["teacher", "base", *students], name))
    found = {name: read_results(run / "eval" / name) for name in names if (run / "eval" / name / RESULTS).exists()}
    credits = {name: _credits(run / "eval" / name, results) for name, results in found.items()}
    scores: list[dict[str, Any]] = []
    notes: list[str] = []
    for name, results in found.items():
        scores += _scores(name, results, credits[name])
        notes += [
            f"{name}: {task.unanswered:,} completions of {task.task} failed and count as wrong"
            for task in results.tasks
            if task.unanswered
        ]
    differences: list[dict[str, Any]] = []
    for a, b in _pairs(recipe, list(found)):
        try:
            differences += _differences(run, a, b, credits)
        except ValueError as error:  # asked or judged in another way: said in place of a number
            notes.append(f"{a} and {b} are not compared: {error}")
    return scores, differences, notes


def _credits(folder: Path, results: Results) -> Credits:
    scores: dict[str, list[float]] = {}
    clusters: dict[str, str] = {}
    for row in read_rows(folder, results):
        item = f"{row.task}/{row.id}"
        scores.setdefault(item, []).append(row.credit)
        clusters[item] = row.cluster and f"{row.task}/{row.cluster}"
    return scores, clusters


def _scores(name: str, results: Results, credits: Credits) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        dict(
            model=name, task=task.task, score=task.score.value, interval=list(task.score.interval), items=task.items,
            k=task.k, cons=task.cons_at_k.value if task.cons_at_k else None, truncated=task.rates["truncated"],
            no_answer=task.rates["no_answer"], failed=task.rates["failed"] + task.rates["timeout"],
            tokens=task.completion_tokens.mean if task.completion_tokens else None,
            prompt_tokens=task.prompt_tokens.total if task.prompt_tokens else None,
            completion_tokens=task.completion_tokens.total if task.completion_tokens else None,
        )
        for task in results.tasks
    ]  # fmt: skip
    if len(lines) > 1:
        scores, clusters = credits
        whole = score_interval(list(scores.values()), [clusters[item] for item in scores])
        lengths = [task.completion_tokens for task in results.tasks if task.completion_tokens]
        known = sum(one.known for one in lengths)
        lines.append(
            dict(
                model=name, task=ALL, score=whole.value, interval=list(whole.interval), items=whole.items, k=None,
                cons=None, tokens=sum(one.total for one in lengths) / known if known else None,
                prompt_tokens=None, completion_tokens=None,
                **{rate: sum(line[rate] * task.samples for line, task in zip(lines, results.tasks, strict=True))
                   / whole.samples for rate in ("truncated", "no_answer", "failed")},
            )
        )  # fmt: skip
    return lines


def _pairs(recipe: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(a, b) for a minus b: traces against answers, each student against the base, then against the teacher."""
    settings = recipe.get("students") or {}
    students = [name for name in names if name in settings]
    target = {name: settings[name].get("target", "trace") for name in students}
    students.sort(key=lambda name: target[name] != "trace")
    for a in students:
        if target[a] == "trace":
            yield from ((a, b) for b in students if target[b] == "answer")
    yield from ((a, "base") for a in students if "base" in names)
    yield from ((a, "teacher") for a in students if "teacher" in names)


def _differences(run: RunDir, a: str, b: str, credits: Mapping[str, Credits]) -> list[dict[str, Any]]:
    compared = compare(run / "eval" / a, run / "eval" / b)
    lines = [_difference(a, b, task, one) for task, one in compared.differences.items()]
    if len(lines) > 1 and not compared.only_a and not compared.only_b:
        whole = paired_difference(credits[a][0], credits[b][0], clusters=credits[a][1])
        lines.append(_difference(a, b, ALL, whole))
    return lines


def _difference(a: str, b: str, task: str, one: PairedDifference) -> dict[str, Any]:
    return dict(
        a=a, b=b, task=task, difference=one.difference, interval=list(one.interval), p_value=one.p_value,
        wins=one.wins, losses=one.losses, ties=one.ties, items=one.items,
    )  # fmt: skip


def place(names: Iterable[str], name: str) -> tuple[int, str]:
    order = list(names)
    return (order.index(name) if name in order else len(order)), name
