"""What an evaluation found: a row for each sample, a summary for each task, and the two files that hold them.

    OUT/graded.jsonl   one `Row` a line, in the order of task, item, index: verdicts and answers, no questions
    OUT/results.json   `Results`: scores, counts that add up, settings, hashes, versions, the sha256 of graded.jsonl

Both are functions of what is in the store: no clock, no order of completion. An interrupted and resumed run writes the
same bytes as one that was not.
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from eval.metrics import (
    Classes,
    Lengths,
    Score,
    cons_at_k,
    mean_pass_at_k,
    score_interval,
    token_lengths,
    verdict_counts,
    verdict_rates,
)
from eval.sample import FinishReason, Record, Verdict

FORMAT = 1
RESULTS, GRADED, FLIPS = "results.json", "graded.jsonl", "flips.jsonl"
LISTED = 20  # failures that results.json spells out; all of them stand in graded.jsonl


@dataclass(frozen=True, slots=True)
class Row(Record):
    """One sample, judged. `key` finds the prompt's completion in the store, with the question as it was shown.

    `vote` is the answer as `cons@k` counts it: a letter is that of the published order, since each sample may have been
    shown another one. `thought` is the state that `thinking.split_thought` found, "" where nothing was generated.
    """

    task: str
    id: str
    index: int
    key: str
    verdict: Verdict
    credit: float
    answer: str | None
    vote: str | None
    gold: str
    detail: str
    grader: str
    thought: str
    finish_reason: FinishReason
    prompt_tokens: int | None
    completion_tokens: int | None
    group: str
    cluster: str


@dataclass(frozen=True)
class TaskResult:
    """One task. `score` is the mean over items of the mean credit of their samples: pass@1, or F1 for DROP.

    `verdicts` adds up to `samples`, which is `items` times `k`. What failed or was cut counts as credit 0, and is in
    `rates`. `pass_at` holds the pass@k that were asked for, over the samples that were obtained,
    `refused` why one could not be given. `cons_at_k` is
    None where k is 1 or answers are free text. `dataset` says what was asked: `hash` (sha256 of all questions asked),
    `items`, and the source. `ours` are the settings that the protocol's source leaves open. `unanswered` counts the
    completions that failed, which the next run asks again; `failures` are the first of the verdicts `failed`, those of
    a grader that failed included.
    """

    task: str
    title: str
    kind: str
    licence: str
    citation: str
    confidential: bool
    chance: float
    settings: dict[str, Any]
    ours: list[str]
    dataset: dict[str, Any]
    items: int
    k: int
    samples: int
    score: Score
    verdicts: dict[Verdict, int]
    rates: dict[Verdict, float]
    pass_at: dict[str, Score]
    refused: dict[str, str]
    cons_at_k: Score | None
    groups: dict[str, Score]
    thoughts: dict[str, int]
    prompt_tokens: Lengths | None
    completion_tokens: Lengths | None
    graders: list[str]
    unanswered: int
    failures: list[dict[str, Any]]


@dataclass(frozen=True)
class Results:
    """A whole evaluation. `complete` is False where completions failed, which the next run asks again."""

    model: dict[str, Any]
    protocol: dict[str, Any]
    seed: int
    limit: int | None
    complete: bool
    samples: int
    verdicts: dict[Verdict, int]
    tasks: list[TaskResult]
    versions: dict[str, str]
    graded_sha256: str
    format: int = FORMAT

    def task(self, name: str) -> TaskResult:
        return next(one for one in self.tasks if one.task == name)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def summarise(rows: Iterable[Row], *, k: int, pass_at: Sequence[int], classes: Classes | None) -> dict[str, Any]:
    """The measured fields of a `TaskResult`, from the rows of one task, those of an item beside each other.

    Rows are read once and not kept: what stays is a few numbers for each. `classes` votes (see `metrics.cons_at_k`);
    None leaves cons@k out.
    """
    credits: list[list[float]] = []
    correct: dict[str, list[bool]] = {}  # of samples that were obtained
    votes: list[float] = []
    groups: dict[str, list[int]] = {}
    clusters: list[str] = []
    cluster_of: dict[str, str] = {}
    thoughts: Counter[str] = Counter()
    verdicts: list[Verdict] = []
    prompt_tokens: list[int | None] = []
    completion_tokens: list[int | None] = []
    graders: set[str] = set()
    unanswered = 0
    failures: list[dict[str, Any]] = []
    for name, item in groupby(rows, key=lambda row: row.id):
        samples = list(item)
        assert len(samples) == k, f"{name}: {len(samples)} samples, not k={k}"
        first = samples[0]
        groups.setdefault(first.group, []).append(len(credits))
        clusters.append(first.cluster)
        cluster_of[name] = first.cluster
        credits.append([row.credit for row in samples])
        correct[name] = [row.verdict == "correct" for row in samples if row.finish_reason != "failed"]
        if classes is not None:
            votes.append(cons_at_k([row.vote for row in samples], "", classes=classes, credits=credits[-1]))
        for row in samples:
            verdicts.append(row.verdict)
            prompt_tokens.append(row.prompt_tokens)
            completion_tokens.append(row.completion_tokens)
            if row.thought:
                thoughts[row.thought] += 1
            if row.grader:
                graders.add(row.grader)
            unanswered += row.finish_reason == "failed"
            if row.verdict == "failed" and len(failures) < LISTED:
                failures.append(dict(id=row.id, index=row.index, detail=row.detail))
    counts = verdict_counts(verdicts)
    assert sum(counts.values()) == len(credits) * k, "every sample has one verdict"
    scores: dict[str, Score] = {}
    refused: dict[str, str] = {}
    for one in sorted(set(pass_at)):
        try:
            scores[str(one)] = mean_pass_at_k(correct, one, clusters=cluster_of)
        except ValueError as error:
            refused[str(one)] = str(error)
    return dict(
        items=len(credits),
        k=k,
        samples=len(verdicts),
        score=score_interval(credits, clusters),
        verdicts=counts,
        rates=verdict_rates(counts),
        pass_at=scores,
        refused=refused,
        cons_at_k=score_interval(votes, clusters) if votes else None,
        groups={
            group: score_interval([credits[place] for place in places], [clusters[place] for place in places])
            for group, places in sorted(groups.items())
            if len(groups) > 1
        },
        thoughts=dict(sorted(thoughts.items())),
        prompt_tokens=token_lengths(prompt_tokens),
        completion_tokens=token_lengths(completion_tokens),
        graders=sorted(graders),
        unanswered=unanswered,
        failures=failures,
    )


class Lines:
    """A file of JSON lines that appears whole under its name, or not at all; `sha256` is that of its bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self._hash = path, hashlib.sha256()
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("wb")

    def write(self, line: str) -> None:
        # A lone half of a surrogate pair becomes its JSON escape.
        content = line.encode("utf-8", "backslashreplace") + b"\n"
        self._hash.update(content)
        self._file.write(content)

    def commit(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        return self._hash.hexdigest()

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_results(out: Path, results: Results) -> None:
    lines = Lines(out / RESULTS)
    lines.write(results.to_json().removesuffix("\n"))
    lines.commit()


def read_results(out: str | Path) -> Results:
    """The results of a finished run. FileNotFoundError where there are none, ValueError where they are not ours."""
    path = Path(out) / RESULTS
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {RESULTS} in {out}: no evaluation was finished there; run it (again), what is stored is kept"
        )
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise ValueError(f"format={values['format']}, and this release reads {FORMAT}")
        return Results(**{**values, "tasks": [_task_result(one) for one in values["tasks"]]})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of results: {error}") from error


