"""A finished run in the real formats, without a model: three kinds of problems, a teacher that is right by its seed,
decisions of every stage, a dataset, two students with their losses, and four evaluations by `eval` itself.

Some texts are hostile: they try to end the page's script, hold Chinese, control characters, or are very long.
"""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from distill.dataset import Row
from distill.pipeline import stages
from distill.recipe import Recipe
from distill.records import Decision, Problem, Trace
from distill.run_dir import ROWS_PER_GROUP, Done, RunDir, content_hash, read_json, schema, write_json, write_table
from eval.benchmark import Benchmark, Source
from eval.protocols import Protocol
from eval.runner import evaluate
from eval.sample import Completion, Graded, Record, Sample, Verdict
from eval.store import Store
from tests.eval.arithmetic import fraction

HOSTILE = "</script><script>document.title = 'taken over'</script><b>&amp;<!--"
CORRECT, MOST = 2, 6
SOURCES = {"chain_sum": ("arithmetic", 0.75), "spell_backward": ("words", 0.9), "number_sorting": ("logic", 0.55)}
WORDS = ["lantern", "harbour", "meadow", "thunder", "orchard", "velvet", "compass", "gravel", "whisper", "marble"]
ENDINGS = ["", "s", "ed", "ing", "er", "less", "ful", "like"]
STUDENTS = {"answers": "answer", "traces": "trace"}
SKILLS = {"teacher": 0.88, "base": 0.12, "answers": 0.34, "traces": 0.71}


def write_run(
    path: Path, *, problems: int = 150, seed: int = 0, items: int = 40, until: str = "report", hostile: bool = True
) -> RunDir:
    """The folder of a run that went up to the stage `until` and finished it."""
    run = RunDir(path)
    versions = {"deepseek-hf": "0.1.0", "transformers": "5.23.0", "trl": "1.16.0", "datasets": "5.2.0"}
    recipe = _recipe(seed).model_dump(mode="json")
    write_json(run / "recipe.json", {"recipe": recipe, "versions": versions, "commit": "58ff2fd0a7"})
    for stage in _stages(run, problems, seed, items, hostile):
        if stage == until:
            return run
    if until != "report":
        raise ValueError(f"until={until!r} is no stage of this run")
    return run


