"""The whole path with a model that answers from its seed: what is asked, stored, judged and said."""

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.benchmark import Benchmark
from eval.progress import Display, duration
from eval.results import GRADED, RESULTS, Row, read_results, read_rows
from eval.runner import STORE, compare, evaluate, grade_completion, plan_run, regrade, sample_seed
from eval.sample import VERDICTS, Completion, Graded, Sample
from eval.samplers import Request
from eval.store import Store
from tests.eval.arithmetic import COLOURS, SUMS, SeededModel, colours, grade_sum, protocol, sums

ITEMS = {"sums": sums(12), "colours": colours(12)}
BOTH: list[str | Benchmark] = [SUMS, COLOURS]


def files(out: Path) -> tuple[bytes, bytes]:
    return (out / RESULTS).read_bytes(), (out / GRADED).read_bytes()


def rows_of(out: Path) -> list[Row]:
    return list(read_rows(out, read_results(out)))


def test_scores_are_the_means_of_what_the_model_said(tmp_path: Path) -> None:
    results = evaluate(SeededModel(), BOTH, protocol(samples=4), tmp_path, items=ITEMS, pass_at=[1, 2])
    rows = rows_of(tmp_path)
    assert len(rows) == results.samples == sum(results.verdicts.values()) == 2 * 12 * 4
    assert [(row.task, row.id, row.index) for row in rows] == [
        (task, sample.id, index) for task in ("sums", "colours") for sample in ITEMS[task] for index in range(4)
    ]
    for task in results.tasks:
        mine = [row for row in rows if row.task == task.task]
        verdicts = Counter(row.verdict for row in mine)
        assert {verdict: n for verdict, n in task.verdicts.items() if n} == dict(verdicts)
        assert set(verdicts) >= {"correct", "wrong", "truncated", "no_answer"}  # the model does all of them
        assert list(task.verdicts) == list(VERDICTS)
        assert task.score.value == pytest.approx(verdicts["correct"] / 48)
        assert task.rates["truncated"] == verdicts["truncated"] / 48
        assert (task.items, task.k, task.samples, task.unanswered) == (12, 4, 48, 0)
        assert task.pass_at["1"].value == pytest.approx(task.score.value)
        by_item = Counter(row.id for row in mine if row.verdict == "correct")
        # 1 - C(4 - c, 2) / 6
        by_hand = [{0: 0, 1: 3 / 6, 2: 5 / 6, 3: 1, 4: 1}[by_item[sample.id]] for sample in ITEMS[task.task]]
        assert task.pass_at["2"].value == pytest.approx(sum(by_hand) / 12)
        assert task.cons_at_k is not None
        assert task.cons_at_k.value >= task.score.value  # right answers agree, and are the most common ones
        assert task.thoughts == {"opened": 48 - verdicts["truncated"], "truncated": verdicts["truncated"]}
        assert task.completion_tokens is not None
        assert task.completion_tokens.total == sum(row.completion_tokens or 0 for row in mine)
    assert results.task("sums").score.clusters == 12
    assert results.task("colours").score.clusters == 3  # four questions share a passage
    assert list(results.task("sums").groups) == ["by 0", "by 1", "by 2"]
    assert results.task("colours").groups == {}
    assert results.complete
    assert read_results(tmp_path) == results


