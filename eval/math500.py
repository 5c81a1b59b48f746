"""MATH-500: the 500 problems of MATH's test set that OpenAI held out for PRM800K (Lightman et al. 2023)."""

from eval.answers import MATH_GRADER, grade_sample
from eval.benchmark import Benchmark, Row, Source
from eval.prompts import boxed, minerva, minerva_exemplars, simple_evals_math
from eval.sample import Sample

TEST = Source(
    hub="HuggingFaceH4/MATH-500",
    split="test",
    revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    file="math500/test.jsonl",
    sha256="35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
    rows=500,
    requires=("problem", "solution", "answer", "subject", "level", "unique_id"),
)


def to_sample(row: Row, index: int) -> Sample:
    return Sample(
        id=row["unique_id"],
        task="math500",
        question=row["problem"],
        gold=row["answer"],
        group=row["subject"],
        meta={"level": row["level"], "solution": row["solution"]},
    )


MATH500 = Benchmark(
    name="math500",
    title="MATH-500",
    source=TEST,
    licence="MIT",
    citation="Lightman et al. 2023, Let's Verify Step by Step, arXiv 2305.20050; MATH: arXiv 2103.03874",
    kind="math",
    to_sample=to_sample,
    prompts={"boxed": boxed, "simple_evals": simple_evals_math, "few_shot": minerva},
    grade=grade_sample,
    grader=MATH_GRADER,
    fixed_exemplars=minerva_exemplars("math500"),
    stop=("Problem:",),
)
