"""Problems from the rows of datasets, files (`rows.py`) and reasoning-gym, each row judged once; and the turn of the
user that a problem becomes.

A row is kept, or it is `empty`, `malformed` or `repeated`. Nothing is mended: a row that cannot be read as its kind
says is dropped and named, and a source of which nothing can be used is an error.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from distill.code_tests import read_tests
from distill.recipe import ProblemSource, Recipe
from distill.records import Decision, Kind, Problem
from distill.rows import Row, read_rows
from eval.multiple_choice import LETTERS, render_choices
from eval.reasoning_gym_tasks import grade, to_sample
from eval.reasoning_gym_tasks import problems as reasoning_gym_rows
from eval.samplers import Message
from eval.yaml_files import nearest

WITH_ANSWER: tuple[Kind, ...] = ("math", "choice", "text", "reasoning_gym")
CHOICE_STYLE = "A) "
_PLACES = re.compile(r"\{question\}|\{choices\}")


class _Unusable(Exception):
    """Why a row is dropped: one of the reasons of the stage, and more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def load_problems(recipe: Recipe) -> Iterator[tuple[Problem, Decision]]:
    """Every row of every source, in the order of the recipe, with what was decided on it; read as it is consumed.

    A dropped row's id is that of its place, so that each row has an id of its own; `detail` of a repeated one names
    the problem that it repeats. Raises, naming the source: FileNotFoundError, ConnectionError (the Hub), ImportError
    (reasoning-gym is not installed), ValueError (a file that cannot be read, a missing column, no usable row).
    """
    seen: set[int] = set()  # ids as numbers: 500,000 of them are 50 MB
    for name, source in recipe.problems.items():
        try:
            yield from _source_problems(name, source, recipe.seed, seen)
        except (ConnectionError, FileNotFoundError, ImportError, ValueError) as error:
            kinds = (ConnectionError, FileNotFoundError, ImportError, ValueError)
            kind = next(one for one in kinds if isinstance(error, one))  # a subclass may take other arguments
            raise kind(f"problems.{name}: {error}") from error


def _source_problems(name: str, source: ProblemSource, seed: int, seen: set[int]) -> Iterator[tuple[Problem, Decision]]:
    usable, first, number = 0, "", -1
    for number, row in enumerate(_rows(source, seed)):
        if number == 0:
            _check_columns(source, row)
        problem, decision = _judged(name, source, number, row, seen)
        usable += decision.reason in ("", "repeated")
        first = first or f"row {number} is {decision.reason}: {decision.detail}"
        yield problem, decision
    if number == -1:
        raise ValueError(f"{source.dataset} has no rows")
    if not usable:
        raise ValueError(f"none of the {number + 1:,} rows can be used as kind {source.kind}; {first}")


def _rows(source: ProblemSource, seed: int) -> Iterator[Row]:
    if source.dataset is not None:
        return islice(read_rows(source.dataset, source.config, source.split, source.revision), source.limit)
    return _generated(source, seed)


def _generated(source: ProblemSource, seed: int) -> Iterator[Row]:
    assert source.reasoning_gym is not None
    assert source.limit is not None
    seed = seed if source.seed is None else source.seed
    try:
        yield from reasoning_gym_rows(source.reasoning_gym, source.limit, seed, source.parameters)
    except (AttributeError, TypeError) as error:  # a dataset that needs a C extension, or has entries that are no JSON
        raise ValueError(f"reasoning-gym's {source.reasoning_gym} cannot be made here: {error}") from error


def _check_columns(source: ProblemSource, row: Row) -> None:
    """ValueError unless the first row has the columns that the recipe names."""
    if source.kind == "reasoning_gym":
        return
    named = {"question": source.question, "answer": source.answer, "choices": source.choices, "tests": source.tests}
    if _may_lack_answer(source):
        del named["answer"]
    elif source.answer is None:
        raise ValueError(f"kind {source.kind} is compared with an answer: name its column with answer")
    for field, column in named.items():
        if column is None:
            continue
        try:
            _value(row, column)
        except _Unusable as problem:
            raise ValueError(
                f"{field}={column!r} is no column of {source.dataset}: {problem.detail}; it has "
                f"{', '.join(map(str, row))}.{nearest(column, map(str, row))}"
            ) from None


def _judged(name: str, source: ProblemSource, number: int, row: Row, seen: set[int]) -> tuple[Problem, Decision]:
    read: dict[str, Any] = {"question": "", "answer": ""}
    try:
        _read(source, row, read)
        identity = problem_id(source.kind, **read)
        if int(identity, 16) in seen:
            raise _Unusable("repeated", f"the same as {identity}")
        seen.add(int(identity, 16))
        decision = Decision(identity)
    except _Unusable as unusable:
        identity = hashlib.sha256(json.dumps([name, number]).encode()).hexdigest()[:16]
        decision = Decision(identity, unusable.reason, unusable.detail)
    return Problem(id=identity, kind=source.kind, domain=source.domain, source=name, row=number, **read), decision


def _read(source: ProblemSource, row: Row, read: dict[str, Any]) -> None:
    """Fills `read` with the fields of a Problem, as far as they can be read before _Unusable is raised."""
    read["question"] = _text(_value(row, source.question), source.question)
    if not read["question"]:
        raise _Unusable("empty", f"{source.question} is empty")
    if source.kind == "reasoning_gym":
        read["answer"] = _text(row["answer"], "answer")
        read["meta"] = {"dataset": source.reasoning_gym, "entry": row["entry"]}
        _check_generated(source, row)
        return
    answer: Any = ""
    if not _may_lack_answer(source) or source.answer in row:
        assert source.answer is not None
        answer = _after(_value(row, source.answer), source)
    if source.kind == "choice":
        assert source.choices is not None
        read["choices"], labels = _choices(_value(row, source.choices), source.choices)
        read["answer"] = _letter(answer, read["choices"], labels)
        return
    read["answer"] = _text(answer, source.answer or "")
    if source.kind in WITH_ANSWER and not read["answer"]:
        raise _Unusable("empty", f"{source.answer} is empty")
    if source.kind == "code":
        assert source.tests is not None
        read["meta"] = {"tests": _tests(_value(row, source.tests), source.tests)}


