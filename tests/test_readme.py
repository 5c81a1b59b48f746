"""The README stays true: its examples run, and its tree names every file that is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run_in_order():
    blocks = re.findall(r"(<!-- example: not run[^\n]*-->\n)?```python\n(.*?)```", README, re.DOTALL)
    examples = [code for skipped, code in blocks if not skipped]
    assert len(examples) >= 4
    exec(compile("\n".join(examples), "README.md", "exec"), {})


def test_tree_names_every_module():
    tree = README[README.index("## What is where") :]
    for folder in ("modeling_deepseek", "eval", "distill"):
        for file in (ROOT / folder).glob("*.py"):
            assert file.name in tree, f"{file.name} is not in the README's tree"
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert list(ROOT.glob(f"[!.]*/**/{name}")), f"the README's tree names {name}, which is not there"
