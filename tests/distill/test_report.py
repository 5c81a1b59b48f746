"""What the report says of a run: counts that add up, numbers that are those of the files, and a page that a browser can
use, whatever a model wrote."""

import html
import html.parser
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from statistics import mean

import pytest

from distill import report_traces
from distill.charts import nice_ticks
from distill.funnel import fates, funnel
from distill.records import REASONS, Decision, Problem, Trace
from distill.report import REPORT_HTML, REPORT_JSON, REPORT_MD, summary, write
from distill.report_data import RATE_LABELS, bin_width, gather, rate_label
from distill.report_tables import notes, p_value, short, totals
from distill.report_traces import shown_traces
from distill.run_dir import RunDir, read_json, read_table, write_json, write_table
from distill.scores import ALL
from eval.results import read_results, read_rows
from eval.runner import compare
from tests.distill.runs import HOSTILE, SKILLS, SOURCES, write_large_run, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def report(run):
    return write(run)


@pytest.fixture
def copy(run, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(run.path, tmp_path / "copy", ignore=shutil.ignore_patterns("report.*"))
    return RunDir(tmp_path / "copy")


def rewrite(run, stage, change):
    """Replaces the decisions of a stage by `change` of their list."""
    write_table(run.decisions(stage), Decision, change(list(read_table(run.decisions(stage), Decision))))


def kept_by(run, stage):
    return {one.id for one in read_table(run.decisions(stage), Decision) if not one.reason}


def set_counts(run, stage, first=None, **counts):
    """Changes the stage's entry in the manifest; `first` moves it behind all others, as if it had run again."""
    manifest = read_json(run / "manifest.json")
    for entry in manifest["stages"]:
        if entry["stage"] == stage:
            entry["counts"].update(counts)
    if first == "again":
        manifest["stages"].sort(key=lambda entry: entry["stage"] == stage)
    write_json(run / "manifest.json", manifest)


# The funnel.


def test_every_stage_keeps_or_drops_what_the_one_before_it_kept(run, report):
    lines = report["funnel"]
    assert [line["stage"] for line in lines] == list(REASONS)
    for line in lines:
        decisions = Counter(one.reason for one in read_table(run.decisions(line["stage"]), Decision))
        assert line["in"] == line["kept"] + sum(line["dropped"].values()) == sum(decisions.values())
        assert (line["kept"], line["dropped"]) == (decisions.pop(""), dict(decisions))
    kept = {line["stage"]: line["kept"] for line in lines}
    given = {line["stage"]: line["in"] for line in lines}
    assert given["prompts"] == kept["problems"]
    assert given["traces"] == len(list(read_table(run / "traces.parquet", Trace)))
    for before, after in zip(list(REASONS)[2:], list(REASONS)[3:], strict=False):
        assert given[after] == kept[before]


def test_every_trace_has_the_fate_that_its_stage_gave_it(run, report):
    found = {row: (stage, reason) for row, _, _, _, stage, reason in fates(run, list(REASONS))}
    given = {}
    for stage in list(REASONS)[2:]:
        given |= {one.id: (stage, one.reason) for one in read_table(run.decisions(stage), Decision) if one.reason}
    assert {row: fate for row, fate in found.items() if fate[1]} == given
    assert {row for row, fate in found.items() if fate == ("", "")} == kept_by(run, "mix")


def test_a_row_that_was_lost_is_no_report(copy):
    rewrite(copy, "dedup", lambda rows: rows[1:])
    with pytest.raises(AssertionError, match=r"dedup judged .* rows were lost"):
        gather(copy)


def test_a_count_that_is_not_that_of_the_decisions_is_no_report(copy):
    set_counts(copy, "filter", repetition=99)
    with pytest.raises(AssertionError, match="filter: the manifest counts 99 rows as repetition"):
        gather(copy)


def test_a_reason_that_no_table_explains_is_no_report(copy):
    rewrite(copy, "filter", lambda rows: [Decision(rows[0].id, "boring"), *rows[1:]])
    with pytest.raises(AssertionError, match="boring"):
        gather(copy)


def test_stages_of_an_earlier_state_are_left_out(copy):
    """The filter ran again and kept one row less; what follows has not run again yet."""
    place = next(i for i, one in enumerate(read_table(copy.decisions("filter"), Decision)) if not one.reason)
    rewrite(
        copy, "filter", lambda rows: [*rows[:place], Decision(rows[place].id, "too_long"), *rows[place + 1 :]]
    )  # fmt: skip
    counts = copy.manifest()["filter"].counts
    set_counts(copy, "filter", "again", kept=counts["kept"] - 1, too_long=1)
    assert [line["stage"] for line in funnel(copy, copy.manifest())] == ["problems", "prompts", "traces", "filter"]
    assert gather(copy)["domains"] == []


# Problems, traces, dataset.


@pytest.mark.parametrize(
    ("right", "asked", "label"),
    [(0, 1, "never"), (0, 8, "never"), (1, 8, "to 20 %"), (1, 5, "to 20 %"), (2, 5, "to 40 %"), (1, 2, "to 60 %"),
     (3, 4, "to 80 %"), (4, 5, "to 80 %"), (5, 6, "below 100 %"), (7, 7, "always"), (1, 1, "always")],
)  # fmt: skip
def test_classes_of_pass_rates(right, asked, label):
    assert rate_label(right, asked) == label


def test_problems_are_counted_by_source_and_pass_rate(run, report):
    source = {one.id: one.source for one in read_table(run / "problems.parquet", Problem)}
    samples: dict[str, list[bool]] = {}
    for one in read_table(run / "traces.parquet", Trace):
        samples.setdefault(one.problem_id, []).append(one.verdict == "correct")
    for line in report["sources"]:
        own = [verdicts for problem, verdicts in samples.items() if source[problem] == line["source"]]
        assert line["prompts"] == line["asked"] == len(own) == sum(line["pass_rates"])
        assert line["solved"] == sum(any(one) for one in own)
        assert (line["samples"], line["right"]) == (sum(map(len, own)), sum(map(sum, own)))
        assert line["pass_rates"][0] == sum(not any(one) for one in own)
        assert line["pass_rates"][-1] == sum(all(one) for one in own)
    assert {line["source"] for line in report["sources"]} == set(SOURCES)
    assert len(RATE_LABELS) == len(report["sources"][0]["pass_rates"])


def test_lengths_of_kept_and_dropped_traces(run, report):
    kept = kept_by(run, "mix")
    tokens = {True: [], False: []}
    for one in read_table(run / "traces.parquet", Trace):
        tokens[one.id in kept].append(one.completion_tokens)
    found = report["traces"]
    for name, own in (("kept", tokens[True]), ("dropped", tokens[False])):
        assert sum(found[f"{name}_bins"]) == len(own)
        assert found[f"{name}_tokens"]["mean"] == pytest.approx(mean(own))
    width = found["bin_width"]
    assert found["kept_bins"][5] == sum(5 * width <= one < 6 * width for one in tokens[True])
    assert sum(found["verdicts"].values()) == report["funnel"][2]["in"]


@pytest.mark.parametrize(("largest", "width"), [(0, 1), (35, 1), (36, 2), (700, 20), (32768, 1000), (8000, 500)])
def test_bins_are_of_a_round_width(largest, width):
    assert bin_width(largest) == width
    assert largest // width < 36


def test_domains_of_the_dataset(run, report):
    assert sum(one["rows"] for one in report["domains"]) == len(kept_by(run, "mix"))
    assert sum(one["share"] for one in report["domains"]) == pytest.approx(1)
    assert sum(one["brought"] for one in report["domains"]) == report["funnel"][-1]["in"]


def test_a_domain_without_enough_rows_is_said(copy):
    recipe = read_json(copy / "recipe.json")
    recipe["recipe"]["mix"]["counts"] = {"logic": 5000}
    write_json(copy / "recipe.json", recipe)
    found = gather(copy)
    rows = next(one["rows"] for one in found["domains"] if one["domain"] == "logic")
    assert f"logic: {rows} rows of the 5,000 that the recipe asks for" in notes(found)


def test_a_dataset_with_other_rows_than_the_mixture_kept_is_no_report(copy):
    shutil.copy(copy.decisions("mix"), copy / "dataset" / "train.parquet")
    rewrite(copy, "mix", lambda rows: rows)
    with pytest.raises(AssertionError, match=r"the dataset has .* rows, and mix kept"):
        gather(copy)


# Scores.


def test_scores_are_those_of_the_evaluations(run, report):
    for name in SKILLS:
        results = read_results(run / "eval" / name)
        own = {one["task"]: one for one in report["scores"] if one["model"] == name}
        assert set(own) == {*SOURCES, ALL}
        for task in results.tasks:
            assert (own[task.task]["score"], tuple(own[task.task]["interval"])) == (
                task.score.value,
                task.score.interval,
            )
        credits = [row.credit for row in read_rows(run / "eval" / name, results)]
        assert own[ALL]["score"] == pytest.approx(mean(credits))
        assert own[ALL]["items"] == sum(task.items for task in results.tasks)
        rows = list(read_rows(run / "eval" / name, results))
        assert own[ALL]["tokens"] == pytest.approx(mean(row.completion_tokens for row in rows))
        assert own[ALL]["truncated"] == pytest.approx(mean(row.verdict == "truncated" for row in rows))


def test_students_are_compared_on_the_same_questions(run, report):
    found = {(one["a"], one["b"], one["task"]): one for one in report["differences"]}
    assert {pair[:2] for pair in found} == {
        ("traces", "answers"), ("traces", "base"), ("answers", "base"), ("traces", "teacher"), ("answers", "teacher"),
    }  # fmt: skip
    expected = compare(run / "eval/traces", run / "eval/answers").differences["chain_sum"]
    here = found["traces", "answers", "chain_sum"]
    assert (here["difference"], tuple(here["interval"])) == (expected.difference, expected.interval)
    score = {one["model"]: one["score"] for one in report["scores"] if one["task"] == ALL}
    whole = found["traces", "answers", ALL]
    assert whole["difference"] == pytest.approx(score["traces"] - score["answers"])
    assert whole["wins"] + whole["losses"] + whole["ties"] == whole["items"] == 120


def test_what_cannot_be_compared_is_said_and_not_computed(copy, tmp_path):
    other = write_run(tmp_path / "other", problems=30, items=5)
    shutil.rmtree(copy / "eval" / "answers")
    shutil.copytree(other / "eval" / "answers", copy / "eval" / "answers")
    found = gather(copy)
    assert {(one["a"], one["b"]) for one in found["differences"]} == {("traces", "base"), ("traces", "teacher")}
    assert any(line.startswith("traces and answers are not compared: ") for line in notes(found))


def test_what_was_trained_stands_beside_its_loss(run, report):
    log = read_json(run / "students/traces/log.json")
    found = report["students"]["traces"]
    assert found["loss"] == [[row["step"], row["loss"]] for row in log]
    assert found["counts"] == dict(run.manifest()["student:traces"].counts)
    content = (run / REPORT_HTML).read_text()
    read, _, learnt = found["shown"].removeprefix("⟦").partition("⟧")
    assert f"<span class=dim>{html.escape(read)}</span><mark>{html.escape(learnt)}</mark>" in content
    assert "&lt;/think&gt;" in html.escape(learnt)


def test_a_long_curve_is_thinned_to_means(copy):
    write_json(copy / "students/traces/log.json", [{"step": step, "loss": step % 2} for step in range(1, 1201)])
    loss = gather(copy)["students"]["traces"]["loss"]
    assert len(loss) == 300
    assert loss[0] == [4, 0.5]
    assert loss[-1] == [1200, 0.5]


def test_provenance_names_what_the_run_was_made_with(run, report):
    text = (run / REPORT_MD).read_text()
    for part in (
        "| commit | 58ff2fd0a7 |",
        "trl 1.16.0",
        "| teacher | models/tiny-teacher |",
        "chain_sum; Apache-2.0 |",
    ):
        assert part in text


def test_costs_add_up(report):
    total = totals(report)
    assert total["seconds"] == pytest.approx(sum(one["seconds"] for one in report["costs"]))
    evaluated = sum(one["completion_tokens"] for one in report["scores"] if one["completion_tokens"])
    traces = next(one for one in report["costs"] if one["stage"] == "traces")
    assert total["completion_tokens"] == evaluated + traces["completion_tokens"] > traces["completion_tokens"] > 0
    assert total["dollars"] == traces["dollars"]


# Text.


def test_small_forms():
    assert [p_value(p) for p in (0.5, 0.0321, 0.001, 1e-9)] == ["0.5", "0.032", "0.001", "< 0.001"]
    assert [short(n) for n in (999, 61_750, 4_309_000_000)] == ["999", "61.8k", "4.31G"]
    assert nice_ticks(0, 47, 5) == [0, 10, 20, 30, 40]
    assert nice_ticks(0, 0.003, 5) == [0, 0.001, 0.002, 0.003]


def test_the_terminal_and_markdown_show_the_same_numbers(run, report):
    said, text = summary(run), (run / REPORT_MD).read_text()
    for line in report["funnel"]:
        assert re.search(rf"^{line['stage']} .* {line['in']:,} +{line['kept']:,}  ", said, re.MULTILINE)
        assert f"| {line['stage']} | {line['unit']} | {line['in']:,} | {line['kept']:,} |" in text
    best = next(one for one in report["differences"] if one["task"] == ALL)
    assert f"{100 * best['difference']:+.1f}" in said
    assert f"{100 * best['difference']:+.1f}" in text
    assert "traces: 2 rows are longer than sft.max_length and were left out" in said
    assert '"most": 6' in text
    assert read_json(run / REPORT_JSON) == json.loads(json.dumps(report))


@pytest.mark.parametrize("until", ["problems", "prompts", "traces", "dedup", "dataset", "student:answers", "eval:base"])
def test_a_run_that_went_half_way_has_a_report(tmp_path, until):
    run = write_run(tmp_path / "run", problems=24, items=4, until=until)
    found = write(run)
    assert until not in found["missing"]
    assert "eval:traces" in found["missing"]
    assert "not run yet: " in summary(run)
    content = (run / REPORT_HTML).read_text()
    assert ("<h2>Scores</h2>" in content) == (until == "eval:base")
    assert ("<h2>How long the traces are</h2>" in content) == (until not in ("problems", "prompts"))


def test_a_folder_without_a_run_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        write(RunDir(tmp_path))


def test_a_report_is_a_function_of_the_run(run, report):
    files = [run / name for name in (REPORT_JSON, REPORT_MD, REPORT_HTML)]
    before = [file.read_bytes() for file in files]
    write(run)
    assert before == [file.read_bytes() for file in files]


LARGE = """
import re, sys
from pathlib import Path
from distill.report import write
from distill.run_dir import RunDir
report = write(RunDir(Path(sys.argv[1])))
# Not getrusage: its peak includes that of the process that started this one.
peak = int(re.search("VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(report["funnel"][-1]["kept"], peak // 1024)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_half_a_million_problems_fit_into_500_megabytes(tmp_path):
    run = write_large_run(tmp_path / "run", problems=500_000)
    process = subprocess.run(
        [sys.executable, "-c", LARGE, str(run.path)], capture_output=True, text=True, check=True
    )  # fmt: skip
    kept, megabytes = map(int, process.stdout.split())
    assert kept == 500_000 * 3 // 4
    assert megabytes < 500
    assert (run / REPORT_HTML).stat().st_size < 12_000_000


# The traces on the page.


def test_a_small_run_is_shown_whole(run, report):
    shown, total = shown_traces(run, list(REASONS), 0)
    traces = [one.id for one in read_table(run / "traces.parquet", Trace)]
    assert [one["id"] for one in shown if "index" in one] == traces
    dropped = [line for line in report["funnel"] if line["unit"] == "prompts"]
    unasked = sum(sum(line["dropped"].values()) - line["dropped"].get("repeated", 0) for line in dropped)
    assert len(shown) == total == len(traces) + unasked
    fates = Counter((one["stage"], one["reason"]) for one in shown)
    for line in report["funnel"]:
        for reason, count in line["dropped"].items():
            assert fates[line["stage"], reason] == (0 if reason == "repeated" else count)
    assert fates["", ""] == report["funnel"][-1]["kept"]
    for one in shown:
        assert (one["path"][-1][1] != "") == bool(one["reason"])
        if "index" in one:
            assert one["samples"][one["index"]] == one["verdict"]


def test_of_a_large_run_every_fate_has_its_place(run, report, monkeypatch):
    monkeypatch.setattr(report_traces, "TRACES", 30)
    shown, total = shown_traces(run, list(REASONS), 0)
    everything = sum(len(line["dropped"]) for line in report["funnel"])
    assert len(shown) == 30 < total
    fates = Counter((one["stage"], one["reason"]) for one in shown)
    assert len(fates) == everything  # with kept, and without repeated
    assert shown == shown_traces(run, list(REASONS), 0)[0]
    assert shown != shown_traces(run, list(REASONS), 1)[0]
    monkeypatch.setattr(report_traces, "BYTES", 3000)
    assert 1 <= len(shown_traces(run, list(REASONS), 0)[0]) < 30


class Collector(html.parser.HTMLParser):
    """Elements that are open, and addresses that would be fetched."""

    VOID = ("meta", "input", "br", "polyline")

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.scripts = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_no_trace_breaks_out_of_it(run, report):
    content = (run / REPORT_HTML).read_text()
    parser = Collector()
    parser.feed(content)
    assert (parser.open, parser.fetched, parser.scripts) == ([], [], 3)
    assert "@@" not in content
    assert "url(" not in content
    data = json.loads(re.search(r'id="data">(.*?)</script>', content, re.DOTALL)[1])
    assert any(HOSTILE in one.get("thought", "") for one in data)


def test_names_of_a_recipe_cannot_break_the_page(copy):
    recipe = read_json(copy / "recipe.json")
    recipe["recipe"]["description"] = "<img src=x>"
    recipe["recipe"]["teacher"]["model"] = "<img src=y>"
    write_json(copy / "recipe.json", recipe)
    write(copy)
    assert "<img" not in (copy / REPORT_HTML).read_text()


# A real browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page in")


def opened(page, profile, state=""):
    """The page's elements after its scripts have run, and what the browser said of errors."""
    process = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr",
         "--v=0", "--dump-dom", page.as_uri() + state],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return process.stdout, [line for line in process.stderr.splitlines() if "CONSOLE" in line]