@pytest.mark.parametrize(("window", "order"), [(1, 0), (3, 1), (48, 2)])
def test_the_order_of_completion_changes_no_byte(tmp_path: Path, window: int, order: int) -> None:
    evaluate(SeededModel(), BOTH, protocol(), tmp_path / "a", items=ITEMS)
    evaluate(SeededModel(window=window, order=order), BOTH, protocol(), tmp_path / "b", items=ITEMS)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_limit_asks_the_same_samples(tmp_path: Path) -> None:
    model = SeededModel()
    evaluate(model, [SUMS], protocol(), tmp_path / "a", items=ITEMS, limit=4)
    four = rows_of(tmp_path / "a")
    evaluate(model, [SUMS], protocol(), tmp_path / "a", items=ITEMS, limit=8)
    assert rows_of(tmp_path / "a")[:8] == four
    assert len(model.calls) == len(set(model.calls)) == 16
    evaluate(SeededModel(), [SUMS], protocol(), tmp_path / "b", items=ITEMS, limit=8)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_larger_k_asks_for_the_rest_and_a_smaller_one_for_nothing(tmp_path: Path) -> None:
    first, second, third = SeededModel(), SeededModel(), SeededModel()
    evaluate(first, [SUMS], protocol(), tmp_path, items=ITEMS, k=4)
    before = files(tmp_path)
    evaluate(second, [SUMS], protocol(), tmp_path, items=ITEMS, k=64)
    assert len(first.calls) == 12 * 4
    assert len(second.calls) == 12 * 60
    assert not set(first.calls) & set(second.calls)
    evaluate(third, [SUMS], protocol(), tmp_path, items=ITEMS, k=4)
    assert third.calls == []
    assert third.checked == []  # nothing to ask: the model is not needed
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "changed",
    [
        dict(temperature=0.9),
        dict(top_p=0.9),
        dict(max_tokens=99),
        dict(system="Be brief."),
        dict(open_thought=False),
        dict(mode="completion"),
        dict(template="few_shot", shots=1),
        dict(seed=1),
        dict(model="another"),
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_changed_parameter_serves_no_old_sample(tmp_path: Path, changed: dict[str, Any]) -> None:
    evaluate(SeededModel(), [SUMS], protocol(), tmp_path, items=ITEMS)
    settings = dict(changed)
    model = SeededModel(name=settings.pop("model", "seeded"))
    evaluate(model, [SUMS], protocol(), tmp_path, items=ITEMS, seed=settings.pop("seed", 0), overrides=settings)
    assert len(model.calls) == 24


def test_another_extraction_is_no_reason_to_ask_again(tmp_path: Path) -> None:
    evaluate(SeededModel(), [COLOURS], protocol(), tmp_path, items=ITEMS)
    model = SeededModel()
    results = evaluate(model, [COLOURS], protocol(), tmp_path, items=ITEMS, overrides={"chain": "mmlu_pro"})
    assert model.calls == []
    assert results.tasks[0].settings["chain"] == "mmlu_pro"


def test_failed_completions_are_listed_and_asked_again(tmp_path: Path) -> None:
    faulty = SeededModel(fails=lambda request: request.seed % 3 == 0)
    results = evaluate(faulty, [SUMS], protocol(), tmp_path / "a", items=ITEMS, pass_at=[1, 2])
    task = results.tasks[0]
    failed = sum(request.seed % 3 == 0 for request in faulty.requests)
    assert 0 < failed == task.verdicts["failed"] == task.unanswered == len(task.failures)
    assert not results.complete
    assert task.failures[0]["detail"] == "no completion: HTTP 500"
    assert "have fewer: sum-" in task.refused["2"]  # pass@2 is refused, naming the items
    assert "2" not in task.pass_at
    sound = SeededModel()
    evaluate(sound, [SUMS], protocol(), tmp_path / "a", items=ITEMS, pass_at=[1, 2])
    assert len(sound.calls) == failed
    evaluate(SeededModel(), [SUMS], protocol(), tmp_path / "b", items=ITEMS, pass_at=[1, 2])
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_what_a_sampler_loses_is_an_error(tmp_path: Path) -> None:
    class Forgetful(SeededModel):
        def sample(self, requests: Any) -> Any:
            return (pair for place, pair in enumerate(super().sample(requests)) if place != 5)

    with pytest.raises(RuntimeError, match="gave nothing back for sums, sum-"):
        evaluate(Forgetful(), [SUMS], protocol(), tmp_path, items=ITEMS)
    assert not (tmp_path / GRADED).exists()
    again = SeededModel()
    evaluate(again, [SUMS], protocol(), tmp_path, items=ITEMS)
    assert len(again.calls) == 1


def test_an_interrupt_keeps_what_is_stored(tmp_path: Path) -> None:
    class Interrupted(SeededModel):
        def sample(self, requests: Any) -> Any:
            for place, pair in enumerate(super().sample(requests)):
                if place == 10:
                    raise KeyboardInterrupt
                yield pair

    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(), [SUMS], protocol(), tmp_path / "a", items=ITEMS)
    again = SeededModel()
    evaluate(again, [SUMS], protocol(), tmp_path / "a", items=ITEMS)
    assert len(again.calls) == 24 - 10
    evaluate(SeededModel(), [SUMS], protocol(), tmp_path / "b", items=ITEMS)
    assert files(tmp_path / "a") == files(tmp_path / "b")


