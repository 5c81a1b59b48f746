"""YAML says what was meant, or is refused by name and line."""

import pytest
from pydantic import BaseModel, ConfigDict

from eval.yaml_files import parse_yaml, read_yaml, validated


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    learning_rate: float = 0.1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    inner: Inner = Inner()
    parts: list[Inner] = []


def test_numbers_and_booleans_are_those_of_yaml_1_2():
    # PyYAML alone: "1e-5" (text), False, True, False, 10 (octal: 8).
    text = "a: 1e-5\nb: no\nc: yes\nd: off\ne: true\nf: 1.5\ng: 3\nh: -2E+3\ni: '1e-5'\nj: .5\nk: 1_0\nl: 1.0.0"
    assert parse_yaml(text, "x") == {
        "a": 1e-5, "b": "no", "c": "yes", "d": "off", "e": True, "f": 1.5, "g": 3, "h": -2000.0, "i": "1e-5",
        "j": 0.5, "k": 10, "l": "1.0.0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands twice"),
        ("a: [1", "x is not valid YAML"),
        ("- a", "x holds list, not a mapping"),
        ("", "x holds NoneType, not a mapping"),
        ("a: !!python/object/apply:os.system ['true']", "x is not valid YAML"),
    ],
)
def test_what_is_no_mapping_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(text, "x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "a"}, "nmae is unknown. Did you mean 'name'?"),
        ({}, "name is missing"),
        ({"name": 3}, "name=3: Input should be a valid string"),
        ({"name": "a", "inner": {"learning_rat": 1.0}}, "inner.learning_rat is unknown. Did you mean 'learning_rate'?"),
        (
            {"name": "a", "inner": {"learning_rate": "1e-5"}},
            "inner.learning_rate='1e-5': Input should be a valid number",
        ),
        (
            {"name": "a", "parts": [{"learnin_rate": 1.0}]},
            "parts.0.learnin_rate is unknown. Did you mean 'learning_rate'?",
        ),
    ],
)
def test_fields_are_checked_by_name(values, message):
    with pytest.raises(ValueError, match="the recipe:") as error:
        validated(Outer, values, "the recipe")
    assert message in str(error.value)


def test_every_wrong_field_is_named_at_once():
    with pytest.raises(ValueError, match="name is missing") as error:
        validated(Outer, {"inner": {"learning_rate": "x"}, "more": 1}, "the recipe")
    assert len(str(error.value).splitlines()) == 4


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_yaml(tmp_path / "none.yaml")
