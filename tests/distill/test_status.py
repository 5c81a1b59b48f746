"""The state of a run as `distill run` would find it."""

import dataclasses
import re

import pytest

from distill.recipe import Recipe
from distill.run_dir import RunDir, read_json, write_json
from distill.status import stage_states, status
from tests.distill.runs import write_run


def states(run):
    return {name: state for name, _, state in stage_states(Recipe(**read_json(run / "recipe.json")["recipe"]), run)}


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", problems=24, items=4, until="student:answers")


def test_what_has_run_is_done_and_what_has_not_is_to_do(run):
    found = states(run)
    assert [name for name, state in found.items() if state == "to do"] == [
        "student:traces", "eval:teacher", "eval:base", "eval:answers", "eval:traces",
    ]  # fmt: skip
    assert set(found.values()) == {"done", "to do"}
    said = status(run)
    counts = run.manifest()["problems"].counts
    assert re.search(rf"^problems +done +{counts['in']} +{counts['kept']} +0\.4 s +1 empty", said, re.MULTILINE)
    assert "5 stages are left" in said


def test_a_finished_run_has_nothing_left(tmp_path):
    said = status(write_run(tmp_path / "run", problems=24, items=4))
    assert said.endswith("everything is done")
    assert "to do" not in said


def test_a_changed_recipe_puts_its_stage_and_what_follows_out_of_date(run):
    values = read_json(run / "recipe.json")
    values["recipe"]["filter"]["paragraph_characters"] = 100
    write_json(run / "recipe.json", values)
    found = states(run)
    assert [name for name, state in found.items() if state == "done"] == ["problems", "prompts", "traces"]
    assert found["filter"] == found["dataset"] == found["student:answers"] == "out of date"


def test_a_file_that_is_gone_puts_its_stage_out_of_date(run):
    run.decisions("mix").unlink()
    assert states(run)["mix"] == "out of date"
    assert states(run)["decontaminate"] == "done"


def test_an_incomplete_generation_says_what_is_missing_and_what_is_stored(run):
    done = run.manifest()["traces"]
    run.finish(dataclasses.replace(done, incomplete="the budget of 1,000 tokens is spent"))
    assert states(run)["traces"] == "to go on: the budget of 1,000 tokens is spent"
    said = status(run)
    assert "to go on: the budget of 1,000 tokens is spent" in said
    assert f"{done.counts['in']:,} completions are stored" in said


def test_a_run_that_has_only_begun(tmp_path):
    run = write_run(tmp_path / "run", problems=12, until="problems")
    said = status(run)
    assert "0 completions are stored" in said
    assert re.search(r"^prompts +to do$", said, re.MULTILINE)


def test_a_folder_without_a_run_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        status(RunDir(tmp_path))
