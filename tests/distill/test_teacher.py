"""Adaptive rejection sampling: exactly the samples of the rule, whatever happens on the way."""

import itertools
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.asking import Asking, next_indices
from distill.engines import open_engine
from distill.recipe import Budget, Price, Verify
from distill.records import Problem, Trace
from distill.run_dir import read_table, write_table
from distill.teacher import Generated, generate, merge_stores, spent, traces
from distill.verify import Verifier
from eval.endpoint_sampler import EndpointSampler
from eval.local_sampler import TransformersSampler
from eval.sample import Completion
from eval.samplers import Request
from eval.store import Store
from tests.distill.teaching import (
    Exact,
    StubTeacher,
    by_the_rule,
    chance,
    problem,
    reply,
    rows,
    run_with_log,
    settings,
    sums,
)
from tests.eval.models import tiny_lm, tiny_tokenizer
from tests.eval.stub_server import StubServer

PROBLEMS = 30
REPOSITORY = Path(__file__).parents[2]


def run(
    folder: Path, problems: list[Problem], sampler: Any = None, verifier: Any = None, **changes: Any
) -> tuple[Generated, list[str]]:
    """What was generated, and the lines of its traces; `changes` are those of the teacher, or `generate`'s own."""
    sampler, verifier = sampler or StubTeacher(), verifier or Exact()
    own = {name: changes.pop(name) for name in ("progress", "shard", "seconds_before", "threads") if name in changes}
    teacher = settings(**changes)
    with Store(folder / "samples.sqlite") as store:
        generated = generate(lambda: problems, sampler, teacher, 0, store, verifier, **own)
        return generated, rows(problems, sampler, teacher, store, verifier)


# The rule.


def test_what_is_asked_at_once_is_what_asking_one_by_one_takes() -> None:
    noise = random.Random(0)
    for _ in range(2000):
        correct = noise.randrange(1, 6)
        teacher = settings(correct=correct, most=noise.randrange(correct, 12))
        verdicts = [noise.random() < 0.4 for _ in range(teacher.most)]
        expected = next((n for n in range(teacher.most + 1) if sum(verdicts[:n]) >= correct or n == teacher.most), None)
        asked, right, on_their_way = 0, 0, list[int]()
        while True:
            indices = next_indices(asked, right, len(on_their_way), teacher)
            assert not indices or indices.start == asked
            on_their_way += indices
            asked += len(indices)
            if not on_their_way:
                break
            right += verdicts[on_their_way.pop(noise.randrange(len(on_their_way)))]
        assert asked == expected


def test_the_samples_are_those_of_the_rule(tmp_path: Path) -> None:
    sampler = StubTeacher(window=8)
    generated, lines = run(tmp_path, sums(PROBLEMS), sampler)
    expected = list(by_the_rule(sums(PROBLEMS), settings(), 0))
    found = [Trace.from_json(line[: line.index("}{") + 1]) for line in lines]
    assert [(one.problem_id, one.index, one.verdict == "correct") for one in found] == expected
    assert len(set(sampler.calls)) == len(sampler.calls) == len(expected)  # each once, and none in vain
    solved = Counter(one for one, _, right in expected if right)
    assert generated.solved == sum(count == 2 for count in solved.values())
    assert generated.problems == PROBLEMS == generated.solved + generated.unsolved
    assert generated.asked == len(expected)
    assert generated.right == sum(right for _, _, right in expected)
    assert generated.completion_tokens == sum(one.completion_tokens or 0 for one in found)
    assert not generated.incomplete
    assert 0 < generated.unsolved < PROBLEMS  # both ways out of the rule are walked


@pytest.mark.parametrize(("window", "order", "threads"), [(1, 0, 1), (3, 1, 4), (64, 2, 2), (1000, 3, 1)])
def test_batch_and_order_change_no_trace(tmp_path: Path, window: int, order: int, threads: int) -> None:
    sampler = StubTeacher(window=window, order=order)
    problems = sums(PROBLEMS)
    expected = run(tmp_path / "one", problems)[1]
    other = problems[:]
    random.Random(order).shuffle(other)
    generated, lines = run(tmp_path / "other", other, sampler, threads=threads)
    assert sorted(lines) == sorted(expected)
    assert generated.asked == len(expected)


