"""A model, tasks, a protocol: samples, verdicts, scores.

`evaluate` reads from top to bottom: plan, check, ask for what is missing, grade what is stored, sum up. Samples go
through the store (`OUT/samples.sqlite`), so a run that is killed goes on where it was, and verdicts and results are
functions of what is stored. `regrade` judges stored samples again without the model; `compare` sets two runs side by
side. The files are described in `results.py`.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from eval.benchmark import Benchmark, dataset_hash, duplicates, exemplars, load, read_rows
from eval.metrics import Classes, PairedDifference, paired_difference, same_text
from eval.multiple_choice import LETTERS, permuted
from eval.protocols import Protocol, Settings, get_protocol
from eval.results import (
    FLIPS,
    GRADED,
    Lines,
    Results,
    Row,
    TaskResult,
    describe,
    read_results,
    summarise,
    total_verdicts,
    write_results,
)
from eval.results import read_rows as read_graded
from eval.sample import Completion, Graded, Sample, Verdict
from eval.samplers import Message, Request, Sampler
from eval.store import Store, Stored, key
from eval.thinking import OPEN, complete_part, split_thought

STORE = "samples.sqlite"
LIKELIHOOD_GRADER = "likelihood/1"
PACKAGES = (
    "deepseek-hf",
    "torch",
    "transformers",
    "math-verify",
    "latex2sympy2_extended",
    "sympy",
    "scipy",
    "datasets",
)
CHUNK = 256  # samples that are graded at a time

Progress = Callable[[str, int, int, str], None]
"""Called with the stage, how many are done, of how many, and a note; see `progress.Display`."""

Data = Path | str | Mapping[str, Path] | None


def evaluate(
    sampler: Sampler,
    tasks: Sequence[str | Benchmark],
    protocol: str | Path | Protocol,
    out: str | Path,
    *,
    k: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    pass_at: Sequence[int] = (),
    overrides: Mapping[str, Any] | None = None,
    data: Data = None,
    changed_data: bool = False,
    items: Mapping[str, Sequence[Sample]] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Asks `sampler` the tasks by the protocol, k samples an item, and judges them. Everything is kept under `out`.

    `k` replaces the protocol's number of samples, `overrides` any of its settings. `limit` takes the first items of
    each task; they are the same samples as without it. `pass_at` lists further pass@k to compute. `data` is the folder
    of the benchmark files, or a path for each task (None: the Hub); `changed_data` accepts other files than the
    published ones. `items` gives a task's samples outright, in place of its files.

    Whatever can be known to be wrong is an error before the first sample: ValueError, FileNotFoundError,
    BlockingIOError (another run writes to `out`). A completion that fails is a failed sample, not an error; the next
    run asks for it again, and for nothing that is stored.
    """
    plan = plan_run(
        tasks, protocol, k=k, limit=limit, seed=seed, pass_at=pass_at, overrides=overrides, data=data,
        changed_data=changed_data, items=items,
    )  # fmt: skip
    return run_plan(sampler, plan, out, progress)


def run_plan(sampler: Sampler, plan: "Plan", out: str | Path, progress: Progress | None = None) -> Results:
    """`evaluate` of what `plan_run` has read and checked."""
    out = Path(out)
    identity = sampler.identity
    with Store(out / STORE) as store:
        ask_missing(store, plan, sampler, identity, progress)
        graded = Lines(out / GRADED)
        try:
            results = [
                _task_result(plan, task, _graded_rows(store, plan, task, sampler, identity, progress), graded)
                for task in plan.tasks
            ]
        except BaseException:
            graded.discard()
            raise
        return _write(
            out, graded, results,
            model=identity, protocol=plan.protocol.model_dump(mode="json"), seed=plan.seed, limit=plan.limit,
            versions=versions(),
        )  # fmt: skip


# The plan: what is to be asked, without asking.


