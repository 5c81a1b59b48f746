"""The rows of a run through its stages: in = kept + dropped by reason, counted from the decisions themselves.

`report.py`, `why.py` and `status.py` know the stages from here. The counts are held against each other and against the
manifest: a row that was lost, or counted twice, is an AssertionError. Tables are read in batches and only in the
columns that are needed, so a run of 500,000 problems is read in little memory.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from distill.records import REASONS
from distill.run_dir import ROWS_PER_GROUP, Done, RunDir, table_rows

UNITS = {stage: "prompts" if stage in ("problems", "prompts") else "traces" for stage in REASONS}


def columns(path: Path, *names: str) -> Iterator[tuple[Any, ...]]:
    """These columns of a table, row by row."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_PER_GROUP, columns=list(names)):
            yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)


def rows_where(path: Path, column: str, values: Collection[str]) -> Iterator[dict[str, Any]]:
    """The rows whose `column` is one of `values`, in their order; the others never become Python values."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    wanted = pyarrow.array(sorted(values), pyarrow.string())
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_PER_GROUP):
            yield from batch.filter(pyarrow.compute.is_in(batch.column(column), wanted)).to_pylist()


def funnel(run: RunDir, manifest: Mapping[str, Done]) -> list[dict[str, Any]]:
    """A line for each stage that has judged rows: in = kept + dropped by reason, and in = what the stage before kept.

    A stage that finished before its predecessor did, and on other rows, is of an earlier state of the run: it and what
    follows are left out.
    """
    lines: list[dict[str, Any]] = []
    order = list(manifest)
    for stage in REASONS:
        if stage not in manifest or not run.decisions(stage).exists():
            break
        line = _line(run, stage)
        before = lines[-1] if lines else None
        given = table_rows(run / "traces.parquet") if stage == "traces" else before["kept"] if before else line["in"]
        if line["in"] != given:
            if before and order.index(stage) < order.index(before["stage"]):
                break
            raise AssertionError(f"{stage} judged {line['in']:,} rows and was given {given:,}: rows were lost")
        _check_against_manifest(line, manifest[stage].counts)
        lines.append(line)
    if len(lines) == len(REASONS) and "dataset" in manifest:
        rows = table_rows(run / "dataset" / "train.parquet")
        if order.index("dataset") > order.index(stage):
            assert rows == lines[-1]["kept"], f"the dataset has {rows:,} rows, and {stage} kept {lines[-1]['kept']:,}"
    return lines


def _line(run: RunDir, stage: str) -> dict[str, Any]:
    counts = Counter(reason for (reason,) in columns(run.decisions(stage), "reason"))
    kept = counts.pop("", 0)
    unknown = sorted(set(counts) - set(REASONS[stage]))
    assert not unknown, f"{stage} dropped rows for {', '.join(unknown)}, which is none of its reasons"
    dropped = {reason: counts[reason] for reason in REASONS[stage] if counts[reason]}
    return dict(stage=stage, unit=UNITS[stage], kept=kept, dropped=dropped, **{"in": kept + sum(dropped.values())})


def _check_against_manifest(line: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    found = {"in": line["in"], "kept": line["kept"], **line["dropped"]}
    for name in ("in", "kept", *REASONS[line["stage"]]):
        said, here = counts.get(name, 0), found.get(name, 0)
        assert said == here, f"{line['stage']}: the manifest counts {said:,} rows as {name}, the decisions {here:,}"


def fates(run: RunDir, done: Sequence[str]) -> Iterator[tuple[str, str, str, Any, str, str]]:
    """(id, problem, verdict, tokens, stage, reason) of every trace, in order; stage and reason are "" where it was kept
    by all stages that have run. Each stage judged in the order of the traces what the one before it had kept."""
    stages = [stage for stage in done if UNITS[stage] == "traces"]
    judged = {stage: columns(run.decisions(stage), "id", "reason") for stage in stages}
    for row, *rest in columns(run / "traces.parquet", "id", "problem_id", "verdict", "completion_tokens"):
        fate = ("", "")
        for stage in stages:
            same, reason = next(judged[stage], ("nothing", ""))
            assert row == same, f"decisions/{stage}.parquet judges {same} where {row} stands"
            if reason:
                fate = (stage, reason)
                break
        problem, verdict, tokens = rest
        yield row, problem, verdict or "unverified", tokens, *fate


def by_problem(run: RunDir, rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, str, list[Any]]]:
    """(source, domain, values) of every prompt that was kept, in order; `rows` are (problem, value) in the same order,
    any number of each problem, none too."""
    prompts: Iterator[tuple[Any, ...]] = columns(run / "problems.parquet", "id", "source", "domain")
    for stage in (stage for stage, unit in UNITS.items() if unit == "prompts"):
        prompts = _kept(run, stage, prompts)
    groups = groupby(rows, key=lambda row: row[0])
    problem, values = next(groups, (None, iter(())))
    for row, source, domain in prompts:
        if row != problem:
            yield source, domain, []
            continue
        yield source, domain, [value for _, value in values]
        problem, values = next(groups, (None, iter(())))
    assert problem is None, f"there are traces of {problem}, which is no prompt that was kept, or not in its place"


def _kept(run: RunDir, stage: str, rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    for row, (same, reason) in zip(rows, columns(run.decisions(stage), "id", "reason"), strict=True):
        assert row[0] == same, f"decisions/{stage}.parquet judges {same} where {row[0]} stands"
        if not reason:
            yield row