def test_shards_merged_are_the_whole(tmp_path: Path) -> None:
    problems, teacher, verifier = sums(PROBLEMS), settings(), Exact()
    _, expected = run(tmp_path / "whole", problems)
    asked = []
    for part in range(3):
        with Store(tmp_path / f"{part}.sqlite") as store:
            asked.append(generate(lambda: problems, StubTeacher(), teacher, 0, store, verifier, shard=(part, 3)))
    assert sum(one.problems for one in asked) == PROBLEMS
    assert all(one.problems > 3 for one in asked)
    with Store(tmp_path / "merged.sqlite") as store:
        assert merge_stores(store, [tmp_path / f"{part}.sqlite" for part in range(3)]) == len(expected)
        graded = verifier.graded
        again = generate(lambda: problems, Untouched(), teacher, 0, store, verifier)
        assert rows(problems, Untouched(), teacher, store, verifier) == expected
    assert (again.asked, again.reused) == (0, len(expected))
    assert verifier.graded == graded  # verdicts came along
    with pytest.raises(ValueError, match=r"shard=\(3, 3\)"):
        run(tmp_path / "none", problems, shard=(3, 3))


class Untouched(StubTeacher):
    """A teacher that may only render."""

    def check(self, requests: Any) -> None:
        raise AssertionError("checked")

    def sample(self, requests: Any) -> Any:
        raise AssertionError("sampled")


def test_a_second_run_asks_and_judges_nothing(tmp_path: Path) -> None:
    _, expected = run(tmp_path, sums(PROBLEMS))
    verifier = Exact()
    generated, lines = run(tmp_path, sums(PROBLEMS), Untouched(), verifier)
    assert lines == expected
    assert (generated.asked, generated.reused) == (0, len(expected))
    assert verifier.graded == 0


def test_another_temperature_reuses_nothing_and_new_problems_ask_for_themselves(tmp_path: Path) -> None:
    before = StubTeacher()
    run(tmp_path, sums(PROBLEMS), before)
    hotter = StubTeacher()
    generated, _ = run(tmp_path, sums(PROBLEMS), hotter, temperature=0.7)
    assert generated.reused == 0
    assert not set(hotter.calls) & set(before.calls)

    more = StubTeacher()
    generated, _ = run(tmp_path, sums(PROBLEMS + 10), more)
    alone = StubTeacher()
    run(tmp_path / "alone", sums(10, first=PROBLEMS), alone)
    assert sorted(more.calls) == sorted(alone.calls)
    assert generated.reused == len(before.calls)


def test_more_samples_wanted_ask_for_the_difference(tmp_path: Path) -> None:
    problems, first, second = sums(PROBLEMS), StubTeacher(), StubTeacher()
    run(tmp_path, problems, first, correct=1, most=4)
    _, lines = run(tmp_path, problems, second, correct=3, most=8)
    assert not set(first.calls) & set(second.calls)
    assert lines == run(tmp_path / "at once", problems, correct=3, most=8)[1]
    # Fewer wanted: what is there beyond the rule is no part of the run.
    assert (
        run(tmp_path, problems, Untouched(), correct=1, most=4)[1]
        == run(tmp_path / "few", problems, correct=1, most=4)[1]
    )


def test_only_problems_on_their_way_are_read(tmp_path: Path) -> None:
    """Neither the list of problems nor the questions to them are ever held: reading keeps step with asking."""
    sampler, read = StubTeacher(window=8), 0

    def problems() -> Any:
        nonlocal read
        for number, one in enumerate(sums(100)):
            read = number
            yield one

    ahead = []
    teacher, original = settings(), sampler.completion

    def completion(request: Request) -> Completion:
        if sampler.checked == 100:
            ahead.append(read - len(sampler.calls))
        return original(request)

    sampler.completion = completion  # type: ignore[method-assign]
    with Store(tmp_path / "samples.sqlite") as store:
        generate(problems, sampler, teacher, 0, store, Exact(), threads=1)  # type: ignore[arg-type]
    assert max(ahead) <= 0  # each problem read is at least one request made


