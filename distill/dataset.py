"""The dataset of a run: one row an example, in parquet, with a card from which it can be built again."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.problems import messages
from distill.recipe import Recipe
from distill.records import REASONS, Problem, Trace
from distill.run_dir import replacing, write_table
from eval.sample import Record


@dataclass(frozen=True, slots=True)
class Row(Record):
    """One training example. `id` is the trace's, `messages` the turns before the reply as JSON, `thought` and
    `response` the teacher's, `answer` the published answer alone, boxed where it is of that kind: what a student that
    learns answers alone writes ("" where there is none). `tokens` is the teacher's count of the completion."""

    id: str
    problem_id: str
    domain: str
    source: str
    messages: str
    thought: str
    response: str
    answer: str
    tokens: int | None
    licence: str


BOXED = ("math", "choice", "reasoning_gym")


def rows(recipe: Recipe, kept: Iterable[tuple[Problem, Trace]]) -> Iterator[Row]:
    """The examples of the traces that were kept, in their order."""
    for problem, trace in kept:
        turns = messages(problem, recipe.teacher.prompt, recipe.teacher.system)
        yield Row(
            id=trace.id, problem_id=problem.id, domain=problem.domain, source=problem.source,
            messages=json.dumps([dict(turn) for turn in turns], ensure_ascii=False),
            thought=trace.thought, response=trace.response, answer=bare_answer(problem),
            tokens=trace.completion_tokens, licence=recipe.problems[problem.source].licence,
        )  # fmt: skip


def bare_answer(problem: Problem) -> str:
    """The published answer as a reply of its own; "" where there is none that could be one."""
    if problem.kind == "text":
        return problem.answer
    return f"\\boxed{{{problem.answer}}}" if problem.kind in BOXED and problem.answer else ""


def write_dataset(
    folder: Path, examples: Iterable[Row], recipe: Recipe, provenance: Mapping[str, Any], funnel: Mapping[str, Any]
) -> dict[str, Any]:
    """`train.parquet` and `README.md`; returns the counts. `provenance` is the run's recipe.json, `funnel` the counts
    of the stages before."""
    by_domain: dict[str, int] = {}
    by_source: dict[str, int] = {}
    tokens = 0

    def counted() -> Iterator[Row]:
        nonlocal tokens
        for row in examples:
            by_domain[row.domain] = by_domain.get(row.domain, 0) + 1
            by_source[row.source] = by_source.get(row.source, 0) + 1
            tokens += row.tokens or 0
            yield row

    with replacing(folder) as part:
        part.mkdir(parents=True)
        count = write_table(part / "train.parquet", Row, counted())
        card_text = card(recipe, provenance, funnel, by_domain, by_source, count, tokens)
        (part / "README.md").write_text(card_text, encoding="utf-8")
    return {"in": count, "kept": count, "tokens": tokens, "domains": by_domain}


def card(
    recipe: Recipe,
    provenance: Mapping[str, Any],
    funnel: Mapping[str, Any],
    by_domain: Mapping[str, int],
    by_source: Mapping[str, int],
    count: int,
    tokens: int,
) -> str:
    """The Hub's dataset card: what is in it, from where, under which licences, and how to make it again."""
    licences = sorted({recipe.problems[name].licence for name in by_source})
    header = ["---", "pretty_name: " + json.dumps(recipe.name), "tags: [distillation, reasoning]"]
    header += [f"license: {licences[0].lower()}" if len(licences) == 1 else "license: other"]
    header += ["configs:", "- config_name: default", "  data_files: train.parquet", "---", ""]
    teacher = recipe.teacher
    lines = [
        *header,
        f"# {recipe.name}",
        "",
        recipe.description.strip() or "Reasoning traces by rejection sampling.",
        "",
        f"{count:,} examples, {tokens:,} tokens of completions. Columns: `id`, `problem_id`, `domain`, `source`,",
        "`messages` (JSON: the turns before the reply), `thought`, `response`, `answer` (the published answer alone),",
        "`tokens`, `licence`.",
        "",
        "| domain | examples |",
        "|---|---:|",
        *(f"| {name} | {number:,} |" for name, number in sorted(by_domain.items())),
        "",
        "## Problems",
        "",
        "| source | examples | from | split, revision or seed | licence |",
        "|---|---:|---|---|---|",
    ]
    for name, source in recipe.problems.items():
        origin = source.dataset or f"reasoning-gym {source.reasoning_gym}"
        drawn = ", ".join(str(one) for one in (source.config, source.split, source.revision) if one)
        if source.reasoning_gym:
            drawn = f"seed {source.seed if source.seed is not None else recipe.seed}"
        lines.append(f"| {name} | {by_source.get(name, 0):,} | {origin} | {drawn} | {source.licence} |")
    lines += [
        "",
        "## Teacher",
        "",
        f"`{teacher.model}`" + (f", revision {teacher.revision}" if teacher.revision else "") + ": "
        f"temperature {teacher.temperature:g}, top-p {teacher.top_p:g}, at most {teacher.max_tokens:,} tokens; until "
        f"{teacher.correct} right samples, {teacher.most} at the most; seed {recipe.seed}.",
        "",
        "## What was dropped",
        "",
        "| stage | in | kept | dropped |",
        "|---|---:|---:|---|",
    ]
    for stage, counts in funnel.items():
        reasons = ", ".join(f"{reason} {counts[reason]:,}" for reason in REASONS[stage] if counts[reason])
        lines.append(f"| {stage} | {counts['in']:,} | {counts['kept']:,} | {reasons or '-'} |")
    lines += [
        "",
        "## Made again",
        "",
        "`distill run recipe.yaml` with the recipe below, which is complete, and these versions:",
        ", ".join(f"{name} {version}" for name, version in sorted(provenance["versions"].items())) + ".",
        "",
        "```json",
        json.dumps(provenance["recipe"], ensure_ascii=False, indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)
