"""Rows of the benchmark table: verdicts a second on real outputs, each text read once, nothing cached from before.

The texts are ZeroEval's outputs and MATH-500's solutions, where the benchmark files are at hand. The last row is the
worst mix: only pairs that the exact path hands to a worker.
"""

import gzip
import json
import time
from collections.abc import Iterator

from rows import Row

from eval.answers import equivalent, grade_math_many
from eval.exact import read
from tests.eval.data import DATA


def lines(file: str) -> list[dict]:
    opened = gzip.open if file.endswith(".gz") else open
    with opened(DATA / file, "rt", encoding="utf-8") as found:
        return [json.loads(line) for line in found]


def row(name: str, pairs: list[tuple[str, str]], goal: str) -> Row:
    read.cache_clear()
    start = time.perf_counter()
    graded = grade_math_many(pairs)
    seconds = time.perf_counter() - start
    in_workers = sum(one.detail not in ("exact", "no answer was found") for one in graded)
    name = f"grading, {len(pairs):,} {name}, {in_workers:,} by sympy"
    return Row(name, f"{len(pairs) / seconds:,.0f} /s", "", "", goal)


def grading(alternate) -> Iterator[Row]:
    equivalent(r"\cot x", r"\tan x")  # the workers are started once
    if not (DATA / "graded").is_dir():
        yield Row(f"grading: no benchmark files in {DATA}", "", "", "", "")
        return
    mixed = []
    for run in ("gsm_gemma-2-2b-it", "math-l5_gemma-2-2b-it", "math-l5_Qwen2.5-7B-Instruct"):
        outputs = lines(f"graded/zeroeval/{run}.jsonl.gz")
        mixed += [(one["output"][0], one["answer"].lstrip("# ")) for one in outputs]
    problems = lines("math500/test.jsonl")
    golds = [one["answer"] for one in problems]
    mixed += [(one["solution"], one["answer"]) for one in problems]
    mixed += [(rf"\boxed{{{a}}}", b) for a, b in zip(golds, golds[1:] + golds[:1], strict=True)]
    yield row("real outputs", mixed, ">= 500 /s")
    opaque = [
        (rf"\boxed{{\sin({k}x)+\sqrt[3]{{{k}}}}}", rf"\sqrt[3]{{{k + k % 2}}}+\sin({k} x)") for k in range(1, 400)
    ]
    yield row("pairs of formulas", opaque, "")


ROWS = {"grading": grading}
