"""Accuracy of mathematical answers, with its interval, by the project's own grader."""

import datasets
import evaluate

from eval.answers import grade_math_many
from eval.evaluate_modules import accuracy

DESCRIPTION = """The share of responses whose final answer equals the gold answer. The last complete box wins; a thought
that was never closed is truncated and not graded; equality is mathematical (0.5 is \\frac12)."""

INPUTS = """predictions: responses, the thought included. references: gold answers.
Returns accuracy in [0, 1], its 95 % interval (low, high), and the verdict and extracted answer of each."""


class MathAnswer(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict:
        graded = grade_math_many(list(zip(predictions, references, strict=True)))
        return accuracy(graded)