SUM = Sample(id="1", task="sums", question="1 + 2 = ?", gold="3")
SETTINGS = protocol().settings(SUMS)


@pytest.mark.parametrize(
    ("completion", "opened", "verdict", "answer"),
    [
        (Completion("it is 3</think>{3}"), True, "correct", "3"),
        (Completion("it is 3</think>{4}"), True, "wrong", "4"),
        (Completion("it is 3</think>three"), True, "no_answer", None),
        (Completion("so {3}", finish_reason="length"), True, "truncated", None),
        (Completion("so {3}"), True, "truncated", None),  # the model stopped inside its thought
        (Completion("<think>so {3}"), False, "truncated", None),
        (Completion("so {3}", finish_reason="length"), None, "truncated", None),  # perhaps a thought: not known
        (Completion("so {3}"), None, "correct", "3"),
        (Completion("{3}", reasoning="it is {4}"), None, "correct", "3"),
        (Completion("", reasoning="it is {3}", finish_reason="length"), None, "truncated", None),
        # The budget ended after the thought: only what is complete counts.
        (Completion("</think>{3} since", finish_reason="length"), True, "correct", "3"),
        (Completion("</think>The answer is {3", finish_reason="length"), True, "truncated", None),
        (Completion("</think>Not {4}\nbut {3", finish_reason="length"), True, "wrong", "4"),
        (Completion(finish_reason="failed", error="HTTP 429"), True, "failed", None),
        (Completion("</think>the grader breaks"), True, "failed", None),
    ],
)
def test_one_completion(completion: Completion, opened: bool | None, verdict: str, answer: str | None) -> None:
    graded = grade_completion(SUM, completion, SUMS, SETTINGS, opened=opened)
    assert (graded.verdict, graded.answer) == (verdict, answer)
    assert graded.grader == "sums/1"


def test_a_failure_says_why() -> None:
    graded = grade_completion(SUM, Completion("</think>the grader breaks"), SUMS, SETTINGS, opened=True)
    assert graded.detail == "the grader failed: ZeroDivisionError: as it was asked to"
    graded = grade_completion(SUM, Completion(finish_reason="failed", error="HTTP 429"), SUMS, SETTINGS)
    assert graded.detail == "no completion: HTTP 429"


LIKELIHOOD = protocol(mode="loglikelihood", samples=1, temperature=0.0, max_tokens=0, open_thought=False)


@pytest.mark.parametrize(
    ("logprobs", "tokens", "verdict", "answer"),
    [
        ((-3.0, -1.0, -2.0, -4.0), (1, 1, 1, 1), "correct", "B"),
        ((-3.0, -1.0, -2.0, -4.0), (), "correct", "B"),
        ((-3.0, -1.0, -1.2, -4.0), (1, 1, 2, 1), "wrong", "C"),  # -0.6 a token: lower perplexity
        ((-1.0, -1.0, -1.0, -1.0), (1, 1, 1, 1), "wrong", "A"),
        ((-1.0, -0.5, float("nan"), -1.0), (1, 1, 1, 1), "failed", None),
        ((-1.0, -0.5), (1, 1), "failed", None),
    ],
)
def test_the_choice_of_lowest_perplexity(
    logprobs: tuple[float, ...], tokens: tuple[int, ...], verdict: str, answer: str | None
) -> None:
    completion = Completion(logprobs=logprobs, choice_tokens=tokens)
    graded = grade_completion(colours(2)[1], completion, COLOURS, LIKELIHOOD.settings(COLOURS))
    assert (graded.verdict, graded.answer) == (verdict, answer)


