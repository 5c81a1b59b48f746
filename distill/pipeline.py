"""The main job: a recipe, from prompts to an evaluated student. Read it from top to bottom.

    problems -> prompts -> traces -> filter -> dedup -> decontaminate -> mix -> dataset -> student:NAME -> eval:NAME

Each stage is a function below: it reads what others wrote into the run's folder and writes its own files. `stages`
lists what each depends on, so that changing one part of a recipe runs that stage and what follows, and nothing else.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distill.recipe import Engine, Recipe
from distill.records import REASONS, Decision, Problem, Trace
from distill.run_dir import RunDir, read_json, write_judged, write_table
from distill.stages import Counts, Outcome, Say, Stage, run_stages
from eval.runner import Progress
from eval.yaml_files import nearest

# What decides how fast samples come, and not which.
SPEED = {"batch_size", "concurrency", "timeout", "retries", "base_urls", "api_key_env", "device_map", "price", "budget"}


@dataclass(frozen=True)
class Context:
    """What every stage is given: the recipe, the folder, and whom to tell how far it is."""

    recipe: Recipe
    run: RunDir
    progress: Progress | None = None


def run_recipe(
    recipe: Recipe,
    run: RunDir,
    *,
    progress: Progress | None = None,
    until: str | None = None,
    students: Sequence[str] | None = None,
    say: Say = lambda line: None,
) -> str:
    """Runs every stage that is not done, up to `until`; returns what is incomplete, "" for nothing.

    `students` limits training and evaluation to some. ValueError, OSError, ImportError where a stage cannot go on; what
    is there stays, and the next run uses it.
    """
    listed = stages(recipe, run, progress=progress, students=students)
    check(recipe)
    return run_stages(listed, recipe, run, until=until, say=say)


def stages(
    recipe: Recipe, run: RunDir, *, progress: Progress | None = None, students: Sequence[str] | None = None
) -> list[Stage]:
    """The stages of a recipe, in their order."""
    context, chosen = Context(recipe, run, progress), _chosen(recipe, students)
    benchmarks = recipe.decontaminate.model_dump() if recipe.decontaminate else None
    benchmark_files = _local(recipe.decontaminate.data) if recipe.decontaminate else ()
    problem_files = _local(*(source.dataset for source in recipe.problems.values()))
    asked = {"teacher": _what_decides(recipe.teacher), "verify": _verify_settings(recipe), "seed": recipe.seed}

    def decisions(name: str) -> str:
        return f"decisions/{name}.parquet"

    def stage(
        name: str, work: Any, settings: Any, after: str, outputs: str, files: tuple[str, ...] = (), version: int = 1
    ) -> Stage:
        """The version is raised when a stage makes something else of the same recipe."""
        return Stage(
            name, partial(work, context), version, settings, tuple(after.split()), tuple(outputs.split()), files
        )

    problems = {name: source.model_dump() for name, source in recipe.problems.items()}
    listed = [
        stage("problems", find_problems, [problems, recipe.seed], "",
              f"problems.parquet {decisions('problems')}", problem_files),
        stage("prompts", clean_prompts, [recipe.deduplicate.prompts, benchmarks], "problems",
              decisions("prompts"), benchmark_files),
        stage("traces", sample_traces, asked, "problems prompts",
              f"traces.parquet {decisions('traces')}", _local(recipe.teacher.model, recipe.teacher.chat_template)),
        stage("filter", filter_traces, recipe.filter.model_dump(), "problems prompts traces", decisions("filter")),
        stage("dedup", deduplicate_traces, recipe.deduplicate.traces, "traces filter", decisions("dedup")),
        stage("decontaminate", decontaminate_traces, benchmarks, "traces filter dedup",
              decisions("decontaminate"), benchmark_files),
        stage("mix", mix_traces, [recipe.mix.model_dump(), recipe.seed],
              "problems prompts traces filter dedup decontaminate", decisions("mix")),
        stage("dataset", write_examples, [recipe.teacher.prompt, recipe.teacher.system],
              "problems prompts traces filter dedup decontaminate mix", "dataset"),
    ]  # fmt: skip
    for name in chosen:
        student = recipe.students[name]
        listed.append(
            stage(f"student:{name}", partial(train_student, name=name),
                  [student.model_dump(exclude={"launch"}), recipe.sft_of(name)], "dataset",
                  f"students/{name}/model students/{name}/labels.json students/{name}/log.json",
                  _local(student.model, student.chat_template))
        )  # fmt: skip
    for name, engine in models(recipe, run, chosen).items():
        assert recipe.evaluate is not None, "only then there are models to evaluate"
        settings = [recipe.evaluate.model_dump(exclude={"models", "batch_size"}), recipe.seed]
        trained = name in chosen
        listed.append(
            stage(f"eval:{name}", partial(evaluate_model, name=name, engine=engine),
                  settings if trained else [*settings, _what_decides(engine)],
                  f"student:{name}" if trained else "", f"eval/{name}/results.json",
                  () if trained else _local(engine.model, engine.chat_template))
        )  # fmt: skip
    return listed


def check(recipe: Recipe) -> None:
    """ValueError or FileNotFoundError for what a late stage would only find after hours: names of tasks, benchmarks and
    protocols, settings of evaluation, files that are not there."""
    from eval.protocols import get_protocol
    from eval.tasks import get_task

    if recipe.decontaminate is not None and recipe.decontaminate.benchmarks != "all":
        for name in recipe.decontaminate.benchmarks:
            get_task(name)
    if recipe.evaluate is not None:
        protocol = get_protocol(recipe.evaluate.protocol)
        for name in recipe.evaluate.tasks:
            protocol.settings(get_task(name), **recipe.evaluate.overrides)
    paths = [recipe.teacher.model, recipe.teacher.chat_template]
    for student in recipe.students.values():
        paths += [student.model, student.chat_template, student.launch]
    for path in paths:
        if path is not None and Path(path).is_absolute() and not Path(path).exists():
            raise FileNotFoundError(f"the recipe {recipe.name} names {path}, and there is no such file or folder")


# The stages.


def find_problems(context: Context) -> Outcome:
    """Every row of every source, with its decision."""
    from distill.problems import load_problems

    run, counts = context.run, Counts("problems")

    def judged() -> Iterator[tuple[Problem, Decision]]:
        for problem, decision in load_problems(context.recipe):
            yield problem, counts.counted(decision)

    write_judged(run / "problems.parquet", Problem, run.decisions("problems"), judged())
    return Outcome(counts.some_left("look at the columns that the recipe names"))


def clean_prompts(context: Context) -> Outcome:
    """Near copies of prompts, and prompts that a benchmark asks: both leave before the teacher is asked."""
    from distill import decontaminate, dedup

    recipe, run, counts = context.recipe, context.run, Counts("prompts")

    def problems() -> Iterator[Problem]:
        return run.rows("problems.parquet", Problem, "problems")

    decisions = dedup.prompts(problems, recipe.deduplicate.prompts)
    if recipe.decontaminate is not None:
        index = decontaminate.load_index(recipe.decontaminate)
        decisions = _first_reason(decontaminate.prompts(problems(), index), decisions)
    write_table(run.decisions("prompts"), Decision, counts.each(decisions))
    return Outcome(counts.some_left("see decisions/prompts.parquet"))


def sample_traces(context: Context) -> Outcome:
    """Asks the teacher until each problem has its right samples, and writes down each sample that this took."""
    from distill import teacher
    from distill.generation import SAMPLES, SHARD, run_teacher

    recipe, run, counts = context.recipe, context.run, Counts("traces")
    with run_teacher(recipe, run, run / SAMPLES, context.progress) as model:
        teacher.merge_stores(model.store, sorted(run.path.glob(SHARD.format("*", "*"))))
        generated = model.generate(model.problems)
        judged = ((trace, counts.counted(decision)) for trace, decision in model.traces())
        write_judged(run / "traces.parquet", Trace, run.decisions("traces"), judged)
        judge = model.verifier.judge
    more = {name: value for name, value in asdict(generated).items() if name not in ("stopped", "incomplete", "failed")}
    if judge is not None and judge.calibration is not None:
        more["judge"] = asdict(judge.calibration)
    return Outcome({**counts.some_left("`distill why` shows what was answered"), **more}, generated.incomplete)


def filter_traces(context: Context) -> Outcome:
    """R1's filters, on the traces that are right."""
    from distill.filtering import decide

    run, counts, settings = context.run, Counts("filter"), context.recipe.filter
    judged = (decide(trace, problem, settings) for problem, trace in _with_problems(run, "traces"))
    write_table(run.decisions("filter"), Decision, counts.each(judged))
    return Outcome(counts.some_left("see decisions/filter.parquet, and the thresholds under filter"))


