"""Items of benchmarks are found wherever they are injected; boilerplate and other problems are left alone."""

# ruff: noqa: RUF001  # typographic marks are meant

import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from distill import decontaminate
from distill.decontaminate import Index, Match, load_benchmarks
from distill.recipe import Decontaminate
from distill.records import REASONS, Decision
from eval.reasoning_gym_tasks import DATASETS, problems
from eval.sample import Sample
from eval.tasks import TASKS
from tests.distill.prompts import problem, prose
from tests.distill.test_dedup import trace
from tests.eval.data import DATA, needs_data

BEFORE, AFTER = "Please solve this one for me.\n", "\nThanks, and explain every step that you take."


def samples(*tasks: str) -> list[Sample]:
    return list(load_benchmarks(Decontaminate(benchmarks=list(tasks), data=str(DATA))))


def shown(sample: Sample) -> str:
    return "\n".join((sample.question, *sample.choices))


def changed(text: str, draw: random.Random) -> str:
    """Another case, other quotation marks, apostrophes and spaces, other or no punctuation."""
    text = draw.choice([str.upper, str.lower, str.title])(text)
    for mark, replacement in (
        (",", " ;"),
        (". ", "  "),
        ("?", ""),
        ("'", "’"),
        ('"', "“"),
        (" ", "  "),
        ("\n", " \n\n"),
    ):
        text = text.replace(mark, replacement)
    return text


def item(number: int, text: str = "", task: str = "test", **changes) -> Sample:
    return Sample(id=f"item/{number}", task=task, question=text or prose(number), gold="7", **changes)


ITEMS = [item(number) for number in range(50)]
INDEX = Index.build(ITEMS)


def test_ten_words_in_a_row_are_found_anywhere():
    words = ITEMS[7].question.split()
    for start in range(0, len(words) - 10, 5):
        text = f"So we recall that {' '.join(words[start : start + 10])} and go on."
        assert INDEX.match(text) == Match("test", "item/7", "10-gram"), text
        assert INDEX.match(f"So we recall that {' '.join(words[start : start + 9])} and go on.") is None


def test_other_texts_are_left_alone():
    assert [INDEX.match(prose(number)) for number in range(100, 200)] == [None] * 100
    assert INDEX.match("") is None
    assert INDEX.match("?!") is None
    assert Index.build([item(0, "____")]).match("...") is None


def test_n_is_a_setting():
    words = " ".join(ITEMS[7].question.split()[:6])
    assert INDEX.match(words) is None
    assert Index.build(ITEMS, ngram=6).match(words) == Match("test", "item/7", "6-gram")


def test_short_items_are_found_whole_wherever_they_stand():
    texts = ["What is 2 + 3?", "Define entropy.", "Simplify $\\sqrt{242}$.", "输尿管", "Why?", "6 * 7 ="]
    index = Index.build([item(n, text) for n, text in enumerate(texts)])
    for number, text in enumerate(texts):
        assert index.match(text) == Match("test", f"item/{number}", "exact")
        assert index.match(f"{BEFORE}{text}{AFTER}") == Match("test", f"item/{number}", "containment"), text
    for other in (
        "What is 2 + 4?",
        "What is 2 - 3?",
        "What is entropy, if we define it?",
        "Simplify $\\sqrt{241}$.",
        "6 + 7 =",
    ):
        assert index.match(f"{BEFORE}{other}{AFTER}") is None, other


def test_a_question_that_says_too_little_needs_its_choices():
    rows = [
        item(0, "Which of these is true?", choices=("Mars has two moons", "Venus has one")),
        item(1, "Which of these is true?", choices=("Iron is a gas", "Helium is a gas")),
        item(2, "Osteoclasts", choices=("resorb bone", "build bone")),
        item(3, "Who painted the ceiling of the chapel?", choices=("Raphael", "Michelangelo")),
    ]
    index = Index.build(rows)
    for row in rows:
        for order in (row.choices, row.choices[::-1]):
            lettered = "\n".join(f"({letter}) {choice}" for letter, choice in zip("AB", order, strict=True))
            found = index.match(f"{BEFORE}{row.question}\n{lettered}{AFTER}")
            assert found == Match("test", row.id, "containment")
    assert index.match(f"{BEFORE}Which of these is true?\nIron is a gas, Mars has two moons.") is None
    assert index.match("In the bone, osteoclasts are large cells.") is None
    assert index.match("Tell me: who painted the ceiling of the chapel? I forgot.") == Match(
        "test", "item/3", "containment"
    )
    assert index.match("osteoclasts?") == Match("test", "item/2", "exact")


def test_reference_solutions_passages_and_choices_are_searched():
    rows = [
        item(0, "Why?", meta={"solution": prose(1)}),
        item(1, "How?", meta={"passage": prose(2)}),
        item(2, "Who?", choices=(prose(3), "nobody")),
    ]
    index = Index.build(rows)
    for row, number in zip(rows, (1, 2, 3), strict=True):
        assert index.match(f"We see: {prose(number)[30:120]}") == Match("test", row.id, "10-gram")


def test_a_passage_that_many_questions_share_is_evidence():
    rows = [item(n, f"What happened in the year {n} of this?", meta={"passage": prose(1)}) for n in range(40)]
    assert Index.build(rows).match(prose(1)[20:150]) == Match("test", "item/0", "10-gram")


def test_a_phrase_of_many_items_is_no_evidence():
    frame = "The following question is about a person who lived in the {} century. Answer it with one letter only. "
    rows = [item(n, frame.format(n) + f"{prose(n)[:60]}") for n in range(30)]
    index = Index.build(rows)
    assert index.match(frame.format(3)) is None
    assert index.match(frame.format(3) + prose(100)[:60]) is None
    assert index.match(f"x {rows[3].question} x") is not None


