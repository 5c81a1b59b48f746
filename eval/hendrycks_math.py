"""MATH: 5,000 competition problems of five levels in seven subjects (Hendrycks et al. 2021), answers in LaTeX.

The authors' archive has one JSON file for each problem, `MATH/test/<subject>/<n>.json`; as a folder or a zip it is read
as it is. The answer is the content of the last box of the published solution.
"""

from pathlib import PurePosixPath

from eval.answers import MATH_GRADER, grade_sample
from eval.benchmark import Benchmark, Row, Source
from eval.prompts import boxed, minerva, minerva_exemplars, simple_evals_math
from eval.sample import Sample

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
TEST = Source(
    hub="EleutherAI/hendrycks_math",
    config=SUBJECTS,
    split="test",
    revision="21a5633873b6a120296cce3e2df9d5550074f4a3",
    file="math/MATH.zip",
    members="test/*/*.json",
    rows=5000,
    requires=("problem", "level", "type", "solution"),
)


def last_box(solution: str) -> str:
    r"""The content of the last `\boxed{}` or `\fbox{}`, or what follows a last `\boxed ` up to the dollar.

    >>> last_box(r"so $x = \boxed{\frac{1}{2}}$ and not $\boxed{3}$, no: $\boxed 7$.")
    '7'
    """
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start == -1:
        raise ValueError(f"the solution holds no box: {solution[-80:]!r}")
    content = solution[start:].split("box", 1)[1].removeprefix("ed")
    if not content.startswith("{"):
        return content.split("$")[0].strip()
    depth = 0
    for end, character in enumerate(content):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return content[1:end]
    raise ValueError(f"the last box of the solution is not closed: {solution[-80:]!r}")


def to_sample(row: Row, index: int) -> Sample:
    subject = row["type"].lower().replace(" & ", "_and_").replace(" ", "_")
    file = "/".join(PurePosixPath(row["_file"]).parts[-3:]) if "_file" in row else f"{subject}/{index}"
    return Sample(
        id=file,
        task="math",
        question=row["problem"],
        gold=last_box(row["solution"]),
        group=row["type"],
        meta={"level": row["level"], "solution": row["solution"]},
    )


MATH = Benchmark(
    name="math",
    title="MATH",
    source=TEST,
    licence="MIT",
    citation="Hendrycks et al. 2021, Measuring Mathematical Problem Solving With the MATH Dataset, arXiv 2103.03874",
    kind="math",
    to_sample=to_sample,
    prompts={"boxed": boxed, "simple_evals": simple_evals_math, "few_shot": minerva},
    grade=grade_sample,
    grader=MATH_GRADER,
    fixed_exemplars=minerva_exemplars("math"),
    stop=("Problem:",),
)