@dataclass(frozen=True)
class Task:
    """A benchmark with its settings resolved and its items at hand; `pool` are the worked examples to choose from."""

    benchmark: Benchmark
    settings: Settings
    samples: tuple[Sample, ...]
    pool: tuple[Sample, ...]
    dataset: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    protocol: Protocol
    tasks: tuple[Task, ...]
    seed: int
    pass_at: tuple[int, ...]
    limit: int | None

    @property
    def samples(self) -> int:
        return sum(len(task.samples) * task.settings.samples for task in self.tasks)


def plan_run(
    tasks: Sequence[str | Benchmark],
    protocol: str | Path | Protocol,
    *,
    k: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    pass_at: Sequence[int] = (),
    overrides: Mapping[str, Any] | None = None,
    data: Data = None,
    changed_data: bool = False,
    items: Mapping[str, Sequence[Sample]] | None = None,
) -> Plan:
    """Resolves the settings and loads the items; no model is needed. Raises what `evaluate` raises for them."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: at least one item of each task must be asked")
    benchmarks = find_benchmarks(tasks)
    protocol = protocol if isinstance(protocol, Protocol) else get_protocol(protocol)
    settings = [protocol.settings(one, **{**(overrides or {}), "samples": k}) for one in benchmarks]
    for benchmark, resolved in zip(benchmarks, settings, strict=True):  # all of them before the first file is read
        _check_settings(benchmark, resolved, pass_at)
    planned = []
    for benchmark, resolved in zip(benchmarks, settings, strict=True):
        source = benchmark.source
        given = (items or {}).get(benchmark.name)
        samples = load(benchmark, _paths(data), changed=changed_data) if given is None else _given(benchmark, given)
        of = len(samples)
        samples = samples[:limit]
        if not samples:
            raise ValueError(f"{benchmark.name} has no items: there is nothing to ask")
        if resolved.permutation == "per_sample" and not all(sample.choices for sample in samples):
            raise ValueError(f"{benchmark.name}: permutation=per_sample orders choices, and its items have none")
        if resolved.mode == "loglikelihood" and not all(sample.choices for sample in samples):
            raise ValueError(f"{benchmark.name}: mode=loglikelihood compares choices, and its items have none")
        pool = tuple(load_exemplars(benchmark, data, changed=changed_data)) if resolved.shots else ()
        config = list(source.config) if isinstance(source.config, tuple) else source.config
        dataset = dict(
            hash=dataset_hash(samples), items=len(samples), of=of,
            repeated=sum(len(ids) - 1 for ids in duplicates(samples)), changed=changed_data or given is not None,
            hub=source.hub, config=config, split=source.split, revision=source.revision, file=source.file,
        )  # fmt: skip
        planned.append(Task(benchmark, resolved, tuple(samples), pool, dataset))
    return Plan(protocol, tuple(planned), seed, tuple(sorted(set(pass_at))), limit)


def find_benchmarks(tasks: Sequence[str | Benchmark]) -> list[Benchmark]:
    """The benchmarks by their names in `tasks.TASKS`; one's own may stand among them as they are."""
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks={tasks!r}: give a list of at least one task")
    benchmarks = [_by_name(one) if isinstance(one, str) else one for one in tasks]
    names = [one.name for one in benchmarks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"tasks names {', '.join(twice)} more than once")
    return benchmarks


def _by_name(name: str) -> Benchmark:
    from eval.tasks import get_task  # every benchmark's file, which those who bring their own do without

    return get_task(name)


def _check_settings(benchmark: Benchmark, settings: Settings, pass_at: Sequence[int]) -> None:
    for k in pass_at:
        if not 1 <= k <= settings.samples:
            raise ValueError(
                f"{benchmark.name}: pass@{k} needs k={k} samples of every item, and k is {settings.samples}; raise k, "
                "or ask for a smaller one"
            )
    if settings.mode != "loglikelihood" and settings.chain not in benchmark.chains:
        raise ValueError(
            f"{benchmark.name}: chain={settings.chain!r} is none of its own: {', '.join(benchmark.chains)}"
        )
    same = "at temperature 0" if settings.temperature == 0 else "by log-likelihood"
    if (
        settings.samples > 1
        and settings.permutation == "published"
        and (settings.temperature == 0 or settings.mode == "loglikelihood")
    ):
        raise ValueError(
            f"{benchmark.name}: k={settings.samples} samples {same} would be one sample {settings.samples} times; "
            + ("set a temperature, or k=1" if settings.mode != "loglikelihood" else "set k=1")
        )


