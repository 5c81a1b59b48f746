"""The examples of the docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import modeling_deepseek

FILES = sorted(Path(modeling_deepseek.__file__).parent.glob("*.py"))
WITH_EXAMPLES = [file.stem for file in FILES if "    >>> " in file.read_text()]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name):
    module = importlib.import_module(f"modeling_deepseek.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
