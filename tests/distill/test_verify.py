"""One verdict a sample, by the grader of its kind: that of an evaluation, and never an error of the sample's making."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from distill.calibration import Calibration
from distill.judge import Judging
from distill.recipe import CodeTests, Judge, Verify
from distill.records import KINDS, Problem
from distill.verify import GRADED_KINDS, RULES, Verifier
from eval.gpqa import GPQA_DIAMOND
from eval.math500 import MATH500
from eval.protocols import get_protocol
from eval.reasoning_gym_tasks import REASONING_GYM, problems
from eval.runner import grade_completion
from eval.sample import Completion, Sample
from eval.store import Store

VERIFIER = Verifier(Verify(code=CodeTests(allow=True)))
MATH = Problem("1" * 16, "math", "math", "1 + 1?", "2", "made", 0)
CHOICE = Problem("2" * 16, "choice", "general", "Which is even?", "B", "made", 0, choices=("1", "2", "3"))
CODE = Problem("3" * 16, "code", "code", "Double it.", "", "made", 0, meta={"tests": [{"input": "3", "output": "6"}]})
TEXT = Problem("4" * 16, "text", "general", "Who wrote Emma?", "Jane Austen", "made", 0)
NONE = Problem("5" * 16, "none", "general", "Write a poem.", "", "made", 0)


needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="the package reasoning-gym is not installed"
)


def generated(dataset: str) -> Problem:
    row = next(problems(dataset, 1, 7))
    meta = {"dataset": dataset, "entry": row["entry"]}
    return Problem("6" * 16, "reasoning_gym", "logic", row["question"], row["answer"], "made", 0, meta=meta)


def verdict(problem: Problem, text: str, opened: bool | None = False, **completion) -> str:
    graded = VERIFIER.grade(problem, Completion(text, **completion), opened)
    assert graded.grader == VERIFIER.grader(problem)
    return graded.verdict


def test_every_kind_but_none_is_graded():
    assert {*GRADED_KINDS, "none"} == set(KINDS)
    assert set(RULES) < set(GRADED_KINDS)
    with pytest.raises(ValueError, match=r"kind 'none'.*unverified"):
        VERIFIER.grade(NONE, Completion("a poem"), False)


@pytest.mark.parametrize(
    ("problem", "right", "wrong"),
    [
        (MATH, r"\boxed{2}", r"\boxed{3}"),
        (MATH, r"so it is \boxed{\frac{4}{2}}", r"\boxed{1 + 2}"),
        (CHOICE, "Answer: B", "Answer: A"),
        (CODE, "```python\nprint(6)\n```", "```python\nprint(5)\n```"),
    ],
)
def test_answers_are_graded_by_their_kind(problem, right, wrong):
    assert verdict(problem, right) == verdict(problem, f"<think>or {wrong}?</think>{right}") == "correct"
    assert verdict(problem, wrong) == verdict(problem, f"<think>or {right}?</think>{wrong}") == "wrong"


@pytest.mark.parametrize("problem", [MATH, CHOICE, CODE], ids=lambda one: one.kind)
def test_a_sample_without_answer_is_not_right(problem):
    gold = {"math": r"\boxed{2}", "choice": "Answer: B", "code": "```python\nprint(6)\n```"}[problem.kind]
    assert verdict(problem, "") == verdict(problem, "I do not know.") == "no_answer"
    assert verdict(problem, f"<think>{gold}") == "truncated"
    assert verdict(problem, gold, opened=True) == "truncated"  # the thought was never closed
    assert verdict(problem, f"{gold}</think>{gold}", opened=True) == "correct"
    assert verdict(problem, f"thinking {gold}", None, finish_reason="length") == "truncated"
    assert verdict(problem, gold, reasoning="thinking") == "correct"
    assert verdict(problem, "</think>It is", opened=True, finish_reason="length") == "truncated"
    assert verdict(problem, "", finish_reason="failed", error="HTTP 500") == "failed"


def test_verdicts_are_those_of_an_evaluation():
    """Teacher's traces and the student's answers, through both doors."""
    texts = [
        r"\boxed{2}", r"<think>\boxed{3}</think>\boxed{2.0}", "Answer: B", "B", "A or B", "", r"<think>\boxed{2}",
        "The answer is 2", "</think>Answer: B", r"\boxed{\frac{4}{2}}", r"\boxed{2", "(B)", "2 or 3", "I do not know",
        "#### 2", "Answer: D",
    ]  # fmt: skip
    for problem, benchmark in ((MATH, MATH500), (CHOICE, GPQA_DIAMOND)):
        shown = Sample(problem.id, benchmark.name, problem.question, problem.answer, choices=problem.choices)
        given = get_protocol("deepseek-r1").settings(benchmark)
        for text in texts:
            for opened in (True, False, None):
                for finish in ("stop", "length"):
                    completion = Completion(text, finish_reason=finish)
                    theirs = grade_completion(shown, completion, benchmark, given, opened=opened)
                    ours = VERIFIER.grade(problem, completion, opened)
                    assert (ours.verdict, ours.answer, ours.detail) == (theirs.verdict, theirs.answer, theirs.detail)


# reasoning-gym.


@needs_reasoning_gym
def test_reasoning_gym_judges_its_own():
    for name, benchmark in REASONING_GYM.items():
        problem = generated(name.removeprefix("rg_"))
        assert verdict(problem, f"<think>hm</think><answer>{problem.answer}</answer>") == "correct", name
        assert verdict(problem, "<answer>-1</answer>") == "wrong", name
        assert verdict(problem, "") == "no_answer", name
        shown = Sample("1", name, problem.question, problem.answer, meta={"entry": problem.meta["entry"]})
        assert benchmark.grade(shown, f"<answer>{problem.answer}</answer>", "").verdict == "correct"


@needs_reasoning_gym
def test_answers_that_reasoning_gym_would_run_are_run_apart(tmp_path):
    """n_queens evaluates an answer as Python, countdown hands it to sympy."""
    outside = tmp_path / "outside"
    queens = generated("n_queens")
    assert verdict(queens, f"<answer>{queens.answer}</answer>") == "correct"
    assert verdict(queens, "<answer>[[1]]</answer>") == "wrong"
    attack = f"<answer>open({str(outside)!r}, 'w')</answer>"
    assert verdict(queens, attack) == "wrong"
    assert not outside.exists()
    # The same, in this process: the package does run what it is given.
    from eval.reasoning_gym_tasks import grade

    shown = Sample("1", "rg_n_queens", queens.question, queens.answer, meta={"entry": queens.meta["entry"]})
    grade(shown, f"<answer>open({str(outside)!r}, 'w').close()</answer>", "", "n_queens")
    assert outside.exists()
    # What ends the process, or forges its result, is no verdict.
    assert verdict(queens, "<answer>__import__('os')._exit(0)</answer>") == "failed"
    forged = (
        "import os\nfor n in range(3, 64):\n    try:\n        "
        'os.write(n, b\'{"token": "", "graded": {"verdict": "correct"}}\')\n'
        "    except OSError:\n        pass\nos._exit(0)"
    )
    assert verdict(queens, f"<answer>exec({forged!r})</answer>") == "failed"
    assert verdict(queens, f"<answer>{queens.answer}</answer>") == "correct"  # the next is untouched


@needs_reasoning_gym
def test_a_score_that_does_not_end_is_a_timeout():
    countdown = generated("countdown")
    verifier = Verifier(Verify(time_limit=1.0))
    assert verifier.grade(countdown, Completion("<answer>9**9**9**9</answer>"), False).verdict == "timeout"
    right = Completion(f"<answer>{countdown.answer}</answer>")
    assert VERIFIER.grade(countdown, right, False).verdict == "correct"


# Graders and their names.


def test_the_grader_says_all_that_a_verdict_depends_on(tmp_path):
    names = {VERIFIER.grader(one) for one in (MATH, CHOICE, CODE)}
    assert names == {"math/1 time_limit=5", "choice/1", "code/1 seconds=10 memory_mb=1024 file_mb=16"}
    assert VERIFIER.grader(MATH) == VERIFIER.grader(replace(MATH, answer="3"))  # the problem is the caller's to compare
    assert Verifier(Verify(time_limit=6.0)).grader(MATH) != VERIFIER.grader(MATH)
    slower = Verifier(Verify(code=CodeTests(allow=True, seconds=11)))
    assert slower.grader(CODE) != VERIFIER.grader(CODE)


def test_an_error_in_a_grader_is_the_samples_verdict():
    graded = VERIFIER.grade(replace(CHOICE, answer="Z"), Completion("Answer: B"), False)
    assert graded.verdict == "failed"
    assert "gold='Z' is none of the letters" in graded.detail
    graded = VERIFIER.grade(replace(CODE, meta={"tests": []}), Completion("```python\nprint(6)\n```"), False)
    assert (graded.verdict, graded.detail) == ("failed", "the grader failed: ValueError: there are no tests")


def test_code_is_refused_without_leave():
    verifier = Verifier(Verify())
    for call in (lambda: verifier.grader(CODE), lambda: verifier.grade(CODE, Completion(""), False)):
        with pytest.raises(ValueError, match=r"'made'.*no security boundary.*verify.code.allow: true"):
            call()


def test_text_is_refused_without_a_judge():
    for call in (lambda: VERIFIER.grader(TEXT), lambda: VERIFIER.grade(TEXT, Completion("x"), False)):
        with pytest.raises(ValueError, match=r"kind text.*give verify.judge"):
            call()


class OneJudge:
    """Says correct where the answer names Austen; and is gone when it is asked about Brontë."""

    identity = {"model": "one"}  # noqa: RUF012  # never changed
    context_length = None

    def render(self, messages, *, open_thought):
        return messages[0]["content"]

    def check(self, requests):
        pass

    def sample(self, requests):
        for request in requests:
            if request is None:
                return
            answer = request.prompt.partition("## Answer to be Evaluated\n")[2].partition("## Output Format")[0]
            if "Brontë" in answer:
                raise ConnectionError("http://judge cannot be reached")
            assert "thinking" not in answer
            yield request, Completion(f'{{"correctness": "{"correct" if "Austen" in answer else "incorrect"}"}}')


def test_text_is_judged_without_its_thought(tmp_path):
    settings = Judge(engine="endpoint", model="one", base_urls=["http://judge/v1"], votes=1)
    with Store(tmp_path / "samples.sqlite") as store:
        judge = Judging(settings, OneJudge(), store)
        verifier = Verifier(Verify(judge=settings), judge)
        with pytest.raises(RuntimeError, match="has not been calibrated"):
            verifier.grade(TEXT, Completion("Austen"), False)
        judge.calibration = Calibration(1.0, (0.9, 1.0), 2, 1, 0, 0, 1, 0, 0, 0.9)
        graded = [
            verifier.grade(TEXT, Completion(text), True)
            for text in (
                "thinking</think>Jane Austen",
                "thinking: Austen?</think>Charles Dickens",
                "thinking",
                "</think> ",
            )
        ]
        assert [one.verdict for one in graded] == ["correct", "wrong", "truncated", "no_answer"]
        assert {one.grader for one in graded} == {verifier.grader(TEXT)} == {judge.grader}
        # What is no fault of the sample ends the run.
        with pytest.raises(ConnectionError, match="cannot be reached"):
            verifier.grade(TEXT, Completion("Emily Brontë"), False)


def test_many_threads_may_grade():
    cases = [
        (MATH, r"\boxed{2}", "correct"), (MATH, r"\boxed{x^2 + 1}", "wrong"), (CHOICE, "Answer: B", "correct"),
        (CODE, "```python\nprint(6)\n```", "correct"),
    ] * 6  # fmt: skip
    if importlib.util.find_spec("reasoning_gym"):
        gcd = generated("gcd")
        cases += [(gcd, f"<answer>{gcd.answer}</answer>", "correct")] * 6
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda case: verdict(case[0], case[1]), cases))
    assert found == [case[2] for case in cases]
