"""The metrics as modules of the `evaluate` library; README.md lists them."""

from pathlib import Path

MODULES = ("math_answer", "choice_answer", "pass_at_k", "cons_at_k", "paired_difference")


def path(name: str) -> str:
    """The folder of a module, for `evaluate.load`. ValueError for a name that is none of `MODULES`."""
    if name not in MODULES:
        raise ValueError(f"there is no module {name!r}; there are {', '.join(MODULES)}")
    return str(Path(__file__).parent / name)
