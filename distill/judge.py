"""A model that says whether an answer agrees with the published one, where no rule can (kind `text`).

    question, reference, answer --PROMPT--> judgements, one a seed, each stored --read_judgement--> the majority

DeepSeek-R1 has part of its reasoning data judged so by DeepSeek-V3, and V3 votes over several of its own judgements
(arXiv 2412.19437, section 5.4.2). A judge is a model that can be wrong, so it first judges answers whose verdict rules
know (`Judging.calibrate`): below the recipe's floor it is refused, and before that it judges nothing.
"""

import json
import queue
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from distill.calibration import UNREADABLE, Calibration, Known, below_floor, choose, measured
from distill.recipe import Judge
from distill.run_dir import fingerprint
from eval.runner import sample_seed
from eval.sample import Completion, Graded
from eval.samplers import Request, Sampler
from eval.store import Store, key
from eval.thinking import OPEN, split_thought

PROMPT = """\
As an advanced reasoning problem evaluation assistant, your primary responsibility is to assess the accuracy of \
provided answers. You will be presented with a reasoning-related question, its corresponding reference answer, and an \
answer requiring evaluation.

## Answer Quality Classification
You have to carefully analyze and classify the answer into one of the following two levels:
1. **correct**: The answer fully aligns with the reference answer in both reasoning process and final conclusion, and \
address the question without any errors or omissions.
2. **incorrect**: The answer contains major errors in key reasoning steps or the final conclusion, or completely \
deviates from the core of the question. This indicates a fundamental misunderstanding or error in comprehending the \
question.

## Question
{question}

## Reference Answer
{reference}

## Answer to be Evaluated
{answer}

## Output Format
You need to combine the question and reference answer, first provide a detailed explanation of your analysis of the \
answer to be evaluated, then conclude with the final answer quality classification.
Output the following content in **JSON** format, including two key:
1. 'analysis': analysis of the answer's correctness;
2. 'correctness': correct/incorrect"""
"""Word for word from the DeepSeek-R1 paper (arXiv 2501.12948v2, B.3.3, listing 4: DeepSeek-V3 as a judge)."""


def judge_prompt(question: str, reference: str, answer: str) -> str:
    """The prompt, filled at once: braces in the texts stay what they are."""
    return PROMPT.format(question=question.strip(), reference=reference.strip(), answer=answer.strip())


def read_judgement(text: str) -> bool | None:
    """Whether a judgement (without its thought) says correct; None where it says neither, or both.

    The key `correctness` counts in JSON objects, and wherever else it stands (LaTeX in the analysis is seldom valid
    JSON), but not within the strings of an object. All places have to agree: a judgement that quotes another verdict
    beside its own, as an answer may ask it to, counts for neither.

    >>> read_judgement('{"analysis": "It says \\"correctness\\": \\"correct\\".", "correctness": "incorrect"}')
    False
    """
    objects, rest = _objects(text)
    said = {value for one in objects if isinstance(value := one.get("correctness"), str)} | {*_KEY.findall(rest)}
    words = {one.strip(" *_`.").lower() for one in said}
    return words == {"correct"} if words in ({"correct"}, {"incorrect"}) else None


_KEY = re.compile(r"""(?<!\\)["']correctness["']\s*:\s*["']?[*_` ]{0,4}(correct|incorrect)\b""", re.IGNORECASE)
_DECODER = json.JSONDecoder(strict=False)  # models break lines within strings


def _objects(text: str) -> tuple[list[dict[str, Any]], str]:
    """The JSON objects in a text, outermost ones only, and the text without them."""
    objects, rest, read = [], "", 0
    start = text.find("{")
    for _ in range(1000):  # of a text that is all braces, no more is looked at
        if start == -1:
            break
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            objects.append(value)
            rest += text[read:start] + " "
            read = end
        start = text.find("{", end)
    return objects, rest + text[read:]


# Judging.


class NotCalibrated(RuntimeError):
    """The judge was asked before it was tried."""


