"""The teacher of a run: its model, its store and its verifier together; shards on other machines, and the pilot.

The stage `traces` of `pipeline.py`, `distill run --shard` and `distill plan --pilot` all ask through here.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill import cost, teacher
from distill.calibration import known
from distill.engines import open_engine
from distill.judge import Judging
from distill.pipeline import run_recipe
from distill.recipe import Recipe
from distill.records import Decision, Problem, Trace
from distill.run_dir import RunDir, read_json, write_json
from distill.stages import Say, described, only_run
from distill.verify import RULES, Verifier
from eval.runner import Progress
from eval.samplers import Sampler
from eval.store import Store

SAMPLES, SHARD = "samples.sqlite", "samples.{}-of-{}.sqlite"
PILOT = "pilot.json"


@dataclass(frozen=True)
class RunTeacher:
    """What it takes to ask the teacher of a run."""

    recipe: Recipe
    run: RunDir
    progress: Progress | None
    sampler: Sampler
    store: Store
    verifier: Verifier

    def problems(self) -> Iterator[Problem]:
        return self.run.rows("problems.parquet", Problem, "problems", "prompts")

    def generate(self, problems: Callable[[], Iterable[Problem]], **options: Any) -> teacher.Generated:
        """`teacher.generate`; the hours of its budget go on from those of earlier calls, which the folder keeps."""
        clock = self.run / "generation.json"
        before = read_json(clock)["seconds"] if clock.exists() else 0.0
        started = time.monotonic()
        try:
            return teacher.generate(
                problems, self.sampler, self.recipe.teacher, self.recipe.seed, self.store, self.verifier,
                progress=self.progress, seconds_before=before, **options,
            )  # fmt: skip
        finally:
            write_json(clock, {"seconds": before + time.monotonic() - started})

    def calibrate(self) -> None:
        """Tries the judge, where there is one, on the teacher's answers to problems that rules verify: these are asked
        first. ValueError below the recipe's floor."""
        judge = self.verifier.judge
        if judge is None:
            return
        ruled = (problem for problem in self.problems() if problem.kind in RULES)
        chosen = cost.pilot(ruled, 2 * judge.settings.calibration, self.recipe.seed)
        if chosen:
            self.generate(lambda: chosen)
        by_id = {problem.id: problem for problem in chosen}
        answers = (known(by_id[one.problem_id], one.response, one.verdict) for one, _ in self.traces(chosen))
        judge.calibrate(one for one in answers if one is not None)

    def traces(self, problems: Iterable[Problem] | None = None) -> Iterator[tuple[Trace, Decision]]:
        return teacher.traces(
            self.problems() if problems is None else problems,
            self.sampler, self.recipe.teacher, self.recipe.seed, self.store, self.verifier,
        )  # fmt: skip


@contextmanager
def run_teacher(recipe: Recipe, run: RunDir, samples: Path, progress: Progress | None) -> Iterator[RunTeacher]:
    """The teacher, ready; its samples go to and come from the store `samples`. A judge has been calibrated."""
    with Store(samples) as store:
        judge = None
        if recipe.verify.judge is not None and any(one.kind == "text" for one in recipe.problems.values()):
            judge = Judging(recipe.verify.judge, open_engine(recipe.verify.judge), store, seed=recipe.seed)
        model = RunTeacher(recipe, run, progress, open_engine(recipe.teacher), store, Verifier(recipe.verify, judge))
        model.calibrate()
        yield model


def run_shard(recipe: Recipe, run: RunDir, shard: tuple[int, int], progress: Progress | None, say: Say) -> str:
    """Asks the teacher part `shard` of the problems; the samples go to a store of their own, which the stage `traces`
    of any run folder of the recipe takes in. Returns what is incomplete."""
    run_recipe(recipe, run, progress=progress, until="prompts", say=say)
    with only_run(run), run_teacher(recipe, run, run / SHARD.format(*shard), progress) as model:
        generated = model.generate(model.problems, shard=shard)
    say(f"shard {shard[0]} of {shard[1]}: {described(asdict(generated))}")
    return generated.incomplete


def run_pilot(recipe: Recipe, run: RunDir, size: int, progress: Progress | None, say: Say) -> None:
    """Asks the teacher `size` problems, drawn at random, and notes what they took. A run uses the samples."""
    run_recipe(recipe, run, progress=progress, until="prompts", say=say)
    with only_run(run), run_teacher(recipe, run, run / SAMPLES, progress) as model:
        chosen = cost.pilot(model.problems(), size, recipe.seed)
        started = time.monotonic()
        model.generate(lambda: chosen)
        seconds = time.monotonic() - started
        spent = teacher.spent(chosen, model.sampler, recipe.teacher, recipe.seed, model.store, model.verifier)
        write_json(run / PILOT, {"spent": [asdict(one) for one in spent], "seconds": seconds})


def read_pilot(run: RunDir) -> tuple[list[cost.Spent], float] | None:
    """What the problems of the pilot took, and the seconds of it; None where there was none."""
    file = run / PILOT
    if not file.exists():
        return None
    values = read_json(file)
    return [cost.Spent(**one) for one in values["spent"]], values["seconds"]
