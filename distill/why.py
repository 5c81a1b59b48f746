"""`distill why ID`: the path of a problem or a trace through the stages, with every decision, in words.

An id is that of a problem (16 hex digits), of a trace (`problem/index`), the key of a sample in the store, or the
beginning of one of these, as long as one row alone begins so.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from distill.funnel import UNITS, columns, rows_where
from distill.records import REASONS
from distill.run_dir import RunDir

SHORTEST = 4  # letters that a beginning must have
SHOWN = 400  # characters of a question, a thought, an answer


def why(run: RunDir, id: str) -> str:
    """What became of a problem with all its samples, or of one trace. ValueError where nothing has that id."""
    if not (run / "problems.parquet").exists():
        raise ValueError(f"{run.path} holds no problems yet: the stage problems has not finished")
    problem, trace = _find(run, id.strip())
    (row, *again) = rows_where(run / "problems.parquet", "id", [problem])
    parts = [_problem(run, row, again)]
    if (run / "traces.parquet").exists():
        traces = list(rows_where(run / "traces.parquet", "problem_id", [problem]))
        decisions = _decisions(run, [one["id"] for one in traces])
        if trace is None:
            parts += [_short(one, decisions) for one in traces] or ["no sample of it was asked"]
        else:
            parts += [_trace(run, one, decisions) for one in traces if one["id"] == trace]
    return "\n\n".join(parts)


def _find(run: RunDir, wanted: str) -> tuple[str, str | None]:
    """The problem that is meant, and the trace where one is. ValueError: none, or several."""
    problems = {row for (row,) in columns(run / "problems.parquet", "id")}
    if wanted in problems:
        return wanted, None
    found: dict[str, tuple[str, str | None]] = {}
    if len(wanted) >= SHORTEST:
        found = {row: (row, None) for row in problems if row.startswith(wanted)}
        for row, problem, key in _trace_names(run):
            if wanted == row:
                return problem, row
            name = row if "/" in wanted else key
            if name.startswith(wanted):
                found[name] = (problem, row)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ValueError(f"{len(found):,} ids begin with {wanted!r}: {', '.join(sorted(found)[:5])}; give more of it")
    raise ValueError(f"{wanted!r} is no problem, trace or sample of {run.path}; {_nearest(wanted, sorted(problems))}")


def _trace_names(run: RunDir) -> Iterator[tuple[str, str, str]]:
    """(id, problem, key) of every trace."""
    if (run / "traces.parquet").exists():
        yield from ((row, of, key) for row, of, key in columns(run / "traces.parquet", "id", "problem_id", "key"))


def _nearest(wanted: str, problems: Sequence[str]) -> str:
    """A problem with most letters in common, place by place, or how ids look."""
    wanted = wanted.partition("/")[0]
    alike = {name: sum(a == b for a, b in zip(wanted, name, strict=False)) for name in problems}
    nearest = max(problems, key=lambda name: alike[name], default="")
    if 2 * alike.get(nearest, 0) > len(wanted):
        return f"did you mean the problem {nearest}?"
    return f"ids look like {nearest} (a problem) and {nearest}/0 (a trace)" if nearest else "it has no problems"


def _decisions(run: RunDir, ids: Iterable[str]) -> dict[str, list[tuple[str, str, str]]]:
    """(stage, reason, detail) of each stage that judged one of these traces, in the order of the stages."""
    ids = set(ids)
    found: dict[str, list[tuple[str, str, str]]] = {one: [] for one in ids}
    for stage in (stage for stage, unit in UNITS.items() if unit == "traces"):
        if run.decisions(stage).exists():
            for row in rows_where(run.decisions(stage), "id", ids):
                found[row["id"]].append((stage, row["reason"], row["detail"]))
    return found


def _problem(run: RunDir, row: Mapping[str, Any], again: Iterable[Mapping[str, Any]]) -> str:
    lines = [f"problem {row['id']}", *_field("from", f"{row['source']}, row {row['row']:,}; domain {row['domain']}")]
    lines += _field("question", row["question"])
    for letter, choice in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", row["choices"], strict=False):
        lines += _field("", f"{letter}) {choice}")
    lines += _field("answer", f"{row['answer'] or '(none)'} (kind {row['kind']})")
    decisions: dict[str, list[Mapping[str, Any]]] = {}
    for stage in (stage for stage, unit in UNITS.items() if unit == "prompts"):
        if run.decisions(stage).exists():
            decisions[stage] = list(rows_where(run.decisions(stage), "id", [row["id"]]))
    for stage, judged in decisions.items():
        for one in judged[:1]:
            lines += _field(stage, _said(stage, one["reason"], one["detail"]))
    for one in again:
        lines += _field("", f"the same problem stands in {one['source']}, row {one['row']:,} again, which was left out")
    return "\n".join(lines)


def _short(row: Mapping[str, Any], decisions: Mapping[str, list[tuple[str, str, str]]]) -> str:
    """A trace as a line of its problem."""
    judged = decisions[row["id"]]
    stage, reason, detail = judged[-1] if judged else ("", "", "")
    fate = f"dropped by {stage}: {_said(stage, reason, detail)}" if reason else f"kept, up to {stage}"
    answer = "" if row["extracted"] is None else f", answered {_cut(row['extracted'], 60)}"
    return f"trace {row['id']}  {row['verdict'] or 'unverified'}{answer}\n  {fate}"


def _trace(run: RunDir, row: Mapping[str, Any], decisions: Mapping[str, list[tuple[str, str, str]]]) -> str:
    tokens = "unknown" if row["completion_tokens"] is None else f"{row['completion_tokens']:,}"
    lines = [f"trace {row['id']}", *_field("sample", f"key {row['key']}, seed {row['seed']}, {tokens} tokens")]
    lines += _field("thought", f"({row['state']}) {row['thought']}")
    lines += _field("response", row["response"] or "(none)")
    detail = f": {row['detail']}" if row["detail"] else ""
    extracted = "nothing found" if row["extracted"] is None else f"answered {row['extracted']}"
    lines += _field("verdict", f"{row['verdict'] or 'unverified'}, {extracted}{detail} (grader {row['grader'] or '-'})")
    for stage, reason, said in decisions[row["id"]]:
        lines += _field(stage, _said(stage, reason, said))
    lines += _dataset(run, row["id"])
    return "\n".join(lines)


def _dataset(run: RunDir, trace: str) -> Iterator[str]:
    file = run / "dataset" / "train.parquet"
    if file.exists():
        place = next((place for place, (row,) in enumerate(columns(file, "id")) if row == trace), None)
        yield from _field("dataset", "not in it" if place is None else f"row {place:,} of dataset/train.parquet")


def _said(stage: str, reason: str, detail: str) -> str:
    if not reason:
        return "kept"
    return f"{reason}, {REASONS[stage].get(reason, 'a reason of another release')}" + (f" ({detail})" if detail else "")


def _field(name: str, value: str) -> list[str]:
    """A name and its value, the further lines of which stand below the first."""
    first, *more = _cut(value, SHOWN).splitlines() or [""]
    return [f"  {name:<14}{first}", *(f"  {'':<14}{line}" for line in more)]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}… ({len(text):,} characters)"
