"""The plan of a recipe, before anything is asked: stages, counts, tokens, hours and dollars. No torch, no network.

What generation will take is an estimate from a pilot: the samples that the run's folder already holds.
"""

from collections.abc import Iterator

from distill.cost import Estimate, Range, estimate
from distill.generation import read_pilot
from distill.recipe import PretrainRecipe, ProblemSource, Recipe
from distill.run_dir import RunDir
from distill.status import stage_states
from eval.progress import duration
from eval.report import text_table


def plan_text(recipe: Recipe | PretrainRecipe, run: RunDir) -> str:
    """What `distill plan` and `--dry-run` print."""
    if isinstance(recipe, PretrainRecipe):
        return _pretrain_text(recipe)
    teacher, budget = recipe.teacher, recipe.teacher.budget
    where = ", ".join(teacher.base_urls) if teacher.engine == "endpoint" else "in this process"
    lines = [
        f"{recipe.name}: {recipe.description.strip()}" if recipe.description else recipe.name,
        "",
        f"teacher   {teacher.model}, {where}; temperature {teacher.temperature:g}, top-p {teacher.top_p:g}, at most "
        f"{teacher.max_tokens:,} tokens",
        f"samples   until {teacher.correct} right ones, {teacher.most} at the most, for each problem",
        *(
            f"student   {name}: {student.model}, learns {'traces' if student.target == 'trace' else 'bare answers'}"
            for name, student in recipe.students.items()
        ),
        f"run       {run.path}",
        "",
        text_table([["problems", "from", "rows", "domain", "licence"], *_sources(recipe)]),
        "",
        text_table([["stage", "state"], *_states(recipe, run)]),
        "",
        *_generation(recipe, run),
    ]
    limits = {"tokens": budget.tokens, "dollars": budget.dollars, "hours": budget.hours}
    if any(limits.values()):
        lines.append("budget: " + ", ".join(f"{value:,} {name}" for name, value in limits.items() if value))
    return "\n".join(lines)


def _sources(recipe: Recipe) -> Iterator[list[str]]:
    for name, source in recipe.problems.items():
        rows = f"{source.limit:,}" if source.limit else "all"
        yield [name, _origin(source), rows, source.domain, source.licence]


def _origin(source: ProblemSource) -> str:
    if source.reasoning_gym:
        return f"reasoning-gym {source.reasoning_gym}"
    return " ".join(str(one) for one in (source.dataset, source.config, source.split, source.revision) if one)


def _states(recipe: Recipe, run: RunDir) -> Iterator[list[str]]:
    for name, done, state in stage_states(recipe, run):
        yield [name, f"done in {duration(done.seconds)}" if done and state == "done" else state]


def _generation(recipe: Recipe, run: RunDir) -> Iterator[str]:
    problems = _number_of_problems(recipe, run)
    least, most = recipe.teacher.correct, recipe.teacher.most
    if problems:
        yield f"generation of {problems:,} problems: {problems * least:,} to {problems * most:,} samples"
    else:
        yield f"generation: {least} to {most} samples a problem (`--until prompts` counts the problems)"
    found = read_pilot(run)
    if found is None or not problems:
        yield "no pilot yet: `distill plan RECIPE --pilot 50` asks 50 problems and estimates tokens, hours and dollars"
        return
    spent, seconds = found
    yield from described(estimate(spent, problems, recipe.teacher.price, seconds), len(spent))


def described(estimated: Estimate, pilot: int) -> Iterator[str]:
    """The estimate in lines, with its 95 % interval."""
    yield f"estimated from a pilot of {pilot:,} problems, with 95 % intervals:"
    rows = [
        ["samples", *_cells(estimated.samples, "{:,.0f}")],
        ["problems solved", *_cells(estimated.solved, "{:,.0f}")],
        ["completion tokens", *_cells(estimated.completion_tokens, "{:,.0f}")],
        ["prompt tokens", *_cells(estimated.prompt_tokens, "{:,.0f}")],
        ["hours", *_cells(estimated.hours, "{:,.2f}")],
        ["dollars", *_cells(estimated.dollars, "{:,.2f}")],
    ]
    yield text_table([["", "expected", "from", "to"], *rows])


def _cells(value: Range, form: str) -> list[str]:
    return [form.format(one) for one in (value.expected, value.low, value.high)]


def _number_of_problems(recipe: Recipe, run: RunDir) -> int | None:
    """As counted by the stage before generation, else as the recipe limits it; None where a source is not limited."""
    done = run.manifest().get("prompts")
    if done is not None:
        return int(done.counts["kept"])
    limits = [source.limit for source in recipe.problems.values()]
    return sum(limit for limit in limits if limit) if all(limits) else None


def _pretrain_text(recipe: PretrainRecipe) -> str:
    documents = sum(part.documents for part in recipe.corpus.parts)
    rows = [[part.dataset, part.form, f"{part.documents:,}"] for part in recipe.corpus.parts]
    batch = recipe.training.get("per_device_train_batch_size", 8) * recipe.training.get(
        "gradient_accumulation_steps", 1
    )
    steps = recipe.training.get("max_steps", 0)
    if steps <= 0:
        steps = round(recipe.training.get("num_train_epochs", 3) * documents / batch)
    return "\n".join([
        f"{recipe.name}: {recipe.description.strip()}" if recipe.description else recipe.name,
        "",
        f"model     {recipe.model['model_type']}, from nothing",
        f"training  {documents:,} documents, batches of {batch}, {steps:,} steps on one device",
        "",
        text_table([["problems of reasoning-gym", "form", "documents"], *rows]),
    ])  # fmt: skip
