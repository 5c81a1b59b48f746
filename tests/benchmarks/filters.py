"""Rows of the benchmark table: near copies and contamination at 1,000 to 100,000 prompts, in processor seconds; what is
planted must be found. Time in proportion is the same microseconds a prompt in every row."""

import time
from collections.abc import Iterator
from dataclasses import replace

from rows import Row

from distill import dedup, filtering
from distill.decontaminate import Index
from distill.recipe import Filter
from distill.records import Problem
from eval.sample import Sample
from tests.distill.labelled import THOUGHTS
from tests.distill.prompts import planted, problem, prose
from tests.distill.test_filtering import PROBLEM, TRACE

COUNTS = (1_000, 10_000, 100_000)


def near_copies(alternate) -> Iterator[Row]:
    list(dedup.prompts(lambda: [problem("warm", "up")], 0.9))  # datasketch imports scipy
    for count in COUNTS:

        def rows(count: int = count) -> Iterator[Problem]:
            return (one for one, _ in planted(count))

        start = time.process_time()
        for _ in rows():
            pass
        making = time.process_time() - start
        start = time.process_time()
        dropped = {one.id for one in dedup.prompts(rows, 0.9) if one.reason}
        seconds = time.process_time() - start - 2 * making  # the prompts are made twice
        copies = {one.id for one, source in planted(count) if source is not None}
        assert dropped <= copies
        found = len(dropped) / len(copies)
        assert found >= 0.99
        name = f"near copies, {count:,} prompts, {found:.2%} of {len(copies):,} planted found"
        yield Row(name, f"{seconds / count * 1e6:,.0f} us each", "", "", "as many at every size")


def contamination(alternate) -> Iterator[Row]:
    index = Index.build(Sample(f"{n}", "test", prose(n), "7") for n in range(10_000))
    for count in COUNTS:
        prompts = [problem(str(n), prose(n + 9_990)) for n in range(count)]
        start = time.process_time()
        found = sum(index.match(one.question) is not None for one in prompts)
        seconds = time.process_time() - start
        assert found == 10, found
        name = f"contamination, {count:,} prompts against 10,000 items"
        yield Row(name, f"{seconds / count * 1e6:,.0f} us each", "", "", "as many at every size")


def filters(alternate) -> Iterator[Row]:
    lines = [f"{n}. {THOUGHTS['English'].split('. ')[n % 5]}, or {prose(n)}" for n in range(60)]
    traces = [replace(TRACE, thought="\n".join([*lines, prose(1000 + n)])) for n in range(50)]
    words = len(traces[0].thought.split())
    for name, settings in (("", Filter()), (", without repetition", Filter(repetition=False))):
        start = time.process_time()
        for trace in traces:
            assert not filtering.decide(trace, PROBLEM, settings).reason
        seconds = time.process_time() - start
        yield Row(f"filters{name}, thoughts of {words:,} words", f"{seconds / 50 * 1e3:,.1f} ms each", "", "", "")


ROWS = {"near copies": near_copies, "contamination": contamination, "filters": filters}
