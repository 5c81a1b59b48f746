"""The metrics as modules of the `evaluate` library; README.md lists them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.metrics import score_interval
from eval.sample import Graded

MODULES = ("math_answer", "choice_answer", "pass_at_k", "cons_at_k", "paired_difference")


def path(name: str) -> str:
    """The folder of a module, for `evaluate.load`. ValueError for a name that is none of `MODULES`."""
    if name not in MODULES:
        raise ValueError(f"there is no module {name!r}; there are {', '.join(MODULES)}")
    return str(Path(__file__).parent / name)


def accuracy(graded: Sequence[Graded]) -> dict[str, Any]:
    """What the modules of single answers give: `accuracy`, `low`, `high`, `verdicts`, `answers`."""
    score = score_interval([one.credit for one in graded])
    low, high = score.interval
    verdicts, answers = [one.verdict for one in graded], [one.answer for one in graded]
    return {"accuracy": score.value, "low": low, "high": high, "verdicts": verdicts, "answers": answers}
