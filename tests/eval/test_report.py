"""What a person reads: the numbers of the results and no others, what may be compared, what stays hidden, a page that
works in a browser."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from eval.protocols import protocol_from_yaml
from eval.report import markdown, page, reported, score_rows, shown_samples, text, text_table, write_report
from eval.results import read_results
from eval.runner import evaluate
from eval.sample import Completion, Sample
from eval.tasks import TASKS
from tests.eval.arithmetic import fraction

STUDENT = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
HOSTILE = "</script><script>document.title = 'taken over'</script><b>&amp;"


class Answers:
    """Answers right three times in four, by its seed; now and then cuts, misses, fails. Quotes the question."""

    context_length = None

    def __init__(self, name=STUDENT, fails=False, error="503 after 8 attempts"):
        self.identity, self.fails, self.error = {"model": name}, fails, error

    def render(self, messages, *, open_thought):
        return messages[-1]["content"] + "<think>\n"

    def check(self, requests):
        assert list(requests)

    def sample(self, requests):
        for request in requests:
            sample, x = request.tag.sample, fraction(request.seed)
            thought = f"The question was: {sample.question} {HOSTILE}"
            if x < 0.1 and self.fails:
                yield request, Completion(finish_reason="failed", error=self.error.format(prompt=request.prompt))
            elif x < 0.2:
                yield request, Completion(thought, finish_reason="length", completion_tokens=32768)
            else:
                answer = sample.gold if x < 0.8 else "A" if sample.choices else "1000000"
                end = f"Answer: {answer}" if sample.choices else f"\\boxed{{{answer}}}"
                yield request, Completion(f"{thought}</think>{end}", completion_tokens=100)


def aime(n=30):
    return [Sample(id=f"{i}", task="aime24", question=f"What is {i} + 1?", gold=str(i + 1)) for i in range(n)]


def gpqa(n=8):
    return [
        Sample(
            id=f"rec{i}", task="gpqa_diamond", question=f"Which zorblax {i} quivers?", gold="ABCD"[i % 4],
            choices=tuple(f"flumph {i}.{j}" for j in range(4)), group="Xenology",
        )
        for i in range(n)
    ]  # fmt: skip


def run(out, items, *, protocol="deepseek-r1", published=True, sampler=None, **options):
    """The results; `published` makes as if the items had come from the published file."""
    out.mkdir(exist_ok=True)
    results = evaluate(sampler or Answers(), list(items), protocol, out, items=items, **options)
    if published:
        tasks = [dataclasses.replace(one, dataset={**one.dataset, "changed": False}) for one in results.tasks]
        results = dataclasses.replace(results, tasks=tasks)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run") / "out", {"aime24": aime(), "gpqa_diamond": gpqa()})


def test_a_score_stands_beside_its_interval_and_the_published_one(results):
    task = results.task("aime24")
    rows = {(row[0], row[1]): row for row in score_rows(results)[1:]}
    score, (low, high) = 100 * task.score.value, (100 * end for end in task.score.interval)
    row = rows["aime24", "pass@1"]
    assert row[2:6] == [f"{score:.1f}", f"[{low:.1f}, {high:.1f}]", "30", "64"]
    assert row[-1] == f"28.9 ({score - 28.9:+.1f}, outside)"
    # Right three times in four, every vote is right; Wilson for 30 of 30: 30 / (30 + 1.96^2) = 88.6 %.
    assert score_rows(results)[2][1:] == ["cons@64", "100.0", "[88.6, 100.0]", *[""] * 6, "52.7 (+47.3, outside)"]
    said = text(results)
    half = (high - low) / 2
    source = "DeepSeek-R1, arXiv 2501.12948 v1, p. 14, table 5"
    line = f"aime24: pass@1 reported 28.9 ({source}); here {score:.1f} ± {half:.1f}: OUTSIDE our interval"
    assert line in said


def test_the_counts_add_up_in_every_rendering(results):
    assert sum(results.verdicts.values()) == results.samples == 30 * 64 + 8 * 64
    who, counts, *_ = text(results).splitlines()
    assert STUDENT in who
    total, parts = counts.split(";")[0].split(" samples = ")
    assert int(total.replace(",", "")) == sum(int(one.split()[0].replace(",", "")) for one in parts.split(", "))
    table = re.search(r"## Verdicts\n\n(.*?)\n\n", markdown(results), re.DOTALL)[1].splitlines()[2:]
    for line in table:
        _, samples, *verdicts = [cell.strip() for cell in line.strip("|").split("|")]
        assert int(samples.replace(",", "")) == sum(int(one.replace(",", "")) for one in verdicts)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(overrides={"max_tokens": 2048}), "the settings are not the protocol's: max_tokens: 2048 and 32768"),
        (dict(protocol="deepseek-v3-chat"), "published under deepseek-r1, run under deepseek-v3-chat"),
        (dict(limit=20), "only 20 of 30 questions were asked"),
        (dict(published=False), "the questions are not those of the published file"),
        (dict(sampler=Answers(fails=True)), "completions failed; run again to ask for them"),
    ],
)
def test_unlike_protocols_are_not_compared(tmp_path, options, reason):
    results = run(tmp_path / "out", {"aime24": aime()}, **options)
    lines = reported(results, results.task("aime24"))
    assert len(lines) == 2
    for line in lines:
        assert reason in line.reason
        assert line.difference is None
    assert "28.9, not compared" in text(results)
    assert reason in text(results)


def test_cons_is_compared_at_its_own_k_only(tmp_path):
    results = run(tmp_path / "out", {"aime24": aime()}, k=4)
    first, cons = reported(results, results.task("aime24"))
    assert first.difference is not None  # k moves the interval, not the value
    assert (cons.difference, cons.reason) == (None, "cons@64 was not computed: it needs k = 64")


def test_settings_that_an_option_changed_are_said(tmp_path):
    results = run(tmp_path / "out", {"aime24": aime()}, overrides={"temperature": 1.0}, sampler=Answers("my/model"))
    assert "aime24: not the settings of deepseek-r1: temperature 1.0 instead of 0.6" in text(results)
    assert "not the settings" not in text(run(tmp_path / "out2", {"aime24": aime()}))


def test_settings_that_ones_own_protocol_changed_are_said(tmp_path):
    mine = protocol_from_yaml("name: short\nbase: deepseek-r1\ntasks: {aime24: {max_tokens: 2048, samples: 16}}")
    said = text(run(tmp_path / "out", {"aime24": aime()}, protocol=mine))
    assert (
        "- aime24: not the settings of deepseek-r1: max_tokens 2048 instead of 32768, samples 16 instead of 64" in said
    )
    assert "28.9, not compared" in said
    assert "our default chain, since the paper names none" in said  # what the base leaves open is still open


def test_another_name_finds_its_published_scores(results):
    lines = reported(results, results.task("aime24"), "deepseek-ai/DeepSeek-R1")
    assert [line.published.value for line in lines] == [79.8]


def test_repeated_questions_and_the_score_of_guessing_are_said(tmp_path):
    twice = [*gpqa(8), dataclasses.replace(gpqa(1)[0], id="again")]
    said = markdown(run(tmp_path / "out", {"gpqa_diamond": twice}, k=1))
    assert "9 of 9, 1 of them repeated" in said
    assert "| score of guessing | 25.0 |" in said


def test_failed_completions_are_listed_by_reason(tmp_path):
    results = run(tmp_path / "out", {"aime24": aime()}, sampler=Answers(fails=True))
    failed = results.verdicts["failed"]
    assert failed > 50
    said = text(results)
    assert (
        f"aime24: {failed:,} of 1,920 completions failed and count as wrong; the same command asks for them again"
        in said
    )
    assert said.count("503 after 8 attempts") == 1


SECRETS = ("zorblax", "flumph", "quivers")


def test_confidential_texts_stand_nowhere_in_plain_text(tmp_path, capfd):
    out = tmp_path / "out"
    # FastAPI's words on a request that it refuses repeat it.
    echo = Answers(fails=True, error="http://host/v1/completions answered 422: {prompt}")
    results = run(out, {"gpqa_diamond": gpqa()}, sampler=echo)
    assert results.verdicts["failed"] > 0
    print(text(write_report(out)))
    files = [path for path in out.iterdir() if path.is_file()]
    assert {"report.html", "report.md", "results.json", "graded.jsonl", "samples.sqlite"} <= {one.name for one in files}
    for path in files:
        for secret in SECRETS:
            assert secret.encode() not in path.read_bytes(), f"{secret} in {path.name}"
    printed = capfd.readouterr()
    assert "no completion: http://host/v1/completions answered 422\n" in printed.out
    assert not any(secret in printed.out + printed.err for secret in SECRETS)
    assert {(one["gold"], one["detail"], one["response"]) for one in shown_samples(out, results)} == {(None, "", None)}
    write_report(out, show_questions=True)
    assert "zorblax" in (out / "report.html").read_text()


class Collector(html.parser.HTMLParser):
    """Elements that are open, and addresses that would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.scripts = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        self.scripts += tag == "script"
        if tag not in ("meta", "input", "br", "line", "circle", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in ("line", "circle", "path")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_no_answer_breaks_out_of_it(tmp_path):
    out = tmp_path / "out"
    run(out, {"aime24": aime()})
    write_report(out)
    content = (out / "report.html").read_text()
    parser = Collector()
    parser.feed(content)
    assert (parser.open, parser.fetched, parser.scripts) == ([], [], 2)
    data = json.loads(re.search(r'id="data">(.*?)</script>', content, re.DOTALL)[1])
    assert len(data) == 300
    assert any(HOSTILE in one["thought"] for one in data)
    assert {one["verdict"] for one in data} == {"correct", "wrong", "truncated"}


def test_samples_on_the_page_are_those_of_the_results(tmp_path):
    out = tmp_path / "out"
    run(out, {"aime24": aime(3)}, k=2)
    shown = list(shown_samples(out, read_results(out)))
    assert [(one["id"], one["index"]) for one in shown] == [("0", 0), ("0", 1), ("1", 0), ("1", 1), ("2", 0), ("2", 1)]
    for one in shown:
        assert one["question"] == f"What is {one['id']} + 1?"
        assert (one["response"] == "") == (one["verdict"] == "truncated")


def test_a_report_is_a_function_of_what_is_stored(tmp_path):
    out = tmp_path / "out"
    run(out, {"aime24": aime(), "gpqa_diamond": gpqa()})
    write_report(out)
    before = {name: (out / name).read_bytes() for name in ("report.md", "report.html")}
    write_report(out)
    assert before == {name: (out / name).read_bytes() for name in before}


def test_columns_line_up_under_wide_characters():
    lines = text_table([["组", "n"], ["会计", "1"], ["ab", "22"]]).splitlines()
    assert lines == ["组    n", "----  --", "会计  1", "ab    22"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page in")
def test_a_browser_shows_the_samples(tmp_path):
    out = tmp_path / "out"
    run(out, {"aime24": aime()})
    write_report(out)
    process = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         (out / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    dom = process.stdout
    assert "<title>deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B by deepseek-r1</title>" in dom
    assert dom.count('<article class="sample"') == 20
    assert "1 to 20 of 300" in dom
    assert '<option value="truncated">truncated</option>' in dom


def test_the_page_escapes_what_it_is_given(results):
    named = dataclasses.replace(results, model={"model": "<img src=x>"})
    assert "<img" not in page(named, [])
    assert TASKS["aime24"].title in page(named, [])