def _may_lack_answer(source: ProblemSource) -> bool:
    """Code is judged by its tests, and kind none not at all: their answer is kept where it is, or where it is named."""
    return source.kind not in WITH_ANSWER and (source.answer is None or "answer" not in source.model_fields_set)


def _after(value: Any, source: ProblemSource) -> Any:
    """What follows the last `answer_after`, if the recipe names one."""
    if source.answer_after is None or not isinstance(value, str):
        return value
    if source.answer_after not in value:
        raise _Unusable("malformed", f"{source.answer_after!r} is not in {source.answer}")
    return value.rpartition(source.answer_after)[2]


def _value(row: Row, column: str) -> Any:
    """The value of a column, or what a dotted name finds inside one."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise _Unusable("malformed", f"there is no {part!r} for {column}" if "." in column else f"no {column}")
    return value


def _text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        more = f"; name one of its places, as in {column}.0" if isinstance(value, list) else ""
        raise _Unusable("malformed", f"{column} is {type(value).__name__}, not text{more}")
    return _encodable(str(value).strip(), column)


def _encodable(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Unusable("malformed", f"{column} holds half of a surrogate pair, which is no character") from None
    return text


def _choices(value: Any, column: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The options and their labels ("" where there are none): a list, or `text` and `label` as ARC has them."""
    labels: Any = ()
    if isinstance(value, Mapping) and "text" in value:
        value, labels = value["text"], value.get("label", ())
    if not isinstance(value, (list, tuple)):
        raise _Unusable("malformed", f"{column} is {type(value).__name__}, not a list of options")
    choices = tuple(_text(one, column) for one in value)
    if not 2 <= len(choices) <= len(LETTERS):
        raise _Unusable("malformed", f"{len(choices)} options; 2 to {len(LETTERS)} can be lettered")
    if not all(choices):
        raise _Unusable("empty", f"an option of {column} is empty")
    return choices, tuple(map(str, labels))


def _letter(answer: Any, choices: Sequence[str], labels: Sequence[str]) -> str:
    """The letter of the right option, given as its letter, its label, its text, or its position from 0 as a number."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return LETTERS[answer]
        raise _Unusable("malformed", f"answer {answer} is no position among {len(choices)} options, counted from 0")
    text = _text(answer, "answer")
    if not text:
        raise _Unusable("empty", "answer is empty")
    if text in labels:
        return LETTERS[labels.index(text)]
    if len(text) == 1 and text in LETTERS[: len(choices)]:
        return text
    if list(choices).count(text) == 1:
        return LETTERS[choices.index(text)]
    raise _Unusable("malformed", f"answer {text[:80]!r} names none of {len(choices)} options")


def _tests(value: Any, column: str) -> list[Any]:
    if value in (None, "", [], {}):
        raise _Unusable("empty", f"{column} holds no test")
    try:
        tests = read_tests(value)
        _encodable(json.dumps(tests, ensure_ascii=False), column)
    except (TypeError, ValueError) as error:
        raise _Unusable("malformed", f"{column}: {error}") from None
    return tests


def _check_generated(source: ProblemSource, row: Row) -> None:
    """A few of reasoning-gym's datasets do not score their own answers, or not once an entry has been JSON."""
    assert source.reasoning_gym is not None
    graded = grade(
        to_sample(row, 0, source.reasoning_gym), f"<answer>{row['answer']}</answer>", "", source.reasoning_gym
    )
    if graded.verdict != "correct":
        raise _Unusable("malformed", f"its own answer is not scored as right: {graded.detail}")


def problem_id(
    kind: Kind, question: str, answer: str, choices: Sequence[str] = (), meta: Mapping[str, Any] | None = None
) -> str:
    """16 hex digits of the sha256 of what is asked and what is right.

    Of reasoning-gym's `meta` only the dataset counts: its entries are numbered, and the same question would be another.
    """
    read = (meta or {}).get("dataset") if kind == "reasoning_gym" else dict(meta or {})
    text = json.dumps([kind, question, list(choices), answer, read], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def messages(problem: Problem, prompt: str | Mapping[Kind, str], system: str | None = None) -> tuple[Message, ...]:
    r"""The turns before the reply: `prompt`, or the one of the problem's kind, with the question in the place of
    `{question}` and the lettered options in that of `{choices}`. Other braces are text. Options that the prompt does
    not place stand below the question.

    >>> problem = Problem("0" * 16, "choice", "general", "Which is even?", "B", "made", 0, choices=("1", "2"))
    >>> messages(problem, "{question}\n\nEnd with \\boxed{LETTER}.")[0]["content"]
    'Which is even?\nA) 1\nB) 2\n\nEnd with \\boxed{LETTER}.'
    """
    if not isinstance(prompt, str):
        prompt = prompt.get(problem.kind, "{question}")
    choices = render_choices(problem.choices, CHOICE_STYLE)
    question = f"{problem.question}\n{choices}" if choices and "{choices}" not in prompt else problem.question
    places = {"{question}": question, "{choices}": choices}
    # In one pass: a question may itself hold the text {choices}.
    user = {"role": "user", "content": _PLACES.sub(lambda found: places[found[0]], prompt).strip()}
    return (user,) if system is None else ({"role": "system", "content": system}, user)
