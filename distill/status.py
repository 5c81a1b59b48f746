"""`distill status`: which stages of a run are done, what they counted, what is missing."""

from collections.abc import Iterator

from distill.pipeline import stages
from distill.recipe import Recipe
from distill.records import REASONS
from distill.report_tables import dropped, seconds
from distill.run_dir import Done, RunDir, read_json
from eval.report import text_table
from eval.store import Store

SHOWN = ("rows", "steps", "epochs", "final loss", "tokens", "documents", "parameters", "samples")
"""Counts of the stages that judge no rows: enough for a line; the report has them all."""


def status(run: RunDir) -> str:
    """A line for each stage of the run's recipe; below, what is stored of a generation that has not finished."""
    if not (run / "recipe.json").exists():
        raise FileNotFoundError(
            f"there is no run in {run.path}: it holds no recipe.json; `distill run RECIPE` makes one"
        )
    recipe = read_json(run / "recipe.json")["recipe"]
    if recipe["kind"] == "distill":
        states = list(stage_states(Recipe(**recipe), run))
    else:
        states = [(name, done, "done") for name, done in run.manifest().items()]
    rows = [["stage", "state", "in", "kept", "time", "counts"]]
    rows += [[name, state, *_numbers(name, done)] for name, done, state in states]
    parts = [f"{recipe['name']}, in {run.path}", text_table(rows, left=(0, 1, 5))]
    if any(name == "traces" and state != "done" for name, _, state in states):
        parts.append(f"{_stored(run):,} completions are stored in samples.sqlite")
    left = sum(state != "done" for _, _, state in states)
    parts.append(f"{left} stages are left: the same `distill run` goes on with them" if left else "everything is done")
    return "\n\n".join(parts)


def stage_states(recipe: Recipe, run: RunDir) -> Iterator[tuple[str, Done | None, str]]:
    """(stage, its entry in the manifest, state) as `distill run` would find it now: done, to do, to go on (incomplete),
    out of date (the recipe, or what it reads, has changed since)."""
    manifest = run.manifest()
    done: dict[str, Done] = {}
    for stage in stages(recipe, run):
        before = manifest.get(stage.name)
        current = run.is_done(stage.name, stage.fingerprint(done)) if set(stage.after) <= set(done) else None
        if current:
            done[stage.name] = current
            yield stage.name, current, "done"
        elif before is None:
            yield stage.name, None, "to do"
        else:
            yield stage.name, before, f"to go on: {before.incomplete}" if before.incomplete else "out of date"


def _numbers(name: str, done: Done | None) -> list[str]:
    if done is None:
        return ["", "", "", ""]
    counts = done.counts
    if name in REASONS:
        reasons = {reason: counts[reason] for reason in REASONS[name] if counts.get(reason)}
        said = dropped({"dropped": reasons}).removeprefix("-")
    else:
        shown = {
            key.replace("_", " "): value for key, value in counts.items() if isinstance(value, int | float) and value
        }
        said = ", ".join(f"{value:,.4g} {key}" if isinstance(value, float) else f"{value:,} {key}"
                         for key, value in shown.items() if key in SHOWN)  # fmt: skip
    whole = [f"{counts[key]:,}" if key in counts else "" for key in ("in", "kept")]
    return [*whole, seconds(done.seconds), said]


def _stored(run: RunDir) -> int:
    if not (run / "samples.sqlite").exists():
        return 0
    with Store(run / "samples.sqlite", readonly=True) as store:
        return len(store)
