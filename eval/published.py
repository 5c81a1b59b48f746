"""DeepSeek's published scores, each with its source, page, table and the protocol it was obtained by.

A score is compared only with one of the same protocol: secondary tables disagree with the papers (one well-known page
gives R1-Distill-Llama-8B 41.7 on AIME 2024, where the paper says 50.4), and so do two protocols on one model.
"""

from dataclasses import dataclass

_V3_BASE = "DeepSeek-V3, arXiv 2412.19437 v1, pp. 24-25, table 3"
_V3_CHAT = "DeepSeek-V3, arXiv 2412.19437 v1, pp. 30-31, table 6"
_R1 = "DeepSeek-R1, arXiv 2501.12948 v1, pp. 11-14, table 4"
_R1_ZERO = "DeepSeek-R1, arXiv 2501.12948 v1, table 2"
_DISTILL = "DeepSeek-R1, arXiv 2501.12948 v1, p. 14, table 5"


@dataclass(frozen=True, slots=True)
class PublishedScore:
    """`value` in percent. `model` is the Hub id. `metric` is `pass@1`, `cons@64` or, where it is published so, `f1`."""

    model: str
    task: str
    metric: str
    value: float
    protocol: str
    source: str


def _scores(model: str, protocol: str, source: str, **values: float) -> list[PublishedScore]:
    return [
        PublishedScore(f"deepseek-ai/{model}", task, "f1" if task == "drop" else "pass@1", value, protocol, source)
        for task, value in values.items()
    ]


def _cons(model: str, source: str, aime24: float) -> PublishedScore:
    return PublishedScore(f"deepseek-ai/{model}", "aime24", "cons@64", aime24, "deepseek-r1", source)


def _student(model: str, aime24: float, cons: float, math500: float, gpqa: float) -> list[PublishedScore]:
    scores = _scores(model, "deepseek-r1", _DISTILL, aime24=aime24, math500=math500, gpqa_diamond=gpqa)
    return [*scores, _cons(model, _DISTILL, cons)]


# fmt: off
PUBLISHED: tuple[PublishedScore, ...] = (
    *_scores("DeepSeek-V3-Base", "deepseek-v3-base", _V3_BASE,
             mmlu=87.1, mmlu_pro=64.4, ceval=90.1, cmmlu=88.8, drop=89.0, gsm8k=89.3, math=61.6),
    *_scores("DeepSeek-V3", "deepseek-v3-chat", _V3_CHAT,
             mmlu=88.5, mmlu_pro=75.9, drop=91.6, gpqa_diamond=59.1, math500=90.2, aime24=39.2, ceval=86.5),
    *_scores("DeepSeek-R1", "deepseek-r1", _R1,
             mmlu=90.8, mmlu_pro=84.0, drop=92.2, gpqa_diamond=71.5, aime24=79.8, math500=97.3, ceval=91.8),
    *_scores("DeepSeek-R1-Zero", "deepseek-r1", _R1_ZERO, aime24=71.0, math500=95.9, gpqa_diamond=73.3),
    _cons("DeepSeek-R1-Zero", _R1_ZERO, 86.7),
    *_student("DeepSeek-R1-Distill-Qwen-1.5B", 28.9, 52.7, 83.9, 33.8),
    *_student("DeepSeek-R1-Distill-Qwen-7B",   55.5, 83.3, 92.8, 49.1),
    *_student("DeepSeek-R1-Distill-Qwen-14B",  69.7, 80.0, 93.9, 59.1),
    *_student("DeepSeek-R1-Distill-Qwen-32B",  72.6, 83.3, 94.3, 62.1),
    *_student("DeepSeek-R1-Distill-Llama-8B",  50.4, 80.0, 89.1, 49.0),
    *_student("DeepSeek-R1-Distill-Llama-70B", 70.0, 86.7, 94.5, 65.2),
)
# fmt: on


def published_scores(model: str, task: str | None = None) -> list[PublishedScore]:
    """The scores of a model, by its Hub id or the last part of it (so that a local folder of that name finds them)."""
    name = model.rstrip("/").rsplit("/", 1)[-1].casefold()
    return [
        score for score in PUBLISHED if score.model.rsplit("/", 1)[-1].casefold() == name and task in (None, score.task)
    ]