def _given(benchmark: Benchmark, samples: Sequence[Sample]) -> list[Sample]:
    """What `load` sees to for files: seeds and files of results go by task and id."""
    if others := sorted({sample.task for sample in samples} - {benchmark.name}):
        raise ValueError(
            f"items of {benchmark.name} name the task {', '.join(others)}; theirs must be {benchmark.name}"
        )
    if len({sample.id for sample in samples}) != len(samples):
        raise ValueError(f"items of {benchmark.name}: ids stand twice; give each item its own")
    return list(samples)


def _paths(data: Data) -> Path | Mapping[str, Path] | None:
    if isinstance(data, Mapping):
        return {name: Path(path) for name, path in data.items()}
    return None if data is None else Path(data)


def load_exemplars(benchmark: Benchmark, data: Data = None, *, changed: bool = False) -> list[Sample]:
    """The rows from which a few-shot prompt takes its worked examples; none where the benchmark prints its own."""
    source = benchmark.exemplars
    if source is None or benchmark.fixed_exemplars:
        return []
    paths = _paths(data)
    path = paths.get(benchmark.name) if isinstance(paths, Mapping) else paths
    if path is not None and path.is_file() and source.file != benchmark.source.file:
        path = path.parent / Path(source.file).name  # the questions' own file was named; these are beside it
    return [benchmark.to_sample(row, index) for index, row in enumerate(read_rows(source, path, changed=changed))]


# The requests: functions of the plan, in its order, made as they are needed.


@dataclass(frozen=True, slots=True)
class Asked:
    """One sample to be had: the item as it is shown, the request, its key, and whether the prompt opens a thought
    (None: the endpoint renders it)."""

    sample: Sample
    index: int
    request: Request
    key: str
    opened: bool | None

    @property
    def context(self) -> dict[str, Any]:
        """What stands beside the completion in the store, and is enough to judge it again."""
        return {
            "task": self.sample.task,
            "id": self.sample.id,
            "index": self.index,
            "opened": self.opened,
            "sample": self.sample.to_json(),
        }