def deduplicate_traces(context: Context) -> Outcome:
    """Of near copies, the best stays."""
    from distill import dedup

    run, counts, threshold = context.run, Counts("dedup"), context.recipe.deduplicate.traces

    def traces() -> Iterator[Trace]:
        return run.rows("traces.parquet", Trace, "traces", "filter")

    decisions = dedup.traces(traces, threshold)
    write_table(run.decisions("dedup"), Decision, counts.each(decisions))
    return Outcome(counts.as_dict())


def decontaminate_traces(context: Context) -> Outcome:
    """Traces that write a benchmark's item down."""
    from distill import decontaminate

    run, counts, settings = context.run, Counts("decontaminate"), context.recipe.decontaminate
    traces = run.rows("traces.parquet", Trace, "traces", "filter", "dedup")
    decisions = (
        (Decision(one.id) for one in traces)
        if settings is None
        else decontaminate.traces(traces, decontaminate.load_index(settings))
    )
    write_table(run.decisions("decontaminate"), Decision, counts.each(decisions))
    return Outcome(counts.some_left("see decisions/decontaminate.parquet"))


def mix_traces(context: Context) -> Outcome:
    """The quotas of the domains."""
    from distill.mixture import mix

    recipe, run, counts = context.recipe, context.run, Counts("mix")
    rows = (
        (trace.id, problem.domain, trace.completion_tokens or 0)
        for problem, trace in _with_problems(run, "traces", "filter", "dedup", "decontaminate")
    )
    write_table(run.decisions("mix"), Decision, counts.each(mix(rows, recipe.mix, recipe.seed)))
    return Outcome(counts.some_left("look at the quotas under mix"))


