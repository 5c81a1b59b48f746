"""cons@k of mathematical answers: a vote over classes of equal answers."""

import datasets
import evaluate

from eval.answers import grade_math
from eval.metrics import cons_at_k

DESCRIPTION = """The share of items whose most frequent answer is right. Equal answers (0.5, 1/2) are one class,
whatever their text; no answer is no vote; a tie shares its credit."""

INPUTS = """predictions: n responses for each item. references: gold answers. Returns {"cons@n": ...} in [0, 1]; n must
be the same for every item."""


class ConsAtK(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": datasets.Sequence(text), "references": text})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions: list[list[str]], references: list[str]) -> dict:
        sizes = {len(many) for many in predictions}
        if len(sizes) != 1:
            raise ValueError(f"items have {sorted(sizes)} responses; cons@n needs the same n for every item")
        credits = [
            cons_at_k([grade_math(one, gold).answer for one in many], gold)
            for many, gold in zip(predictions, references, strict=True)
        ]
        return {f"cons@{sizes.pop()}": sum(credits) / len(credits)}
