"""How many verdicts a second the grader gives on real outputs: `PYTHONPATH=. python tests/benchmarks/grading.py`.

The texts are ZeroEval's outputs and MATH-500's solutions, each read once, nothing cached from before. The last line is
the worst mix: only pairs that the exact path hands to a worker.
"""

import gzip
import json
import os
import time
from collections import Counter

from eval.answers import equivalent, grade_math_many
from eval.exact import read
from tests.eval.data import DATA


def rows(file: str) -> list[dict]:
    opened = gzip.open if file.endswith(".gz") else open
    with opened(DATA / file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def measure(name: str, pairs: list[tuple[str, str]]) -> None:
    read.cache_clear()
    start = time.perf_counter()
    graded = grade_math_many(pairs)
    seconds = time.perf_counter() - start
    counts = dict(Counter(one.verdict for one in graded))
    in_workers = sum(one.detail not in ("exact", "no answer was found") for one in graded)
    print(f"{name:32} {len(pairs):6} {len(pairs) / seconds:8.0f} {in_workers:10}  {counts}", flush=True)


def main() -> None:
    equivalent(r"\cot x", r"\tan x")  # the workers are started once
    print(f"{os.cpu_count()} cores\n{'texts':32} {'number':>6} {'a second':>8} {'in workers':>10}  verdicts")
    mixed = []
    for run in ("gsm_gemma-2-2b-it", "math-l5_gemma-2-2b-it", "math-l5_Qwen2.5-7B-Instruct"):
        pairs = [(row["output"][0], row["answer"].lstrip("# ")) for row in rows(f"graded/zeroeval/{run}.jsonl.gz")]
        measure(f"ZeroEval {run}", pairs)
        mixed += pairs
    problems = rows("math500/test.jsonl")
    solutions = [(row["solution"], row["answer"]) for row in problems]
    golds = [row["answer"] for row in problems]
    shifted = [(rf"\boxed{{{a}}}", b) for a, b in zip(golds, golds[1:] + golds[:1], strict=True)]
    measure("MATH-500 published solutions", solutions)
    measure("MATH-500 the next gold", shifted)
    measure("all of these", mixed + solutions + shifted)
    opaque = [
        (rf"\boxed{{\sin({k}x)+\sqrt[3]{{{k}}}}}", rf"\sqrt[3]{{{k + k % 2}}}+\sin({k} x)") for k in range(1, 400)
    ]
    measure("sympy for every pair", opaque)


if __name__ == "__main__":
    main()