def write_large_run(path: Path, *, problems: int) -> RunDir:
    """Two traces a problem, a wrong and a right one; of the right ones the mixture keeps three in four."""
    run, names = RunDir(path), list(SOURCES)
    write_json(run / "recipe.json", {"recipe": _recipe(0).model_dump(mode="json"), "versions": {}, "commit": None})
    question = "State the final answer to: " + " + ".join(map(str, range(40)))

    def problem(place: int) -> str:
        return hashlib.sha256(str(place).encode()).hexdigest()[:16]

    def both(place: int) -> str:
        return f"{problem(place // 2)}/{place % 2}"

    def right(place: int) -> str:
        return f"{problem(place)}/1"

    def judged(
        stage: str, count: int, row: Callable[[int], str], reason: Callable[[int], str] = lambda place: ""
    ) -> None:
        _write_columns(run.decisions(stage), Decision, count, id=row, reason=reason, detail=lambda place: "")
        counts = {name or "kept": n for name, n in Counter(map(reason, range(count))).items()}
        run.finish(Done(stage, "0", 1.0, {}, {"in": count, **counts}))

    _write_columns(
        run / "problems.parquet", Problem, problems, id=problem, kind=lambda n: "math", question=lambda n: question,
        answer=lambda n: "780", row=lambda n: n, choices=lambda n: (), meta=lambda n: "{}",
        source=lambda n: names[n % 3], domain=lambda n: SOURCES[names[n % 3]][0],
    )  # fmt: skip
    judged("problems", problems, problem)
    judged("prompts", problems, problem)
    _write_columns(
        run / "traces.parquet", Trace, 2 * problems, id=both, problem_id=lambda n: problem(n // 2),
        index=lambda n: n % 2, key=lambda n: f"{n:064d}", seed=lambda n: n, thought=lambda n: f"{n} so " * 200,
        response=lambda n: "42", state=lambda n: "closed", finish_reason=lambda n: "stop", detail=lambda n: "",
        verdict=lambda n: "correct" if n % 2 else "wrong", extracted=lambda n: "42", grader=lambda n: "math/1",
        prompt_tokens=lambda n: 40, completion_tokens=lambda n: 300 + n % 700,
    )  # fmt: skip
    judged("traces", 2 * problems, both, lambda n: "" if n % 2 else "wrong")
    for stage in ("filter", "dedup", "decontaminate"):
        judged(stage, problems, right)
    judged("mix", problems, right, lambda n: "" if n % 4 else "over_quota")
    return run


def _write_columns(path: Path, record: type[Record], count: int, **columns: Callable[[int], Any]) -> None:
    """As `write_table`, faster: each column is a function of the row's number."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.parquet.ParquetWriter(path, schema(record), compression="zstd") as writer:
        for start in range(0, count, ROWS_PER_GROUP):
            rows = range(start, min(start + ROWS_PER_GROUP, count))
            values = {name: [column(row) for row in rows] for name, column in columns.items()}
            writer.write_table(pyarrow.table(values, schema(record)))


def _recipe(seed: int) -> Recipe:
    return Recipe(
        name="small", description="Three kinds of problems with exact verifiers.", seed=seed,
        problems={
            name: dict(reasoning_gym=name, kind="reasoning_gym", domain=domain, licence="Apache-2.0", limit=50)
            for name, (domain, _) in SOURCES.items()
        },
        teacher=dict(
            engine="transformers", model="models/tiny-teacher", temperature=1.0, top_p=1.0, max_tokens=400,
            correct=CORRECT, most=MOST,
        ),
        decontaminate=None,
        sft=dict(learning_rate=1e-3, num_train_epochs=3.0, per_device_train_batch_size=16, max_length=512),
        students={name: dict(model="models/tiny-base", target=target) for name, target in STUDENTS.items()},
        evaluate=dict(tasks=list(SOURCES), protocol="deepseek-r1", k=2),
    )  # type: ignore[arg-type]  # fmt: skip


def _stages(run: RunDir, problems: int, seed: int, items: int, hostile: bool) -> Iterator[str]:
    draw = random.Random(seed)
    rows = [_problem(number, draw) for number in range(problems)]
    first = {row.id: number for number, row in reversed(list(enumerate(rows)))}
    judged = [Decision(row.id, "" if first[row.id] == number else "repeated", "") for number, row in enumerate(rows)]
    judged[3] = Decision("row-3", "empty", "the column answer is empty")
    rows[3] = Problem("row-3", "reasoning_gym", rows[3].domain, rows[3].question, "", rows[3].source, 3)
    write_table(run / "problems.parquet", Problem, rows)
    _judge(run, "problems", judged, 0.4)
    yield "problems"

    kept = [row for row, one in zip(rows, judged, strict=True) if not one.reason]
    judged = [_prompt_decision(row, kept[0], draw) for row in kept]
    _judge(run, "prompts", judged, 1.3)
    yield "prompts"

    kept = [row for row, one in zip(kept, judged, strict=True) if not one.reason]
    traces = [trace for row in kept for trace in _traces(row, draw, seed)]
    if hostile:
        traces[0] = _with(traces[0], thought=HOSTILE + "\n\u202e reversed \x07 " + "long " * 4000)
    write_table(run / "traces.parquet", Trace, traces)
    with Store(run / "samples.sqlite") as store:
        for one in traces:
            text = f"{one.thought}\n</think>\n\n{one.response}"
            completion = Completion(text, None, one.finish_reason, 40, one.completion_tokens)
            store.put(one.key, completion, {"id": one.id})
    judged = [_verdict_decision(one) for one in traces]
    total = sum(one.completion_tokens or 0 for one in traces)
    extras = dict(asked=len(traces), reused=0, prompt_tokens=40 * len(traces), completion_tokens=total, dollars=0.0123)
    _judge(run, "traces", judged, 96.2, **extras)
    yield "traces"

    kept_traces = [one for one, decision in zip(traces, judged, strict=True) if not decision.reason]
    for stage, seconds, decide in (
        ("filter", 0.8, _filter_decision), ("dedup", 1.1, _dedup_decision),
        ("decontaminate", 0.5, lambda trace, draw: Decision(trace.id)), ("mix", 0.1, _mix_decision),
    ):  # fmt: skip
        judged = [decide(one, draw) for one in kept_traces]
        _judge(run, stage, judged, seconds)
        kept_traces = [one for one, decision in zip(kept_traces, judged, strict=True) if not decision.reason]
        yield stage

    by_id = {row.id: row for row in rows}
    write_table(run / "dataset" / "train.parquet", Row, [_row(by_id[one.problem_id], one) for one in kept_traces])
    tokens = sum(one.completion_tokens or 0 for one in kept_traces)
    _finish(run, "dataset", 0.2, {"in": len(kept_traces), "kept": len(kept_traces), "tokens": tokens})
    yield "dataset"

    for name in STUDENTS:
        log = _log(name, draw)
        one = kept_traces[0]
        learnt = f"{one.thought}\n</think>\n\n{one.response}" if name == "traces" else f"\n</think>\n\n{one.response}"
        shown = f"⟦<|User|>{by_id[one.problem_id].question}<|Assistant|><think>\n⟧{learnt}<|end|>"
        labels = dict(rows=len(kept_traces), shown=shown, end_of_sequence="<|end|>", notes=[])
        for file, content in (("log.json", log), ("labels.json", labels), ("model/config.json", {})):
            write_json(run / "students" / name / file, content)
        counts = dict(
            rows=len(kept_traces), dropped_too_long=2 if name == "traces" else 0, tokens=41_000, steps=len(log),
            epochs=3.0, final_loss=log[-1]["loss"],
        )  # fmt: skip
        _finish(run, f"student:{name}", 41.7, counts)
        yield f"student:{name}"

    for name in SKILLS:
        _evaluate(run / "eval" / name, name, items)
        _finish(run, f"eval:{name}", 12.4, {"tasks": len(SOURCES), "samples": 2 * 3 * items})
        yield f"eval:{name}"


def _judge(run: RunDir, stage: str, decisions: list[Decision], took: float, **extras: Any) -> None:
    write_table(run.decisions(stage), Decision, decisions)
    counts = Counter(one.reason for one in decisions)
    kept = counts.pop("", 0)
    _finish(run, stage, took, {"in": len(decisions), "kept": kept, **counts, **extras})


def _finish(run: RunDir, name: str, took: float, counts: dict[str, Any]) -> None:
    """The entry that the pipeline would write."""
    recipe = Recipe(**read_json(run / "recipe.json")["recipe"])
    stage = next(one for one in stages(recipe, run) if one.name == name)
    outputs = {output: content_hash(run / output) for output in stage.outputs}
    run.finish(Done(name, stage.fingerprint(run.manifest()), took, outputs, counts))


# Problems and traces.


def _problem(number: int, draw: random.Random) -> Problem:
    source = list(SOURCES)[number % 3]
    if source == "chain_sum":
        numbers = [draw.randint(2, 99) for _ in range(draw.randint(2, 5))]
        question, answer = f"State the final answer to: {' + '.join(map(str, numbers))} =", str(sum(numbers))
    elif source == "spell_backward":
        word = draw.choice(WORDS) + draw.choice(ENDINGS)
        question, answer = f"Spell this word backward: {word}", word[::-1]
    else:
        numbers = [draw.randint(-40, 90) for _ in range(draw.randint(3, 7))]
        question, answer = f"Sort these numbers in ascending order: {numbers}", str(sorted(numbers))
    identity = hashlib.sha256(question.encode()).hexdigest()[:16]
    return Problem(identity, "reasoning_gym", SOURCES[source][0], question, answer, source, number // 3)


def _traces(problem: Problem, draw: random.Random, seed: int) -> Iterator[Trace]:
    """Samples until `CORRECT` are right, `MOST` at the most."""
    hard = len(problem.question) / 200
    skill = max(0.04, min(0.97, SOURCES[problem.source][1] + 0.25 - 1.2 * hard + draw.uniform(-0.35, 0.3)))
    right = index = 0
    while right < CORRECT and index < MOST:
        x = draw.random()
        verdict: Verdict = "correct" if x < skill else "truncated" if x > 0.96 else "no_answer" if x > 0.92 else "wrong"
        yield _trace(problem, index, verdict, draw, seed)
        right += verdict == "correct"
        index += 1


def _trace(problem: Problem, index: int, verdict: Verdict, draw: random.Random, seed: int) -> Trace:
    thought = "\n\n".join(_steps(problem, draw))
    answer = problem.answer if verdict == "correct" else "".join(draw.sample(problem.answer, len(problem.answer)))
    response = f"So the answer is \\boxed{{{answer}}}."
    tokens = int(len(thought) / 2.2) + draw.randint(15, 60)
    extracted: str | None = answer
    if verdict == "truncated":
        response, extracted, tokens = "", None, 400
        thought += "\n\nWait, let me check this again." * 12
    elif verdict == "no_answer":
        response, extracted = "I am not sure.", None
    kind = draw.random()
    if verdict == "correct" and kind < 0.05:
        thought += "\n\n" + "让我再检查一遍这个结果。"
    elif verdict == "correct" and kind < 0.08:
        thought += "\n\n```python\nprint(sum(numbers))\n```"
    elif verdict == "correct" and kind < 0.11:
        thought += "\n\nWait, is that right?" * 9
    elif verdict == "correct" and kind < 0.12:
        thought = ""
    return Trace(
        id=f"{problem.id}/{index}", problem_id=problem.id, index=index,
        key=hashlib.sha256(f"{problem.id} {index} {seed}".encode()).hexdigest(), seed=draw.getrandbits(31),
        thought=thought, response=response, state="truncated" if verdict == "truncated" else "closed",
        finish_reason="length" if verdict == "truncated" else "stop", verdict=verdict, extracted=extracted,
        detail="" if verdict == "correct" else f"{extracted} is not {problem.answer}" if extracted else "no box",
        grader="reasoning_gym/1", prompt_tokens=40, completion_tokens=min(tokens, 400),
    )  # fmt: skip


def _steps(problem: Problem, draw: random.Random) -> Iterator[str]:
    if problem.source == "chain_sum":
        numbers = [int(part) for part in problem.question.split(":")[1].replace("=", "").split("+")]
        yield f"We add {len(numbers)} numbers from left to right."
        for place in range(1, len(numbers)):
            before = sum(numbers[:place])
            tens, ones = divmod(numbers[place], 10)
            first = before + 10 * tens
            yield f"{before} + {numbers[place]}: {before} + {10 * tens} = {first}, plus {ones} is {first + ones}."
    elif problem.source == "spell_backward":
        word = problem.answer[::-1]
        yield f"The letters of {word} are: {', '.join(word)}."
        yield f"From the last to the first: {', '.join(problem.answer)}."
        yield f"Joined: {problem.answer}."
    else:
        left = json.loads(problem.question.split(": ")[1])
        yield f"There are {len(left)} numbers. I take the smallest that is left, again and again."
        while left:
            yield f"The smallest of {left} is {min(left)}."
            left.remove(min(left))
    if draw.random() < 0.4:
        yield "Let me check that no step was left out. It was not."


def _with(trace: Trace, **changes: Any) -> Trace:
    return Trace(**{**{name: getattr(trace, name) for name in Trace.__slots__}, **changes})


def _prompt_decision(row: Problem, first: Problem, draw: random.Random) -> Decision:
    x = draw.random()
    if x < 0.03:
        return Decision(row.id, "near_duplicate", f"of {first.id}, similarity 0.94")
    if x < 0.06:
        return Decision(row.id, "contaminated", f"{row.source} item 17, exact")
    return Decision(row.id)


def _verdict_decision(trace: Trace) -> Decision:
    return Decision(trace.id, "" if trace.verdict == "correct" else str(trace.verdict), trace.detail)


def _filter_decision(trace: Trace, draw: random.Random) -> Decision:
    if not trace.thought:
        return Decision(trace.id, "empty_thought", "")
    if "让" in trace.thought:
        return Decision(trace.id, "mixed_languages", "en, then zh from character 212")
    if "```" in trace.thought:
        return Decision(trace.id, "code_block", "```python at character 198")
    if trace.thought.count("Wait, ") > 5:
        return Decision(trace.id, "repetition", "'Wait, is that right?' 9 times in a row")
    return Decision(trace.id)


def _dedup_decision(trace: Trace, draw: random.Random) -> Decision:
    if trace.index and draw.random() < 0.5:
        return Decision(trace.id, "near_duplicate", f"of {trace.problem_id}/0, similarity 0.97")
    return Decision(trace.id)


def _mix_decision(trace: Trace, draw: random.Random) -> Decision:
    return Decision(trace.id, "over_quota" if draw.random() < 0.04 else "", "")


def _row(problem: Problem, trace: Trace) -> Row:
    messages = json.dumps([{"role": "user", "content": problem.question}])
    return Row(
        trace.id, problem.id, problem.domain, problem.source, messages, trace.thought, trace.response,
        f"\\boxed{{{problem.answer}}}", trace.completion_tokens, "Apache-2.0",
    )  # fmt: skip


# Students and evaluations.


def _log(name: str, draw: random.Random, steps: int = 120) -> list[dict[str, float]]:
    floor, scale = (0.16, 1.5) if name == "traces" else (0.55, 1.9)
    return [
        {
            "step": step,
            "epoch": 3 * step / steps,
            "loss": floor + scale * math.exp(-step / 22) + draw.gauss(0, 0.035) * (1 + math.exp(-step / 30)),
            "learning_rate": 1e-3 * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
        }
        for step in range(1, steps + 1)
    ]


class Skilled:
    """Answers with the gold as often as its skill says, by the seed of the request."""

    context_length = None

    def __init__(self, name: str) -> None:
        self.identity, self.skill = {"model": name}, SKILLS[name]

    def render(self, messages: Any, *, open_thought: bool) -> str:
        return f"{messages[-1]['content']}<think>\n"

    def check(self, requests: Iterable[Any]) -> None:
        assert list(requests)

    def sample(self, requests: Iterable[Any]) -> Iterator[Any]:
        for request in requests:
            sample = request.tag.sample
            # One draw an item for its difficulty, which all models share, and one for each sample.
            x = 0.6 * fraction(sample.id, sample.task) + 0.4 * fraction(self.identity, request.seed)
            text = f"so</think>{sample.gold if x < self.skill else '?'}"
            cut = fraction(request.seed, "cut") < 0.04
            yield request, Completion(text, None, "length" if cut else "stop", 40, 400 if cut else 90 + int(200 * x))


def _grade(sample: Sample, answer: str, chain: str) -> Graded:
    return Graded("correct" if answer.strip() == sample.gold else "wrong", answer.strip(), "", "exact/1")


def benchmark(name: str) -> Benchmark:
    return Benchmark(
        name=name, title=name, source=Source(hub="none/none", split="test", file="none.jsonl", rows=0), licence="none",
        citation="none", kind="choice", to_sample=lambda row, index: Sample(**row), grade=_grade, grader="exact/1",
        prompts={"plain": lambda sample, shots: sample.question},
    )  # fmt: skip


def _evaluate(out: Path, name: str, items: int) -> None:
    settings = dict(mode="chat", template="plain", samples=2, temperature=1.0, max_tokens=400, open_thought=True)
    draw = random.Random(7)
    held_out = [_problem(number, draw) for number in range(3 * items)]
    samples = {
        task: [
            Sample(id=str(number), task=task, question=one.question, gold=one.answer)
            for number, one in enumerate(held_out)
            if one.source == task
        ]
        for task in SOURCES
    }
    protocol = Protocol(name="deepseek-r1-small", source="tests", defaults=settings)
    evaluate(Skilled(name), [benchmark(task) for task in SOURCES], protocol, out, items=samples)
