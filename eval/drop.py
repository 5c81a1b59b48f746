"""DROP: 9,536 questions on paragraphs whose answer has to be computed: counts, dates, spans (Dua et al. 2019).

The score is the published F1. Each prediction is compared with every annotator's answer by the official metric, a bag
of normalised words for each span, spans aligned one to one, no credit where the numbers differ; the best one counts.
`credit` is that F1, and the verdict is `correct` where it is 1. The official metric takes the prediction as a list of
spans, which a text is not: where the gold answer has several spans, the text counts as one span and as the spans that
commas, semicolons, line breaks and "and" divide, whichever scores better.

Hub: EleutherAI/drop, which keeps every annotator's answer apart (ucinlp/drop pours all their spans into one list).
Locally: `drop_dataset_dev.json` as the authors publish it, alone or in `drop_dataset.zip`.
"""

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval.benchmark import Benchmark, Row, Source
from eval.sample import Graded, Sample

DROP_GRADER = "drop/1"
MAX_PREDICTION = 10_000  # characters that are compared; the longest gold answer has a few hundred


def expand(passages: Row) -> Iterator[Row]:
    """The authors' file maps a passage's id to its text and its questions: one row for each question."""
    for section, passage in passages.items():
        for pair in passage["qa_pairs"]:
            yield {"section_id": section, "passage": passage["passage"], **pair}


def source(split: str, name: str, rows: int) -> Source:
    return Source(
        hub="EleutherAI/drop",
        split=split,
        revision="619386fc7ffe6dace3cc6d3483c69b164ebf6bf3",
        file="drop/drop_dataset.zip",
        members=f"drop_dataset_{name}.json",
        rows=rows,
        requires=("section_id", "query_id", "passage", "question", "answer"),
        expand=expand,
    )


DEV = source("validation", "dev", 9536)
TRAIN = source("train", "train", 77409)


def to_sample(row: Row, index: int) -> Sample:
    validated = row.get("validated_answers") or []
    if isinstance(validated, Mapping):  # the Hub's: a list for each field
        fields = ("number", "date", "spans")
        validated = [dict(zip(fields, one, strict=True)) for one in zip(*(validated[f] for f in fields), strict=True)]
    golds, kinds = [], []
    for answer in (row["answer"], *validated):
        spans, kind = spans_of(answer)
        if any(span.strip() for span in spans) and spans not in golds:
            golds.append(spans)
            kinds.append(kind)
    if not golds:
        raise ValueError(f"drop: row {index} ({row['query_id']}) has no answer: {row['answer']!r}")
    return Sample(
        id=row["query_id"],
        task="drop",
        question=row["question"],
        gold=", ".join(golds[0]),
        cluster=row["section_id"],
        meta={"passage": row["passage"], "golds": golds, "type": kinds[0]},
    )


def spans_of(answer: Mapping[str, Any]) -> tuple[list[str], str]:
    """The spans of an annotated answer and its type."""
    if str(answer.get("number", "")) != "":
        return [str(answer["number"])], "number"
    if answer.get("spans"):
        return list(answer["spans"]), "span" if len(answer["spans"]) == 1 else "spans"
    date = answer.get("date") or {}
    return [" ".join(str(date.get(part, "")) for part in ("day", "month", "year")).strip()], "date"


# The official metric: `drop_eval.py` of allenai/allennlp-reading-comprehension, from the published description.


def normalized(text: str) -> str:
    """Lower case; words split at spaces and hyphens; numbers in one form; no punctuation, no articles."""
    words = []
    for word in re.split(" |-", text.lower()):
        if not is_number(word):
            word = "".join(character for character in word if character not in _PUNCTUATION)
        word = str(float(word)) if is_number(word) else word
        words.append(" ".join(_ARTICLES.sub(" ", word).split()))
    return " ".join(word for word in words if word)


_PUNCTUATION = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """The mean F1 of aligned spans, to two places as published; a span more or less counts as 0.

    >>> f1(["the 12 men"], ["12 men"]), f1(["Rams", "Bears"], ["Bears"])
    (1.0, 0.5)
    """
    bags = [[frozenset(normalized(span).split()) for span in spans] for spans in (predicted, gold)]
    scores = [[_overlap(one, other) for one in bags[0]] for other in bags[1]]
    return round(sum(_aligned(scores)) / max(len(predicted), len(gold)) * 100) / 100


