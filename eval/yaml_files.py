"""Strict YAML into a pydantic model: what was written is what is meant, or an error that says how to write it.

PyYAML follows YAML 1.1, where `1e-5` is a string, a bare `no` is False and the last of two equal keys wins without a
word. Here numbers and booleans are those of YAML 1.2, a repeated key is an error, and an unknown key is answered with
the nearest known name.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema for booleans and floats; no repeated keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML reads it from the class
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def nearest(name: str, names: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing where no name is near."""
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping that a YAML text holds; ValueError, naming `where` and the line, where it does not hold one."""
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds {type(values).__name__}, not a mapping of `key: value` lines")
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """`parse_yaml` of a file; FileNotFoundError, naming it, where there is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return parse_yaml(path.read_text(encoding="utf-8"), str(path))


def validated(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """`model(**values)`; ValueError with one line for each field that is wrong, unknown keys with the nearest name."""
    try:
        return model.model_validate(values)
    except ValidationError as errors:
        lines = [_line(model, error) for error in errors.errors()]
        raise ValueError(f"{where}:\n  " + "\n  ".join(lines)) from None


def _line(model: type[BaseModel], error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        fields = _fields_at(model, error["loc"][:-1])
        near = nearest(str(error["loc"][-1]), fields)
        return f"{path} is unknown.{near} Known: {', '.join(sorted(fields))}"
    if error["type"] == "missing":
        return f"{path} is missing"
    if error["type"] == "value_error":  # our own words, which name the value
        return f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
    return f"{path}={error['input']!r}: {error['msg']}"


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """The field names of the model that stands at `loc` inside `model`; those of `model` where it cannot be told."""
    for part in loc:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        candidates = [inner, *getattr(inner, "__args__", ())]
        models = [one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)]
        if models:
            model = models[0]
    return list(model.model_fields)
