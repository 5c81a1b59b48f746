"""pass@k of mathematical answers: the unbiased estimator, by the project's own grader."""

from collections.abc import Sequence

import datasets
import evaluate

from eval.answers import grade_math_many
from eval.metrics import mean_pass_at_k

DESCRIPTION = """The probability that one of k responses is right, 1 - C(n-c, k) / C(n, k) averaged over items."""

CITATION = "Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv 2107.03374"

INPUTS = """predictions: n responses for each item. references: gold answers. k: a list of ks (default [1]), each at
most n: with fewer samples of any item pass@k is refused. Returns {"pass@1": ..., ...}, each in [0, 1]."""


class PassAtK(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": datasets.Sequence(text), "references": text})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions: list[list[str]], references: list[str], k: Sequence[int] = (1,)) -> dict:
        pairs = [(one, gold) for many, gold in zip(predictions, references, strict=True) for one in many]
        graded = iter(grade_math_many(pairs))
        right = {str(item): [next(graded).verdict == "correct" for _ in many] for item, many in enumerate(predictions)}
        return {f"pass@{one}": mean_pass_at_k(right, one).value for one in k}