def _overlap(predicted: frozenset[str], gold: frozenset[str]) -> float:
    numbers = {word for word in gold if is_number(word)}
    if numbers and not numbers & predicted:
        return 0.0
    common = len(predicted & gold)
    precision = common / len(predicted) if predicted else 1.0
    recall = common / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _aligned(scores: list[list[float]]) -> list[float]:
    """The scores of the best one-to-one alignment of rows and columns."""
    if len(scores) == 1 or len(scores[0]) == 1:
        return [max(score for row in scores for score in row)]
    from scipy.optimize import linear_sum_assignment  # only answers of several spans need it

    rows, columns = linear_sum_assignment(scores, maximize=True)
    return [scores[row][column] for row, column in zip(rows, columns, strict=True)]


# What of a response is the prediction.

_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")  # simple-evals' ANSWER_PATTERN
_ANSWER_IS = re.compile(r"(?i)\banswer\s+is:?[ \t]+([^\n]+)")


def extract(answer: str, chain: str) -> str:
    """The prediction: the last "Answer: ..." line, else what follows the last "answer is", else the first line.

    `simple_evals` is the official way: the first "Answer:" line, else the whole response.
    """
    if chain == "simple_evals":
        found = _ANSWER_LINE.search(answer)
        return found[1] if found else answer
    text = answer.replace("**", "").replace("$", "")
    boxed = re.fullmatch(r"\\boxed\{(.*)\}\.?", text.strip())
    if boxed:
        return boxed[1]
    for pattern in (_ANSWER_LINE, _ANSWER_IS):
        if found_all := pattern.findall(text):
            return found_all[-1].strip().removesuffix(".")
    return text.strip().split("\n", 1)[0].removesuffix(".")


def grade(sample: Sample, answer: str, chain: str) -> Graded:
    prediction = extract(answer, chain).strip()[:MAX_PREDICTION]
    if not prediction:
        return Graded("no_answer", None, f"chain {chain}: no answer", DROP_GRADER)
    best = max(_score(prediction, gold) for gold in sample.meta["golds"])
    return Graded("correct" if best == 1 else "wrong", prediction, f"chain {chain}: F1 {best:.2f}", DROP_GRADER, best)


def _score(prediction: str, gold: Sequence[str]) -> float:
    whole = f1([prediction], gold)
    if len(gold) == 1:
        return whole
    spans = [span for span in re.split(r",\s+(?:and\s+)?|;\s*|\n|\s+and\s+", prediction) if span.strip()]
    return max(whole, f1(spans, gold)) if spans else whole


# Prompts.


def simple_evals(sample: Sample, examples: Sequence[Sample]) -> str:
    """simple-evals `drop_eval.py`. It draws its three examples from one generator shared by threads; ours are the first
    of the training set. Without examples, the sentence about them and their heading are left out."""

    def context(one: Sample) -> str:
        return f"---\nPassage: {one.meta['passage']}\nQuestion: {one.question}\nAnswer: "

    intro = "You will be asked to read a passage and answer a question."
    if examples:
        intro += " Some examples of passages and Q&A are provided below.\n\n# Examples"
    worked = "".join(f"\n{context(one)}{one.gold}\n" for one in examples)
    return (
        f"{intro}{worked}\n# Your Task\n\n{context(sample)}\n\nThink step by step, then write a line of the form "
        '"Answer: $ANSWER" at the end of your response.'
    )


def few_shot(sample: Sample, examples: Sequence[Sample]) -> str:
    """DeepSeek-V2, appendix G, table 21. The type of the answer is given away, as it is there."""

    def asked(one: Sample) -> str:
        return (
            f"Passage: {one.meta['passage']}\n\nAnswer the following questions based on the above passage, please "
            f"calculate carefully if calculation is necessary.\nQ: {one.question}\nA: The answer type is "
            f"{one.meta['type']}. So according to above Passage, the answer is"
        )

    return "\n\n".join([*(f"{asked(one)} {one.gold}." for one in examples), asked(sample)])


DROP = Benchmark(
    name="drop",
    title="DROP",
    source=DEV,
    licence="CC BY-SA 4.0",
    citation="Dua et al. 2019, DROP, arXiv 1903.00161",
    kind="text",
    to_sample=to_sample,
    prompts={"simple_evals": simple_evals, "few_shot": few_shot},
    grade=grade,
    grader=DROP_GRADER,
    exemplars=TRAIN,
    chains=("default", "simple_evals"),
    stop=("\n",),
)
