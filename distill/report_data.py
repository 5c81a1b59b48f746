"""What a run came to, as one JSON value: `gather` reads the run's files, `report.py` renders what it gives.

Of 500,000 problems stay a few numbers each: tables are read in batches, in the columns that are needed.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from distill.funnel import by_problem, columns, fates, funnel
from distill.pipeline import stages
from distill.recipe import Recipe
from distill.records import REASONS
from distill.run_dir import Done, RunDir, read_json
from distill.scores import ALL, evaluations, place
from eval.metrics import token_lengths

FORMAT = 1
POINTS = 300  # of a loss curve
RATES = (0.0, 0.2, 0.4, 0.6, 0.8)  # lower ends of the classes of pass rates between never and always right
RATE_LABELS = ("never", "to 20 %", "to 40 %", "to 60 %", "to 80 %", "below 100 %", "always")


def gather(run: RunDir) -> dict[str, Any]:
    """report.json. Stages that have not run yet are missing from it. Raises AssertionError where counts do not add up,
    FileNotFoundError where there is no run."""
    if not (run / "recipe.json").exists():
        raise FileNotFoundError(f"{run.path} is not the folder of a run: it holds no recipe.json; start one with run")
    resolved, manifest = read_json(run / "recipe.json"), run.manifest()
    recipe = resolved.pop("recipe")
    if recipe["kind"] != "distill":
        raise ValueError(f"{run.path} is a run of kind {recipe['kind']}, and a report is for those of kind distill")
    lines = funnel(run, manifest)
    done = [line["stage"] for line in lines]
    scores, differences, notes = evaluations(run, recipe, manifest)
    students = {name: student(run, recipe, manifest, name) for name in recipe.get("students") or {}}
    return dict(
        format=FORMAT,
        name=recipe["name"],
        description=recipe.get("description", ""),
        seed=recipe.get("seed", 0),
        incomplete={name: one.incomplete for name, one in manifest.items() if one.incomplete},
        missing=[one.name for one in stages(Recipe(**recipe), run) if one.name not in manifest],
        funnel=lines,
        sources=sources(run, recipe, done),
        domains=domains(run, recipe, done),
        traces=lengths(run, done),
        students=students,
        scores=scores,
        differences=differences,
        notes=notes,
        costs=[cost(one, scores) for one in manifest.values()],
        recipe=recipe,
        provenance=resolved,
    )


# Problems and traces.


def sources(run: RunDir, recipe: Mapping[str, Any], done: Sequence[str]) -> list[dict[str, Any]]:
    """For each source: prompts kept, asked, solved (a right sample at least), samples, and the problems by pass rate
    (right among asked), a count for each of `RATE_LABELS`."""
    if "prompts" not in done:
        return []
    counts: dict[str, Counter[str]] = {}
    rows = columns(run / "traces.parquet", "problem_id", "verdict") if "traces" in done else ()
    for source, _, verdicts in by_problem(run, rows):
        count, right = counts.setdefault(source, Counter()), verdicts.count("correct")
        count["prompts"] += 1
        if verdicts:
            count.update(asked=1, samples=len(verdicts), right=right, solved=right > 0)
            if None not in verdicts:  # nothing verified those of kind none
                count[rate_label(right, len(verdicts))] += 1
    return [
        dict(
            source=name,
            kind=recipe["problems"].get(name, {}).get("kind", ""),
            **{key: count[key] for key in ("prompts", "asked", "solved", "samples", "right")},
            pass_rates=[count[label] for label in RATE_LABELS],
        )
        for name, count in sorted(counts.items(), key=lambda one: place(recipe["problems"], one[0]))
    ]


def rate_label(right: int, asked: int) -> str:
    """The class of a pass rate; a rate on a border belongs to the class below it.

    >>> rate_label(0, 4), rate_label(1, 5), rate_label(3, 4), rate_label(2, 2)
    ('never', 'to 20 %', 'to 80 %', 'always')
    """
    if right in (0, asked):
        return RATE_LABELS[-1] if right else RATE_LABELS[0]
    return RATE_LABELS[sum(right > low * asked + 1e-9 for low in RATES)]


def domains(run: RunDir, recipe: Mapping[str, Any], done: Sequence[str]) -> list[dict[str, Any]]:
    """For each domain: traces that it brought to the mixture, rows of the dataset, their tokens; `wanted` is what the
    recipe asks of it."""
    if len(done) < len(REASONS) or not (run / "dataset" / "train.parquet").exists():
        return []
    brought: Counter[str] = Counter()
    judged = ((row.rpartition("/")[0], row) for (row,) in columns(run.decisions("mix"), "id"))
    for _, domain, traces in by_problem(run, judged):
        brought[domain] += len(traces)
    rows: Counter[str] = Counter()
    tokens: dict[str, list[int | None]] = {}
    for domain, count in columns(run / "dataset" / "train.parquet", "domain", "tokens"):
        rows[domain] += 1
        tokens.setdefault(domain, []).append(count)
    mix = recipe.get("mix") or {}
    wanted = mix.get("counts") or mix.get("shares") or {}
    total = sum(rows.values())
    lines = []
    for name in sorted({*+brought, *wanted}, key=lambda one: (-rows[one], one)):
        size = token_lengths(tokens.get(name, ()))
        lines.append(
            dict(
                domain=name, brought=brought[name], rows=rows[name], share=rows[name] / total if total else 0.0,
                tokens=size.total if size else None, mean_tokens=size.mean if size else None, wanted=wanted.get(name),
            )
        )  # fmt: skip
    return lines


def lengths(run: RunDir, done: Sequence[str]) -> dict[str, Any] | None:
    """Verdicts of all traces, and how many of each length (completion tokens) were kept and dropped."""
    if "traces" not in done:
        return None
    verdicts: Counter[str] = Counter()
    found = {"kept": array("q"), "dropped": array("q")}
    unknown = 0
    for _, _, verdict, tokens, _, reason in fates(run, done):
        verdicts[verdict] += 1
        if tokens is None:
            unknown += 1
        else:
            found["dropped" if reason else "kept"].append(tokens)
    step = bin_width(max((max(one) for one in found.values() if one), default=0))
    bins = {name: Counter(tokens // step for tokens in one) for name, one in found.items()}
    last = max((max(one) for one in bins.values() if one), default=-1)
    summaries = {name: token_lengths(one) for name, one in found.items()}
    return dict(
        verdicts=dict(sorted(verdicts.items())),
        unknown_length=unknown,
        bin_width=step,
        **{f"{name}_bins": [one[place] for place in range(last + 1)] for name, one in bins.items()},
        **{f"{name}_tokens": one and asdict(one) for name, one in summaries.items()},
    )


def bin_width(largest: int, most: int = 36) -> int:
    """1, 2 or 5 times a power of ten, so that at most `most` bins reach `largest`.

    >>> bin_width(700), bin_width(32768), bin_width(3)
    (20, 1000, 1)
    """
    step, factors = 1, (2, 2.5, 2)
    place = 0
    while largest // step >= most:
        step, place = int(step * factors[place % 3]), place + 1
    return step


# Students.


def student(run: RunDir, recipe: Mapping[str, Any], manifest: Mapping[str, Done], name: str) -> dict[str, Any]:
    """What was trained, how, its loss (`POINTS` means of neighbouring steps at the most), and the row that its labels
    were proven on, with what is read and not learnt in ⟦ ⟧."""
    settings = recipe["students"][name]
    how = "full" if settings.get("adapter") is None else "QLoRA" if settings.get("quantization") else "LoRA"
    folder = run / "students" / name
    log = read_json(folder / "log.json") if (folder / "log.json").exists() else []
    loss = [(row["step"], row["loss"]) for row in log if "loss" in row]
    labels = read_json(folder / "labels.json") if (folder / "labels.json").exists() else {}
    done = manifest.get(f"student:{name}")
    return dict(
        model=settings["model"],
        target=settings.get("target", "trace"),
        training=how,
        counts=dict(done.counts) if done else {},
        shown=labels.get("shown", ""),
        notes=list(labels.get("notes", ())),
        loss=_thinned(loss),
        eval_loss=[[row["step"], row["eval_loss"]] for row in log if "eval_loss" in row],
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Means of runs of neighbours, few enough to draw."""
    size = -(-len(points) // POINTS) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [[part[-1][0], sum(value for _, value in part) / len(part)] for part in parts]


# Cost.


def cost(done: Done, scores: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Time, tokens, dollars and samples of a stage; None where it has none. The tokens of an evaluation are those of
    its results."""
    line = {
        name: done.counts.get(name) for name in ("prompt_tokens", "completion_tokens", "dollars", "asked", "reused")
    }
    if done.stage.startswith("eval:"):
        own = [one for one in scores if one["model"] == done.stage.removeprefix("eval:") and one["task"] != ALL]
        for name in ("prompt_tokens", "completion_tokens"):
            known = [one[name] for one in own if one[name] is not None]
            line[name] = sum(known) if known else None
    return dict(stage=done.stage, seconds=done.seconds, incomplete=done.incomplete, **line)
