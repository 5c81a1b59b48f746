"""DROP's metric against an implementation that we did not write, its two layouts, and what counts as the prediction."""

import importlib.util
import json
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.benchmark import Source, load, read_rows
from eval.drop import DEV, DROP, f1, grade, is_number, normalized, to_sample
from eval.sample import Sample

GOLDS = [["12"], ["the 12 men"], ["Rams", "Bears"], ["3", "4 October 1999", "Smith-Jones"], ["a"], ["17.0"], ["1,000"]]
PREDICTIONS = [
    ["12"], ["12.0"], ["twelve"], ["12 men"], ["the Rams"], ["Bears", "Rams"], ["Rams and Bears"], ["Rams", "Lions"],
    ["4 October"], ["3", "Smith Jones", "4 October 1999"], [""], ["the"], ["17"], ["1000"], ["nan"], ["1_000"],
    ["Bears", "Rams", "Lions", "12"], ["-3"], ["3%"], ["$12"], ["An apple a day"], ["inf"],
]  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    """lm-eval's port of the official script, loaded by itself: the package imports much else."""
    package = importlib.util.find_spec("lm_eval")
    if package is None:
        pytest.skip("lm-eval is not installed")
    file = Path(package.submodule_search_locations[0]) / "tasks" / "drop" / "utils.py"
    spec = importlib.util.spec_from_file_location("lm_eval_drop_utils", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_metric_equals_the_reference_on_a_table(reference):
    for gold in GOLDS:
        for predicted in PREDICTIONS:
            assert f1(predicted, gold) == reference.get_metrics(predicted, gold)[1], (predicted, gold)


WORDS = st.sampled_from(
    [
        "the",
        "a",
        "an",
        "3",
        "3.0",
        "4",
        "12",
        "twelve",
        "Rams",
        "Bears",
        "O'Neil",
        "well-known",
        "1,000",
        "$5",
        "nan",
        "-",
    ]
)
SPANS = st.lists(st.lists(WORDS, max_size=5).map(" ".join), min_size=1, max_size=4)


@given(SPANS, SPANS)
@settings(max_examples=500, deadline=None)
def test_the_metric_equals_the_reference_on_any_spans(reference, predicted, gold):
    assert f1(predicted, gold) == reference.get_metrics(predicted, gold)[1]


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_normalisation_equals_the_reference_on_any_text(reference, text):
    assert normalized(text) == reference._normalize(text)
    assert is_number(text) == reference._is_number(text)


def test_values_computed_by_hand():
    assert f1(["Rams"], ["Rams", "Bears"]) == 0.5  # one span of two
    assert f1(["Denver Broncos won"], ["Broncos"]) == 0.5  # precision 1/3, recall 1
    assert f1(["3 men"], ["4 men"]) == 0.0  # a common word, but another number
    assert f1(["4"], ["4 men"]) == 0.67  # precision 1, recall 1/2
    assert f1(["men"], ["4 men"]) == 0.0  # the number is missing


ANSWER = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}


def answer(**fields):
    return {**ANSWER, **fields}


PASSAGES = {
    "nfl_1": {
        "passage": "The Rams beat the Bears 12 to 3.",
        "wiki_url": "x",
        "qa_pairs": [
            {
                "question": "By how many points?",
                "answer": answer(number="9"),
                "query_id": "q1",
                "validated_answers": [answer(number="9"), answer(number="nine"), answer()],
            },
            {
                "question": "Which teams played?",
                "answer": answer(spans=["Rams", "Bears"]),
                "query_id": "q2",
                "validated_answers": [answer(spans=["the Rams"])],
            },
        ],
    },
    "history_2": {
        "passage": "It was signed on 4 October 1999.",
        "wiki_url": "y",
        "qa_pairs": [
            {
                "question": "When was it signed?",
                "answer": answer(date={"day": "4", "month": "October", "year": "1999"}),
                "query_id": "q3",
                "validated_answers": [],
            }
        ],
    },
}


def rows_of(source):
    return {**{name: getattr(source, name) for name in source.__dataclass_fields__}, "rows": 3}


@pytest.fixture
def samples(tmp_path):
    with zipfile.ZipFile(tmp_path / "drop_dataset.zip", "w") as archive:
        archive.writestr("drop_dataset/drop_dataset_dev.json", json.dumps(PASSAGES))
        archive.writestr("drop_dataset/drop_dataset_train.json", "{}")
    rows = read_rows(Source(**rows_of(DEV)), tmp_path / "drop_dataset.zip")
    return [to_sample(row, index) for index, row in enumerate(rows)]


