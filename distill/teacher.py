"""Traces of the teacher: samples until enough are right, and the rows that come of them.

`generate` asks for what the store lacks and judges it (`rejection.py`); `traces` then reads the rows of the run from
the store alone. So the traces are a function of problems, model, settings and seed, whatever the batch, the order, the
shards or the interruptions.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from distill.asking import Asking, Place, next_indices, of_shard, opened, stored_verdict, with_verdict
from distill.cost import Spent
from distill.recipe import Teacher
from distill.records import Decision, Problem, Trace
from distill.rejection import Generated, Generation, Problems
from eval.runner import Progress
from eval.sample import Graded
from eval.samplers import Sampler
from eval.store import Store, Stored
from eval.thinking import split_thought

if TYPE_CHECKING:
    from distill.verify import Verifier


def generate(
    problems: Problems,
    sampler: Sampler,
    teacher: Teacher,
    seed: int,
    store: Store,
    verifier: "Verifier",
    *,
    progress: Progress | None = None,
    shard: tuple[int, int] = (0, 1),
    seconds_before: float = 0.0,
    threads: int | None = None,
) -> Generated:
    """Asks for every sample that the rule wants and the store lacks, and judges what has no verdict.

    The model is not touched where nothing is missing. Else all prompts are checked first. The budget is one of all
    samples of these settings in the store, and of `seconds_before` and this call: when it ends, what is on its way is
    waited for and kept. `threads` judge (None: as many as the judge may be asked at a time, or as there are cores).

    Raises, with everything kept that was answered: ConnectionError (no endpoint can be reached), OSError (no room),
    ValueError (a prompt exceeds the context, the first many samples are all wrong or all failed, a budget in tokens
    that nobody counts).
    """
    generation = Generation(problems, Asking(sampler, teacher, seed), store, verifier, progress, shard, seconds_before)
    pool = ThreadPoolExecutor(threads or _threads(verifier), "verdicts")
    try:
        return generation.run(pool)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or an interrupt, what has no verdict gets one next time


def _threads(verifier: "Verifier") -> int:
    judge = verifier.settings.judge
    return max(os.cpu_count() or 1, judge.concurrency if judge is not None and judge.engine == "endpoint" else 1)


# What is stored, read again.


def traces(
    problems: Iterable[Problem],
    sampler: Sampler,
    teacher: Teacher,
    seed: int,
    store: Store,
    verifier: "Verifier",
    *,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Trace, Decision]]:
    """The samples of the rule that are in the store, by problem and index, with what the verifier said: right ones are
    kept, and so are those of kind `none`, which have no verdict. The sampler is not asked; it renders the prompts."""
    asking = Asking(sampler, teacher, seed)
    for problem in of_shard(problems, shard):
        for place, graded, was_opened in _stored(asking, problem, store, verifier):
            trace = _trace(problem, place, graded, was_opened)
            reason = "" if trace.verdict in (None, "correct") else str(trace.verdict)
            yield trace, Decision(trace.id, reason, trace.detail if reason else "")


def spent(
    problems: Iterable[Problem], sampler: Sampler, teacher: Teacher, seed: int, store: Store, verifier: "Verifier"
) -> Iterator[Spent]:
    """What each problem took that is done, for `cost.estimate`; those that lack a sample are left out."""
    asking = Asking(sampler, teacher, seed)
    for problem in problems:
        found = [(place, graded) for place, graded, _ in _stored(asking, problem, store, verifier)]
        done = [place.stored.completion for place, graded in found if place.stored and not _is_unknown(place, graded)]
        right = sum(graded is None or graded.verdict == "correct" for _, graded in found)
        if len(done) < len(found) or next_indices(len(found), right, 0, teacher):
            continue
        tokens = [(one.prompt_tokens or 0, one.completion_tokens or 0) for one in done]
        yield Spent(len(done), sum(one for one, _ in tokens), sum(one for _, one in tokens), right >= teacher.correct)


def _stored(
    asking: Asking, problem: Problem, store: Store, verifier: "Verifier"
) -> Iterator[tuple[Place, Graded | None, bool | None]]:
    """The samples of one problem that the rule asks for and the store has, failed ones too, with verdict (None: none is
    needed) and whether the prompt opens a thought."""
    prompt = asking.prompt(problem)
    was_opened = opened(prompt)
    asked = right = unknown = 0
    while indices := next_indices(asked, right, unknown, asking.teacher):
        for place in asking.look_up(store, problem, prompt, indices):
            asked += 1
            graded = None if place.stored is None else _verdict(store, place.stored, problem, verifier, was_opened)
            if _is_unknown(place, graded):
                unknown += 1
            else:
                right += graded is None or graded.verdict == "correct"
            if place.stored is not None:
                yield place, graded, was_opened


def _is_unknown(place: Place, graded: Graded | None) -> bool:
    return place.stored is None or (graded is not None and graded.verdict == "failed")


def _verdict(
    store: Store, stored: Stored, problem: Problem, verifier: "Verifier", was_opened: bool | None
) -> Graded | None:
    completion = stored.completion
    if completion.finish_reason == "failed":
        return Graded("failed", None, f"no completion: {completion.error}")
    if problem.kind == "none":
        return None
    graded = stored_verdict(stored.context, problem, verifier)
    if graded is None:  # `generate` judges what it meets; this is for a store that another version filled
        graded = verifier.grade(problem, completion, was_opened)
        if not store.readonly:
            store.set_context(stored.key, with_verdict(stored.context, graded))
    return graded


def _trace(problem: Problem, place: Place, graded: Graded | None, was_opened: bool | None) -> Trace:
    assert place.stored is not None
    completion = place.stored.completion
    thought = split_thought(
        completion.text, opened=was_opened, reasoning=completion.reasoning, finish_reason=completion.finish_reason
    )
    return Trace(
        id=f"{problem.id}/{place.index}",
        problem_id=problem.id,
        index=place.index,
        key=place.key,
        seed=place.request.seed,
        thought=thought.thought.strip(),
        response=thought.answer.strip(),
        state=thought.state,
        finish_reason=completion.finish_reason,
        verdict=graded.verdict if graded else None,
        extracted=graded.answer if graded else None,
        detail=graded.detail if graded else "",
        grader=graded.grader if graded else "",
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
    )


def merge_stores(into: Store, others: Sequence[Path]) -> int:
    """Copies the samples of other stores, of shards that ran elsewhere, with their verdicts; returns how many it read.
    A sample that is there stays, unless it had failed. FileNotFoundError for a store that is not there."""
    count = 0
    for path in others:
        with Store(path, readonly=True) as store:
            for stored in store:
                into.put(stored.key, stored.completion, stored.context)
                count += 1
    return count
