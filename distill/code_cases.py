"""The tests of code: read from the forms in which data sets have them, and what a program gave compared with them.

Pure; `code_tests.py` runs the programs. Nothing here is compared by an object of the program's own: what it returned
comes as plain data (`decode`), what it printed as text.
"""

import ast
import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Test = Mapping[str, Any] | str
"""One test, JSON: `{"input": ..., "output": ...}` for a program that reads and prints; `{"call": "f(1)", "value": ...}`
for an expression; or statements as text (`assert f(1) == 2`), which run in order after the program."""

TOLERANCE = 1e-6  # absolute or relative, for numbers that are printed or returned with a decimal point


# Reading.


def read_tests(value: Any) -> list[Test]:
    """The tests in a data set's column, in the form of `Test`; ValueError where it holds none.

    Read are lists of `Test`; statements as text or a list of them (MBPP's `test_list`); `{"inputs", "outputs"}` with
    or without `fn_name` (APPS, TACO; also a mapping for each test), `{"input", "output"}` as lists of equal length
    (CodeContests), HumanEval's `{"test", "entry_point"}`; each also as JSON text. What is read already comes back as it
    is.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            pass  # statements
        except RecursionError:
            raise ValueError("the tests are nested too deeply to be read") from None
    if isinstance(value, str):
        parsed(value)
        tests: list[Test] = [value] if value.strip() else []
    elif isinstance(value, Mapping):
        tests = _of_mapping(value)
    elif isinstance(value, Sequence):
        tests = [_one(test) for test in value]
    else:
        raise ValueError(f"tests are a list, a mapping or text, not {type(value).__name__}")
    if not tests:
        raise ValueError("there are no tests")
    if any(isinstance(one, Mapping) and "input" in one for one in tests) and not all(
        isinstance(one, Mapping) and "input" in one for one in tests
    ):
        raise ValueError("tests of a whole program (input, output) and of its functions cannot be mixed")
    return tests


def _of_mapping(value: Mapping[str, Any]) -> list[Test]:
    if "test" in value and "entry_point" in value:
        text = f"{value['test']}\ncheck({value['entry_point']})"
        parsed(text)
        return [text]
    for given, expected in (("inputs", "outputs"), ("input", "output")):
        if isinstance(value.get(given), list) and isinstance(value.get(expected), list):
            break
    else:
        return [_one(value)]
    if len(value[given]) != len(value[expected]):
        raise ValueError(f"{len(value[given])} {given} and {len(value[expected])} {expected} do not match")
    pairs = zip(value[given], value[expected], strict=True)
    if name := value.get("fn_name"):
        return [_call(name, arguments, result) for arguments, result in pairs]
    return [{"input": _lines(one), "output": _lines(other)} for one, other in pairs]


def _call(name: str, arguments: Any, result: Any) -> Test:
    """A call as APPS and TACO have it: a list of arguments, and the value, often as a list of one."""
    if isinstance(arguments, str):  # LiveCodeBench: one JSON value a line
        arguments = [json.loads(line) for line in arguments.splitlines() if line.strip()]
        result = json.loads(result) if isinstance(result, str) else result
        return {"call": f"{name}({', '.join(map(repr, arguments))})", "value": result, "function": name}
    return {"call": f"{name}({', '.join(map(repr, arguments))})", "value": result, "function": name, "boxed": True}


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _one(test: Any) -> Test:
    if isinstance(test, str):
        parsed(test)
        return test
    if isinstance(test, Mapping) and test.get("fn_name") and "input" in test and "output" in test:
        return _call(test["fn_name"], test["input"], test["output"])
    if isinstance(test, Mapping) and isinstance(test.get("input"), str) and isinstance(test.get("output"), str):
        return dict(test)
    if isinstance(test, Mapping) and isinstance(test.get("call"), str) and "value" in test:
        parsed(test["call"])
        return dict(test)
    raise ValueError(
        f'{str(test)[:200]!r} is no test: give {{"input": text, "output": text}}, {{"call": "f(1)", "value": ...}} or '
        "a statement such as 'assert f(1) == 2'"
    )


def parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the test {text[:200]!r} is no Python: {error}") from None


# Comparing.


def steps(test: Test) -> Iterator[dict[str, Any]]:
    """What is sent of a test ("value": an expression, or "run": statements), and how its value is judged ("equal")."""
    if isinstance(test, Mapping):
        value, boxed = test["value"], test.get("boxed", False)

        def as_json(found: Any) -> bool:
            # APPS has the value of one call as [value], and means either.
            return _near(found, value) or (
                boxed and isinstance(value, list) and len(value) == 1 and _near(found, value[0])
            )

        step = {"value": test["call"], "equal": as_json}
        yield {**step, "function": test["function"]} if "function" in test else step
        return
    for statement in parsed(test).body:
        compared = _literal_comparison(statement)
        if compared is None:
            yield {"run": ast.unparse(statement)}
        else:
            expression, expected = compared
            yield {"value": expression, "equal": lambda found, expected=expected: _equal(found, expected)}


def _literal_comparison(statement: ast.stmt) -> tuple[str, Any] | None:
    """`assert f(1) == 2` -> ("f(1)", 2); None for any other form."""
    if not (isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare)):
        return None
    compare = statement.test
    if len(compare.ops) != 1 or not isinstance(compare.ops[0], ast.Eq):
        return None
    for expression, literal in ((compare.left, compare.comparators[0]), (compare.comparators[0], compare.left)):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return ast.unparse(expression), ast.literal_eval(literal)
    return None


def decode(value: Any) -> Any:
    """The data of `code_runner.encode`."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "float":
            return float(inner)
        case "complex":
            return complex(*map(float, inner))
        case "bytes":
            return bytes.fromhex(inner)
        case "dict":
            return {decode(key): decode(one) for key, one in inner}
    return {"list": list, "tuple": tuple, "set": frozenset}[kind](decode(one) for one in inner)


def _equal(found: Any, expected: Any) -> bool:
    return bool(found == expected)  # both are plain data, whose == is Python's


def _near(found: Any, expected: Any) -> bool:
    """Equality as JSON has it: tuples are lists, keys are strings, floats are compared with a tolerance."""
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(_near, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        left, right = ({str(key): one for key, one in values.items()} for values in (found, expected))
        return left.keys() == right.keys() and all(_near(left[key], right[key]) for key in left)
    numbers = [one for one in (found, expected) if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(numbers) == 2 and any(isinstance(one, float) for one in numbers):
        return _close(float(found), float(expected))
    return isinstance(found, bool) == isinstance(expected, bool) and _equal(found, expected)


def _close(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def same_output(printed: str, expected: str) -> bool:
    """Equal line by line and word by word; blank lines at the end and space between words do not count, and numbers of
    which one has a decimal point may differ by `TOLERANCE`.

    >>> same_output("3 0.33333333\\n\\n", "3 0.3333333")
    True
    >>> same_output("3.0", "4")
    False
    """
    lines = [[line.split() for line in text.rstrip().split("\n")] for text in (printed, expected)]
    if [len(words) for words in lines[0]] != [len(words) for words in lines[1]]:
        return False
    return all(
        one == other or _close_words(one, other)
        for words in zip(*lines, strict=True)
        for one, other in zip(*words, strict=True)
    )


_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?", re.ASCII)


def _close_words(one: str, other: str) -> bool:
    if len(one) > 400 or len(other) > 400 or not (_NUMBER.fullmatch(one) and _NUMBER.fullmatch(other)):
        return False
    return not (one.lstrip("+-").isdigit() and other.lstrip("+-").isdigit()) and _close(float(one), float(other))


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + " ..."