def test_the_published_layout(samples, tmp_path):
    assert [(one.id, one.cluster, one.gold, one.meta["type"]) for one in samples] == [
        ("q1", "nfl_1", "9", "number"),
        ("q2", "nfl_1", "Rams, Bears", "spans"),
        ("q3", "history_2", "4 October 1999", "date"),
    ]
    assert samples[0].meta["golds"] == [["9"], ["nine"]]  # equal and empty ones stand once and never
    assert Sample.from_json(samples[0].to_json()).meta == samples[0].meta
    (tmp_path / "drop_dataset_dev.json").write_text(json.dumps(PASSAGES))
    with pytest.raises(ValueError, match="has 3 rows, and the published set has 9536"):
        load(DROP, tmp_path / "drop_dataset_dev.json")
    assert load(DROP, tmp_path / "drop_dataset_dev.json", changed=True)[0].question == "By how many points?"


def test_the_layout_of_the_hub(samples):
    """There, the annotators' answers are a list for each field."""
    pair = PASSAGES["nfl_1"]["qa_pairs"][0]
    validated = {field: [one[field] for one in pair["validated_answers"]] for field in ANSWER}
    row = {**pair, "section_id": "nfl_1", "passage": PASSAGES["nfl_1"]["passage"], "validated_answers": validated}
    assert to_sample(row, 0) == samples[0]


def test_a_question_without_an_answer_is_an_error():
    row = {"query_id": "q", "section_id": "s", "passage": "p", "question": "?", "answer": ANSWER}
    with pytest.raises(ValueError, match=r"row 7 \(q\) has no answer"):
        to_sample(row, 7)


@pytest.mark.parametrize(
    ("number", "text", "verdict", "credit"),
    [
        (0, "Twelve minus three.\nAnswer: 9", "correct", 1),
        (0, "**Answer:** 9.", "correct", 1),
        (0, "Answer: 12\nNo.\nAnswer: nine", "correct", 1),  # the last line; any annotator's answer
        (0, " 9.", "correct", 1),  # as the few-shot prompt is continued
        (0, "So the answer is 9.", "correct", 1),
        (0, "\\boxed{9}", "correct", 1),
        (0, "Answer: 8", "wrong", 0),
        (0, "Answer: 9 points", "wrong", 0.67),
        (0, "", "no_answer", 0),
        (0, " \n", "no_answer", 0),
        (1, "Answer: Bears and Rams", "correct", 1),
        (1, "Answer: Rams", "correct", 1),  # one annotator's answer
        (1, "Answer: Bears", "wrong", 0.5),
        (1, "Answer: Bears, Rams, Lions", "wrong", 0.67),
        (2, "Answer: October 4, 1999", "correct", 1),
        (2, "Answer: October 1999", "wrong", 0.8),  # precision 1, recall 2/3; one number in common is enough
    ],
)
def test_grading(samples, number, text, verdict, credit):
    graded = grade(samples[number], text, "default")
    assert (graded.verdict, graded.credit) == (verdict, credit), graded


def test_the_official_extraction_takes_the_first_line_or_everything(samples):
    assert grade(samples[0], "Answer: 12\nAnswer: 9", "simple_evals").verdict == "wrong"
    assert grade(samples[0], "9", "simple_evals").verdict == "correct"


PROMPT = """You will be asked to read a passage and answer a question. Some examples of passages and Q&A are provided \
below.

# Examples
---
Passage: The Rams beat the Bears 12 to 3.
Question: By how many points?
Answer: 9

# Your Task

---
Passage: It was signed on 4 October 1999.
Question: When was it signed?
Answer: \n
Think step by step, then write a line of the form "Answer: $ANSWER" at the end of your response."""

FEW_SHOT = """Passage: The Rams beat the Bears 12 to 3.

Answer the following questions based on the above passage, please calculate carefully if calculation is necessary.
Q: By how many points?
A: The answer type is number. So according to above Passage, the answer is 9.

Passage: It was signed on 4 October 1999.

Answer the following questions based on the above passage, please calculate carefully if calculation is necessary.
Q: When was it signed?
A: The answer type is date. So according to above Passage, the answer is"""


def test_prompts(samples):
    assert DROP.prompts["simple_evals"](samples[2], samples[:1]) == PROMPT
    assert "xamples" not in DROP.prompts["simple_evals"](samples[2], ())
    assert DROP.prompts["few_shot"](samples[2], samples[:1]) == FEW_SHOT


def test_a_long_answer_is_graded_in_time(samples):
    for text in ("Answer: " + "9" * 1_000_000, "Answer" + " " * 1_000_000, "answer is " * 100_000, "and " * 250_000):
        start = time.perf_counter()
        assert grade(samples[1], text, "default").verdict == "wrong"
        assert time.perf_counter() - start < 1