# Verdicts.


def test_verdicts_are_stored_and_given_again_by_another_grader(tmp_path: Path) -> None:
    _, expected = run(tmp_path, sums(20))
    newer = Exact("exact/2")
    generated, lines = run(tmp_path, sums(20), Untouched(), newer)
    assert newer.graded == generated.reused == len(expected)
    assert lines == [line.replace("exact/1", "exact/2") for line in expected]
    stricter = Exact("exact/3", breaks=lambda problem, completion: False)
    run(tmp_path, sums(20), Untouched(), stricter)
    assert stricter.graded == len(expected)


def test_a_grader_that_takes_back_a_verdict_asks_for_more(tmp_path: Path) -> None:
    class Harsh(Exact):
        def grade(self, problem: Problem, completion: Completion, opened: bool | None) -> Any:
            graded = super().grade(problem, completion, opened)
            return replace(graded, verdict="wrong", credit=0.0) if len(completion.text) % 3 == 0 else graded

    sampler = StubTeacher()
    run(tmp_path, sums(PROBLEMS), sampler)
    harsh = StubTeacher()
    _, lines = run(tmp_path, sums(PROBLEMS), harsh, Harsh("harsh/1"))
    assert harsh.calls
    assert not set(harsh.calls) & set(sampler.calls)
    assert lines == run(tmp_path / "from the start", sums(PROBLEMS), verifier=Harsh("harsh/1"))[1]


def test_a_grader_that_fails_is_asked_again_next_time(tmp_path: Path) -> None:
    expected = run(tmp_path / "well", sums(20))[1]
    broken = Exact(breaks=lambda problem, completion: problem.row % 4 == 0)
    generated, lines = run(tmp_path / "ill", sums(20), verifier=broken)
    assert generated.unfinished == 5
    assert generated.failed == 10  # two of each
    assert "10 samples failed (the last: the grader failed: as it was asked to)" in generated.incomplete
    assert sum('"reason": "failed"' in line for line in lines) == 10
    sampler = StubTeacher()
    generated, lines = run(tmp_path / "ill", sums(20), sampler)
    assert not generated.incomplete
    assert lines == expected


def test_what_befalls_every_verdict_ends_the_run_and_keeps_the_samples(tmp_path: Path) -> None:
    class Down(Exact):
        def grade(self, problem: Problem, completion: Completion, opened: bool | None) -> Any:
            raise ConnectionError("http://judge cannot be reached")

    sampler = StubTeacher()
    with pytest.raises(ConnectionError, match="http://judge"):
        run(tmp_path, sums(PROBLEMS), sampler, Down())
    with Store(tmp_path / "samples.sqlite") as store:
        assert {one.key for one in store} == set(sampler.calls)
    assert 0 < len(sampler.calls) < PROBLEMS  # it ended soon


def test_without_a_verdict_all_samples_are_kept(tmp_path: Path) -> None:
    problems = [problem(number, kind="none", answer="") for number in range(10)]
    verifier = Exact()
    generated, lines = run(tmp_path, problems, verifier=verifier, correct=3)
    assert (generated.asked, generated.solved, verifier.graded) == (30, 10, 0)
    found = [Trace.from_json(line[: line.index("}{") + 1]) for line in lines]
    assert {one.verdict for one in found} == {None}
    assert {one.grader for one in found} == {""}
    assert all('"reason": ""' in line for line in lines)


