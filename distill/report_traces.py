"""The traces on the page: all of a small run, a seeded sample of a large one, in which every fate has its place.

Every stage and reason takes its turn, those with the lowest hash of their id first, until `TRACES` rows or `BYTES` of
text are chosen. So a rare reason is there to be looked at, and the same run shows the same traces.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from distill.funnel import UNITS, columns, fates, rows_where
from distill.run_dir import ROWS_PER_GROUP, RunDir

TRACES, BYTES = 2000, 8_000_000
PROMPT_STAGES = [stage for stage, unit in UNITS.items() if unit == "prompts"]
TRACE_STAGES = [stage for stage, unit in UNITS.items() if unit == "traces"]
OF_TRACE = (
    "id", "index", "extracted", "detail", "thought", "response", "state", "seed", "grader", "completion_tokens",
)  # fmt: skip
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def shown_traces(run: RunDir, done: Sequence[str], seed: int) -> tuple[list[dict[str, Any]], int]:
    """What the page shows, and how many there are to show: traces in their order, then prompts that were dropped before
    anything was asked."""
    strata: dict[tuple[str, str], list[tuple[bytes, str, int]]] = {}
    total = 0
    for row, size, stage, reason in _candidates(run, done):
        total += 1
        stratum = strata.setdefault((stage, reason), [])
        stratum.append((hashlib.sha256(f"{seed}/{row}".encode()).digest(), row, size))
        if len(stratum) > 2 * TRACES:
            stratum.sort()
            del stratum[TRACES:]
    chosen = _choose([sorted(strata[key]) for key in sorted(strata)])
    return list(_entries(run, done, chosen)), total


def _choose(strata: Sequence[Sequence[tuple[bytes, str, int]]]) -> set[str]:
    chosen: set[str] = set()
    room = BYTES
    for turn in zip_longest(*strata):
        for one in turn:
            if one is not None:
                room -= one[2]
                if chosen and (len(chosen) == TRACES or room < 0):
                    return chosen
                chosen.add(one[1])
    return chosen


def _candidates(run: RunDir, done: Sequence[str]) -> Iterator[tuple[str, int, str, str]]:
    """(id, bytes of text, stage, reason) of every trace and of every prompt that was dropped."""
    for stage in PROMPT_STAGES:
        if stage in done:
            rows = columns(run.decisions(stage), "id", "reason")
            # A repeated row has the id and the text of the one that was kept.
            yield from ((row, 500, stage, reason) for row, reason in rows if reason and reason != "repeated")
    if "traces" in done:
        for (row, _, _, _, stage, reason), size in zip(fates(run, done), _sizes(run), strict=True):
            yield row, size, stage, reason


def _sizes(run: RunDir) -> Iterator[int]:
    import pyarrow.compute
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(run / "traces.parquet") as file:
        for batch in file.iter_batches(ROWS_PER_GROUP, columns=["thought", "response"]):
            parts = (pyarrow.compute.binary_length(batch.column(name)).to_pylist() for name in ("thought", "response"))
            yield from map(sum, zip(*parts, strict=True))


def _entries(run: RunDir, done: Sequence[str], chosen: set[str]) -> Iterator[dict[str, Any]]:
    decisions = {stage: _decisions(run, stage, chosen) for stage in done}
    wanted = {row.partition("/")[0] for row in chosen}
    problems: dict[str, dict[str, Any]] = {}
    if chosen:
        for row in rows_where(run / "problems.parquet", "id", wanted):
            problems.setdefault(row["id"], row)
    if "traces" in done:
        samples = _samples(run, wanted)
        for trace in rows_where(run / "traces.parquet", "id", chosen):
            path = _path(trace["id"], decisions, TRACE_STAGES)
            own = {name: trace[name] for name in OF_TRACE}
            yield {
                **_of_problem(problems[trace["problem_id"]]), **_fate(path), **own, "path": path,
                "verdict": trace["verdict"] or "unverified", "samples": samples[trace["problem_id"]],
            }  # fmt: skip
    for row_id in sorted(chosen & problems.keys()):
        path = _path(row_id, decisions, PROMPT_STAGES)
        yield {**_of_problem(problems[row_id]), **_fate(path), "id": row_id, "path": path, "verdict": "not asked"}


def _decisions(run: RunDir, stage: str, chosen: set[str]) -> dict[str, Any]:
    rows = rows_where(run.decisions(stage), "id", chosen)
    return {row["id"]: row for row in rows if row["reason"] != "repeated"}


def _path(row: str, decisions: Mapping[str, Mapping[str, Any]], stages: Sequence[str]) -> list[list[str]]:
    """[stage, reason, detail] of each stage that judged the row, up to the one that dropped it."""
    judged = ((stage, decisions[stage][row]) for stage in stages if row in decisions.get(stage, {}))
    path = []
    for stage, one in judged:
        path.append([stage, one["reason"], one["detail"]])
        if one["reason"]:
            break
    return path


def _fate(path: Sequence[Sequence[str]]) -> dict[str, str]:
    stage, reason, _ = path[-1] if path else ("", "", "")
    return {"stage": stage if reason else "", "reason": reason}


def _of_problem(row: Mapping[str, Any]) -> dict[str, Any]:
    choices = "".join(f"\n{letter}) {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    own = {name: row[name] for name in ("source", "domain", "kind")}
    return {**own, "problem": row["id"], "question": row["question"] + choices, "gold": row["answer"]}


def _samples(run: RunDir, wanted: set[str]) -> dict[str, list[str]]:
    """The verdicts of all samples of a problem, in their order."""
    found: dict[str, list[str]] = {}
    for problem, verdict in columns(run / "traces.parquet", "problem_id", "verdict"):
        if problem in wanted:
            found.setdefault(problem, []).append(verdict or "unverified")
    return found
