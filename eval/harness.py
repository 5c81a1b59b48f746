"""Our samplers and benchmarks inside EleutherAI's harness (the optional extra `lm-eval`), and a way to compare.

    lm_eval.simple_evaluate(SamplerLM(sampler), tasks=[lm_eval_task("gsm8k", "deepseek-r1", data=...)],
                            apply_chat_template=True)

`SamplerLM` runs their tasks on our samplers; `lm_eval_task` runs our benchmarks, by a protocol, on any model of theirs.
Both together give the samples that `runner.evaluate` gives: the seeds are the same.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from lm_eval.api.task import Task as HarnessTask
from lm_eval.config.task import TaskConfig
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from eval.benchmark import Benchmark, exemplars
from eval.multiple_choice import permuted
from eval.protocols import Protocol
from eval.runner import Data, continuations, grade_completion, plan_run, sample_seed, without_quotes
from eval.sample import Completion, Graded, Sample
from eval.samplers import Message, Request, Sampler
from eval.thinking import OPEN

# What `generate_until` may ask for. Anything else (`top_k`, `repetition_penalty`, ...) would be dropped in silence, and
# the result would not be what was asked.
KNOWN = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p"})


class Text(str):
    """A text as lm-eval passes it about, with the completion it is from."""

    completion: Completion

    def __new__(cls, text: object, completion: Completion | None = None) -> "Text":
        one = super().__new__(cls, text)  # lm-eval makes others of the same type
        one.completion = completion or Completion(text=str(text))
        return one

    def __reduce__(self) -> tuple[Any, ...]:
        return Text, (str(self), self.completion)


class Chat(str):
    """The messages of a chat as one string, for an endpoint that renders them itself."""

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(json.loads(self))


class SamplerLM(LM):
    """One of lm-eval's models, on one of our samplers.

    Every sample has a seed of its own, made of `seed`, task, item and index: `repeats` of an item differ, where
    lm-eval's own models share one. A completion that fails ends the run, since lm-eval knows no failed sample and would
    grade an empty text as wrong.
    """

    def __init__(self, sampler: Sampler, *, seed: int = 0, max_gen_toks: int = 256):
        super().__init__()
        self.sampler, self.seed, self.max_gen_toks = sampler, seed, max_gen_toks

    def _ask(self, requests: Sequence[Request], what: str, disable_tqdm: bool) -> list[Completion]:
        """Completions in the order of the requests, whose tags are their places."""
        self.sampler.check(requests)
        out: dict[int, Completion] = {}
        for request, completion in tqdm(
            self.sampler.sample(requests), total=len(requests), desc=what, disable=disable_tqdm
        ):
            out[request.tag] = completion
        failed = [completion.error for completion in out.values() if completion.finish_reason == "failed"]
        if failed:
            # Without the server's words: many repeat the request, which may be a confidential question.
            first = without_quotes(failed[0] or "")
            raise RuntimeError(f"{len(failed)} of {len(requests)} requests failed; the first one: {first}")
        return [out[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Each continuation's log-probability; those that follow one context are scored together."""
        together: dict[str, list[str]] = defaultdict(list)
        for instance in requests:
            context, continuation = instance.args
            if continuation not in together[context]:
                together[context].append(continuation)
        asked = [
            Request(context, choices=tuple(choices), tag=place)
            for place, (context, choices) in enumerate(together.items())
        ]
        scores: dict[tuple[str, str], tuple[float, bool]] = {}
        for request, completion in zip(asked, self._ask(asked, "scoring", disable_tqdm), strict=True):
            for choice, *score in zip(request.choices, completion.logprobs, completion.choice_greedy, strict=True):
                pair = (str(request.prompt), choice)
                scores[pair] = (float(score[0]), bool(score[1]))
                self.cache_hook.add_partial("loglikelihood", pair, scores[pair])
        return [scores[instance.args] for instance in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        seen: Counter[tuple[Any, ...]] = Counter()
        asked = []
        for place, instance in enumerate(requests):
            context, given = instance.args
            settings = normalize_gen_kwargs(given, self.max_gen_toks)
            if unknown := sorted(set(settings) - KNOWN):
                raise ValueError(
                    f"generation_kwargs hold {', '.join(unknown)}, which a Request does not know; remove them, or run "
                    "the task on lm-eval's own model"
                )
            temperature = settings.get("temperature", 0.0) if settings["do_sample"] else 0.0
            if settings["do_sample"] and not temperature:
                raise ValueError("generation_kwargs say do_sample without a temperature; add one")
            doc, index = instance.doc, instance.idx
            if isinstance(doc, dict) and {"task", "id"} <= set(doc):  # one of ours, as `runner.evaluate` asks it
                seed = sample_seed(self.seed, doc["task"], doc["id"], index)
            else:
                item = (str(instance.task_name), str(instance.doc_id), index)
                seed = sample_seed(self.seed, item[0], f"{item[1]}/{index}", seen[item])
                seen[item] += 1
            asked.append(
                Request(
                    context.messages if isinstance(context, Chat) else context,
                    seed,
                    settings["max_gen_toks"],
                    float(temperature),
                    float(settings.get("top_p", 1.0)),
                    tuple(stop for stop in settings["until"] if stop),
                    tag=place,
                )
            )
        texts: list[str] = [
            Text(completion.text, completion) for completion in self._ask(asked, "sampling", disable_tqdm)
        ]
        for instance, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", instance.args, text)
        return texts

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of the context as lm-eval cuts them; local models only."""
        sampler: Any = self.sampler
        if not hasattr(sampler, "score"):
            raise NotImplementedError(
                f"{type(sampler).__name__} counts no tokens, so that a text cannot be cut into windows; use a model in "
                "this process (TransformersSampler)"
            )
        windows, owners = [], []
        for owner, instance in enumerate(requests):
            (text,) = instance.args
            for window in get_rolling_token_windows(
                token_list=sampler.encode(text),
                prefix_token=sampler.prefix_token,
                max_seq_len=sampler.context_length,
                context_len=1,
            ):
                windows.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, sampler.score(windows), strict=True):
            totals[owner] += score.logprob
        return totals

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise ValueError("a reply that lm-eval begins (gen_prefix) cannot be sampled here; use a task without it")
        prompt = self.sampler.render(chat_history, open_thought=False)
        return prompt if isinstance(prompt, str) else Chat(json.dumps([dict(message) for message in prompt]))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        tokenizer = getattr(self.sampler, "tokenizer", None)
        return getattr(tokenizer, "chat_template", None) or ""

    @property
    def tokenizer_name(self) -> str:
        return json.dumps(self.sampler.identity, sort_keys=True)

    def get_model_info(self) -> dict[str, Any]:
        return {"sampler": self.sampler.identity}


def lm_eval_task(
    task: str | Benchmark,
    protocol: str | Protocol,
    *,
    k: int | None = None,
    limit: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    data: Data = None,
    items: Mapping[str, Sequence[Sample]] | None = None,
    show_questions: bool = False,
) -> "BenchmarkTask":
    """One of our benchmarks as a task for `lm_eval.simple_evaluate(tasks=[...])`, asked by a protocol, offline if
    `data` names the files. The arguments are those of `runner.evaluate`, which says what they raise.

    lm-eval keeps every prompt beside its results. A confidential benchmark (GPQA) therefore needs `show_questions`.
    """
    plan = plan_run([task], protocol, k=k, limit=limit, overrides=overrides, data=data, items=items)
    benchmark = plan.tasks[0].benchmark
    if benchmark.confidential and not show_questions:
        raise ValueError(
            f"{benchmark.name} must not stand in plain text, and lm-eval keeps every prompt beside its results; use "
            "`deepseek-eval run`, or pass show_questions=True and keep the results to yourself"
        )
    return BenchmarkTask(plan.tasks[0])


class BenchmarkTask(HarnessTask):
    """A benchmark with its settings. The metrics are `score` (the mean credit of the k samples, then of the items) and
    the rates of the other verdicts."""

    VERSION = 1

    def __init__(self, planned: Any):
        self.planned, self.settings, self.benchmark = planned, planned.settings, planned.benchmark
        self.opened: bool | None = False  # whether prompts end inside a thought; None where an endpoint renders them
        self.samples: dict[str, Sample] = {sample.id: sample for sample in planned.samples}
        self.OUTPUT_TYPE = "loglikelihood" if self.settings.mode == "loglikelihood" else "generate_until"
        super().__init__()
        self._config = TaskConfig(
            task=self.benchmark.name,
            output_type=self.OUTPUT_TYPE,
            num_fewshot=self.settings.shots,
            generation_kwargs=None if self.OUTPUT_TYPE == "loglikelihood" else self._generation_kwargs(),
            metadata={"version": self.VERSION, "settings": self.settings.model_dump(mode="json")},
        )

    def _generation_kwargs(self) -> dict[str, Any]:
        settings = self.settings
        stop = list(self.benchmark.stop) if settings.mode == "completion" else []
        sampled = {"temperature": settings.temperature, "top_p": settings.top_p} if settings.temperature else {}
        return {"until": stop, "max_gen_toks": settings.max_tokens, "do_sample": settings.temperature > 0, **sampled}

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the plan has read its files."""

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[dict[str, Any]]:
        name = self.benchmark.name
        if self.benchmark.confidential:
            return [{"task": name, "id": number} for number in self.samples]
        return [{**json.loads(sample.to_json()), "task": name} for sample in self.samples.values()]

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return self._text(self.samples[doc["id"]])

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        return self.samples[doc["id"]].gold

    def _text(self, sample: Sample) -> str:
        shots = self.settings.shots
        if self.config.num_fewshot not in (None, shots):
            raise ValueError(
                f"num_fewshot={self.config.num_fewshot} is not the protocol's; set overrides={{'shots': ...}}"
            )
        examples = exemplars(self.benchmark, sample, self.planned.pool, shots) if shots else ()
        return self.benchmark.prompts[self.settings.template](sample, examples)

    def _shown(self, sample: Sample, index: int) -> Sample:
        """The item as sample `index` shows it. The order of the choices goes by the runner's seed 0."""
        if self.settings.permutation == "per_sample":
            return permuted(sample, sample_seed(0, self.benchmark.name, sample.id, index))
        return sample

    def fewshot_context(
        self, doc: dict[str, Any], num_fewshot: int, *args: Any, **kwargs: Any
    ) -> Callable[[Sample], str]:
        """How a sample's prompt is made; `construct_requests` calls it for each order of the choices."""
        template, chat = kwargs.get("chat_template"), self.settings.mode == "chat"
        if chat != (template is not None):
            raise ValueError(
                f"{self.benchmark.name}: the protocol asks in mode={self.settings.mode}; run simple_evaluate with "
                f"apply_chat_template={chat}"
            )
        system = self.settings.system

        def prompt(sample: Sample) -> str:
            text = self._text(sample)
            if template is None:
                return text
            messages = [{"role": "system", "content": system}] if system is not None else []
            rendered = template([*messages, {"role": "user", "content": text}])
            if self.settings.open_thought and not isinstance(rendered, Chat) and not rendered.endswith(OPEN + "\n"):
                rendered += "\n" if rendered.endswith(OPEN) else OPEN + "\n"
            self.opened = None if isinstance(rendered, Chat) else rendered.rstrip().endswith(OPEN)
            return rendered

        return prompt

    def construct_requests(self, doc: dict[str, Any], ctx: Callable[[Sample], str], **kwargs: Any) -> list[Instance]:
        sample, metadata = self.samples[doc["id"]], kwargs["metadata"]
        if self.OUTPUT_TYPE == "loglikelihood":
            prompt = ctx(sample)
            choices = continuations(prompt, len(sample.choices))
            pairs = [(prompt, choice) for choice in choices]
            return [Instance("loglikelihood", doc, pair, index, metadata) for index, pair in enumerate(pairs)]
        return [
            Instance(
                "generate_until", doc, (ctx(self._shown(sample, index)), self._generation_kwargs()), index, metadata
            )
            for index in range(self.settings.samples)
        ]

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
        sample = self.samples[doc["id"]]
        if self.OUTPUT_TYPE == "loglikelihood":
            logprobs = tuple(logprob for logprob, _ in results)
            completions: Iterable[Completion] = [Completion(logprobs=logprobs)]
        else:
            completions = [text.completion if isinstance(text, Text) else Completion(text=text) for text in results]
        graded = [self._grade(sample, index, completion) for index, completion in enumerate(completions)]
        rates = {
            verdict: mean([float(one.verdict == verdict) for one in graded])
            for verdict in ("no_answer", "truncated", "timeout", "failed")
        }
        return {"score": mean([one.credit for one in graded]), **rates}

    def _grade(self, sample: Sample, index: int, completion: Completion) -> Graded:
        shown = self._shown(sample, index)
        return grade_completion(shown, completion, self.benchmark, self.settings, opened=self.opened)

    def aggregation(self) -> dict[str, Callable[[list[float]], float]]:
        return dict.fromkeys(("score", "no_answer", "truncated", "timeout", "failed"), mean)

    def higher_is_better(self) -> dict[str, bool]:
        return {"score": True, "no_answer": False, "truncated": False, "timeout": False, "failed": False}
