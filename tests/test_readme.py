"""The README stays true: its examples run, its tree names every file that is there, what it computed is computed."""

import re
from pathlib import Path

from modeling_deepseek import what_fits

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


def test_table_of_what_fits_is_computed():
    header = "| model | weights | GB | "
    table = README[README.index(header) :].split("\n\n")[0].splitlines()
    columns = table[0].removeprefix(header).rstrip(" |").split(" | ")
    rows = [line.strip("| ").split(" | ") for line in table[2:]]
    written = {
        (model, dtype, column): (size, context)
        for model, dtype, size, *contexts in rows
        for column, context in zip(columns, contexts, strict=True)
    }
    computed = {}
    for fit in what_fits():
        column = f"{fit.gpus}x" * (fit.gpus > 1) + f"{fit.gpu_memory_bytes // 10**9} GB"
        context = f"{fit.context_tokens // 1024}K" if fit.context_tokens else "-"
        computed[fit.model, fit.weights_dtype, column] = (f"{fit.weights_bytes / 1e9:,.1f}", context)
    assert len(written) == 90
    assert written == {key: computed[key] for key in written}
