"""MMLU-Pro: 12,032 questions of three to ten choices in 14 categories (Wang et al. 2024), 5 worked examples of each.

The Hub's questions have been corrected over the years; the revision is pinned, and the local file holds those that the
authors' published outputs answered in 2024.
"""

from collections.abc import Sequence

from eval.benchmark import Benchmark, Row, Source
from eval.multiple_choice import CHAINS, CHOICE_GRADER, grade_sample, render_choices
from eval.prompts import few_shot_choice, simple_evals_choice, without_examples
from eval.sample import Sample

TEST = Source(
    hub="TIGER-Lab/MMLU-Pro",
    split="test",
    revision="b189ec765aa7ed75c8acfea42df31fdae71f97be",
    file="mmlu_pro/test.jsonl.gz",
    sha256="94e512d0e3076a702e94262980a266ffeae1355dfb65fc2c82bcdf265e834776",
    rows=12032,
    requires=("question_id", "question", "options", "answer", "category"),
)
VALIDATION = Source(
    hub=TEST.hub,
    split="validation",
    revision=TEST.revision,
    file="mmlu_pro/validation.jsonl",
    rows=70,
    requires=(*TEST.requires, "cot_content"),
)


def to_sample(row: Row, index: int) -> Sample:
    return Sample(
        id=str(row["question_id"]),
        task="mmlu_pro",
        question=row["question"],
        choices=tuple(option for option in row["options"] if option != "N/A"),  # as the official script loads them
        gold=row["answer"],
        group=row["category"],
        meta={"cot": row["cot_content"]} if row.get("cot_content") else {},
    )


INSTRUCTION = (
    "The following are multiple choice questions (with answers) about {subject}. Think step by step and then finish "
    'your answer with "the answer is (X)" where X is the correct letter choice.'
)


def asked(sample: Sample) -> str:
    return f"Question:\n{sample.question}\nOptions:\n{render_choices(sample.choices, 'A. ')}\n"


def official(sample: Sample, examples: Sequence[Sample]) -> str:
    """`evaluate_from_local.py` and `cot_prompt_lib/initial_prompt.txt` of TIGER-AI-Lab/MMLU-Pro: 5 worked thoughts."""
    think = "Answer: Let's think step by step."
    worked = [asked(one) + one.meta["cot"].replace("A: Let's think step by step.", think) + "\n\n" for one in examples]
    return INSTRUCTION.format(subject=sample.group) + "\n\n" + "".join(worked) + asked(sample) + think


@without_examples
def zero_shot(sample: Sample) -> str:
    """Ours, for "MMLU-Pro made zero-shot" (DeepSeek-R1, p. 11): the official instruction and question."""
    instruction = INSTRUCTION.replace("are multiple choice questions (with answers)", "is a multiple choice question")
    return f"{instruction.format(subject=sample.group)}\n\n{asked(sample)}".rstrip("\n")


MMLU_PRO = Benchmark(
    name="mmlu_pro",
    title="MMLU-Pro",
    source=TEST,
    licence="MIT",
    citation="Wang et al. 2024, MMLU-Pro, arXiv 2406.01574",
    kind="choice",
    to_sample=to_sample,
    prompts={
        "zero_shot": zero_shot,
        "official": official,
        "simple_evals": simple_evals_choice,
        # DeepSeek-V3 (p. 24) scores MMLU-Pro by perplexity; the form is that of MMLU in DeepSeek-V2, table 29.
        "few_shot": few_shot_choice(
            header="The following are multiple choice questions (with answers) about {subject}.",
            answer="Answer:",
            subject=lambda sample: sample.group,
        ),
    },
    grade=grade_sample,
    grader=CHOICE_GRADER,
    chains=tuple(CHAINS),
    exemplars=VALIDATION,
    stop=("Question:",),
    chance=0.11,  # a mean of 9.5 choices
)