@needs_chromium
def test_a_browser_opens_the_page_where_the_address_points(run, report, tmp_path):
    expected = [one for one in shown_traces(run, list(REASONS), 0)[0] if one["reason"] == "mixed_languages"]
    dom, errors = opened(run / REPORT_HTML, tmp_path, "#fate=filter:mixed_languages")
    assert errors == []
    assert "<title>small</title>" in dom
    assert dom.count('role="option"') == len(expected) > 1
    assert dom.count('aria-selected="true"') == 1
    assert f"1 of {len(expected)}<" in dom
    assert f">{expected[0]['id']} · " in dom
    assert "Dropped: the thought changes its language (en, then zh from character 212)." in dom


CHOICES = {
    "#": lambda one: True,
    "#verdict=wrong": lambda one: one["verdict"] == "wrong",
    "#verdict=not+asked": lambda one: "index" not in one,
    "#fate=kept": lambda one: not one["reason"],
    "#fate=dropped&source=chain_sum": lambda one: one["reason"] and one["source"] == "chain_sum",
    "#q=THE+LETTERS+OF": lambda one: "The letters of" in one.get("thought", ""),
    "#q=nothing+is+like+this": lambda one: False,
}


@needs_chromium
def test_choosing_searching_and_moving_by_keys(run, report, tmp_path):
    """One visit: each of `CHOICES`, then j, j, j, k, the arrow of the list, and the slash, which goes to the search."""
    visit = """<script>
    const visited = (hash) => {
      history.replaceState(null, "", `${hash}&=`);
      restore(false);
      return found.map((row) => row.id);
    };
    const seen = %s.map(visited);
    visited("#");
    const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    for (const key of ["j", "j", "j", "k"]) press(document.body, key);
    press(byId("list"), "ArrowDown");
    press(byId("list"), "/");
    const keys = [at, document.activeElement.id, location.hash, byId("detail").querySelector(".meta").textContent];
    document.title = JSON.stringify({ seen, keys });
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text((run / REPORT_HTML).read_text().replace("</body>", visit % json.dumps(list(CHOICES))))
    dom, errors = opened(page, tmp_path / "profile")
    assert errors == []
    told = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom)[1]))
    shown = shown_traces(run, list(REASONS), 0)[0]
    for (state, chosen), ids in zip(CHOICES.items(), told["seen"], strict=True):
        assert ids == [one["id"] for one in shown if chosen(one)], state
    at, focus, address, meta = told["keys"]
    assert (at, focus, address) == (3, "q", f"#id={shown[3]['id'].replace('/', '%2F')}")
    assert meta.startswith(f"{shown[3]['id']} · {shown[3]['source']}")
