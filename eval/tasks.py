"""The table of tasks. A task is added by one file and one line here."""

from collections.abc import Mapping

from eval.aime import AIME24, AIME25
from eval.benchmark import Benchmark
from eval.ceval import CEVAL
from eval.cmmlu import CMMLU
from eval.drop import DROP
from eval.gpqa import GPQA_DIAMOND, GPQA_MAIN
from eval.gsm8k import GSM8K
from eval.hendrycks_math import MATH
from eval.math500 import MATH500
from eval.mmlu import MMLU
from eval.mmlu_pro import MMLU_PRO
from eval.reasoning_gym_tasks import REASONING_GYM
from eval.yaml_files import nearest

TASKS: Mapping[str, Benchmark] = {
    "mmlu": MMLU,
    "mmlu_pro": MMLU_PRO,
    "gpqa_main": GPQA_MAIN,
    "gpqa_diamond": GPQA_DIAMOND,
    "math500": MATH500,
    "math": MATH,
    "aime24": AIME24,
    "aime25": AIME25,
    "gsm8k": GSM8K,
    "drop": DROP,
    "ceval": CEVAL,
    "cmmlu": CMMLU,
    **REASONING_GYM,
}


def get_task(name: str) -> Benchmark:
    """A task by its name. Raises ValueError, with the nearest name, for an unknown one."""
    if name == "ceval_test":
        raise ValueError("C-Eval publishes no answers of its test split; use 'ceval', which asks its val split")
    if name not in TASKS:
        raise ValueError(f"the task {name!r} is unknown.{nearest(name, TASKS)} Known: {', '.join(TASKS)}")
    return TASKS[name]