def write_examples(context: Context) -> Outcome:
    """The dataset with its card."""
    from distill.dataset import rows, write_dataset

    recipe, run = context.recipe, context.run
    kept = _with_problems(run, "traces", "filter", "dedup", "decontaminate", "mix")
    funnel = {name: done.counts for name, done in run.manifest().items() if name in REASONS}
    return Outcome(write_dataset(run / "dataset", rows(recipe, kept), recipe, read_json(run / "recipe.json"), funnel))


def train_student(context: Context, name: str) -> Outcome:
    """Fine-tuning with TRL, after the proof of its labels."""
    from distill.student import train_in_run

    return Outcome(train_in_run(context.run, context.recipe, name, progress=context.progress))


def evaluate_model(context: Context, name: str, engine: Engine) -> Outcome:
    """One model on the recipe's tasks, by `eval`."""
    from distill.engines import open_engine
    from eval.runner import evaluate

    settings = context.recipe.evaluate
    assert settings is not None, "only a recipe with evaluate has this stage"

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if context.progress:
            context.progress(f"{name}: {stage}", done, total, note)

    results = evaluate(
        open_engine(engine), settings.tasks, settings.protocol, context.run / f"eval/{name}",
        k=settings.k, limit=settings.limit, seed=context.recipe.seed, overrides=settings.overrides,
        data=settings.data, progress=progress,
    )  # fmt: skip
    failed = sum(task.verdicts.get("failed", 0) for task in results.tasks)
    samples = sum(sum(task.verdicts.values()) for task in results.tasks)
    return Outcome({"tasks": len(results.tasks), "samples": samples}, f"{failed} samples failed" if failed else "")


# What they share.


def models(recipe: Recipe, run: RunDir, students: Sequence[str]) -> dict[str, Engine]:
    """The models that are evaluated, by name: the teacher, the students' base models, the students."""
    if recipe.evaluate is None:
        return {}
    batch_size = recipe.evaluate.batch_size
    found = {"teacher": Engine(**recipe.teacher.model_dump(include=set(Engine.model_fields)))}
    bases: dict[tuple[str, str | None, str | None], str] = {}
    for name in students:
        student = recipe.students[name]
        bases.setdefault((student.model, student.revision, student.chat_template), name)
    for first in bases.values():
        student = recipe.students[first]
        found["base" if len(bases) == 1 else f"base-{first}"] = Engine(
            engine="transformers", model=student.model, revision=student.revision, dtype=student.dtype,
            chat_template=student.chat_template, trust_remote_code=student.trust_remote_code, batch_size=batch_size,
        )  # fmt: skip
    for name in students:
        found[name] = Engine(
            engine="transformers", model=str(run / f"students/{name}/model"),
            trust_remote_code=recipe.students[name].trust_remote_code, batch_size=batch_size,
        )  # fmt: skip
    wanted = recipe.evaluate.models
    if wanted is None:
        return found
    return {name: engine for name, engine in found.items() if name in wanted or name.partition("-")[0] in wanted}


def _chosen(recipe: Recipe, students: Sequence[str] | None) -> list[str]:
    for name in students or ():
        if name not in recipe.students:
            raise ValueError(
                f"{name!r} is no student of {recipe.name}.{nearest(name, recipe.students)} "
                f"There are: {', '.join(recipe.students) or 'none'}"
            )
    return [name for name in recipe.students if students is None or name in students]


def _what_decides(engine: Engine) -> dict[str, Any]:
    """The settings of a model that decide which samples come; not how fast, from where, or at what price."""
    return engine.model_dump(exclude=SPEED)


def _verify_settings(recipe: Recipe) -> dict[str, Any]:
    judge = recipe.verify.judge
    return {**recipe.verify.model_dump(exclude={"judge"}), "judge": judge and _what_decides(judge)}


def _local(*paths: str | None) -> tuple[str, ...]:
    """Those that are files or folders here; what is not is an id on the Hub, pinned by its revision."""
    return tuple(path for path in paths if path and Path(path).exists())


def _with_problems(run: RunDir, *kept_by: str) -> Iterator[tuple[Problem, Trace]]:
    """The kept traces with their problems; both tables are in the order of the problems."""
    problems = run.rows("problems.parquet", Problem, "problems", "prompts")
    problem: Problem | None = None
    for trace in run.rows("traces.parquet", Trace, *kept_by):
        while problem is None or problem.id != trace.problem_id:
            problem = next(problems)
        yield problem, trace


def _first_reason(*judged: Iterable[Decision]) -> Iterator[Decision]:
    """For rows that several judge, the first reason there is."""
    for decisions in zip(*judged, strict=True):
        yield next((one for one in decisions if one.reason), decisions[0])
