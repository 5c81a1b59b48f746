"""Evaluation: from a benchmark's rows to a score with its interval.

    benchmark file (mmlu.py, gpqa.py, ...) -> Sample -> prompt, by a Protocol -> sampler -> Completion -> store
    store -> thinking (thought | answer) -> grader -> Graded -> metrics -> results.json, report.md, report.html

`tasks.TASKS` is the table of benchmarks, `protocols.PROTOCOLS` that of the published ways to ask; `runner.evaluate` is
the whole path, read from top to bottom. Nothing is imported here: grading needs neither torch nor a network.

Write `from eval.runner import evaluate`, not `import eval`, which hides Python's own `eval`.
"""
