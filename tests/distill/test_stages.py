"""Each stage once, on just its inputs; what changed runs again with what follows, and nothing else."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from distill.records import Decision
from distill.run_dir import RunDir, read_json
from distill.stages import Counts, Outcome, Stage, described, only_run, run_stages, signature


class Made(BaseModel):
    name: str = "made"


class Flow:
    """a -> b -> c, and d beside b; each writes its settings and what it read."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDir(folder)
        self.settings = {"a": 1, "b": 1, "c": 1, "d": 1}
        self.says = {"a": "a1"}
        self.ran: list[str] = []
        self.incomplete = {"a": ""}
        self.files: tuple[str, ...] = ()

    def stages(self) -> list[Stage]:
        def work(name: str, after: tuple[str, ...]):
            def one() -> Outcome:
                self.ran.append(name)
                read = "".join((self.run / f"{other}.txt").read_text() for other in after)
                (self.run / f"{name}.txt").write_text(self.says.get(name, f"{name}{self.settings[name]}({read})"))
                return Outcome({"in": 1, "kept": 1}, self.incomplete.get(name, ""))

            return one

        after = {"a": (), "b": ("a",), "c": ("b",), "d": ("a",)}
        return [
            Stage(name, work(name, others), 1, self.settings[name], others, (f"{name}.txt",),
                  self.files if name == "d" else ())
            for name, others in after.items()
        ]  # fmt: skip

    def __call__(self, **options) -> list[str]:
        self.ran = []
        self.missing = run_stages(self.stages(), Made(), self.run, **options)
        return self.ran


@pytest.fixture
def flow(tmp_path):
    return Flow(tmp_path / "run")


def test_a_second_run_does_nothing(flow):
    assert flow() == ["a", "b", "c", "d"]
    before = {one.name: one.stat().st_mtime_ns for one in flow.run.path.glob("*.txt")}
    assert flow() == []
    assert {one.name: one.stat().st_mtime_ns for one in flow.run.path.glob("*.txt")} == before


def test_a_change_runs_that_stage_and_what_follows(flow):
    flow()
    flow.settings["b"] = 2
    assert flow() == ["b", "c"]
    flow.settings["a"] = 2
    assert flow() == ["a"], "what a writes is the same, so nothing else is to be done"
    flow.says["a"] = "other"
    flow.settings["a"] = 3
    assert flow() == ["a", "b", "c", "d"]


def test_what_is_gone_is_made_again(flow):
    flow()
    (flow.run / "c.txt").unlink()
    assert flow() == ["c"]


def test_a_changed_file_runs_its_stage(flow, tmp_path):
    (tmp_path / "data.jsonl").write_text("1")
    flow.files = (str(tmp_path / "data.jsonl"),)
    flow()
    (tmp_path / "data.jsonl").write_text("2")
    assert flow() == ["d"]


def test_what_is_incomplete_goes_on_and_the_rest_is_done_with_what_is_there(flow):
    flow.incomplete["a"] = "the budget ended"
    assert flow() == ["a", "b", "c", "d"]
    assert flow.missing == "a: the budget ended"
    flow.incomplete["a"] = ""
    assert flow() == ["a"], "the same came out, so nothing follows"
    assert flow.missing == ""


def test_until(flow):
    assert flow(until="b") == ["a", "b"]
    assert flow() == ["c", "d"]
    with pytest.raises(ValueError, match=r"'bb' is no stage. .*There are: a, b, c, d"):
        flow(until="bb")


def test_an_error_keeps_what_was_done(flow):
    stages = flow.stages()

    def broken() -> Outcome:
        raise OSError(28, "No space left on device")

    failing = [stages[0], Stage("b", broken, 1, 1, ("a",), ("b.txt",))]
    with pytest.raises(OSError, match="No space left"):
        run_stages(failing, Made(), flow.run)
    assert flow() == ["b", "c", "d"]


def test_the_recipe_stands_beside_the_results(flow):
    flow()
    values = read_json(flow.run / "recipe.json")
    assert values["recipe"] == {"name": "made"}
    assert values["versions"]["torch"].startswith("2.")
    with pytest.raises(ValueError, match="holds a run of the recipe 'made', not of 'other'"):
        run_stages(flow.stages(), Made(name="other"), flow.run)


def test_one_process_at_a_time(flow):
    with only_run(flow.run), pytest.raises(BlockingIOError, match="another process runs in"):
        flow()


def test_counts_add_up():
    counts = Counts("prompts")
    list(counts.each([Decision("1"), Decision("2", "contaminated"), Decision("3")]))
    assert counts.as_dict() == {"in": 3, "kept": 2, "near_duplicate": 0, "contaminated": 1}
    assert described(counts.as_dict()) == "3 in, 2 kept, 1 contaminated"
    with pytest.raises(KeyError, match="wrong"):
        counts.counted(Decision("4", "wrong"))


def test_nothing_left_is_an_error_with_the_counts():
    counts = Counts("filter")
    counts.counted(Decision("1", "too_long"))
    with pytest.raises(ValueError, match=r"filter: nothing is left \(1 in, 1 too long\); look there"):
        counts.some_left("look there")


def test_the_signature_of_a_large_folder_is_not_its_contents(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("12")
    small = signature(tmp_path)
    monkeypatch.setattr("distill.stages.GIGABYTE", 1)
    large = signature(tmp_path)
    (tmp_path / "x").write_text("34")
    assert small != large != signature(tmp_path)