@pytest.mark.parametrize(
    ("completion", "open_thought", "expected"),
    [
        (Completion("a</think> \\boxed{0}"), True, ("a", "\\boxed{0}", "opened", "")),
        (Completion("<think>\na\n</think>\\boxed{0}"), False, ("a", "\\boxed{0}", "closed", "")),
        (Completion("\\boxed{0}", reasoning="a "), False, ("a", "\\boxed{0}", "field", "")),
        (Completion("a, so \\boxed{0}", None, "length"), True, ("a, so \\boxed{0}", "", "truncated", "truncated")),
        (Completion("a</think>\\boxed{1}"), True, ("a", "\\boxed{1}", "opened", "wrong")),
        (Completion("a</think>no idea"), True, ("a", "no idea", "opened", "no_answer")),
    ],
)
def test_a_trace_is_the_thought_and_the_answer_with_their_verdict(
    tmp_path: Path, completion: Completion, open_thought: bool, expected: tuple[str, ...]
) -> None:
    """By the verifier of the package."""

    class One(StubTeacher):
        def completion(self, request: Request) -> Completion:
            return (
                completion if not request.prompt.startswith("<user>Work out 1 ") else Completion("</think>\\boxed{2}")
            )

    problems, teacher = sums(2), settings(correct=1, most=1, open_thought=open_thought)
    sampler, verifier = One(), Verifier(Verify())
    with Store(tmp_path / "samples.sqlite") as store:
        generate(lambda: problems, sampler, teacher, 5, store, verifier)
        trace, decision = next(traces(problems, sampler, teacher, 5, store, verifier))
    assert (trace.thought, trace.response, trace.state, decision.reason) == expected
    assert (trace.id, trace.problem_id, trace.index) == (f"{problems[0].id}/0", problems[0].id, 0)
    assert decision.id == trace.id
    assert trace.grader == verifier.grader(problems[0])
    write_table(tmp_path / "traces.parquet", Trace, [trace])
    assert list(read_table(tmp_path / "traces.parquet", Trace)) == [trace]


# What goes wrong.


def fails_at_first(request: Request) -> bool:
    return request.seed % 10 < 3


def test_a_failed_sample_is_asked_again_next_time(tmp_path: Path) -> None:
    expected = run(tmp_path / "well", sums(PROBLEMS))[1]
    sampler = StubTeacher(fails=fails_at_first)
    generated, lines = run(tmp_path / "ill", sums(PROBLEMS), sampler)
    failed = sum('"verdict": "failed"' in line for line in lines)
    assert generated.failed == failed > 10
    assert generated.unfinished > 0
    assert f"{failed} samples failed (the last: HTTP 500)" in generated.incomplete
    assert f"{generated.unfinished} of {PROBLEMS} problems are unfinished" in generated.incomplete
    assert '"detail": "no completion: HTTP 500"' in "".join(lines)
    again = StubTeacher()
    generated, lines = run(tmp_path / "ill", sums(PROBLEMS), again)
    assert lines == expected
    assert not generated.incomplete
    answered = set(sampler.calls) - {name for name in sampler.calls if name in again.calls}
    assert len(answered) == len(sampler.calls) - failed  # only what failed was asked again


def test_faults_of_the_endpoint_change_no_trace(tmp_path: Path) -> None:
    problems, verifier = sums(40), Verifier(Verify())
    found = []
    for faults in (0.0, 0.3):
        with StubServer(answer=reply, faults=faults, slow=1.5) as server:
            sampler = EndpointSampler(server.url, "stub", concurrency=8, timeout=1.0, first_delay=0.001)
            generated, lines = run(tmp_path / str(faults), problems, sampler, verifier, open_thought=True)
            assert not generated.incomplete
            assert len(server.asked) == generated.asked == len(lines)
            found.append(lines)
            if faults:
                assert server.calls > 1.2 * server.answered
    assert found[0] == found[1]


def test_an_endpoint_that_is_not_there_is_said_before_anything(tmp_path: Path) -> None:
    with StubServer() as server:
        url = server.url
    teacher = settings(engine="endpoint", base_urls=[url], retries=0)
    with pytest.raises(ConnectionError, match=url), Store(tmp_path / "samples.sqlite") as store:
        generate(lambda: sums(3), open_engine(teacher), teacher, 0, store, Verifier(Verify()))


