"""MMLU: 14,042 questions of four choices on 57 subjects (Hendrycks et al. 2021), with 5 worked examples of each.

The authors' archive holds a CSV without header for each subject and split; on the Hub, one table has them all.
"""

from dataclasses import replace
from pathlib import PurePosixPath

from eval.benchmark import Benchmark, Row, Source
from eval.multiple_choice import CHAINS, CHOICE_GRADER, LETTERS, grade_sample
from eval.prompts import few_shot_choice, simple_evals_choice, without_examples
from eval.sample import Sample

TEST = Source(
    hub="cais/mmlu",
    config="all",
    split="test",
    revision="c30699e8356da336a370243923dbaf21066bb9fe",
    file="mmlu/mmlu.zip",
    members="test/*.csv",
    columns=("question", "A", "B", "C", "D", "answer"),
    sha256="9e2b2d78bf59d80baf271a13005568ef0aca17bd663f2e5ebfecdc07a68f0edc",
    rows=14042,
    requires=("question", "answer"),
)
DEV = replace(TEST, split="dev", members="dev/*.csv", rows=285)


def to_sample(row: Row, index: int) -> Sample:
    if "choices" in row:  # the Hub's: choices in a list, the answer as a number
        subject, choices, gold = row["subject"], row["choices"], LETTERS[row["answer"]]
    else:
        subject = PurePosixPath(row["_file"]).stem.rsplit("_", 1)[0]
        choices, gold = [row[letter] for letter in "ABCD"], row["answer"]
    return Sample(
        id=f"{subject}/{index}",
        task="mmlu",
        question=row["question"],
        choices=tuple(choices),
        gold=gold,
        group=subject,
    )


def subject_name(sample: Sample) -> str:
    return sample.group.replace("_", " ")


@without_examples
def zero_shot(sample: Sample) -> str:
    """Ours: the header of the few-shot form, then the prompt of simple-evals."""
    header = f"The following is a multiple choice question about {subject_name(sample)}."
    return f"{header}\n\n{simple_evals_choice(sample, ())}"


MMLU = Benchmark(
    name="mmlu",
    title="MMLU",
    source=TEST,
    licence="MIT",
    citation="Hendrycks et al. 2021, Measuring Massive Multitask Language Understanding, arXiv 2009.03300",
    kind="choice",
    to_sample=to_sample,
    prompts={
        "simple_evals": simple_evals_choice,
        "zero_shot": zero_shot,
        # DeepSeek-V2, appendix G, table 29; the wording of the authors' own script.
        "few_shot": few_shot_choice(
            header="The following are multiple choice questions (with answers) about {subject}.",
            answer="Answer:",
            subject=subject_name,
        ),
    },
    grade=grade_sample,
    grader=CHOICE_GRADER,
    chains=tuple(CHAINS),
    exemplars=DEV,
    stop=("\n\n",),
    chance=0.25,
)
