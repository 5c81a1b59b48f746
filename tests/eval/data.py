"""Where the real benchmark files are, if they are: tests that read them skip, saying so, where they are missing.

`DEEPSEEK_EVAL_DATA` names the folder; without it, `shared/data` beside the checkout is taken. None of these files may
be copied into the project: their licences are their own.
"""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("DEEPSEEK_EVAL_DATA", Path(__file__).parents[3] / "shared" / "data"))


def needs_data(*files: str) -> pytest.MarkDecorator:
    """Skips the test unless every file is under `DATA`."""
    missing = [file for file in files if not (DATA / file).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"benchmark files are missing from {DATA}: {', '.join(missing)}")