def test_a_prompt_beyond_the_context_is_said_before_anything(tmp_path: Path) -> None:
    sampler = StubTeacher(context_length=200)
    problems = [*sums(20), problem(99, question="99 + 99 =" + "=" * 200)]
    with pytest.raises(ValueError, match="context_length=200"):
        run(tmp_path, problems, sampler)
    assert sampler.calls == []
    assert sampler.checked == 21


def test_a_teacher_that_is_never_right_ends_early_with_examples(tmp_path: Path) -> None:
    sampler = StubTeacher(answer=lambda prompt, seed: "I am sure.</think>\\boxed{no}")
    with pytest.raises(ValueError, match="none of the first") as caught:
        run(tmp_path, sums(1000), sampler, most=2, correct=1)
    assert "wrong" in str(caught.value)
    assert "read 'no', the answer is '0'" in str(caught.value)
    assert "\\boxed{no}" in str(caught.value)
    assert 400 <= len(sampler.calls) < 500
    with Store(tmp_path / "samples.sqlite") as store:
        assert len(store) == len(sampler.calls)  # everything is kept, what was on its way too
    again = StubTeacher(answer=sampler.answer)
    with pytest.raises(ValueError, match="none of the first"):  # and it takes no asking to say so again
        run(tmp_path, sums(1000), again, most=2, correct=1)
    assert len(again.calls) < 20


def test_many_samples_of_few_problems_are_enough_to_see_it(tmp_path: Path) -> None:
    sampler = StubTeacher(answer=lambda prompt, seed: "</think>\\boxed{no}")
    with pytest.raises(ValueError, match="none of the first"):
        run(tmp_path, sums(100), sampler, most=64, correct=1)
    assert 1000 <= len(sampler.calls) < 1100


def test_a_small_run_without_a_right_answer_is_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the first 8 samples is right \(8 no_answer\)"):
        run(tmp_path, sums(1), StubTeacher(answer=lambda prompt, seed: "well"))


def test_completions_that_all_fail_end_early(tmp_path: Path) -> None:
    sampler = StubTeacher(fails=lambda request: True)
    with pytest.raises(ValueError, match="the first 64 completions all failed, the last with: HTTP 500"):
        run(tmp_path, sums(1000), sampler)
    assert len(sampler.calls) < 70


