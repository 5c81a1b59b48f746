"""Templates that several benchmarks share: from a question and its worked examples to the text that is asked.

A template is a function of values, named in a benchmark's `prompts` and chosen by the protocol. Its wording is part of
a published protocol and is kept to the letter; each cites where it stands.
"""

from collections.abc import Callable, Sequence

from eval.benchmark import Template
from eval.multiple_choice import LETTERS, render_choices
from eval.sample import Sample

DIRECTIVE = "Please reason step by step, and put your final answer within \\boxed{}."  # README of DeepSeek-R1


def without_examples(render: Callable[[Sample], str]) -> Template:
    """A template that has no place for worked examples and refuses them, rather than dropping them."""

    def template(sample: Sample, examples: Sequence[Sample]) -> str:
        if examples:
            raise ValueError(
                f"{sample.task}: this template has no place for worked examples, and shots={len(examples)}; set "
                "shots=0 or choose a few-shot template"
            )
        return render(sample)

    return template


@without_examples
def boxed(sample: Sample) -> str:
    return f"{sample.question}\n{DIRECTIVE}"


@without_examples
def simple_evals_choice(sample: Sample) -> str:
    """simple-evals `common.py`, QUERY_TEMPLATE_MULTICHOICE; as many letters as there are choices."""
    letters = LETTERS[: len(sample.choices)]
    return (
        "Answer the following multiple choice question. The last line of your response should be of the following "
        f"format: 'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. Think step by step before "
        f"answering.\n\n{sample.question}\n\n{render_choices(sample.choices, 'A) ')}"
    )


@without_examples
def simple_evals_math(sample: Sample) -> str:
    """simple-evals `math_eval.py`, QUERY_TEMPLATE."""
    return (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        f"$ANSWER (without quotes) where $ANSWER is the answer to the problem.\n\n{sample.question}\n\nRemember to put "
        'your answer on its own line after "Answer:", and you do not need to use a \\boxed command.'
    )


def few_shot_choice(*, header: str, question: str = "", answer: str, subject: Callable[[Sample], str]) -> Template:
    """DeepSeek-V2, appendix G: a header with the subject, worked examples, then the question up to its answer.

    The answers stand after `answer` as ` A` where it ends in an ASCII colon, else as `A`: as the runner continues it.
    """

    def template(sample: Sample, examples: Sequence[Sample]) -> str:
        space = " " if answer.isascii() else ""

        def asked(one: Sample) -> str:
            return f"{question}{one.question}\n{render_choices(one.choices, 'A. ')}\n{answer}"

        worked = [f"{asked(one)}{space}{one.gold}" for one in examples]
        return "\n\n".join([header.format(subject=subject(sample)), *worked, asked(sample)])

    return template


# Minerva's four worked examples (Lewkowycz et al. 2022, arXiv 2206.14858, appendix D.2), the prompt of DeepSeek-V2's
# table 27. The stray brace after the first problem stands in both.
MINERVA = (
    (
        r"Find the domain of the expression  $\frac{\sqrt{x-2}}{\sqrt{5-x}}$.}",
        r"The expressions inside each square root must be non-negative. Therefore, $x-2 \ge 0$, so $x\ge2$, and "
        r"$5 - x \ge 0$, so $x \le 5$. Also, the denominator cannot be equal to zero, so $5-x>0$, which gives $x<5$. "
        r"Therefore, the domain of the expression is $\boxed{[2,5)}$.",
        r"[2,5)",
    ),
    (
        r"If $\det \mathbf{A} = 2$ and $\det \mathbf{B} = 12,$ then find $\det (\mathbf{A} \mathbf{B}).$",
        r"We have that $\det (\mathbf{A} \mathbf{B}) = (\det \mathbf{A})(\det \mathbf{B}) = (2)(12) = \boxed{24}.$",
        "24",
    ),
    (
        "Terrell usually lifts two 20-pound weights 12 times. If he uses two 15-pound weights instead, how many times "
        "must Terrell lift them in order to lift the same total weight?",
        r"If Terrell lifts two 20-pound weights 12 times, he lifts a total of $2\cdot 12\cdot20=480$ pounds of weight."
        r"  If he lifts two 15-pound weights instead for $n$ times, he will lift a total of $2\cdot15\cdot n=30n$ "
        "pounds of weight.  Equating this to 480 pounds, we can solve for $n$:\n"
        r"\begin{align*}"
        "\n30n&=480\\\\\n"
        r"\Rightarrow\qquad n&=480/30=\boxed{16}"
        "\n"
        r"\end{align*}",
        "16",
    ),
    (
        "If the system of equations\n\n"
        r"\begin{align*}"
        "\n6x-4y&=a,\\\\\n6y-9x &=b.\n"
        r"\end{align*}has a solution $(x, y)$ where $x$ and $y$ are both nonzero,"
        "\n"
        r"find $\frac{a}{b},$ assuming $b$ is nonzero.",
        r"If we multiply the first equation by $-\frac{3}{2}$, we obtain"
        "\n\n"
        r"$$6y-9x=-\frac{3}{2}a.$$Since we also know that $6y-9x=b$, we have"
        "\n\n"
        r"$$-\frac{3}{2}a=b\Rightarrow\frac{a}{b}=\boxed{-\frac{2}{3}}.$$",
        r"-\frac{2}{3}",
    ),
)


def minerva_exemplars(task: str) -> tuple[Sample, ...]:
    return tuple(
        Sample(id=f"minerva/{n}", task=task, question=problem, gold=answer, meta={"solution": solution})
        for n, (problem, solution, answer) in enumerate(MINERVA)
    )


def minerva(sample: Sample, examples: Sequence[Sample]) -> str:
    worked = [
        f"Problem:\n{one.question}\n\nSolution:\n{one.meta['solution']}\n"
        f"Final Answer: The final answer is ${one.gold}$. I hope it is correct."
        for one in examples
    ]
    return "\n\n".join([*worked, f"Problem:\n{sample.question}\n\nSolution:"])
