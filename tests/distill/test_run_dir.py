"""Tables, manifest and the files of a run."""

import pytest

from distill.records import Decision, Problem
from distill.run_dir import (
    ROWS_PER_GROUP,
    Done,
    RunDir,
    content_hash,
    fresh_folder,
    read_table,
    replacing,
    table_rows,
    write_judged,
    write_table,
)


def problem(number: int, **fields) -> Problem:
    values = dict(id=f"{number:016x}", kind="math", domain="math", question=f"{number} + 1?", answer=str(number + 1),
                  source="made", row=number)  # fmt: skip
    return Problem(**{**values, **fields})


def test_rows_come_back_as_they_were(tmp_path):
    rows = [problem(1), problem(2, choices=("a", "b"), meta={"tests": [{"input": "1\n"}]}), problem(3, question="火")]
    assert write_table(tmp_path / "t.parquet", Problem, rows) == 3
    assert list(read_table(tmp_path / "t.parquet", Problem)) == rows
    assert table_rows(tmp_path / "t.parquet") == 3


def test_an_empty_table_has_its_columns(tmp_path):
    write_table(tmp_path / "t.parquet", Problem, [])
    assert list(read_table(tmp_path / "t.parquet", Problem)) == []


def test_rows_are_read_and_written_in_groups(tmp_path):
    waiting = []

    def rows():
        for number in range(3 * ROWS_PER_GROUP):
            waiting.append(number)
            yield problem(number)

    write_table(tmp_path / "t.parquet", Problem, rows())
    import pyarrow.parquet

    assert pyarrow.parquet.read_metadata(tmp_path / "t.parquet").num_row_groups == 3
    assert [one.row for one in read_table(tmp_path / "t.parquet", Problem)] == waiting


def test_a_table_appears_whole_or_not_at_all(tmp_path):
    write_table(tmp_path / "t.parquet", Problem, [problem(1)])

    def broken():
        yield problem(2)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_table(tmp_path / "t.parquet", Problem, broken())
    assert [one.row for one in read_table(tmp_path / "t.parquet", Problem)] == [1]
    assert [one.name for one in tmp_path.iterdir()] == ["t.parquet"]


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("old", "new"):
        with replacing(tmp_path / "folder") as part:
            part.mkdir()
            (part / name).touch()
    assert [one.name for one in (tmp_path / "folder").iterdir()] == ["new"]


def test_rows_that_stages_kept(tmp_path):
    run = RunDir(tmp_path)
    problems = [problem(number) for number in range(5)]
    first = [Decision(one.id, "repeated" if one.row == 1 else "") for one in problems]
    write_judged(run / "problems.parquet", Problem, run.decisions("problems"), zip(problems, first, strict=True))
    second = [Decision(one.id, "contaminated" if one.row == 3 else "") for one in problems if one.row != 1]
    write_table(run.decisions("prompts"), Decision, second)
    assert [one.row for one in run.rows("problems.parquet", Problem, "problems")] == [0, 2, 3, 4]
    assert [one.row for one in run.rows("problems.parquet", Problem, "problems", "prompts")] == [0, 2, 4]


def test_decisions_of_another_run_are_an_error(tmp_path):
    run = RunDir(tmp_path)
    write_table(run / "problems.parquet", Problem, [problem(1), problem(2)])
    write_table(run.decisions("problems"), Decision, [Decision(problem(2).id), Decision(problem(1).id)])
    with pytest.raises(ValueError, match=f"decides on {problem(2).id} where {problem(1).id} stands"):
        list(run.rows("problems.parquet", Problem, "problems"))
    write_table(run.decisions("problems"), Decision, [Decision(problem(1).id)])
    with pytest.raises(ValueError, match="shorter"):
        list(run.rows("problems.parquet", Problem, "problems"))


def test_manifest(tmp_path):
    run = RunDir(tmp_path)
    assert run.manifest() == {}
    (tmp_path / "out").touch()
    done = Done("a", "f1", 1.5, {"out": "hash"}, {"in": 3, "kept": 3})
    run.finish(done)
    run.finish(Done("b", "f2", 0.5, {}, {}, "the budget of 10 tokens ended it"))
    assert list(run.manifest()) == ["a", "b"]
    assert run.is_done("a", "f1") == done
    assert run.is_done("a", "other") is None
    assert run.is_done("b", "f2") is None, "what is incomplete goes on"
    (tmp_path / "out").unlink()
    assert run.is_done("a", "f1") is None, "what it wrote is gone"


def test_content_hash_knows_names_and_contents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("1")
    one = content_hash(tmp_path / "a")
    (tmp_path / "a" / ".lock").touch()
    assert content_hash(tmp_path / "a") == one, "files that begin with a dot do not count"
    (tmp_path / "a" / "x").write_text("2")
    two = content_hash(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert len({one, two, content_hash(tmp_path / "a")}) == 3


def test_work_in_progress_is_kept_for_the_same_work_alone(tmp_path):
    folder = fresh_folder(tmp_path / "training", "f1")
    (folder / "checkpoint-5").mkdir()
    assert (fresh_folder(tmp_path / "training", "f1") / "checkpoint-5").exists()
    assert not (fresh_folder(tmp_path / "training", "f2") / "checkpoint-5").exists()