@pytest.mark.parametrize("dataset", DATASETS)
def test_of_one_template_only_the_items_themselves_are_matched(dataset):
    rows = [replace(TASKS[f"rg_{dataset}"].to_sample(row, 0), id=row["id"]) for row in problems(dataset, 200, 1)]
    index = Index.build(rows)
    asked = {row.question.strip().lower() for row in rows}
    for row in rows:
        assert index.match(row.question) is not None
        assert index.match(f"{BEFORE}{row.question}{AFTER}") is not None
    others = [row["question"] for row in problems(dataset, 500, 2)]
    false = [text for text in others if text.strip().lower() not in asked and index.match(text)]
    # A list of animals or a text may begin with all of a shorter one.
    assert len(false) <= (5 if dataset in ("leg_counting", "letter_counting") else 0), false


def test_decisions_name_the_item_and_keep_its_text_to_themselves():
    rows = [problem("a", ITEMS[3].question), problem("b", prose(99))]
    expected = [Decision("a", "contaminated", "test item/3, exact"), Decision("b")]
    assert list(decontaminate.prompts(rows, INDEX)) == expected
    assert all(one.reason in REASONS["decontaminate"] or not one.reason for one in expected)


def test_choices_of_a_prompt_count():
    row = replace(problem("a", "Which one?"), choices=(ITEMS[3].question, "none"))
    assert next(iter(decontaminate.prompts([row], INDEX))).detail == "test item/3, 10-gram"


def test_thought_and_response_of_a_trace_count():
    traces = [
        trace("p/0", f"I recall: {ITEMS[3].question}"),
        trace("p/1", "So it is.", ITEMS[4].question[20:150]),
        trace("p/2", prose(99)),
    ]
    details = [one.detail for one in decontaminate.traces(traces, INDEX)]
    assert details == ["test item/3, 10-gram", "test item/4, 10-gram", ""]


def test_benchmarks_are_named_when_they_cannot_be_had(tmp_path):
    with pytest.raises(ValueError, match=r"the benchmark gsm8k cannot be read: there is no gsm8k/test.jsonl under"):
        list(load_benchmarks(Decontaminate(benchmarks=["gsm8k"], data=str(tmp_path))))
    with pytest.raises(ValueError, match=r"'gsm8' is unknown. Did you mean 'gsm8k'"):
        list(load_benchmarks(Decontaminate(benchmarks=["gsm8"], data=str(tmp_path))))


def test_all_stands_for_every_task(monkeypatch):
    monkeypatch.setattr(decontaminate, "load", lambda task, data: [item(0, task=task.name)])
    assert [one.task for one in load_benchmarks(Decontaminate(benchmarks="all"))] == list(TASKS)


def recall(rows: Sequence[Sample], index: Index) -> dict[str, float]:
    draw, found, count = random.Random(0), Counter[str](), Counter[str]()
    for row in rows:
        texts = {
            "verbatim": shown(row),
            "inside a text": f"{BEFORE}{shown(row)}{AFTER}",
            "changed": changed(shown(row), draw),
            "changed, inside a text": f"{BEFORE}{changed(shown(row), draw)}{AFTER}",
        }
        for name, text in texts.items():
            count[name] += 1
            found[name] += index.match(text) is not None
    return {name: found[name] / count[name] for name in count}


@needs_data("math500/test.jsonl", "gsm8k/test.jsonl", "aime24/test.jsonl", "ceval/ceval.zip")
def test_real_items_are_found():
    rows = samples("math500", "gsm8k", "aime24", "ceval", *(f"rg_{name}" for name in DATASETS))
    found = recall(rows[::3], Index.build(rows))
    assert found["verbatim"] == found["inside a text"] == 1
    assert min(found.values()) >= 0.98, found


@needs_data("gsm8k/train.jsonl", "gsm8k/test.jsonl", "math500/test.jsonl")
def test_false_positives_on_real_problems():
    """Of GSM8K's training set, against its own test set and MATH-500: problems that share a sentence of ten words."""
    index = Index.build(samples("gsm8k", "math500"))
    with (DATA / "gsm8k/train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][::3]
    matched = [index.match(row["question"]) for row in rows]
    solved = [index.match(row["answer"]) for row in rows]
    assert sum(map(bool, matched)) <= 0.003 * len(rows)
    assert sum(map(bool, solved)) <= 0.005 * len(rows)
    assert {one.how for one in (*matched, *solved) if one} == {"10-gram"}


LOCAL = ("mmlu", "mmlu_pro", "math500", "aime24", "aime25", "gsm8k", "ceval", "cmmlu")
FILES = ("mmlu/mmlu.zip", "mmlu_pro/test.jsonl.gz", "cmmlu/cmmlu.zip", "ceval/ceval.zip", "gsm8k/test.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_data(*FILES)
def test_all_local_benchmarks():
    rows = samples(*LOCAL, *(f"rg_{name}" for name in DATASETS))
    index = Index.build(rows)
    found = recall(rows, index)
    assert len(rows) > 42_000
    assert found["verbatim"] == found["inside a text"] == 1, found
    assert min(found.values()) >= 0.99, found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_data(*FILES)
def test_the_index_is_small():
    tracemalloc.start()
    index = decontaminate.load_index(Decontaminate(benchmarks=list(LOCAL), data=str(DATA)))
    held, peak = (value / 2**20 for value in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert len(index.grams) > 1_000_000
    assert held < 60
    assert peak < 300
