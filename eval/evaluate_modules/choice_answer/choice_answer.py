"""Accuracy of multiple choice, with its interval, by the project's own extraction."""

import datasets
import evaluate

from eval.evaluate_modules import accuracy
from eval.multiple_choice import grade_choice
from eval.sample import Graded
from eval.thinking import split_thought

DESCRIPTION = """The share of responses that choose the gold letter. A response without a letter is no answer, never a
guess; a thought that was never closed is truncated and not graded."""

INPUTS = """predictions: responses, the thought included. references: gold letters. n_choices: choices of each item
(default 4). chain: the extraction (default "default").
Returns accuracy in [0, 1], its 95 % interval (low, high), and the verdict and extracted letter of each."""


class ChoiceAnswer(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, predictions: list[str], references: list[str], n_choices: int = 4, chain: str = "default"
    ) -> dict:
        graded = []
        for prediction, reference in zip(predictions, references, strict=True):
            thought = split_thought(prediction)
            cut = thought.state == "truncated"
            graded.append(Graded("truncated") if cut else grade_choice(thought.answer, reference, n_choices, chain))
        return accuracy(graded)
