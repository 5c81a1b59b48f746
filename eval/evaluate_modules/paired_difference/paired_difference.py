"""Two models on the same items: the difference of their scores, with its interval and tests."""

import dataclasses

import datasets
import evaluate

from eval.metrics import paired_difference

DESCRIPTION = """Mean score of one model minus that of another on the same items, item by item, with its 95 % interval,
McNemar's exact test and the difference that could have been detected."""

CITATION = "Miller 2024, Adding Error Bars to Evals, arXiv 2411.00640"

INPUTS = (
    """predictions: the scores of one model, in [0, 1], an item each. references: those of the other, same order."""
)


class PairedDifference(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        features = datasets.Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict:
        return dataclasses.asdict(paired_difference(predictions, references))
