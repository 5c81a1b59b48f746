"""AIME 2024 and 2025: the 30 problems of the two papers of each year; the answer is an integer from 0 to 999.

The problems are the Mathematical Association of America's.
"""

from dataclasses import replace

from eval.answers import MATH_GRADER, grade_sample
from eval.benchmark import Benchmark, Row, Source
from eval.prompts import boxed, simple_evals_math
from eval.sample import Sample

AIME_2024 = Source(
    hub="HuggingFaceH4/aime_2024",
    split="train",  # the only one
    revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
    file="aime24/test.jsonl",
    sha256="e428f83ec735201c9db2a232727f4c20dbce87079ed386b6e3fb7f756d078756",
    rows=30,
    requires=("problem",),
)
AIME_2025 = Source(
    hub="math-ai/aime25",
    split="test",
    revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
    file="aime25/test.jsonl",
    sha256="b672f9c6660b68dd42f5fc705b17405f24eaa9991c98991d63463c6b683468a8",
    rows=30,
    requires=("problem",),
)


def to_sample(row: Row, index: int, task: str) -> Sample:
    answer = row.get("expected_answer") or row.get("answer")  # the local file's, the Hub's
    if answer is None:
        raise ValueError(f"{task}: row {index} has neither expected_answer nor answer; it has {', '.join(row)}")
    return Sample(id=f"{task}/{index}", task=task, question=row["problem"], gold=str(int(answer)))  # 073 is 73


def sample_2024(row: Row, index: int) -> Sample:
    return to_sample(row, index, "aime24")


def sample_2025(row: Row, index: int) -> Sample:
    return to_sample(row, index, "aime25")


PROMPTS = {"boxed": boxed, "simple_evals": simple_evals_math}

AIME24 = Benchmark(
    name="aime24",
    title="AIME 2024",
    source=AIME_2024,
    licence="problems: Mathematical Association of America",
    citation="American Invitational Mathematics Examination 2024, I and II",
    kind="math",
    to_sample=sample_2024,
    prompts=PROMPTS,
    grade=grade_sample,
    grader=MATH_GRADER,
)
AIME25 = replace(
    AIME24,
    name="aime25",
    title="AIME 2025",
    source=AIME_2025,
    citation="American Invitational Mathematics Examination 2025, I and II",
    to_sample=sample_2025,
)
