"""Precision and recall of each filter on labelled thoughts in seven languages; order of the reasons; real outputs."""

import gzip
import json
import time
from collections.abc import Iterable
from dataclasses import replace

import pytest

from distill import filtering, languages, loops
from distill.filtering import decide
from distill.recipe import Filter
from distill.records import REASONS, Problem, Trace
from distill.words import figures, words
from eval.benchmark import load
from eval.tasks import TASKS
from tests.distill.labelled import CODE, NO_CODE, THOUGHTS, mixed_languages, paragraphs, repetition
from tests.eval.data import DATA, needs_data

PROBLEM = Problem(id="p", kind="math", domain="math", question="What is 2 + 2?", answer="4", source="s", row=0)
TRACE = Trace(
    id="p/0", problem_id="p", index=0, key="k", seed=1, thought="Two and two make four.", response="It is \\boxed{4}.",
    state="closed", finish_reason="stop", verdict="correct", extracted="4", detail="", grader="math/1",
    prompt_tokens=5, completion_tokens=20,
)  # fmt: skip


def reason(settings: Filter | None = None, problem: Problem = PROBLEM, raw_text: str | None = None, **changes) -> str:
    return decide(replace(TRACE, **changes), problem, settings or Filter(), raw_text).reason


def scores(judged: Iterable[tuple[bool, bool, str]]) -> tuple[float, float, list[str]]:
    """Precision, recall and the texts that were misjudged, of (label, found, text)."""
    judged = list(judged)
    hits = sum(label and found for label, found, _ in judged)
    wrong = [f"{'missed' if label else 'false'}: {text}" for label, found, text in judged if label != found]
    found = sum(found for _, found, _ in judged)
    labelled = sum(label for label, _, _ in judged)
    return hits / max(found, 1), hits / max(labelled, 1), wrong


def test_mixed_languages():
    cases = list(mixed_languages())
    judged = [(label, bool(languages.mixed_languages(text, problem)), text[-300:]) for label, text, problem in cases]
    precision, recall, wrong = scores(judged)
    assert len(cases) > 200
    assert (precision, recall) == (1, 1), "\n".join(wrong)


def test_repetition():
    judged = [(label, bool(loops.find_loop(text)), text[-200:]) for label, text in repetition()]
    precision, recall, wrong = scores(judged)
    assert (precision, recall) == (1, 1), "\n".join(wrong)


def test_code_blocks():
    cases = [(True, text) for text in CODE] + [(False, text) for text in (*NO_CODE, *THOUGHTS.values())]
    precision, recall, wrong = scores((label, bool(filtering.code_block(text)), text) for label, text in cases)
    assert (precision, recall) == (1, 1), wrong


def test_long_paragraphs():
    judged = [(label, bool(filtering.long_paragraph(text, 1000)), text[:200]) for label, text in paragraphs()]
    precision, recall, wrong = scores(judged)
    assert (precision, recall) == (1, 1), wrong


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        ({"finish_reason": "length"}, "cut"),
        ({"state": "truncated", "response": ""}, "cut"),
        ({"state": "nested"}, "doubled_tags"),
        ({"thought": "So <think> is a tag."}, "doubled_tags"),
        ({"response": "4 </think> 4"}, "doubled_tags"),
        ({"response": "4 </ Think >"}, "doubled_tags"),
        ({"thought": "I think that 2 < 3 and 3 > 2, thinking of it."}, ""),
        ({"thought": " \n"}, "empty_thought"),
        ({"thought": "", "state": "absent"}, "empty_thought"),
        ({"response": "\n"}, "empty_answer"),
        ({"thought": "Run this:\n```\nls\n```"}, "code_block"),
        ({"response": "```\nls\n```"}, ""),  # the answer may hold code
        ({"thought": "word " * 801}, "long_paragraph"),
        ({"thought": "Wait, " * 60}, "repetition"),
        ({"response": "Wait, " * 60}, "repetition"),
        ({"thought": THOUGHTS["English"] + THOUGHTS["Chinese"]}, "mixed_languages"),
    ],
)
def test_a_trace_has_one_reason(changes, expected):
    assert reason(**changes) == expected
    assert expected == "" or expected in REASONS["filter"]


def test_every_reason_of_the_table_can_be_given_and_no_other():
    tokens = Filter(min_tokens=1, max_tokens=2)
    given = {name for name, _ in filtering.judgements(TRACE, PROBLEM, tokens, None)}
    assert given == set(REASONS["filter"])


def test_what_is_no_whole_sample_is_named_first():
    everything = {"finish_reason": "length", "thought": "```" + "Wait, " * 900, "state": "nested"}
    assert reason(**everything) == "cut"
    assert reason(**{**everything, "finish_reason": "stop"}) == "doubled_tags"


def test_raw_text_shows_tags_that_the_split_removed():
    assert reason(raw_text="<think>a</think>b") == ""
    assert reason(raw_text="a</think>b") == ""
    assert reason(raw_text="<think><think>a</think>b") == "doubled_tags"
    assert reason(raw_text="<think>a</think></think>b") == "doubled_tags"