def test_log_likelihoods_are_asked_of_each_choice(tmp_path: Path) -> None:
    """Two equal questions are two items: each has its own verdict, though the model is asked the same."""
    twice = [*colours(3), replace(colours(1)[0], id="again", gold="D")]
    model = SeededModel()
    results = evaluate(model, [COLOURS], LIKELIHOOD, tmp_path, items={"colours": twice})
    assert {request.choices for request in model.requests} == {(" A", " B", " C", " D")}
    assert all(isinstance(request.prompt, str) and request.prompt.endswith("Answer:") for request in model.requests)
    assert len(set(model.calls)) == 4
    rows = rows_of(tmp_path)
    assert (rows[0].answer, rows[0].gold, rows[3].gold) == (rows[3].answer, "A", "D")
    assert results.tasks[0].graders == ["likelihood/1"]
    assert results.tasks[0].thoughts == {}
    assert results.tasks[0].cons_at_k is None  # one sample is no vote
    assert regrade(tmp_path, benchmarks=[COLOURS]).flips == []


@pytest.mark.parametrize(
    ("end", "first"), [("Answer:", " A"), ("Answer: ", "A"), ("答案:\n", "A"), ("答案\uff1a", "A")]
)
def test_the_space_before_a_letter(tmp_path: Path, end: str, first: str) -> None:
    benchmark = replace(COLOURS, prompts={"plain": lambda sample, shots: sample.question + end})
    model = SeededModel()
    evaluate(model, [benchmark], LIKELIHOOD, tmp_path, items=ITEMS, limit=1)
    assert model.requests[0].choices[0] == first


def test_permutations_move_the_gold_letter_and_votes_are_on_the_published_one(tmp_path: Path) -> None:
    """A model that always finds the right text gives another letter for each sample, and they are one class."""

    class Knows(SeededModel):
        def _completion(self, request: Request) -> Completion:
            return Completion(f"</think>Answer: {request.tag.sample.gold}")

    model = Knows()
    settings = protocol(samples=6, permutation="per_sample")
    results = evaluate(model, [COLOURS], settings, tmp_path, items=ITEMS)
    assert results.tasks[0].score.value == 1.0
    assert results.tasks[0].cons_at_k is not None
    assert results.tasks[0].cons_at_k.value == 1.0
    first = [row for row in rows_of(tmp_path) if row.id == "colour-0"]
    assert len({row.answer for row in first}) > 1
    assert {row.vote for row in first} == {"A"}
    assert len({request.prompt for request in model.requests}) > 12
    for request in model.requests:
        shown = request.tag.sample
        published = next(one for one in ITEMS["colours"] if one.id == shown.id)
        assert shown.choices["ABCD".index(shown.gold)] == published.choices["ABCD".index(published.gold)]


def test_a_vote_for_one_letter_shown_is_no_majority(tmp_path: Path) -> None:
    """Always A, under permutation, is a vote for another choice each time."""

    class AlwaysA(SeededModel):
        def _completion(self, request: Request) -> Completion:
            return Completion("</think>Answer: A")

    results = evaluate(AlwaysA(), [COLOURS], protocol(samples=64, permutation="per_sample"), tmp_path, items=ITEMS)
    low, high = results.tasks[0].score.interval
    assert low < 0.25 < high
    rows = rows_of(tmp_path)
    assert {row.answer for row in rows} == {"A"}
    by_hand = []
    for sample in ITEMS["colours"]:
        votes = Counter(row.vote for row in rows if row.id == sample.id)
        largest = [letter for letter, count in votes.items() if count == max(votes.values())]
        by_hand.append((sample.gold in largest) / len(largest))
    assert results.tasks[0].cons_at_k is not None
    assert results.tasks[0].cons_at_k.value == pytest.approx(sum(by_hand) / 12)


