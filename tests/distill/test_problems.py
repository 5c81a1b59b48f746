"""Problems from every kind of source; each row with one decision; prompts."""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from distill.problems import load_problems, messages, problem_id
from distill.recipe import ProblemSource, Recipe, Verify
from distill.records import Decision, Problem
from distill.rows import read_rows
from distill.run_dir import read_table, write_table
from distill.verify import Verifier
from eval.sample import Completion
from tests.distill.teaching import problem
from tests.eval.data import DATA, needs_data

ROWS = [{"question": f"{n} + 1 = ?", "answer": str(n + 1)} for n in range(5)]


def source(**changes: Any) -> ProblemSource:
    return ProblemSource(**{**dict(kind="math", domain="math", licence="MIT"), **changes})


def recipe(seed: int = 0, **sources: ProblemSource) -> Recipe:
    return Recipe(
        name="test", seed=seed, problems=sources, decontaminate=None,
        verify=Verify.model_validate({
            "code": {"allow": True}, "judge": {"engine": "transformers", "model": "judge"},
        }),
        teacher=dict(engine="transformers", model="m", temperature=1.0, max_tokens=9, correct=1, most=2),
    )  # fmt: skip


def load(source: ProblemSource, seed: int = 0) -> list[tuple[Problem, Decision]]:
    return list(load_problems(recipe(seed, one=source)))


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reasons(found: list[tuple[Problem, Decision]]) -> list[str]:
    return [decision.reason for _, decision in found]


# Files.


def write_jsonl(path: Path) -> None:
    jsonl(path, ROWS)


def write_json(path: Path) -> None:
    path.write_text("\ufeff " + json.dumps(ROWS, indent=1), encoding="utf-8")


def write_lines(path: Path) -> None:
    path.write_text("\n\n".join(map(json.dumps, ROWS)))


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(path)