def sample_seed(seed: int, task: str, sample_id: str, index: int) -> int:
    """The seed of one sample: it depends on these four and on nothing else, be it order, limit, batch or resuming.

    31 bits, since servers differ in what they accept.
    """
    digest = hashlib.sha256(json.dumps([seed, task, sample_id, index]).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def asked(
    plan: Plan, sampler: Sampler, identity: Mapping[str, Any], *, only: Task | None = None, distinct: bool = False
) -> Iterator[Asked]:
    """Everything to be asked, task by task, item by item, index by index; `distinct` leaves out equal prompts."""
    for task in plan.tasks if only is None else (only,):
        settings, stop = task.settings, task.benchmark.stop if task.settings.mode == "completion" else ()
        reorder = settings.permutation == "per_sample"
        for sample in task.samples:
            prompt: str | tuple[Message, ...] = ""
            for index in range(settings.samples if reorder or not distinct else 1):
                number = sample_seed(plan.seed, task.benchmark.name, sample.id, index)
                shown = permuted(sample, number) if reorder else sample
                if reorder or index == 0:
                    prompt = _prompt(task, shown, sampler)
                if settings.mode == "loglikelihood":  # the seed says nothing, but keeps two equal questions apart
                    request = Request(prompt, number, choices=continuations(prompt, len(shown.choices)))
                else:
                    request = Request(
                        prompt, number, settings.max_tokens, settings.temperature, settings.top_p, tuple(stop)
                    )
                opened = prompt.rstrip().endswith(OPEN) if isinstance(prompt, str) else None
                yield Asked(shown, index, request, key(identity, request), opened)


def _prompt(task: Task, sample: Sample, sampler: Sampler) -> str | tuple[Message, ...]:
    settings = task.settings
    examples = exemplars(task.benchmark, sample, task.pool, settings.shots) if settings.shots else ()
    text = task.benchmark.prompts[settings.template](sample, examples)
    if settings.mode != "chat":
        return text
    messages = [{"role": "user", "content": text}]
    if settings.system is not None:
        messages.insert(0, {"role": "system", "content": settings.system})
    return sampler.render(messages, open_thought=settings.open_thought)


def continuations(prompt: str | tuple[Message, ...], n_choices: int) -> tuple[str, ...]:
    """` A`, ` B`, ... after a prompt that ends in a word or an ASCII colon; without the space where one stands already,
    or after Chinese, whose script writes none."""
    assert isinstance(prompt, str), "completions are asked with plain text"
    space = "" if not prompt or prompt[-1].isspace() or not prompt[-1].isascii() else " "
    return tuple(space + letter for letter in LETTERS[:n_choices])


def ask_missing(
    store: Store, plan: Plan, sampler: Sampler, identity: Mapping[str, Any], progress: Progress | None = None
) -> None:
    """Asks for what the store lacks, each completion stored as it comes; first, whether all of it fits the context."""
    total = sum(1 for _ in store.missing(one.key for one in asked(plan, sampler, identity)))
    if not total:
        return
    sampler.check(one.request for one in asked(plan, sampler, identity, distinct=True))
    failed = 0
    for done, (request, completion) in enumerate(sampler.sample(_missing_requests(store, plan, sampler, identity)), 1):
        store.put(request.tag.key, completion, request.tag.context)
        failed += completion.finish_reason == "failed"
        if progress:
            progress("sampling", done, total, f"{failed} failed" if failed else "")


def _missing_requests(store: Store, plan: Plan, sampler: Sampler, identity: Mapping[str, Any]) -> Iterator[Request]:
    for chunk in _chunks(asked(plan, sampler, identity)):
        present = store.present(one.key for one in chunk)
        for one in chunk:
            if one.key not in present:
                yield replace(one.request, tag=one)


# The verdicts: functions of what is stored.


def grade_completion(
    sample: Sample, completion: Completion, benchmark: Benchmark, settings: Settings, *, opened: bool | None = False
) -> Graded:
    """The verdict on one completion, the same wherever it is asked for: here, in training, on a teacher's traces.

    `sample` is the item as it was shown, and `opened` says whether its prompt ended inside a thought (None: not known).
    A thought that was not closed is `truncated`. Of an answer that the budget cut, only the complete part is read, and
    if that holds no answer it is `truncated` too. An error in a grader is `failed`, with what it said.
    """
    return _judge(sample, completion, benchmark, settings, opened)[0]


def _judge(
    sample: Sample, completion: Completion, benchmark: Benchmark, settings: Settings, opened: bool | None
) -> tuple[Graded, str]:
    """The verdict, and the state of the thought ("" where nothing was generated)."""
    if settings.mode == "loglikelihood" and completion.finish_reason != "failed":
        return _likeliest(sample, completion), ""
    return grade_text(
        completion,
        opened,
        lambda answer: benchmark.grade(sample, answer, settings.chain),
        benchmark.grader,
        confidential=benchmark.confidential,
    )


def grade_text(
    completion: Completion,
    opened: bool | None,
    grade: Callable[[str], Graded],
    grader: str,
    *,
    confidential: bool = False,
    passing: type[Exception] | tuple[type[Exception], ...] = (),
) -> tuple[Graded, str]:
    """What `grade` says of the answer in a completion, and the state of its thought ("" where nothing was generated);
    the rules are those of `grade_completion`.

    `grader` stands on the verdicts for which `grade` is not asked. Errors of the types `passing` are raised: those that
    are no fault of this sample.
    """
    if completion.finish_reason == "failed":
        said = without_quotes(completion.error or "") if confidential else completion.error
        return Graded("failed", None, f"no completion: {said}", grader), ""
    thought = split_thought(
        completion.text, opened=opened, reasoning=completion.reasoning, finish_reason=completion.finish_reason
    )
    if thought.state == "truncated":
        return Graded("truncated", None, "the thought was not closed", grader), thought.state
    cut = completion.finish_reason == "length"
    answer = complete_part(thought.answer) if cut else thought.answer
    try:
        graded = grade(answer)
    except passing:
        raise
    except Exception as error:  # whatever a grader does, it is one sample's verdict and not the end of the run
        said = type(error).__name__ if confidential else f"{type(error).__name__}: {error}"
        return Graded("failed", None, f"the grader failed: {said}", grader), thought.state
    if cut and graded.verdict == "no_answer":
        graded = Graded("truncated", None, "the answer was cut by the budget", graded.grader)
    return graded, thought.state


def without_quotes(error: str) -> str:
    """Our own words on a failure, without the server's after the first `: `: many repeat the request they refuse."""
    return error.partition(": ")[0]


def _likeliest(sample: Sample, completion: Completion) -> Graded:
    """The choice of lowest perplexity, which is that of highest log-probability per token; the first of equal ones."""
    logprobs, tokens = completion.logprobs, completion.choice_tokens or (1,) * len(completion.logprobs)
    if len(logprobs) != len(sample.choices) or any(one != one for one in logprobs):
        detail = f"{len(logprobs)} log-probabilities for {len(sample.choices)} choices, or one that is not a number"
        return Graded("failed", None, detail, LIKELIHOOD_GRADER)
    each = [logprob / max(count, 1) for logprob, count in zip(logprobs, tokens, strict=True)]
    letter = LETTERS[each.index(max(each))]
    verdict: Verdict = "correct" if letter == sample.gold else "wrong"
    return Graded(verdict, letter, "choice of lowest perplexity", LIKELIHOOD_GRADER)


def _row(stored: Stored, sample: Sample, graded: Graded, thought: str) -> Row:
    context, completion = stored.context, stored.completion
    vote = graded.answer
    if vote and sample.permutation and vote in LETTERS[: len(sample.choices)]:
        vote = LETTERS[sample.permutation[LETTERS.index(vote)]]
    return Row(
        task=sample.task, id=sample.id, index=context["index"], key=stored.key,
        verdict=graded.verdict, credit=graded.credit, answer=graded.answer, vote=vote, gold=sample.gold,
        detail=graded.detail, grader=graded.grader, thought=thought, finish_reason=completion.finish_reason,
        prompt_tokens=completion.prompt_tokens, completion_tokens=completion.completion_tokens,
        group=sample.group, cluster=sample.cluster,
    )  # fmt: skip


def _judged(benchmark: Benchmark, settings: Settings, stored: Iterable[Stored]) -> Iterator[Row]:
    """Rows in the order of `stored`. Mathematics is judged in worker processes, several samples at a time."""

    def judge(one: Stored) -> Row:
        sample = Sample.from_json(one.context["sample"])
        return _row(one, sample, *_judge(sample, one.completion, benchmark, settings, one.context["opened"]))

    if benchmark.kind != "math":
        yield from map(judge, stored)
        return
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for chunk in _chunks(stored):
            yield from threads.map(judge, chunk)


def _graded_rows(
    store: Store, plan: Plan, task: Task, sampler: Sampler, identity: Mapping[str, Any], progress: Progress | None
) -> Iterator[Row]:
    rows = _judged(task.benchmark, task.settings, _stored(store, asked(plan, sampler, identity, only=task)))
    yield from _counted(rows, f"grading {task.benchmark.name}", len(task.samples) * task.settings.samples, progress)


def _stored(store: Store, everything: Iterable[Asked]) -> Iterator[Stored]:
    for chunk in _chunks(everything):
        for one, found in zip(chunk, store.get_many(one.key for one in chunk), strict=True):
            if found is None:
                raise RuntimeError(
                    f"the sampler gave nothing back for {one.sample.task}, {one.sample.id}, index {one.index}"
                )
            if found.context != one.context:  # the question's gold answer was mended since, say
                store.set_context(one.key, one.context)
                found = Stored(found.key, found.completion, one.context)
            yield found


def _task_result(plan: Plan, task: Task, rows: Iterable[Row], graded: Lines) -> TaskResult:
    benchmark, settings = task.benchmark, task.settings
    summary = summarise(
        _written(rows, graded), k=settings.samples, pass_at=plan.pass_at, classes=vote_classes(benchmark, settings)
    )
    return TaskResult(
        task=benchmark.name, title=benchmark.title, kind=benchmark.kind, licence=benchmark.licence,
        citation=benchmark.citation, confidential=benchmark.confidential, chance=benchmark.chance,
        settings=settings.model_dump(mode="json"), ours=plan.protocol.choices_of_ours(benchmark.name),
        dataset=task.dataset, **summary,
    )  # fmt: skip


def vote_classes(benchmark: Benchmark, settings: Settings) -> Classes | None:
    """How answers are put into classes for cons@k; None where there is no vote: one sample, or free text."""
    if settings.samples == 1 or benchmark.kind == "text":
        return None
    if benchmark.kind == "choice":
        return same_text
    from eval.answers import answer_classes

    return answer_classes


def _write(out: Path, graded: Lines, tasks: list[TaskResult], **run: Any) -> Results:
    verdicts = total_verdicts(tasks)
    results = Results(
        complete=not any(task.unanswered for task in tasks),
        samples=sum(task.samples for task in tasks),
        verdicts=verdicts,
        tasks=tasks,
        graded_sha256=graded.commit(),
        **run,
    )
    assert sum(verdicts.values()) == results.samples
    write_results(out, results)
    return results


def _written(rows: Iterable[Row], file: Lines) -> Iterator[Row]:
    for row in rows:
        file.write(row.to_json())
        yield row


def _counted(rows: Iterable[Row], stage: str, total: int, progress: Progress | None) -> Iterator[Row]:
    for done, row in enumerate(rows, 1):
        yield row
        if progress:
            progress(stage, done, total, "")


def _chunks(values: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide samples and verdicts, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# Stored samples, judged again; two runs, compared.


@dataclass(frozen=True, slots=True)
class Flip:
    """A sample whose verdict or credit is another one than before."""

    task: str
    id: str
    index: int
    key: str
    before: Verdict
    after: Verdict
    answer_before: str | None
    answer_after: str | None
    grader_before: str
    grader_after: str
    detail: str


@dataclass(frozen=True)
class Regraded:
    """`before` and `after` a regrading, and what flipped: also in OUT/flips.jsonl."""

    before: Results
    after: Results
    flips: list[Flip]

    @property
    def counts(self) -> dict[tuple[Verdict, Verdict], int]:
        pairs = sorted((flip.before, flip.after) for flip in self.flips)
        return {pair: len(list(same)) for pair, same in groupby(pairs)}


def regrade(out: str | Path, *, benchmarks: Sequence[Benchmark] = (), progress: Progress | None = None) -> Regraded:
    """Judges the samples of a finished run again, as they are stored, without the model and without the data files.

    Rewrites `results.json` and `graded.jsonl`, and lists the flips in `flips.jsonl`. `benchmarks` are those of the run
    that `tasks.TASKS` does not hold.
    """
    out = Path(out)
    before = read_results(out)
    with Store(out / STORE) as store:
        own = {one.name: one for one in benchmarks}
        found = find_benchmarks([own.get(task.task, task.task) for task in before.tasks])
        old_rows = read_graded(out, before)
        graded, flipped = Lines(out / GRADED), Lines(out / FLIPS)
        flips: list[Flip] = []
        tasks = []
        try:
            for benchmark, task in zip(found, before.tasks, strict=True):
                settings = Settings(**task.settings)
                rows = _judged_again(store, benchmark, settings, islice(old_rows, task.samples), flips)
                summary = summarise(
                    _written(_counted(rows, f"grading {benchmark.name}", task.samples, progress), graded),
                    k=task.k,
                    pass_at=[int(one) for one in (*task.pass_at, *task.refused)],
                    classes=vote_classes(benchmark, settings),
                )
                tasks.append(TaskResult(**{**vars(task), **summary}))
            for flip in flips:
                flipped.write(json.dumps(asdict(flip), ensure_ascii=False))
        except BaseException:
            graded.discard()
            flipped.discard()
            raise
        flipped.commit()
        after = _write(
            out, graded, tasks,
            model=before.model, protocol=before.protocol, seed=before.seed, limit=before.limit, versions=versions(),
        )  # fmt: skip
        return Regraded(before, after, flips)


def _judged_again(
    store: Store, benchmark: Benchmark, settings: Settings, rows: Iterable[Row], flips: list[Flip]
) -> Iterator[Row]:
    for chunk in _chunks(rows):
        stored = list(store.get_many(row.key for row in chunk))
        if None in stored:
            row = chunk[stored.index(None)]
            raise ValueError(
                f"{store.path} no longer holds {row.task}, {row.id}, index {row.index}; run the evaluation again"
            )
        for old, new in zip(chunk, _judged(benchmark, settings, (one for one in stored if one)), strict=True):
            if (old.verdict, old.credit) != (new.verdict, new.credit):
                flips.append(
                    Flip(
                        task=new.task,
                        id=new.id,
                        index=new.index,
                        key=new.key,
                        detail=new.detail,
                        before=old.verdict,
                        answer_before=old.answer,
                        grader_before=old.grader,
                        after=new.verdict,
                        answer_after=new.answer,
                        grader_after=new.grader,
                    )
                )
            yield new


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same items, task by task: `differences[task]` is a minus b. `only_a` and `only_b` are the tasks
    that the other run does not have. `unanswered[task]` counts the completions of a and of b that failed, which count
    as wrong until they are asked again."""

    model_a: dict[str, Any]
    model_b: dict[str, Any]
    differences: dict[str, PairedDifference]
    only_a: list[str]
    only_b: list[str]
    unanswered: dict[str, tuple[int, int]]


def compare(out_a: str | Path, out_b: str | Path) -> Comparison:
    """The paired differences of two finished runs. ValueError, naming all that differs, unless they asked the same
    questions in the same way and judged them with the same graders; only k may differ."""
    a, b = read_results(out_a), read_results(out_b)
    names_a, names_b = [task.task for task in a.tasks], [task.task for task in b.tasks]
    shared = [name for name in names_a if name in names_b]
    if not shared:
        raise ValueError(f"{out_a} has {', '.join(names_a)} and {out_b} has {', '.join(names_b)}: no task is in both")
    unlike = [line for name in shared for line in _unlike(a.task(name), b.task(name))]
    if unlike:
        raise ValueError(f"{out_a} and {out_b} cannot be compared:\n  " + "\n  ".join(unlike))
    scores_a, clusters = _scores_by_item(out_a, a, shared)
    scores_b, _ = _scores_by_item(out_b, b, shared)
    return Comparison(
        a.model,
        b.model,
        {name: paired_difference(scores_a[name], scores_b[name], clusters=clusters[name]) for name in shared},
        [name for name in names_a if name not in names_b],
        [name for name in names_b if name not in names_a],
        {name: (a.task(name).unanswered, b.task(name).unanswered) for name in shared},
    )


def _unlike(a: TaskResult, b: TaskResult) -> Iterator[str]:
    if unlike := Settings(**a.settings).unlike(Settings(**b.settings)):
        yield f"{a.task}: {describe(unlike)}; run both by one protocol"
    if a.dataset["hash"] != b.dataset["hash"]:
        yield (
            f"{a.task}: {a.items} and {b.items} items, which are not the same questions (hash {a.dataset['hash'][:12]} "
            f"and {b.dataset['hash'][:12]}); run both with the same data and limit"
        )
    if a.graders != b.graders:
        yield f"{a.task}: judged by {', '.join(a.graders)} and by {', '.join(b.graders)}; regrade both"


def _scores_by_item(
    out: str | Path, results: Results, names: Sequence[str]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, str]]]:
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    clusters: dict[str, dict[str, str]] = {name: {} for name in names}
    for row in read_graded(out, results):
        if row.task in scores:
            scores[row.task].setdefault(row.id, []).append(row.credit)
            clusters[row.task][row.id] = row.cluster
    return scores, clusters