def test_prompts_and_stops_follow_the_settings(tmp_path: Path) -> None:
    model = SeededModel()
    evaluate(model, [SUMS], protocol(system="Be brief."), tmp_path, items=ITEMS, limit=1)
    assert model.requests[0].prompt == "<system>Be brief.<user>0 + 1 = ?<assistant><think>\n"
    assert model.requests[0].stop == ()
    assert model.requests[0].seed == sample_seed(0, "sums", "sum-0", 0)
    evaluate(model, [SUMS], protocol(mode="completion", template="few_shot", shots=2), tmp_path, items=ITEMS, limit=1)
    assert model.requests[2].prompt == "0 + 0 = ? 0\n1 + 0 = ? 1\n0 + 1 = ?"
    assert model.requests[2].stop == ("\n",)


def test_seeds_are_their_own_for_every_sample() -> None:
    # sha256 of the JSON '[0, "math500", "test/algebra/1.json", 3]', its first four bytes, halved
    assert sample_seed(0, "math500", "test/algebra/1.json", 3) == 434437408
    seeds = {
        sample_seed(run, task, name, index) for run in (0, 1) for task in "ab" for name in "xyz" for index in range(64)
    }
    assert len(seeds) == 2 * 2 * 3 * 64
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(limit=0), "limit=0"),
        (dict(k=2, pass_at=[4]), "pass@4 needs k=4"),
        (dict(pass_at=[0]), "pass@0"),
        (dict(k=4, overrides={"temperature": 0.0}), "at temperature 0 would be one sample"),
        (
            dict(tasks=[COLOURS], k=4, protocol=protocol(mode="loglikelihood", max_tokens=0)),
            "by log-likelihood would be",
        ),
        (dict(k=0), "samples"),
        (dict(overrides={"temprature": 0.5}), "temprature is unknown. Did you mean 'temperature'"),
        (dict(overrides={"template": "boxed"}), "template='boxed' is none of"),
        (dict(overrides={"chain": "mmlu_pro"}), "chain='mmlu_pro' is none of"),
        (dict(tasks=[]), "at least one task"),
        (dict(tasks="sums"), "list of at least one task"),
        (dict(tasks=[SUMS, SUMS]), "sums more than once"),
        (dict(items={"sums": []}), "has no items"),
        (dict(items={"sums": [SUM, SUM]}), "ids stand twice"),
        (dict(items={"sums": colours(1)}), "name the task colours"),
        (dict(overrides={"mode": "loglikelihood"}), "needs choices"),
        (dict(overrides={"permutation": "per_sample"}), "its items have none"),
        (dict(overrides={"template": "few_shot", "shots": 3}), "2 worked examples"),
        (dict(context=105), "does not fit into context_length=105"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_is_wrong_is_an_error_before_any_sampling(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    before = SeededModel()
    evaluate(before, [SUMS], protocol(), tmp_path, items=ITEMS, limit=2)
    kept = files(tmp_path)
    model = SeededModel(context_length=arguments.pop("context", None))
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        evaluate(model, **{"tasks": [SUMS], "protocol": protocol(), "out": tmp_path, "items": ITEMS, **arguments})
    assert model.calls == []
    assert files(tmp_path) == kept
    with Store(tmp_path / STORE, readonly=True) as store:
        assert len(store) == 4


def test_a_missing_file_is_an_error_before_any_sampling(tmp_path: Path) -> None:
    model = SeededModel()
    with pytest.raises(FileNotFoundError, match=r"there is no none\.jsonl under"):
        evaluate(model, [SUMS], protocol(), tmp_path / "out", data=tmp_path)
    assert model.calls == []
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with Store(tmp_path / STORE), pytest.raises(BlockingIOError, match="already open"):
        evaluate(SeededModel(), [SUMS], protocol(), tmp_path, items=ITEMS)


def test_the_plan_needs_no_model() -> None:
    plan = plan_run(BOTH, protocol(), k=3, items=ITEMS, limit=5)
    assert plan.samples == 2 * 5 * 3
    assert [task.dataset["items"] for task in plan.tasks] == [5, 5]
    assert plan.tasks[0].dataset["hash"] != plan_run(BOTH, protocol(), items=ITEMS, limit=6).tasks[0].dataset["hash"]


def mended(sample: Sample, answer: str, chain: str) -> Graded:
    """As `grade_sum`, and 7 is taken for everything."""
    graded = grade_sum(sample, answer, chain)
    return replace(graded, verdict="correct", credit=1.0, grader="sums/2") if graded.answer == "7" else graded


def test_regrading_lists_the_flips_and_needs_no_model(tmp_path: Path) -> None:
    evaluate(SeededModel(), BOTH, protocol(), tmp_path / "a", items=ITEMS, pass_at=[2])
    kept = files(tmp_path / "a")
    same = regrade(tmp_path / "a", benchmarks=BOTH_OWN)
    assert same.flips == []
    assert files(tmp_path / "a") == kept
    before = rows_of(tmp_path / "a")
    new = replace(SUMS, grade=mended)
    found = regrade(tmp_path / "a", benchmarks=[new, COLOURS])
    expected = [
        (row.id, row.index) for row in before if row.task == "sums" and row.answer == "7" and row.verdict == "wrong"
    ]
    assert [(flip.id, flip.index) for flip in found.flips] == expected != []
    assert found.counts == {("wrong", "correct"): len(expected)}
    assert (found.flips[0].before, found.flips[0].after, found.flips[0].grader_after) == ("wrong", "correct", "sums/2")
    assert found.after.task("sums").verdicts["wrong"] == found.before.task("sums").verdicts["wrong"] - len(expected)
    flips = [json.loads(line) for line in (tmp_path / "a" / "flips.jsonl").read_text().splitlines()]
    assert [(flip["id"], flip["index"]) for flip in flips] == expected
    evaluate(SeededModel(), [new, COLOURS], protocol(), tmp_path / "b", items=ITEMS, pass_at=[2])
    assert files(tmp_path / "a") == files(tmp_path / "b")


BOTH_OWN = [SUMS, COLOURS]


def test_a_mended_gold_answer_is_judged_without_asking(tmp_path: Path) -> None:
    evaluate(SeededModel(), [SUMS], protocol(), tmp_path, items=ITEMS)
    model = SeededModel()
    sevens = [replace(sample, gold="7") for sample in ITEMS["sums"]]
    results = evaluate(model, [SUMS], protocol(), tmp_path, items={"sums": sevens})
    assert model.calls == []
    assert {row.verdict for row in rows_of(tmp_path) if row.answer == "7"} == {"correct"}
    assert regrade(tmp_path, benchmarks=[SUMS]).after == results  # by the gold answer as it is now


def test_regrading_what_was_never_finished(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no evaluation was finished there"):
        regrade(tmp_path)
    assert list(tmp_path.iterdir()) == []
    evaluate(SeededModel(), [SUMS], protocol(), tmp_path, items=ITEMS)
    with (tmp_path / GRADED).open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="is not of one run with"):
        regrade(tmp_path, benchmarks=[SUMS])
    (tmp_path / RESULTS).write_text("{}")
    with pytest.raises(ValueError, match="is not a file of results"):
        regrade(tmp_path, benchmarks=[SUMS])


def test_two_runs_are_compared_item_by_item(tmp_path: Path) -> None:
    evaluate(SeededModel(), BOTH, protocol(), tmp_path / "a", items=ITEMS, k=4)
    evaluate(SeededModel(name="another"), BOTH, protocol(), tmp_path / "b", items=ITEMS, k=8)
    found = compare(tmp_path / "a", tmp_path / "b")
    a, b = read_results(tmp_path / "a"), read_results(tmp_path / "b")
    for task in ("sums", "colours"):
        assert found.differences[task].difference == pytest.approx(a.task(task).score.value - b.task(task).score.value)
        assert found.differences[task].items == 12
    assert (found.differences["sums"].clusters, found.differences["colours"].clusters) == (12, 3)
    assert (found.model_a["model"], found.model_b["model"]) == ("seeded", "another")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(overrides={"temperature": 0.5}), r"sums: temperature: 1\.0 and 0\.5"),
        (dict(overrides={"max_tokens": 50, "top_p": 0.5}), r"top_p: 1\.0 and 0\.5; max_tokens: 100 and 50"),
        (dict(limit=5), "12 and 5 items, which are not the same questions"),
        (dict(tasks=[replace(SUMS, grade=mended)]), r"judged by sums/1 and by sums/1, sums/2; regrade both"),
        (dict(tasks=[COLOURS]), "no task is in both"),
    ],
)
def test_unlike_runs_are_not_compared(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    evaluate(SeededModel(), [SUMS], protocol(), tmp_path / "a", items=ITEMS)
    evaluate(
        SeededModel(), **{"tasks": [SUMS], "protocol": protocol(), "out": tmp_path / "b", "items": ITEMS, **arguments}
    )
    with pytest.raises(ValueError, match=message):
        compare(tmp_path / "a", tmp_path / "b")


def test_no_file_in_plain_text_holds_a_question(tmp_path: Path) -> None:
    evaluate(SeededModel(), [COLOURS], protocol(), tmp_path, items=ITEMS)
    regrade(tmp_path, benchmarks=[COLOURS])
    for path in tmp_path.iterdir():
        assert b"Which is colour" not in path.read_bytes(), path
        assert b"shade" not in path.read_bytes(), path


def test_half_a_surrogate_pair_reaches_the_files(tmp_path: Path) -> None:
    class Odd(SeededModel):
        def _completion(self, request: Request) -> Completion:
            return Completion("</think>{\ud83d}")

    evaluate(Odd(), [SUMS], protocol(samples=1), tmp_path, items=ITEMS, limit=1)
    assert rows_of(tmp_path)[0].answer == "\ud83d"


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int, str]] = []
    faulty = SeededModel(fails=lambda request: True)
    evaluate(faulty, [SUMS], protocol(), tmp_path, items=ITEMS, progress=lambda *one: told.append(one))
    assert told[0] == ("sampling", 1, 24, "1 failed")
    assert told[23] == ("sampling", 24, 24, "24 failed")
    assert told[-1] == ("grading sums", 24, 24, "")


def test_progress_in_plain_lines() -> None:
    seconds = iter([0.0, 5.0, 10.0, 10.0, 10.0, 100.0, 100.0])
    file = io.StringIO()
    display = Display(file, lambda: next(seconds))
    display("sampling", 1, 100)  # begins: 0 s; 5 s: too early
    display("sampling", 11, 100, "2 failed")  # at 10 s
    display("sampling", 100, 100)  # at the end
    assert file.getvalue() == "sampling: 11/100, 1/s, 1 min 29 s left, 2 failed\nsampling: 100/100, 0.99/s\n"
    assert [duration(one) for one in (0.4, 59.4, 60, 3599, 3600, 7500)] == [
        "0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip


def test_progress_on_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    display = Display(file)
    for done in range(1, 51):
        display("sampling", done, 50, "1 failed")
    assert "sampling: 100%" in file.getvalue()
    assert "50/50" in file.getvalue()
