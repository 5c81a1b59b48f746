"""Whether a sample of the teacher is right: one verdict for each, by the grader of the problem's kind.

    completion --eval.runner.grade_text--> the answer, its thought removed --the grader of its kind--> Graded

The rules are those of `eval` (`answers`, `multiple_choice`, reasoning-gym's own score), reached by the same path as in
an evaluation, so that teacher and student meet one judgement. Two graders are of this package alone: `code_tests.py`
runs tests, `judge.py` asks a model. `confined_score.py` scores what reasoning-gym would read as code.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from distill.code_tests import CODE_GRADER, grade_code
from distill.confined_score import grade_reasoning_gym
from distill.judge import Judging, NotCalibrated
from distill.recipe import Verify
from distill.records import Kind, Problem
from eval.answers import MATH_GRADER, grade_final
from eval.multiple_choice import CHOICE_GRADER, grade_choice
from eval.reasoning_gym_tasks import RG_GRADER
from eval.runner import grade_text
from eval.sample import Completion, Graded, Sample

RULES: tuple[Kind, ...] = ("math", "choice", "reasoning_gym")
"""Kinds whose verdict is a rule's: a judge is calibrated on them."""
GRADED_KINDS: tuple[Kind, ...] = (*RULES, "code", "text")
"""Kinds that have a verdict; what is left is `none`, which its caller keeps unverified."""


@dataclass(frozen=True)
class Verifier:
    """Grades samples, from any number of threads at once.

    `judge` is needed for problems of kind `text`, and only for them.
    """

    settings: Verify
    judge: Judging | None = None

    def grader(self, problem: Problem) -> str:
        """Who judges samples of this problem, with all that its verdict depends on besides the problem and the sample:
        where this is another, a stored verdict is out of date. `Graded.grader` is just this.

        ValueError for a problem that cannot be graded at all: of kind `none`, or of one that the settings do not allow.
        """
        return self._grader(problem)[0]

    def grade(self, problem: Problem, completion: Completion, opened: bool | None) -> Graded:
        """The verdict on one sample; `opened` says whether its prompt ended inside a thought (None: not known).

        Whatever a sample does to its grader is its own verdict (`failed`, `timeout`), never an error. Errors are what
        would befall every sample: ValueError as `grader`, OSError where the judge cannot be reached (ConnectionError)
        or its judgements not be stored, NotCalibrated where it was not tried.
        """
        name, grade = self._grader(problem)
        graded, _ = grade_text(completion, opened, grade, name, passing=(OSError, NotCalibrated))
        return replace(graded, grader=name)

    def _grader(self, problem: Problem) -> tuple[str, Callable[[str], Graded]]:
        """The name of the grader, and the grader itself: a function of the answer's text."""
        settings = self.settings
        match problem.kind:
            case "math":
                name = f"{MATH_GRADER} time_limit={settings.time_limit:g}"
                return name, lambda answer: grade_final(answer, problem.answer, time_limit=settings.time_limit)
            case "choice":
                return CHOICE_GRADER, lambda answer: grade_choice(answer, problem.answer, len(problem.choices))
            case "reasoning_gym":
                dataset = problem.meta["dataset"]
                return RG_GRADER, lambda answer: grade_reasoning_gym(
                    _as_sample(problem), answer, dataset, settings.time_limit
                )
            case "code":
                code = settings.code
                if not code.allow:
                    raise ValueError(
                        f"problem {problem.id} of {problem.source!r} is verified by running what the teacher wrote, in "
                        "a limited process that is no security boundary; run it where that is acceptable, and set "
                        "verify.code.allow: true"
                    )
                name = f"{CODE_GRADER} seconds={code.seconds:g} memory_mb={code.memory_mb} file_mb={code.file_mb}"
                return name, lambda answer: grade_code(answer, problem.meta["tests"], code)
            case "text":
                judge = self.judge
                if judge is None:
                    raise ValueError(
                        f"problem {problem.id} of {problem.source!r} has kind text, which a judge must verify: give "
                        "verify.judge"
                    )
                return judge.grader, lambda answer: judge.grade(problem.question, problem.answer, answer)
        raise ValueError(
            f"problem {problem.id} has kind {problem.kind!r}, and verdicts are for {', '.join(GRADED_KINDS)}: keep its "
            "samples unverified"
        )


def _as_sample(problem: Problem) -> Sample:
    """A problem of reasoning-gym as `eval` has it."""
    dataset = problem.meta["dataset"]
    meta = {"entry": problem.meta["entry"]}
    return Sample(id=problem.id, task=f"rg_{dataset}", question=problem.question, gold=problem.answer, meta=meta)