def test_an_answer_without_a_thought_is_fit_where_nothing_is_verified():
    asked = replace(PROBLEM, kind="none", answer="")
    assert reason(problem=asked, thought="", state="absent", verdict=None) == ""
    assert reason(problem=asked, thought="", verdict=None) == "empty_thought"


def test_lengths_in_tokens():
    assert reason(Filter(min_tokens=20, max_tokens=20)) == ""
    assert reason(Filter(min_tokens=21)) == "too_short"
    assert reason(Filter(max_tokens=19)) == "too_long"
    with pytest.raises(ValueError, match=r"filter.max_tokens needs a count of tokens, and p/0 has none"):
        reason(Filter(max_tokens=19), completion_tokens=None)


def test_each_filter_can_be_switched_off():
    off = Filter(mixed_languages=False, paragraph_characters=None, code_blocks=False, repetition=False)
    assert reason(off, thought="```" + "Wait, " * 900 + THOUGHTS["Chinese"] + THOUGHTS["English"]) == ""
    assert reason(problem=replace(PROBLEM, kind="code"), thought="```\nls\n```") == ""


def test_the_thought_may_quote_its_problem():
    quoted = "列车每小时走多少公里"
    assert reason(thought=f"The problem asks {quoted}, which is a speed.") == "mixed_languages"
    assert reason(problem=replace(PROBLEM, question=quoted), thought=f"The problem asks {quoted}, a speed.") == ""


def test_details_say_what_was_found():
    assert decide(replace(TRACE, thought="Wait, " * 60), PROBLEM, Filter()).detail == "'wait,' 60 times"
    long = decide(replace(TRACE, thought="word " * 801), PROBLEM, Filter()).detail
    assert long.startswith("4,004 characters, of at most 4,000: word word")


OUTPUTS = (
    "gsm_gemma-2-2b-it.jsonl.gz",
    "math-l5_gemma-2-2b-it.jsonl.gz",
    "math-l5_Qwen2.5-7B-Instruct.jsonl.gz",
)


@needs_data(*(f"graded/zeroeval/{name}" for name in OUTPUTS))
def test_real_english_outputs():
    """2,761 solutions of three models. Those that ended are left alone; of those that the budget cut, most loop."""
    ended, mixed, loop = [], [], []
    for name in OUTPUTS:
        with gzip.open(DATA / "graded" / "zeroeval" / name, "rt", encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["output"][0]
                ended.append(text.rstrip().endswith(("}", "```")))
                mixed.append(languages.mixed_languages(text, ""))
                loop.append(loops.find_loop(text))
    assert len(ended) == 2761
    assert [one for one in mixed if one] == []
    false = [one for one, whole in zip(loop, ended, strict=True) if one and whole]
    assert len(false) <= 0.002 * sum(ended), false
    cut = [one for one, whole in zip(loop, ended, strict=True) if not whole]
    assert sum(map(bool, cut)) >= 0.6 * len(cut), (sum(map(bool, cut)), len(cut))


@needs_data("ceval/ceval.zip", "math500/test.jsonl")
def test_real_questions_keep_their_language():
    """Five questions with choices or solutions are one text: Chinese with formulas and names, English; one is code."""
    mixed = []
    for name in ("ceval", "math500"):
        rows = load(TASKS[name], DATA)
        texts = ["\n".join((one.question, *one.choices, str(one.meta.get("solution", "")))) for one in rows]
        joined = ["\n".join(texts[place : place + 5]) for place in range(0, len(texts), 5)]
        mixed += [found for text in joined if (found := languages.mixed_languages(text, ""))]
    assert len(mixed) <= 1, mixed


ODD = (
    "a",
    "$",
    "$$ ",
    '"',
    "\\begin{",
    "\\begin{a} ",
    "\\[ ",
    "\\( ",
    "| ",
    "& ",
    "《",
    "- ",
    "<< ",
    "'a",
    "`",
    "\n",
    " ",
    "```",
)


@pytest.mark.parametrize("odd", ODD)
def test_no_text_is_slow(odd):
    """A hundred thousand characters: no pattern begins again at each of them and runs to the end."""
    thought = odd * (100_000 // len(odd)) + "x"
    start = time.process_time()
    settings = Filter(paragraph_characters=None, code_blocks=False)
    filtering.decide(replace(TRACE, thought=thought), PROBLEM, settings)
    languages.mixed_languages(thought, "")
    words(thought), figures(thought)
    assert time.process_time() - start < 5


def test_long_thoughts_take_milliseconds():
    lines = THOUGHTS["English"].split()
    text = "\n".join(" ".join(lines[n % 7 : n % 7 + 12]) + f" {n}." for n in range(8000))
    start = time.process_time()
    filtering.decide(replace(TRACE, thought=text), PROBLEM, Filter())
    assert time.process_time() - start < 5
