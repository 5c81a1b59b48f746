"""What `make quickstart` shows has to hold for every seed, not for one: `make test-slow` runs it five times."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.__main__ import EXIT_ERROR, main
from distill.run_dir import read_json
from distill.scores import ALL
from eval.report import text_table

ROOT = Path(__file__).parents[2]
SEEDS = 5
GIGABYTES = 4


@pytest.mark.slow
@pytest.mark.timeout(SEEDS * 900)
def test_the_student_on_traces_is_better_than_the_one_on_answers_on_every_seed(tmp_path):
    rows = []
    for seed in range(SEEDS):
        run, started = tmp_path / f"seed{seed}", time.monotonic()
        command = [sys.executable, "-m", "distill", "run", "recipes/quickstart.yaml", "--run-dir", str(run)]
        process = subprocess.Popen([*command, f"seed={seed}"], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        minutes, gigabytes = (time.monotonic() - started) / 60, usage.ru_maxrss / 2**20
        (one,) = (
            one for one in read_json(run / "report.json")["differences"]
            if (one["a"], one["b"], one["task"]) == ("on_traces", "on_answers", ALL)
        )  # fmt: skip
        low, high = one["interval"]
        rows.append([str(seed), f"{100 * one['difference']:+.1f}", f"[{100 * low:+.1f}, {100 * high:+.1f}]",
                     f"{minutes:.1f}", f"{gigabytes:.2f}"])  # fmt: skip
        print(text_table([["seed", "traces - answers", "95 % interval", "minutes", "GB"], *rows]), flush=True)
        assert low > 0
        assert gigabytes < GIGABYTES


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.model=./nowhere", "nowhere"),
        ("problems.gone={dataset: ./gone.jsonl, kind: math, domain: math, licence: MIT}", "there is no"),
        ("teacher.max_tokens=600", "600"),  # the model has room for 512 tokens
        ("evaluate.tasks=[rg_chain_sums]", "rg_chain_sum"),
        ("decontaminate.benchmarks=[rg_chain_sums]", "rg_chain_sum"),
        ("sft.max_length=20", "max_length"),
    ],
)
def test_what_cannot_work_is_said_before_work_is_lost(tmp_path, capfd, override, message):
    small = [f"problems.{name}.limit=4" for name in ("letter_counting", "chain_sum", "leg_counting")]
    arguments = ["run", str(ROOT / "recipes/quickstart.yaml"), "--run-dir", str(tmp_path / "run"), *small, override]
    assert main(arguments) == EXIT_ERROR
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said


@pytest.mark.parametrize(
    "override",
    [
        "evaluate.tasks=[rg_chain_sums]", "evaluate.protocol=deepseek-r2", "evaluate.overrides={max_token: 5}",
        "decontaminate.benchmarks=[rg_chain_sums]", "students.on_traces.model=/nowhere/base",
        "students.on_traces.launch=/nowhere/fsdp.yaml", "teacher.model=/nowhere/teacher",
    ],
)  # fmt: skip
def test_what_a_late_stage_would_find_is_found_before_the_first(tmp_path, capfd, override):
    run = tmp_path / "run"
    assert main(["run", str(ROOT / "recipes/quickstart.yaml"), "--run-dir", str(run), override]) == EXIT_ERROR
    assert "error: " in capfd.readouterr().err
    assert not run.exists(), "nothing was begun"
