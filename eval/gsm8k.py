"""GSM8K: 1,319 grade school word problems (Cobbe et al. 2021); the answer is a number after `####`.

Chains: `default` reads and compares as everywhere in mathematics; `official` is OpenAI's match of the text after
"A: " or "#### ", where 5 and 5.00 differ.
"""

from collections.abc import Sequence

from eval.answers import MATH_GRADER, grade_final, gsm8k_official
from eval.benchmark import Benchmark, Row, Source
from eval.prompts import boxed, simple_evals_math
from eval.sample import Graded, Sample

TEST = Source(
    hub="openai/gsm8k",
    config="main",
    split="test",
    revision="740312add88f781978c0658806c59bc2815b9866",
    file="gsm8k/test.jsonl",
    sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    rows=1319,
    requires=("question", "answer"),
)


def to_sample(row: Row, index: int) -> Sample:
    solution, marker, answer = row["answer"].rpartition("####")
    if not marker:
        raise ValueError(f"gsm8k: row {index} has no '#### N' in its answer: {row['answer'][-80:]!r}")
    return Sample(
        id=f"test/{index}",
        task="gsm8k",
        question=row["question"],
        gold=answer.strip().replace(",", ""),
        meta={"solution": solution.strip()},
    )


def grade(sample: Sample, answer: str, chain: str) -> Graded:
    if chain == "official":
        if not answer.strip():
            return Graded("no_answer", None, "chain official: no answer", MATH_GRADER)
        equal = gsm8k_official(answer, f"#### {sample.gold}")
        return Graded("correct" if equal else "wrong", None, "chain official", MATH_GRADER)
    return grade_final(answer, sample.gold)


# The eight worked examples of DeepSeek-V2's appendix G, table 24.
WORKED = (
    (
        "Max can mow the lawn in 40 minutes. If it takes him twice that long to fertilize the lawn, how long will it "
        "take him to both mow and fertilize the lawn?",
        "It takes Max 2 * 40 minutes = 80 minutes to fertilize the lawn. In total, Max takes 80 minutes + 40 minutes = "
        "120 minutes to both mow and fertilize the lawn.",
        "120",
    ),
    (
        "The bagels cost $2.25 each, or a dozen for $24. How much is saved, per bagel, in cents, by buying a dozen at "
        "a time?",
        "They cost 2.25*100=225 cents each. At the bulk rate, they are 24/12=2 dollar each. They cost 2*100=200 cents "
        "each. 225-200=25 cents are saved per bagel.",
        "25",
    ),
    (
        "Tim is 5 years old. His cousin, Rommel, is thrice as old as he is. His other cousin, Jenny, is 2 years older "
        "than Rommel. How many years younger is Tim than Jenny?",
        "Rommel is 5 x 3 = 15 years old. Jenny is 15 + 2 = 17 years old. So, Tim is 17 - 5 = 12 years younger than "
        "Jenny.",
        "12",
    ),
    (
        "The school has 14 boys and 10 girls. If 4 boys and 3 girls drop out, how many boys and girls are left?",
        "There are 14 boys - 4 boys = 10 boys left. There are 10 girls - 3 girls = 7 girls left. In total there are 10 "
        "boys + 7 girls = 17 boys and girls left.",
        "17",
    ),
    (
        "Building one birdhouse requires 7 planks and 20 nails. If 1 nail costs 0.05, and one plank costs 3, what is "
        "the cost, in dollars, to build 4 birdhouses?",
        "The cost of the planks for one birdhouse is 7 * 3 = 21. And the nails are a cost of 20 * 0.05 = 1 for each "
        "birdhouse. So to build one birdhouse one will need 21 + 1 = 22. So the cost of building 4 birdhouses is at "
        "4 * 22 = 88.",
        "88",
    ),
    (
        "Danny brings 3 watermelons to his family picnic. He cuts each watermelon into 10 slices. His sister brings 1 "
        "watermelon to the family picnic, and she cuts the watermelon into 15 slices. How many watermelon slices are "
        "there in total at the picnic?",
        "From Danny, there are 3 * 10 = 30 watermelon slices. From his sister, there are 1 * 15 = 15 watermelon "
        "slices. There are a total of 30 + 15 = 45 watermelon slices.",
        "45",
    ),
    (
        "Angela is a bike messenger in New York. She needs to deliver 8 times as many packages as meals. If she needs "
        "to deliver 27 meals and packages combined, how many meals does she deliver?",
        "Let p be the number of packages Angela delivers and m be the number of meals. We know that p + m = 27 and "
        "p = 8m. Substituting the second equation into the first equation, we get 8m + m = 27. Combining like terms, "
        "we get 9m = 27. Dividing both sides by 9, we get m = 3.",
        "3",
    ),
    (
        "Cori is 3 years old today. In 5 years, she will be one-third the age of her aunt. How old is her aunt today?",
        "In 5 years, Cori will be 3 + 5 = 8 years old. In 5 years, Cori's aunt will be 8 x 3 = 24 years old. Today, "
        "her aunt is 24 - 5 = 19 years old.",
        "19",
    ),
)
EXEMPLARS = tuple(
    Sample(id=f"deepseek-v2/{n}", task="gsm8k", question=question, gold=gold, meta={"solution": solution})
    for n, (question, solution, gold) in enumerate(WORKED)
)


def few_shot(sample: Sample, examples: Sequence[Sample]) -> str:
    worked = [
        f"Q: {one.question}\nA: Let's think step by step. {one.meta['solution']} The answer is {one.gold}."
        for one in examples
    ]
    return "\n\n".join([*worked, f"Q: {sample.question}\nA: Let's think step by step."])


GSM8K = Benchmark(
    name="gsm8k",
    title="GSM8K",
    source=TEST,
    licence="MIT",
    citation="Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems, arXiv 2110.14168",
    kind="math",
    to_sample=to_sample,
    prompts={"boxed": boxed, "simple_evals": simple_evals_math, "few_shot": few_shot},
    grade=grade,
    grader=MATH_GRADER,
    fixed_exemplars=EXEMPLARS,
    chains=("default", "official"),
    stop=("\nQ:",),
)
