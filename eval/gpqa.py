"""GPQA: questions of four choices by doctoral students in biology, physics and chemistry (Rein et al. 2023).

`gpqa_main` has 448, `gpqa_diamond` the 198 that both experts answered alike and most laymen wrongly. Its authors ask
that no question ever stands in plain text where a crawler finds it: the tasks are confidential, and a report or log
holds ids and letters only. The rows give the correct answer first, so its order is drawn here for each item; with
`permutation: per_sample` a protocol draws another one for each of the k samples, as simple-evals does.
"""

from dataclasses import replace

from eval.benchmark import Benchmark, Row, Source
from eval.multiple_choice import CHAINS, CHOICE_GRADER, grade_sample, permuted
from eval.prompts import simple_evals_choice, without_examples
from eval.sample import Sample

REVISION = "633f5ee89ab8ad4522a9f850766b73f62147ffdd"
ANSWERS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def source(subset: str, rows: int) -> Source:
    return Source(
        hub="Idavidrein/gpqa",
        config=f"gpqa_{subset}",
        split="train",  # the only one; its name notwithstanding
        revision=REVISION,
        file=f"gpqa/gpqa_{subset}.csv",
        rows=rows,
        requires=("Question", *ANSWERS, "High-level domain", "Subdomain"),
    )


def published(row: Row, index: int, task: str) -> Sample:
    """The correct answer in position 0, as the rows have it."""
    return Sample(
        id=str(row.get("Record ID") or index),
        task=task,
        question=row["Question"],
        choices=tuple(row[name] for name in ANSWERS),
        gold="A",
        group=row["High-level domain"],
        meta={"subdomain": row["Subdomain"]},
    )


def main_sample(row: Row, index: int) -> Sample:
    return permuted(published(row, index, "gpqa_main"), seed=0)


def diamond_sample(row: Row, index: int) -> Sample:
    return permuted(published(row, index, "gpqa_diamond"), seed=0)


@without_examples
def zero_shot(sample: Sample) -> str:
    return simple_evals_choice(sample, ())


PROMPTS = {"simple_evals": simple_evals_choice, "zero_shot": zero_shot}
CITATION = "Rein et al. 2023, GPQA: A Graduate-Level Google-Proof Q&A Benchmark, arXiv 2311.12022"

GPQA_MAIN = Benchmark(
    name="gpqa_main",
    title="GPQA",
    source=source("main", 448),
    licence="CC BY 4.0; not to be published in plain text",
    citation=CITATION,
    kind="choice",
    to_sample=main_sample,
    prompts=PROMPTS,
    grade=grade_sample,
    grader=CHOICE_GRADER,
    chains=tuple(CHAINS),
    confidential=True,
    chance=0.25,
)
GPQA_DIAMOND = replace(
    GPQA_MAIN,
    name="gpqa_diamond",
    title="GPQA Diamond",
    source=source("diamond", 198),
    to_sample=diamond_sample,
)
