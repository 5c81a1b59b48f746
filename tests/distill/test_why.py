"""The path of a problem, a trace, a sample: every decision on it, and nothing of its neighbours."""

import pytest

from distill.records import Decision, Problem, Trace
from distill.run_dir import read_table, write_table
from distill.why import why
from tests.distill.runs import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("why") / "run", problems=90, until="dataset", hostile=False)


def traces(run):
    return {one.id: one for one in read_table(run / "traces.parquet", Trace)}


def first(run, stage, reason):
    return next(one for one in read_table(run.decisions(stage), Decision) if one.reason == reason)


def test_a_dropped_trace_ends_at_the_stage_that_dropped_it(run):
    dropped = first(run, "filter", "mixed_languages")
    said = why(run, dropped.id)
    lines = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert lines["filter"].endswith(
        "mixed_languages, the thought changes its language (en, then zh from character 212)"
    )
    assert lines["traces"].split() == ["traces", "kept"]
    assert "dedup" not in lines
    assert "mix" not in lines
    assert lines["dataset"].endswith("not in it")
    trace = traces(run)[dropped.id]
    assert f"key {trace.key}, seed {trace.seed}" in said
    assert f"correct, answered {trace.extracted} (grader reasoning_gym/1)" in said


def test_a_wrong_trace_shows_what_was_answered_and_what_is_right(run):
    dropped = first(run, "traces", "wrong")
    trace = traces(run)[dropped.id]
    problem = next(one for one in read_table(run / "problems.parquet", Problem) if one.id == trace.problem_id)
    said = why(run, dropped.id)
    assert f"answered {trace.extracted}: {trace.extracted} is not {problem.answer}" in said
    assert f"answer        {problem.answer} (kind reasoning_gym)" in said
    assert "wrong, the verifier disagrees with the answer" in said


def test_a_kept_trace_names_its_row_of_the_dataset(run):
    kept = [one.id for one in read_table(run.decisions("mix"), Decision) if not one.reason]
    assert "row 3 of dataset/train.parquet" in why(run, kept[3])


def test_a_near_copy_names_what_it_is_a_copy_of(run):
    dropped = first(run, "dedup", "near_duplicate")
    assert f"(of {dropped.id.partition('/')[0]}/0, similarity 0.97)" in why(run, dropped.id)


def test_a_problem_lists_its_samples(run):
    problem = next(iter(traces(run).values())).problem_id
    own = [one for one in traces(run).values() if one.problem_id == problem]
    said = why(run, problem)
    assert said.count("\ntrace ") == len(own)
    for one in own:
        assert f"trace {one.id}  {one.verdict}" in said


def test_a_prompt_that_was_never_asked_says_why(run):
    dropped = first(run, "prompts", "near_duplicate")
    said = why(run, dropped.id)
    assert "near_duplicate, almost the same words as a prompt that was kept (of " in said
    assert said.endswith("no sample of it was asked")
    assert "the column answer is empty" in why(run, "row-3")


def test_a_repeated_problem_says_where_it_stands_again(run):
    repeated = first(run, "problems", "repeated")
    rows = [one for one in read_table(run / "problems.parquet", Problem) if one.id == repeated.id]
    said = why(run, repeated.id)
    assert f"from          {rows[0].source}, row {rows[0].row}" in said
    assert f"stands in {rows[1].source}, row {rows[1].row} again" in said
    assert "problems      kept" in said


def test_the_key_of_a_sample_and_a_beginning_are_enough(run):
    trace = next(iter(traces(run).values()))
    whole = why(run, trace.id)
    assert why(run, trace.key) == why(run, trace.key[:12]) == whole
    assert why(run, trace.problem_id[:8]) == why(run, trace.problem_id) != whole


@pytest.mark.parametrize("stage", ["problems", "prompts"])
def test_of_a_run_that_has_asked_nothing_the_problem_is_shown(tmp_path, stage):
    run = write_run(tmp_path / "run", problems=12, until=stage)
    problem = next(iter(read_table(run / "problems.parquet", Problem)))
    said = why(run, problem.id)
    assert problem.question in said
    assert ("prompts       kept" in said) == (stage == "prompts")


def test_an_unknown_id_names_the_nearest(run):
    problem = next(iter(traces(run).values())).problem_id
    wrong = problem[:12] + ("f" if problem[12] != "f" else "0") + problem[13:]
    with pytest.raises(ValueError, match=f"did you mean the problem {problem}"):
        why(run, wrong)
    with pytest.raises(ValueError, match=f"did you mean the problem {problem}"):
        why(run, f"{problem}/99")
    with pytest.raises(ValueError, match=r"'x' is no problem, trace or sample .* ids look like"):
        why(run, "x")


def test_a_beginning_of_several_ids_is_not_enough(tmp_path):
    run = write_run(tmp_path / "run", problems=6, until="problems")
    rows = [Problem(f"abcd{place:012d}", "math", "math", f"{place}?", "1", "sums", place) for place in range(2)]
    write_table(run / "problems.parquet", Problem, rows)
    with pytest.raises(ValueError, match="2 ids begin with 'abcd': abcd000000000000, abcd000000000001; give more"):
        why(run, "abcd")