class Judging:
    """A judge: settings, the model that is asked, and the store that keeps its judgements. Any number of threads may
    call `grade` at once; their requests go to the sampler together.

    ValueError where several judgements would be one, several times.
    """

    def __init__(self, settings: Judge, sampler: Sampler, store: Store, *, seed: int = 0) -> None:
        if settings.votes > 1 and settings.temperature == 0:
            raise ValueError(
                f"verify.judge: temperature=0 gives the same judgement votes={settings.votes} times; set votes: 1, or "
                "raise the temperature"
            )
        self.settings, self.sampler, self.store, self.seed = settings, sampler, store, seed
        self.calibration: Calibration | None = None
        self._identity = sampler.identity
        self._requests = _Queue(sampler)
        self._lock = threading.Lock()
        self._on_their_way: dict[str, Future[Completion]] = {}  # by key

    @property
    def grader(self) -> str:
        """Name and version, with all that a verdict depends on."""
        settings = self.settings
        asked = [self._identity, PROMPT, settings.votes, settings.temperature, settings.top_p, settings.max_tokens]
        return f"judge/1 {settings.model} {fingerprint(*asked, self.seed)}"

    def grade(self, question: str, reference: str, answer: str) -> Graded:
        """The majority's verdict on an answer without its thought; half of the votes is no majority.

        `failed` where judgements that could decide were not obtained, or none can be read. NotCalibrated before
        `calibrate`; ConnectionError where the judge's endpoint is gone.
        """
        if self.calibration is None:
            raise NotCalibrated("this judge has not been calibrated: call `calibrate` first")
        return self._grade(question, reference, answer)

    def calibrate(self, items: Iterable[Known]) -> Calibration:
        """Judges up to `settings.calibration` of the items; from here on the judge may be used.

        ValueError where too many are judged wrongly (the floor), where they do not fit the judge's context, or are of
        no use (`choose`); ConnectionError where the judge cannot be reached.
        """
        chosen, exchanged = choose(items, self.settings.calibration)
        prompts = [self._prompt(one.question, one.reference, one.answer) for one in chosen]
        self.sampler.check(self._request(prompt, 0) for prompt in prompts)
        with ThreadPoolExecutor(min(len(chosen), AT_ONCE), "calibration") as threads:
            judged = list(threads.map(lambda one: self._grade(one.question, one.reference, one.answer), chosen))
        failed = [one.detail for one in judged if one.verdict == "failed" and not one.detail.startswith(UNREADABLE)]
        if failed:
            raise ValueError(f"the judge gave no judgement on {len(failed)} of {len(chosen)} answers: {failed[0]}")
        calibration = measured(chosen, judged, exchanged, self.settings.floor)
        if calibration.agreement < self.settings.floor - 1e-9:  # 0.92 is not less than 0.92
            raise ValueError(below_floor(self.settings.model, calibration))
        self.calibration = calibration
        return calibration

    def _grade(self, question: str, reference: str, answer: str) -> Graded:
        shown = answer.strip()
        if not shown:
            return Graded("no_answer", None, "the answer is empty", self.grader)
        shown = shown if len(shown) <= 200 else shown[:200] + " ..."
        votes, need = self.settings.votes, self.settings.votes // 2 + 1
        prompt = self._prompt(question, reference, answer)
        said: list[bool | None] = []
        errors: list[str] = []
        # A vote that can no longer change the verdict is not asked for. One that failed may still be either.
        while (yes := said.count(True)) < need <= yes + votes - len(said):
            asked = len(said) + len(errors)
            if asked == votes:
                detail = f"{len(errors)} of {votes} judgements were not obtained: {errors[0]}"
                return Graded("failed", shown, detail, self.grader)
            indices = range(asked, min(votes, asked + need - yes))
            for completion in self._complete([self._request(prompt, index) for index in indices]):
                if completion.finish_reason == "failed":
                    errors.append(completion.error or "")
                else:
                    said.append(self._read(prompt, completion))
        if not any(one is not None for one in said):
            return Graded("failed", shown, f"{UNREADABLE} ({len(said)} were given)", self.grader)
        counts = f"{yes} of {len(said)} judgements say correct"
        if unread := said.count(None):
            counts += f", {unread} cannot be read"
        return Graded("correct" if yes >= need else "wrong", shown, counts, self.grader)

    def _prompt(self, question: str, reference: str, answer: str) -> Any:
        content = judge_prompt(question, reference, answer)
        return self.sampler.render([{"role": "user", "content": content}], open_thought=False)

    def _request(self, prompt: Any, index: int) -> Request:
        settings = self.settings
        return Request(
            prompt,
            sample_seed(self.seed, "judge", "", index),
            settings.max_tokens,
            settings.temperature,
            settings.top_p,
        )

    def _read(self, prompt: Any, completion: Completion) -> bool | None:
        opened = prompt.rstrip().endswith(OPEN) if isinstance(prompt, str) else None
        thought = split_thought(
            completion.text, opened=opened, reasoning=completion.reasoning, finish_reason=completion.finish_reason
        )
        return read_judgement(thought.answer)

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions from the store; those that it lacks are asked for, once for all threads that want the same."""
        keys = [key(self._identity, request) for request in requests]
        stored = dict(zip(keys, self.store.get_many(keys), strict=True))
        waiting: dict[str, Future[Completion]] = {}
        mine: list[str] = []
        with self._lock:
            for one, request in zip(keys, requests, strict=True):
                found = stored[one]
                if found is None or found.completion.finish_reason == "failed":
                    if one not in self._on_their_way:
                        self._on_their_way[one] = self._requests.ask(request)
                        mine.append(one)
                    waiting[one] = self._on_their_way[one]
        try:
            for one in mine:
                self.store.put(one, waiting[one].result(), {"task": "judge"})
        finally:
            with self._lock:
                for one in mine:
                    del self._on_their_way[one]
        return [waiting[one].result() if one in waiting else stored[one].completion for one in keys]  # type: ignore[union-attr]  # those not stored are waited for


AT_ONCE = 64  # answers that are judged at a time in calibration


class _Queue:
    """Requests of many threads, as one stream to the sampler: from a thread that lives while there is something to ask,
    since a sampler in this process works on one batch and serves one caller."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._lock = threading.Lock()
        self._running = False
        self._waiting: queue.SimpleQueue[tuple[Request, Future[Completion]]] = queue.SimpleQueue()

    def ask(self, request: Request) -> "Future[Completion]":
        future: Future[Completion] = Future()
        with self._lock:
            self._waiting.put((request, future))
            if not self._running:
                self._running = True
                threading.Thread(target=self._serve, name="judge", daemon=True).start()
        return future

    def _serve(self) -> None:
        pending: set[Future[Completion]] = set()

        def stream() -> Iterator[Request | None]:
            while True:
                try:
                    request, future = self._waiting.get_nowait()
                except queue.Empty:
                    if not pending:
                        return
                    yield None  # until the next completion: more may have come by then
                else:
                    pending.add(future)
                    yield replace(request, tag=future)

        while True:
            try:
                for request, completion in self._sampler.sample(stream()):
                    pending.discard(request.tag)
                    request.tag.set_result(completion)
                problem: BaseException = RuntimeError("the sampler gave nothing back for a judgement")
            except BaseException as error:  # for those who wait
                problem = error
            for future in pending:
                future.set_exception(problem)
            pending.clear()
            with self._lock:
                if self._waiting.empty():
                    self._running = False
                    return