def _task_result(values: dict[str, Any]) -> TaskResult:
    score: Callable[[Any], Score | None] = lambda one: one and Score(**{**one, "interval": tuple(one["interval"])})  # noqa: E731
    lengths: Callable[[Any], Lengths | None] = lambda one: one and Lengths(**one)  # noqa: E731
    return TaskResult(
        **{
            **values,
            "score": score(values["score"]),
            "cons_at_k": score(values["cons_at_k"]),
            "pass_at": {name: score(one) for name, one in values["pass_at"].items()},
            "groups": {name: score(one) for name, one in values["groups"].items()},
            "prompt_tokens": lengths(values["prompt_tokens"]),
            "completion_tokens": lengths(values["completion_tokens"]),
        }
    )


def read_rows(out: str | Path, results: Results) -> Iterator[Row]:
    """The rows that `results` were made of, checked to be those."""
    path = Path(out) / GRADED
    found = ""
    if path.is_file():
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != results.graded_sha256:
        raise ValueError(
            f"{path} is not of one run with {RESULTS} (a run was interrupted while writing, or the file was changed); "
            "run the evaluation again: nothing that is stored is asked again"
        )
    with path.open(encoding="utf-8") as file:
        yield from map(Row.from_json, file)


def total_verdicts(tasks: Sequence[TaskResult]) -> dict[Verdict, int]:
    total: Counter[Verdict] = Counter()
    for task in tasks:
        total.update(task.verdicts)
    return verdict_counts([]) | dict(total)


def describe(settings: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name}: {ours!r} and {theirs!r}" for name, (ours, theirs) in settings.items())
