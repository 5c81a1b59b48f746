"""Our samplers and benchmarks inside lm-eval: the numbers of its own model, and of our own runner."""

import copy
import json
import pickle
import re

import pytest

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from eval.benchmark import load
from eval.harness import SamplerLM, Text, lm_eval_task
from eval.local_sampler import TransformersSampler
from eval.runner import evaluate
from eval.sample import Completion
from eval.samplers import Request
from eval.tasks import TASKS
from tests.eval.arithmetic import COLOURS, SUMS, colours, protocol, reply, sums
from tests.eval.data import DATA, needs_data
from tests.eval.models import prompts, tiny_lm, tiny_tokenizer
from tests.eval.stub_server import StubServer

FAMILIES = ("llama", "qwen2", "deepseek")
NO_OTHERS = TaskManager(include_defaults=False)  # without reading the thousands of files of their tasks


def both(family: str = "llama", ends: float = 3.0, **overrides) -> tuple[SamplerLM, HFLM]:
    """Our sampler and lm-eval's model on the same weights."""
    model, tokenizer = tiny_lm(family, ends=ends, **overrides), tiny_tokenizer()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=2048)
    return SamplerLM(TransformersSampler(model, tokenizer, batch_size=4)), theirs


def run(model, *tasks, **options) -> dict:
    results = lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=NO_OTHERS, bootstrap_iters=0, **options)
    assert results is not None
    return results


@pytest.fixture
def their_tasks(tmp_path):
    """Two of lm-eval's own tasks, on rows of our own: four choices, and a greedy answer up to a stop string."""
    rows = [
        {"question": f"what is {n} plus {7 * n}?", "choices": [f"{n}", f"{8 * n}", "13", "7 or 8"], "answer": n % 4}
        for n in range(12)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str, **config) -> ConfigurableTask:
        return ConfigurableTask(
            config={
                "task": name, "dataset_path": "json", "test_split": "test", "doc_to_text": "Question: {{question}}",
                "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")}, **config,
            }
        )  # fmt: skip

    choose = make("choose", output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="{{answer}}")
    write = make(
        "write", output_type="generate_until", doc_to_target="{{answer}}", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["3", "?"], "max_gen_toks": 20, "do_sample": False},
    )  # fmt: skip
    return choose, write


def test_their_tasks_give_the_numbers_of_their_model(their_tasks):
    ours, theirs = both()
    mine, other = run(ours, *copy.deepcopy(their_tasks)), run(theirs, *copy.deepcopy(their_tasks))
    assert mine["results"]["choose"]["acc,none"] == other["results"]["choose"]["acc,none"]
    assert mine["results"]["choose"]["acc_norm,none"] == other["results"]["choose"]["acc_norm,none"]
    for name in ("choose", "write"):
        assert len(mine["samples"][name]) == 12
    for a, b in zip(mine["samples"]["choose"], other["samples"]["choose"], strict=True):
        for (logprob, greedy), (their_logprob, their_greedy) in zip(
            a["filtered_resps"], b["filtered_resps"], strict=True
        ):
            assert logprob == pytest.approx(their_logprob, abs=1e-5, rel=1e-6)
            assert greedy == their_greedy
    written = [sample["filtered_resps"] for sample in mine["samples"]["write"]]
    assert written == [sample["filtered_resps"] for sample in other["samples"]["write"]]
    assert len({text for (text,) in written}) > 3
    assert mine["config"]["sampler"]["weights"], "the report says which model it was"


@pytest.mark.parametrize("family", FAMILIES)
def test_rolling_loglikelihood_equals_theirs_over_several_windows(family):
    model, tokenizer = tiny_lm(family, initializer_range=0.05), tiny_tokenizer()
    ours = SamplerLM(TransformersSampler(model, tokenizer, batch_size=4, context_length=24))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=24)
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in prompts(6)]
    assert max(len(tokenizer.encode(text)) for text in prompts(6)) > 3 * 24
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-6)
    with StubServer() as server:
        from eval.endpoint_sampler import EndpointSampler

        with pytest.raises(NotImplementedError, match="EndpointSampler counts no tokens"):
            SamplerLM(EndpointSampler(server.url, "stub")).loglikelihood_rolling(texts)


def test_choices_of_one_context_are_scored_together():
    asked = []

    class Watched(TransformersSampler):
        def sample(self, requests):
            asked.extend(requests)
            return super().sample(requests)

    model = SamplerLM(Watched(tiny_lm(), tiny_tokenizer()))
    pairs = [(prompt, choice) for choice in (" A", " B", " A") for prompt in prompts(3)]
    scores = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    assert len(asked) == 3
    assert [request.choices for request in asked] == [(" A", " B")] * 3
    assert scores[:3] == scores[6:]


def test_repeats_of_an_item_are_different_samples():
    model, _ = both(ends=0.0)
    kwargs = {"until": [], "max_gen_toks": 12, "temperature": 1.0, "do_sample": True}
    instance = Instance("generate_until", {"any": 1}, ("Question", kwargs), 0, ("task", 0, 4))
    texts = model.generate_until([instance] * 4, disable_tqdm=True)
    assert len(set(texts)) == 4
    assert model.generate_until([instance] * 4, disable_tqdm=True) == texts


