"""The main job on a small scale, with the bundled teacher: each stage once, killed or not; only what a change needs."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from distill.__main__ import EXIT_INCOMPLETE, main
from distill.dataset import Row
from distill.pipeline import run_recipe
from distill.recipe import Recipe, load_recipe
from distill.records import REASONS, Decision, Problem, Trace
from distill.run_dir import RunDir, content_hash, read_json, read_table
from eval.store import Store

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes/quickstart.yaml"
SMALL = [
    "problems.letter_counting.limit=12", "problems.chain_sum.limit=12", "problems.leg_counting.limit=12",
    "teacher.max_tokens=120", "teacher.most=3", "mix.shares=null", "sft.num_train_epochs=1",
    "sft.per_device_train_batch_size=8", "evaluate.limit=3", "evaluate.k=1",
]  # fmt: skip


def small(*more: str) -> Recipe:
    recipe = load_recipe(QUICKSTART, [*SMALL, *more])
    assert isinstance(recipe, Recipe)
    return recipe


def ran(recipe: Recipe, run: RunDir, **options) -> list[str]:
    """The stages that were run, not found done."""
    lines: list[str] = []
    run_recipe(recipe, run, say=lines.append, **options)
    return [line.partition(": ")[0] if not line.startswith(("student", "eval")) else ":".join(line.split(":")[:2])
            for line in lines if not line.endswith("done before")]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("quickstart") / "run")
    ran(small(), run)
    return run


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


def samples(run: RunDir) -> int:
    with Store(run / "samples.sqlite", readonly=True) as store:
        return len(store)


def test_every_stage_writes_what_the_next_one_reads(finished):
    done = finished.manifest()
    assert list(done) == [
        "problems", "prompts", "traces", "filter", "dedup", "decontaminate", "mix", "dataset",
        "student:on_answers", "student:on_traces", "eval:teacher", "eval:base", "eval:on_answers", "eval:on_traces",
    ]  # fmt: skip
    assert all((finished / name).exists() for one in done.values() for name in one.outputs)


def test_counts_add_up_from_stage_to_stage(finished):
    done = finished.manifest()
    for stage in REASONS:
        counts = done[stage].counts
        assert counts["in"] == counts["kept"] + sum(counts[reason] for reason in REASONS[stage])
        decisions = list(read_table(finished.decisions(stage), Decision))
        assert len(decisions) == counts["in"]
        assert sum(not one.reason for one in decisions) == counts["kept"]
    for before, after in pairwise(["traces", "filter", "dedup", "decontaminate", "mix", "dataset"]):
        assert done[before].counts["kept"] == done[after].counts["in"]
    assert done["problems"].counts["kept"] == done["prompts"].counts["in"]


def test_the_dataset_holds_right_traces_alone_and_its_card_how_to_make_it(finished):
    rows = list(read_table(finished / "dataset/train.parquet", Row))
    traces = {one.id: one for one in read_table(finished / "traces.parquet", Trace)}
    problems = {one.id: one for one in read_table(finished / "problems.parquet", Problem)}
    assert len(rows) > 10
    for row in rows:
        assert traces[row.id].verdict == "correct"
        assert row.answer == f"\\boxed{{{problems[row.problem_id].answer}}}"
        assert row.response.endswith("}")
        assert "<think>" not in row.thought + row.response
    card = (finished / "dataset/README.md").read_text()
    assert card.startswith("---\n")
    for part in (
        "license: apache-2.0",
        "reasoning-gym chain_sum",
        "| traces |",
        '"temperature": 1.0',
        "transformers 5.",
    ):
        assert part in card


def test_a_second_run_does_nothing(run):
    before = content_hash(run.path)
    assert ran(small(), run) == []
    assert content_hash(run.path) == before


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluate.limit=2", ["eval:teacher", "eval:base", "eval:on_answers", "eval:on_traces"]),
        ("students.on_traces.sft.learning_rate=1e-3", ["student:on_traces", "eval:on_traces"]),
        ("deduplicate.traces=0.99", ["dedup"]),  # it keeps the same, so nothing follows
        ("teacher.batch_size=7", []),
        ("teacher.budget.hours=9", []),
    ],
)
def test_a_change_runs_that_stage_and_what_follows(run, override, expected):
    assert ran(small(override), run) == expected


def test_another_temperature_reuses_no_sample(run):
    before = samples(run)
    stages = ran(small("teacher.temperature=0.8"), run, until="traces")
    assert stages == ["traces"]
    counts = run.manifest()["traces"].counts
    assert counts["reused"] == 0
    assert counts["asked"] == samples(run) - before > 0


def test_added_problems_are_all_that_is_asked(run):
    before = run.manifest()["traces"].counts
    ran(small("problems.chain_sum.limit=22"), run, until="traces")
    after = run.manifest()["traces"].counts
    assert after["problems"] == before["problems"] + 10
    assert after["reused"] == before["asked"]
    with Store(run / "samples.sqlite", readonly=True) as store:
        assert len(store) == before["asked"] + after["asked"]


def test_a_student_alone(finished, tmp_path):
    run = RunDir(tmp_path / "run")
    shutil.copytree(finished.path, run.path)
    shutil.rmtree(run / "students/on_traces")
    assert ran(small(), run, students=["on_traces"]) == ["student:on_traces"], "and its scores are the same"
    with pytest.raises(ValueError, match=r"'on_trace' is no student of quickstart. Did you mean 'on_traces'\?"):
        ran(small(), run, students=["on_trace"])


def test_shards_make_the_same_traces(finished, tmp_path):
    from distill.generation import run_shard

    run = RunDir(tmp_path / "run")
    for index in range(3):
        assert run_shard(small(), run, (index, 3), None, lambda line: None) == ""
    ran(small(), run, until="traces")
    assert run.manifest()["traces"].counts["asked"] == 0
    assert (run / "traces.parquet").read_bytes() == (finished / "traces.parquet").read_bytes()


def test_a_budget_stops_with_what_is_there_and_the_run_says_so(tmp_path, capsys):
    arguments = ["run", str(QUICKSTART), "--run-dir", str(tmp_path / "run"), "--until", "traces", *SMALL]
    assert main([*arguments, "teacher.budget.tokens=800", "teacher.batch_size=4"]) == EXIT_INCOMPLETE
    assert "the budget" in capsys.readouterr().err
    kept = RunDir(tmp_path / "run").manifest()["traces"].counts
    assert 0 < kept["kept"] < 60
    assert main(arguments) == 0
    whole = RunDir(tmp_path / "run").manifest()["traces"].counts
    assert whole["kept"] > kept["kept"]
    assert whole["reused"] == kept["asked"]


def _killed_until_done(run: Path, seed: int, *more: str) -> int:
    """Starts the run again and again, killed after a random while; returns how often."""
    command = [sys.executable, "-m", "distill", "run", str(QUICKSTART), "--run-dir", str(run), *more, *SMALL]
    chance, kills = random.Random(seed), 0
    while True:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        # Each life is longer than the one before, so that it comes to an end.
        deadline = time.monotonic() + chance.uniform(2, 6) * (1 + kills / 2)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is not None:
            assert process.returncode == 0
            return kills
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1


@pytest.mark.slow
def test_killed_at_random_moments_the_dataset_is_the_same(finished, tmp_path):
    kills = sum(_killed_until_done(tmp_path / str(seed), seed, "--until", "dataset") for seed in range(4))
    assert kills >= 8
    for seed in range(4):
        for name in ("traces.parquet", "dataset/train.parquet", "decisions/mix.parquet"):
            assert (tmp_path / str(seed) / name).read_bytes() == (finished / name).read_bytes()


def test_the_recipe_as_it_was_resolved_stands_beside_the_results(finished):
    values = read_json(finished / "recipe.json")
    assert values["recipe"]["teacher"]["max_tokens"] == 120
    assert {"torch", "transformers", "trl"} <= set(values["versions"])