def zipped(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(path: Path) -> None:
        plain = path.with_suffix("")
        write(plain)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()

    return both


FILES: dict[str, Callable[[Path], None]] = {
    "rows.jsonl": write_jsonl,
    "rows.json": write_json,
    "lines.json": write_lines,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "rows.jsonl.gz": zipped(write_jsonl),
    "rows.csv.gz": zipped(write_csv),
}


@pytest.mark.parametrize("name", FILES)
def test_every_form_of_file_gives_the_same_problems(tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / name)
    found = load(source(dataset=str(tmp_path / name)))
    expected = [
        Problem(problem_id("math", **row), "math", "math", row["question"], row["answer"], "one", number)
        for number, row in enumerate(ROWS)
    ]
    assert [one for one, _ in found] == expected
    assert [decision for _, decision in found] == [Decision(one.id) for one in expected]
    write_table(tmp_path / "problems.parquet", Problem, expected)
    assert list(read_table(tmp_path / "problems.parquet", Problem)) == expected


def test_a_folder_is_read_by_splits(tmp_path: Path) -> None:
    jsonl(tmp_path / "data" / "train-00000-of-00002.jsonl", ROWS[:2])
    jsonl(tmp_path / "data" / "train-00001-of-00002.jsonl", ROWS[2:4])
    (tmp_path / "README.md").write_text("a card")
    assert len(load(source(dataset=str(tmp_path)))) == 4  # one split, in two files
    jsonl(tmp_path / "data" / "test.jsonl", ROWS[4:])
    assert len(load(source(dataset=str(tmp_path), split="train"))) == 4
    assert len(load(source(dataset=str(tmp_path), split="test"))) == 1
    with pytest.raises(ValueError, match=r"problems\.one: .* holds test, train, and which .* name one with split"):
        load(source(dataset=str(tmp_path)))
    with pytest.raises(ValueError, match="holds test, train, and no validation"):
        load(source(dataset=str(tmp_path), split="validation"))
    jsonl(tmp_path / "main" / "train" / "part.jsonl", ROWS)
    assert len(load(source(dataset=str(tmp_path), config="main", split="train"))) == 5
    with pytest.raises(FileNotFoundError, match="config='socratic'"):
        load(source(dataset=str(tmp_path), config="socratic"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no file of rows"):
        load(source(dataset=str(tmp_path / "empty")))


def test_a_dataset_saved_to_disk_is_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "splits")
    assert len(load(source(dataset=str(tmp_path / "rows")))) == 5
    assert len(load(source(dataset=str(tmp_path / "splits"), split="test"))) == 1
    with pytest.raises(ValueError, match="has the splits train, test; say which with split"):
        load(source(dataset=str(tmp_path / "splits")))


def test_the_hub_is_asked_for_just_what_the_recipe_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load(source(dataset="openai/gsm8k", config="main", split="train", revision="abc", limit=3))
    assert len(found) == 3
    assert asked == [(("openai/gsm8k", "main"), {"split": "train", "revision": "abc"})]


def test_without_a_network_the_error_names_the_dataset(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"problems\.one: cannot read nobody/nothing from the Hub"):
        load(source(dataset="nobody/nothing", split="train"))
    with pytest.raises(FileNotFoundError, match=r"there is no .*rows\.jsonl"):
        load(source(dataset=str(tmp_path / "rows.jsonl")))
    with pytest.raises(FileNotFoundError, match=r"there is no train\.parquet"):
        load(source(dataset="train.parquet"))


def test_what_is_for_the_hub_is_refused_for_a_file(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl", ROWS))
    for field in ("config", "split", "revision"):
        with pytest.raises(ValueError, match=f"{field}='x' is for the Hub or a folder"):
            load(source(dataset=path, **{field: "x"}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", r"rows\.jsonl is empty"),
        ("rows.csv", b"question,answer\n", r"rows\.csv is empty"),
        ("rows.jsonl", b'{"question": "a", "answer": "1"}\n{"question": ', r"rows\.jsonl, line 2 is not JSON"),
        ("rows.jsonl", b'{"question": "a", "answer": "1"}\n[1]\n', "line 2 holds list, not an object"),
        ("rows.json", b'[{"question": "a"', r"rows\.json is not valid JSON"),
        ("rows.json", b'[{"question": "a", "answer": "1"}, 7]', "row 1 holds int, not an object"),
        ("rows.csv", b"question,answer\na,1,2\n", "line 2 has more cells than the header"),
        ("rows.parquet", b"no parquet at all", "is no parquet file"),
        ("rows.jsonl", b'{"question": "\xff"}\n', r"rows\.jsonl cannot be read: 'utf-8' codec"),
        ("rows.jsonl.gz", b"not compressed", r"rows\.jsonl\.gz cannot be read: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(b'{"question": "a"}' * 99)[:-20], r"rows\.jsonl\.gz cannot be read"),
        ("rows.txt", b"a question", r"rows\.txt: rows are read from \.jsonl"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(source(dataset=str(tmp_path / name)))
    assert str(caught.value).startswith("problems.one: ")


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    """A torn last line is not met by one who wants the first rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{")
    assert len(load(source(dataset=str(path), limit=5))) == 5
    assert next(iter(read_rows(str(path), None, None, None))) == ROWS[0]


# Decisions.


def test_a_row_is_kept_empty_malformed_or_repeated(tmp_path: Path) -> None:
    rows = [
        {"question": " 1 + 1 ", "answer": 2},
        {"question": "", "answer": "2"},
        {"question": None, "answer": "2"},
        {"question": "1 + 2", "answer": " "},
        {"question": "1 + 3", "answer": None},
        {"question": ["1 + 4"], "answer": "5"},
        {"question": "1 + 5", "answer": ["6"]},
        {"question": "1 + 6"},
        {"question": "1 + 1", "answer": "2"},
        {"question": "1 + 1", "answer": "3"},
        {"question": "\ud800", "answer": "3"},
        {"question": "1 + 7", "answer": True},
    ]
    found = load(source(dataset=str(jsonl(tmp_path / "rows.jsonl", rows))))
    assert reasons(found) == [
        "", "empty", "empty", "empty", "empty", "malformed", "malformed", "malformed", "repeated", "", "malformed",
        "malformed",
    ]  # fmt: skip
    assert found[8][1].detail == f"the same as {found[0][0].id}"
    assert found[6][1].detail == "answer is list, not text; name one of its places, as in answer.0"
    assert found[7][1].detail == "no answer"
    assert len({one.id for one, _ in found}) == len(found)  # so that a decision is about one row
    assert all(one.id == decision.id and one.row == row for row, (one, decision) in enumerate(found))
    write_table(tmp_path / "problems.parquet", Problem, (one for one, _ in found))  # also the dropped ones


def test_an_id_is_of_what_is_asked_and_what_is_right(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    backwards = jsonl(tmp_path / "b.jsonl", ROWS[::-1])
    ids = [one.id for one, _ in load(source(dataset=str(path)))]
    assert ids == [one.id for one, _ in load(source(dataset=str(backwards), domain="other"), seed=5)][::-1]
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in ids)
    both = list(load_problems(recipe(a=source(dataset=str(path)), b=source(dataset=str(backwards)))))
    assert reasons(both) == [""] * 5 + ["repeated"] * 5
    assert [one.source for one, _ in both] == ["a"] * 5 + ["b"] * 5
    values = dict(kind="math", question="q", answer="a", choices=(), meta={})
    others = [
        {"kind": "text"}, {"question": "p"}, {"answer": "b"}, {"choices": ("a", "b")}, {"meta": {"tests": ["x"]}},
    ]  # fmt: skip
    assert len({problem_id(**{**values, **other}) for other in [{}, *others]}) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "qestion"}, r"question='qestion' is no column of .* it has question, answer\. Did you mean 'qu"),
        ({"answer": "solution"}, "answer='solution' is no column"),
        ({"answer": None}, "kind math is compared with an answer: name its column with answer"),
        ({"kind": "choice", "choices": "options"}, "choices='options' is no column"),
        ({"kind": "code", "tests": "cases"}, "tests='cases' is no column"),
        ({"kind": "none", "answer": "reply"}, "answer='reply' is no column"),
        ({"question": "answer.0"}, "no column of"),
    ],
)
def test_a_column_that_is_not_there_is_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=message):
        load(source(**{"dataset": str(path), **changes}))


def test_a_source_of_which_nothing_can_be_used_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"none of the 5 rows can be used as kind math; row 0 is malformed: '####'"):
        load(source(dataset=str(path), answer_after="####"))


def test_dotted_names_and_what_follows_a_mark(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"content": "2 + 2?"}], "extra": {"solution": "two and two #### is #### 4 "}, "a.b": "dotted"},
        {"messages": [], "extra": {"solution": "#### 5"}, "a.b": "x"},
    ]
    path = str(jsonl(tmp_path / "rows.jsonl", rows))
    columns = dict(question="messages.0.content", answer="extra.solution", answer_after="####")
    (first, _), (_, second) = load(source(dataset=path, **columns))
    assert (first.question, first.answer) == ("2 + 2?", "4")
    assert second == Decision(second.id, "malformed", "there is no '0' for messages.0.content")
    assert load(source(dataset=path, question="a.b", answer="a.b"))[0][0].question == "dotted"


# Kinds.


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["x", "y", "z"], "B", "B"),
        (["x", "y", "z"], 2, "C"),
        (["x", "y", "z"], "y", "B"),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", "B"),
        ({"text": ["B", "A"], "label": ["A", "B"]}, "A", "A"),
        (["x", "y", "z"], 3, "malformed"),
        (["x", "y", "z"], "D", "malformed"),
        (["x", "y", "x"], "x", "malformed"),
        (["x", "y", "z"], True, "malformed"),
        (["x"], "A", "malformed"),
        ("xyz", "A", "malformed"),
        ([str(n) for n in range(11)], "A", "malformed"),
        (["x", ""], "A", "empty"),
        (["x", "y"], "", "empty"),
        (["x", "y"], None, "empty"),
    ],
)
def test_a_choice_s_answer_becomes_its_letter(tmp_path: Path, options: Any, answer: Any, letter: str) -> None:
    rows = [
        {"question": "?", "answer": "A", "options": ["x", "y"]},
        {"question": "!", "answer": answer, "options": options},
    ]
    found = load(source(dataset=str(jsonl(tmp_path / "rows.jsonl", rows)), kind="choice", choices="options"))
    assert (found[1][0].answer or found[1][1].reason) == letter
    assert found[1][1].reason == ("" if letter in "ABC" else letter)


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        (["assert f(1) == 2", "assert f(2) == 3"], ["assert f(1) == 2", "assert f(2) == 3"]),
        ('{"inputs": ["1\\n"], "outputs": ["2\\n"]}', [{"input": "1\n", "output": "2\n"}]),
        ([{"call": "f(1)", "value": 2}], [{"call": "f(1)", "value": 2}]),
        ("assert f(1) == 2", ["assert f(1) == 2"]),
        ([], "empty"),
        (None, "empty"),
        ("", "empty"),
        ("assert f(1) ==", "malformed"),
        ({"inputs": ["1"], "outputs": []}, "malformed"),
        (["assert '\ud800'"], "malformed"),
    ],
)
def test_code_has_tests_in_one_form_and_needs_no_answer(tmp_path: Path, tests: Any, expected: Any) -> None:
    rows = [{"question": "?", "cases": ["assert f(0) == 1"]}, {"question": "!", "cases": tests}]
    found = load(source(dataset=str(jsonl(tmp_path / "rows.jsonl", rows)), kind="code", tests="cases"))
    assert (found[1][0].meta.get("tests") or found[1][1].reason) == expected


def test_answers_are_kept_where_nothing_is_compared(tmp_path: Path) -> None:
    rows = [{"question": "a", "reply": "yes"}, {"question": "b", "reply": ""}]
    path = str(jsonl(tmp_path / "rows.jsonl", rows))
    assert [one.answer for one, _ in load(source(dataset=path, kind="none"))] == ["", ""]
    assert [one.answer for one, _ in load(source(dataset=path, kind="none", answer="reply"))] == ["yes", ""]
    assert reasons(load(source(dataset=path, kind="text", answer="reply"))) == ["", "empty"]


def test_reasoning_gym_makes_the_same_problems_from_the_same_seed() -> None:
    gcd = dict(reasoning_gym="gcd", kind="reasoning_gym")
    found = load(source(**gcd, limit=80, seed=3))
    assert reasons(found) == [""] * 80
    assert found[:20] == load(source(**gcd, limit=20), seed=3)
    assert found[:20] != load(source(**gcd, limit=20), seed=2000)
    one = found[0][0]
    assert one.meta["dataset"] == "gcd"
    assert one.meta["entry"]["metadata"]["numbers"]
    larger = load(source(**gcd, limit=20, parameters={"min_value": 500, "max_value": 900}))
    assert all(min(one.meta["entry"]["metadata"]["numbers"]) >= 500 for one, _ in larger)
    few = load(source(**gcd, limit=40, parameters={"min_value": 1, "max_value": 4}))
    assert "repeated" in reasons(few)  # entries are numbered, and yet the same question is the same problem
    verifier = Verifier(Verify())
    for one, _ in found:
        assert verifier.grade(one, Completion(f"</think>\\boxed{{{one.answer}}}"), True).verdict == "correct"


def test_reasoning_gym_has_more_datasets_than_the_six_tasks() -> None:
    found = load(source(reasoning_gym="countdown", kind="reasoning_gym", limit=3))
    assert "using all of these numbers" in found[0][0].question
    # Its colours are keys of a mapping, which JSON makes into texts: its own scorer no longer knows them.
    with pytest.raises(ValueError, match="row 0 is malformed: its own answer is not scored as right"):
        load(source(reasoning_gym="graph_color", kind="reasoning_gym", limit=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reasoning_gym": "chainsum"}, r"'chainsum' is no dataset of reasoning-gym.* Did you mean 'chain_sum'"),
        ({"parameters": {"terms": 3}}, r"gcd does not take terms=3: .*unexpected keyword argument 'terms'"),
        ({"parameters": {"min_value": 9, "max_value": 3}}, "max_value must be > min_value"),
    ],
)
def test_what_reasoning_gym_does_not_know_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"problems\.one: .*{message}"):
        load(source(**{"reasoning_gym": "gcd", "kind": "reasoning_gym", "limit": 3, **changes}))


@needs_data("gsm8k/train.jsonl")
def test_gsm8k_is_read_whole() -> None:
    found = load(source(dataset=str(DATA / "gsm8k"), split="train", answer_after="####"))
    assert Counter(reasons(found)) == Counter({"": 7473})
    assert found[0][0].answer == "72"
    assert found[0][0].question.startswith("Natalia sold clips")


# Prompts.


@pytest.mark.parametrize(
    ("prompt", "choices", "expected"),
    [
        ("{question}", (), "Which {choices}?"),
        ("Q: {question}\nPut it in \\boxed{}.", (), "Q: Which {choices}?\nPut it in \\boxed{}."),
        ("{question}", ("x", "y"), "Which {choices}?\nA) x\nB) y"),
        (
            "{question}\n\n{choices}\n\nLetter:",
            ("x", "{question}"),
            "Which {choices}?\n\nA) x\nB) {question}\n\nLetter:",
        ),
        ("{question}\n\n{choices}", (), "Which {choices}?"),
    ],
)
def test_a_prompt_places_question_and_choices_and_leaves_other_braces(
    prompt: str, choices: tuple[str, ...], expected: str
) -> None:
    one = problem(0, question="Which {choices}?", choices=choices)
    assert messages(one, prompt) == ({"role": "user", "content": expected},)
    system = {"role": "system", "content": "Think."}
    assert messages(one, prompt, "Think.") == (system, {"role": "user", "content": expected})