def test_what_a_request_does_not_know_is_refused():
    model, _ = both()
    for kwargs, message in (
        ({"top_k": 5, "temperature": 1.0}, "generation_kwargs hold top_k"),
        ({"do_sample": True}, "do_sample without a temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate_until([Instance("generate_until", {}, ("Question", kwargs), 0, ("task", 0, 1))])
    with pytest.raises(ValueError, match=r"context_length=2048.*nothing is cut"):
        model.generate_until([Instance("generate_until", {}, ("Q", {"max_gen_toks": 5000}), 0, ("task", 0, 1))])


def test_a_failed_request_is_no_wrong_answer():
    from eval.endpoint_sampler import EndpointSampler

    with StubServer(broken=["1 + 2 = ?"], answer=reply) as server:
        model = SamplerLM(EndpointSampler(server.url, "stub", retries=1, first_delay=0.01))
        task = lm_eval_task(SUMS, protocol(open_thought=False), items={"sums": sums(3)})
        with pytest.raises(RuntimeError, match=r"2 of 6 requests failed; the first one: .* answered 500$"):
            run(model, task, apply_chat_template=True)


def test_a_text_keeps_its_completion():
    text = Text("x", Completion("x", "thought", "length", 3, 4))
    assert pickle.loads(pickle.dumps(text)).completion == text.completion
    assert (text, copy.deepcopy(text).completion) == ("x", text.completion)


# Our benchmarks.


def test_our_benchmark_scores_there_as_in_our_runner(tmp_path):
    """An endpoint, k samples of a chat: the same seeds, so the same samples and the same score."""
    from eval.endpoint_sampler import EndpointSampler

    asked = protocol(samples=4, open_thought=False)
    with StubServer(answer=reply) as server:
        sampler = EndpointSampler(server.url, "stub", first_delay=0.01)
        here = evaluate(sampler, [SUMS], asked, tmp_path, items={"sums": sums(10)}).task("sums")
        seeds = sorted(server.asked)
        there = run(SamplerLM(sampler), lm_eval_task(SUMS, asked, items={"sums": sums(10)}), apply_chat_template=True)
        assert sorted(server.asked) == seeds
        assert set(server.asked.values()) == {2}
    score = there["results"]["sums"]["score,none"]
    assert 0 < score < 1
    assert score == pytest.approx(here.score.value)
    assert there["n-shot"]["sums"] == 0


def test_the_choice_of_lowest_perplexity_there(tmp_path):
    asked = protocol(mode="loglikelihood", samples=1, temperature=0.0, max_tokens=0, open_thought=False)
    ours, theirs = both(ends=0.0)
    items = {"colours": colours(12)}
    here = evaluate(ours.sampler, [COLOURS], asked, tmp_path, items=items).task("colours")
    for model in (ours, theirs):
        there = run(model, lm_eval_task(COLOURS, asked, items=items, show_questions=True))
        assert there["results"]["colours"]["score,none"] == pytest.approx(here.score.value)
        confidential = [sample["doc"] for sample in there["samples"]["colours"]]
        assert confidential[3] == {"task": "colours", "id": "colour-3"}


def test_the_chat_template_must_be_asked_for():
    ours, _ = both()
    task = lm_eval_task(SUMS, protocol(), items={"sums": sums(2)})
    with pytest.raises(ValueError, match="run simple_evaluate with apply_chat_template=True"):
        run(ours, task)


def test_the_thought_is_opened_and_one_that_is_not_closed_is_truncated():
    """The prompt opened the thought and the text never closes it: truncated, though the right answer stands in it."""
    from eval.endpoint_sampler import EndpointSampler

    for closing, truncated in (("", 1.0), ("</think>", 0.0)):
        with StubServer(answer=lambda prompt, noise, closing=closing: f"so {closing}{{1}}") as server:
            model = SamplerLM(EndpointSampler(server.url, "stub", tokenizer=tiny_tokenizer()))
            results = run(model, lm_eval_task(SUMS, protocol(), items={"sums": sums(1)}), apply_chat_template=True)
        assert results["results"]["sums"]["truncated,none"] == truncated
        assert results["results"]["sums"]["score,none"] == 1 - truncated
        context = results["samples"]["sums"][0]["arguments"][0][0]
        assert context == "<s><|user|>0 + 1 = ?\n<|assistant|><think>\n"


@needs_data("gsm8k/test.jsonl", "mmlu/mmlu.zip")
def test_real_benchmarks_offline_on_both_models():
    """GSM8K by generation and MMLU by perplexity, by the protocol of the V3 base model, on our model and on theirs."""
    ours, theirs = both(max_position_embeddings=8192)
    theirs._max_length = 8192
    overrides = {"max_tokens": 24}
    scores = []
    for model in (ours, theirs):
        tasks = [
            lm_eval_task("gsm8k", "deepseek-v3-base", data=DATA, limit=4, overrides=overrides),
            lm_eval_task("mmlu", "deepseek-v3-base", data=DATA, limit=12),
        ]
        results = run(model, *tasks)
        scores.append({name: results["results"][name]["score,none"] for name in ("gsm8k", "mmlu")})
        texts = [sample["filtered_resps"] for sample in results["samples"]["gsm8k"]]
        assert len(texts) == 4
        assert results["n-shot"] == {"gsm8k": 8, "mmlu": 5}
    assert scores[0] == scores[1]
    rows = load(TASKS["gsm8k"], DATA)[:4]
    question = re.escape(rows[0].question.strip()[:60])
    assert re.search(question, tasks[0].doc_to_text(tasks[0].test_docs()[0]))


def test_a_request_is_what_the_sampler_sees():
    ours, _ = both()
    ((_, direct),) = ours.sampler.sample([Request("Question", 5, 8, 1.0, 0.9, ("x",))])
    assert isinstance(direct, Completion)


def test_a_confidential_benchmark_is_refused_unless_asked_for():
    with pytest.raises(ValueError, match="colours must not stand in plain text"):
        lm_eval_task(COLOURS, protocol(open_thought=False), items={"colours": colours(4)})