def test_a_full_disk_keeps_what_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(tmp_path / "well", sums(20))[1]
    room, put = itertools.count(), Store.put

    def put_while_there_is_room(self: Store, *arguments: Any) -> None:
        if next(room) >= 15:
            raise OSError(28, "no room to store a sample")
        put(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", put_while_there_is_room)
        with pytest.raises(OSError, match="no room"):
            run(tmp_path / "full", sums(20))
    generated, lines = run(tmp_path / "full", sums(20))
    assert generated.reused == 15
    assert lines == expected


def test_an_interrupt_loses_only_what_is_on_its_way(tmp_path: Path) -> None:
    class Interrupted(StubTeacher):
        def completion(self, request: Request) -> Completion:
            if len(self.calls) == 30:
                raise KeyboardInterrupt
            return super().completion(request)

    first, second = Interrupted(), StubTeacher()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", sums(20), first)
    _, lines = run(tmp_path / "cut", sums(20), second)
    assert lines == run(tmp_path / "whole", sums(20))[1]
    assert len(set(first.calls) & set(second.calls)) <= first.window


def started(target: Callable[..., None], *arguments: object) -> Any:
    """A process of its own, forked from one that has everything imported, so that the work itself is what is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distill.teaching"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def finish(process: Any) -> None:
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))])
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(tmp_path: Path, seed: int) -> None:
    window, count, log = 8, 60, tmp_path / "log"
    (tmp_path / "whole").mkdir()
    finish(started(run_with_log, str(tmp_path / "whole"), str(tmp_path / "other log"), 0, 0.0, count))
    unique = len(set((tmp_path / "other log").read_text().split()))
    assert unique > 2 * count

    (tmp_path / "cut").mkdir()
    noise, kills = random.Random(seed), 0
    log.touch()
    for order in range(4):
        process = started(run_with_log, str(tmp_path / "cut"), str(log), order, 0.002, count)
        until = len(log.read_text().split()) + noise.randrange(1, unique // 5)
        while len(log.read_text().split()) < until and process.exitcode is None:
            time.sleep(0.001)
        time.sleep(noise.random() * 0.004)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills == 4
    finish(started(run_with_log, str(tmp_path / "cut"), str(log), 9, 0.0, count))
    assert (tmp_path / "cut" / "traces").read_bytes() == (tmp_path / "whole" / "traces").read_bytes()
    calls = log.read_text().split()
    assert len(set(calls)) == unique
    assert len(calls) <= unique + kills * window


# Budgets.


def test_a_budget_of_tokens_ends_it_and_goes_on_when_raised(tmp_path: Path) -> None:
    problems, whole = sums(PROBLEMS), run(tmp_path / "whole", sums(PROBLEMS))
    limit = whole[0].completion_tokens // 2
    generated, lines = run(tmp_path / "cut", problems, StubTeacher(window=32), budget=Budget(tokens=limit))
    assert (
        generated.stopped == f"the budget of {limit:,} completion tokens is used up ({generated.completion_tokens:,})"
    )
    assert generated.incomplete.startswith(generated.stopped)
    assert limit <= generated.completion_tokens < limit + 50  # a sample has about 20: the last one passes it
    assert set(lines) < set(whole[1])
    assert generated.problems == PROBLEMS
    assert generated.unfinished > 10

    again, same = run(tmp_path / "cut", problems, Untouched(), budget=Budget(tokens=limit))
    assert (again.asked, again.stopped) == (0, generated.stopped)  # the budget is of the run, not of one call
    assert same == lines
    more, rest = run(tmp_path / "cut", problems, budget=Budget(tokens=10 * limit))
    assert rest == whole[1]
    assert more.reused == generated.asked
    # Samples of other settings were paid for by another budget.
    assert run(tmp_path / "cut", problems, temperature=0.5, budget=Budget(tokens=10 * limit))[0].reused == 0


def test_a_budget_of_dollars_counts_prompts_too(tmp_path: Path) -> None:
    price = Price(prompt_per_million=1e4, completion_per_million=2e4)  # 10 prompt tokens: $0.1
    generated, _ = run(tmp_path, sums(PROBLEMS), budget=Budget(dollars=20.0), price=price)
    cost = (generated.prompt_tokens * 1e4 + generated.completion_tokens * 2e4) / 1e6
    assert generated.dollars == pytest.approx(cost)
    assert 20 <= cost < 21
    assert generated.stopped == f"the budget of $20.00 is used up (${cost:,.2f})"


def test_a_budget_of_hours_counts_earlier_calls(tmp_path: Path) -> None:
    generated, _ = run(tmp_path, sums(PROBLEMS), StubTeacher(pause=0.01), budget=Budget(hours=0.2 / 3600))
    assert generated.stopped == "the budget of 5.55556e-05 hours is used up"
    assert 0 < generated.asked < 40
    again, _ = run(tmp_path, sums(PROBLEMS), Untouched(), budget=Budget(hours=0.2 / 3600), seconds_before=0.3)
    assert again.asked == 0
    assert again.seconds > 0.3


def test_a_budget_that_nobody_counts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"budget\.tokens cannot be kept"):
        run(tmp_path, sums(20), StubTeacher(counts=False), budget=Budget(tokens=100))
    with pytest.raises(ValueError, match=r"budget\.dollars cannot be kept"):
        run(
            tmp_path / "2", sums(20), StubTeacher(counts=False), budget=Budget(dollars=1.0),
            price=Price(completion_per_million=1.0),
        )  # fmt: skip
    assert not run(tmp_path / "3", sums(20), StubTeacher(counts=False))[0].incomplete


# What it takes, what is shown.


def test_what_a_pilot_took_is_counted_by_problem(tmp_path: Path) -> None:
    problems, teacher, verifier = sums(PROBLEMS), settings(), Exact()
    generated, lines = run(tmp_path, problems[:20])
    with Store(tmp_path / "samples.sqlite", readonly=True) as store:
        found = list(spent(problems, StubTeacher(), teacher, 0, store, verifier))  # type: ignore[arg-type]
    assert len(found) == 20  # the others were not asked
    assert sum(one.samples for one in found) == generated.asked == len(lines)
    assert sum(one.completion_tokens for one in found) == generated.completion_tokens
    assert sum(one.prompt_tokens for one in found) == generated.prompt_tokens
    assert sum(one.solved for one in found) == generated.solved
    assert [one.samples for one in found][:3] == [
        len([1 for one, _, _ in by_the_rule(problems[:3], teacher, 0) if one == each.id]) for each in problems[:3]
    ]


def test_adaptive_sampling_needs_fewer_tokens_than_a_fixed_number(tmp_path: Path) -> None:
    """The same accepted traces for fewer tokens; and for the same tokens, more of the hard problems."""
    problems = sums(60)
    found = {}
    ways = {"adaptive": dict(most=16), **{f"fixed {n}": dict(correct=n, most=n) for n in (7, 16)}}
    for name, changes in ways.items():
        generated, lines = run(tmp_path / name, problems, **changes)
        accepted = dict[str, list[str]]()
        for line in lines:
            if '"verdict": "correct"' in line:
                accepted.setdefault(Trace.from_json(line[: line.index("}{") + 1]).problem_id, []).append(line)
        found[name] = generated.completion_tokens, {one: kept[:2] for one, kept in accepted.items()}
    assert found["adaptive"][1] == found["fixed 16"][1]
    assert found["adaptive"][0] < 0.5 * found["fixed 16"][0]
    assert found["adaptive"][0] < found["fixed 7"][0]
    hard = {one.id for one in problems if chance(one.question) < 0.3}
    assert len(hard & set(found["adaptive"][1])) >= 1.5 * len(hard & set(found["fixed 7"][1]))


def test_progress_says_how_far_it_is(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int, str]] = []
    price = Price(completion_per_million=1e5)
    run(tmp_path, sums(20), progress=lambda *values: seen.append(values), price=price)
    assert [one[1:3] for one in seen if one[0] == "checking prompts"] == [(done, 20) for done in range(1, 21)]
    asking = [one for one in seen if one[0] == "asking the teacher"]
    assert [one[1:3] for one in asking] == [(done, 20) for done in range(1, 21)]
    assert "% right, " in asking[-1][3]
    assert " tokens, $" in asking[-1][3]


# Real engines.


def test_a_model_in_this_process_gives_the_same_traces_in_any_batch(tmp_path: Path) -> None:
    """A DeepSeek with latent attention and experts; it cannot add, so everything is kept unjudged."""
    problems = [problem(number, kind="none", answer="") for number in range(4)]
    tokenizer, model = tiny_tokenizer(), tiny_lm("deepseek", ends=4.0)
    found = []
    for batch in (1, 5):
        sampler = TransformersSampler(model, tokenizer, batch_size=batch, name="tiny")
        generated, lines = run(tmp_path / str(batch), problems, sampler, max_tokens=16, correct=2)
        assert (generated.asked, generated.solved) == (8, 4)
        assert generated.completion_tokens > 16
        found.append(lines)
    assert found[0] == found[1]


def test_verdicts_arrive_while_a_model_in_this_process_goes_on(tmp_path: Path) -> None:
    """Follow-up samples depend on verdicts that are still to come: the sampler is told to wait, and does."""
    problems = [problem(number, answer="no such answer") for number in range(4)]
    sampler = TransformersSampler(tiny_lm("llama", ends=4.0), tiny_tokenizer(), batch_size=4, name="tiny")
    right = Counter[str]()

    class Third(Exact):
        def grade(self, problem: Problem, completion: Completion, opened: bool | None) -> Any:
            time.sleep(0.01)
            right[problem.id] += 1
            graded = super().grade(problem, completion, opened)
            return replace(graded, verdict="correct", credit=1.0) if right[problem.id] > 4 else graded

    generated, _ = run(tmp_path, problems, sampler, Third(), correct=1, max_tokens=8)
    assert generated.asked == 20
    assert generated.solved == 4


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_a_thought_in_a_field_of_its_own_is_the_trace_s_thought(tmp_path: Path, field: str) -> None:
    with StubServer(answer=reply, reasoning=field) as server:
        teacher = settings(engine="endpoint", model="stub", base_urls=[server.url])
        problems, sampler, verifier = sums(5), open_engine(teacher), Verifier(Verify())
        with Store(tmp_path / "samples.sqlite") as store:
            generate(lambda: problems, sampler, teacher, 0, store, verifier)
            found = [trace for trace, _ in traces(problems, sampler, teacher, 0, store, verifier)]
        assert server.bodies[0]["messages"] == [{"role": "user", "content": "Work out 0 + 0 ="}]
    assert {one.state for one in found} == {"field"}
    assert all("it is twice" in one.thought and one.response.startswith("\\boxed") for one in found)


def test_keys_do_not_depend_on_how_the_model_is_reached(tmp_path: Path) -> None:
    """Batches, retries and prices are no part of them; the settings of sampling are."""
    sampler, one = StubTeacher(), problem(3)

    def keys(seed: int = 0, **changes: Any) -> list[str]:
        asking = Asking(sampler, settings(**changes), seed)
        with Store(tmp_path / "samples.sqlite") as store:
            return [place.key for place in asking.look_up(store, one, asking.prompt(one), range(3))]

    assert keys() == keys(batch_size=7, retries=1, price=Price(machine_per_hour=2.0))
    others = [keys(temperature=0.5), keys(top_p=0.9), keys(max_tokens=7), keys(prompt="{question}!"), keys(seed=1)]
    assert len({*keys(), *(one for other in others for one in other)}) == 18


# Many problems.

MANY = """
import sys, time
from pathlib import Path
from distill.records import Problem, Trace
from distill.run_dir import read_table, write_table
from distill.teacher import generate, traces
from eval.store import Store
from tests.distill.teaching import Exact, StubTeacher, problem, settings

class Forgetful(list):
    def append(self, name):
        pass

folder, count = Path(sys.argv[1]), int(sys.argv[2])
write_table(folder / "problems.parquet", Problem, (problem(number) for number in range(count)))
sampler, teacher, verifier = StubTeacher(window=128), settings(correct=1, most=2), Exact()
sampler.calls = Forgetful()
read = lambda: read_table(folder / "problems.parquet", Problem)
used = time.process_time()
with Store(folder / "samples.sqlite") as store:
    generated = generate(read, sampler, teacher, 0, store, verifier)
    used = time.process_time() - used
    found = traces(read(), sampler, teacher, 0, store, verifier)
    rows = write_table(folder / "traces.parquet", Trace, (trace for trace, _ in found))
assert rows == generated.asked >= count
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(rows, used / rows * 1000, int(peak) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("count", [1_000, pytest.param(500_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_many_problems_take_little_memory_and_little_time_each(tmp_path: Path, count: int) -> None:
    """With the teacher's own time, and that of the verdicts, in what is measured."""
    command = [sys.executable, "-c", MANY, str(tmp_path), str(count)]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    samples, milliseconds, mebibytes = map(float, output.split())
    print(f"{count:,} problems, {samples:,.0f} samples: {milliseconds:.3f} ms each, {mebibytes:.0f} MiB")
    assert milliseconds < 1.0
    assert mebibytes < 500
