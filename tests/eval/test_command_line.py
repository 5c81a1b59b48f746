"""`deepseek-eval` as a person types it: what it prints, its exit status, what it leaves behind."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.__main__ import main
from tests.eval.models import tiny_lm, tiny_tokenizer
from tests.eval.stub_server import StubServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama in a folder, as the Hub has it."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny_lm(ends=4.0).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """GSM8K in its own layout, with eight questions made here."""
    file = tmp_path / "data" / "gsm8k" / "test.jsonl"
    file.parent.mkdir(parents=True)
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def run(model, data, out, *more, tasks="gsm8k", protocol="deepseek-r1"):
    options = ["--model", str(model), "--tasks", tasks, "--protocol", protocol, "--out", str(out)]
    return main(["run", *options, "--data", str(data), "--changed-data", "--max-tokens", "24", *more])


def test_help_answers_at_once():
    began = time.perf_counter()
    for command in ([], ["run"], ["compare"]):
        subprocess.run([sys.executable, "-m", "eval", *command, "--help"], cwd=ROOT, check=True, capture_output=True)
    assert time.perf_counter() - began < 3.0  # three processes; a torch alone takes longer


def test_a_run_ends_with_a_table_a_page_and_results(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(model, data, out, "--k", "2", "--pass-at", "2") == 0
    printed = capsys.readouterr()
    assert re.search(r"gsm8k +pass@1 +\d+\.\d +\[\d+\.\d, \d+\.\d\] +8 +2 ", printed.out)
    assert "pass@2" in printed.out
    assert "sampling: 16/16" in printed.err
    assert {"samples.sqlite", "graded.jsonl", "results.json", "report.md", "report.html"} <= {
        one.name for one in out.iterdir()
    }
    results = (out / "results.json").read_bytes()
    assert run(model, data, out, "--k", "2", "--pass-at", "2", "--batch-size", "3") == 0  # nothing is asked again
    assert "sampling" not in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == results


def test_raising_k_asks_for_the_rest(model, data, tmp_path, capsys):
    run(model, data, tmp_path / "out", "--k", "1")
    run(model, data, tmp_path / "out", "--k", "3")
    assert re.findall(r"sampling: (\d+)/\1", capsys.readouterr().err) == ["8", "16"]


def test_report_compare_regrade(model, data, tmp_path, capsys):
    for name, seed in (("a", "0"), ("b", "1")):
        assert run(model, data, tmp_path / name, "--k", "2", "--seed", seed) == 0
    (tmp_path / "a" / "report.html").unlink()
    assert main(["report", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "report.html").is_file()
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert "a - b" in printed
    assert "detectable" in printed
    assert main(["compare", "--json", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert json.loads(capsys.readouterr().out)["differences"]["gsm8k"]["items"] == 8
    assert main(["regrade", str(tmp_path / "a")]) == 0
    assert "0 of 16 verdicts flipped" in capsys.readouterr().out


def test_the_same_commands_on_an_endpoint(data, tmp_path, capsys):
    def answer(prompt, noise):
        number = int(re.search(r"What is (\d+)", prompt)[1]) if "What is" in prompt else noise
        return f"<think>{'so ' * (noise % 5)}</think>\\boxed{{{2 * number + (noise % 4 == 3)}}}"

    with StubServer(answer=answer) as server:
        assert run(server.model, data, tmp_path / "out", "--base-url", server.url, "--k", "8") == 0
    printed = capsys.readouterr()
    assert "temperature" in printed.err  # the preflight's findings
    score = float(re.search(r"gsm8k +pass@1 +(\d+\.\d)", printed.out)[1])
    assert 50 < score < 95  # right three times in four


def test_a_dishonest_endpoint_is_refused_and_may_be_taken_all_the_same(data, tmp_path, capsys):
    with StubServer(ignores=("temperature",)) as server:
        arguments = (server.model, data, tmp_path / "out", "--base-url", server.url, "--k", "1")
        assert run(*arguments) == 1
        assert "does not honour temperature" in capsys.readouterr().err
        assert not (tmp_path / "out" / "results.json").exists()
        assert run(*arguments, "--skip-preflight") == 0


def test_a_dead_endpoint_is_said_at_once(data, tmp_path, capsys):
    began = time.perf_counter()
    assert run("stub", data, tmp_path / "out", "--base-url", "http://127.0.0.1:9/v1") == 1
    assert "127.0.0.1:9/v1/models cannot be reached" in capsys.readouterr().err
    assert time.perf_counter() - began < 10


def test_a_wrong_key_is_said_before_anything_is_asked(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with StubServer(api_key="sk-right") as server:
        assert run(server.model, data, tmp_path / "out", "--base-url", server.url) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "refuses the first request" in error
    assert "answered 401" in error
    assert "--skip-preflight" not in error  # it would not help
    assert "sk-wrong" not in error


def test_failed_completions_give_a_status_of_their_own_and_are_asked_again(data, tmp_path, capsys):
    directive = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    with StubServer() as server:
        options = (server.model, data, tmp_path / "out", "--base-url", server.url, "--k", "1", "--skip-preflight")
        options = (*options, "--retries", "0")
        server.broken = {f"What is 3 plus 3?{directive}"}
        assert run(*options) == 3
        assert "1 of 8 completions failed" in capsys.readouterr().out
        server.broken = set()
        calls = server.calls
        assert run(*options) == 0
        assert server.calls == calls + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tasks", "gsm9k"], "the task 'gsm9k' is unknown. Did you mean 'gsm8k'?"),
        (["--protocol", "deepseek-r2"], "protocol='deepseek-r2' is unknown. Did you mean 'deepseek-r1'?"),
        (["--data", "none"], "there is no gsm8k/test.jsonl under"),
        (["--pass-at", "8"], "gsm8k: pass@8 needs k=8 samples of every item, and k is 4"),
        (["--limit", "0"], "limit=0"),
        (["--model", "no/such-model"], "no/such-model"),
        (["--base-url", "localhost:1"], "base_url='localhost:1' is no address"),
        (["--max-tokens", "100000"], "100000"),
        (["--temperature", "-1"], "temperature=-1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_asked(model, data, tmp_path, capsys, change, message):
    options = {"--model": str(model), "--tasks": "gsm8k", "--protocol": "deepseek-r1", "--data": str(data)}
    options |= {"--max-tokens": "24", "--out": str(tmp_path / "out")}
    options[change[0]] = change[1] if change[1] != "none" else str(tmp_path / "none")
    assert main(["run", *(part for pair in options.items() for part in pair), "--changed-data"]) == 1
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] or message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_changed_file_is_refused_without_the_option(model, data, tmp_path, capsys):
    options = ["--model", str(model), "--tasks", "gsm8k", "--protocol", "deepseek-r1", "--out", str(tmp_path / "out")]
    assert main(["run", *options, "--data", str(data)]) == 1
    error = capsys.readouterr().err
    assert "has sha256" in error
    assert "--changed-data" in error


def test_a_model_without_a_chat_template_is_refused(data, tmp_path, capsys):
    folder = tmp_path / "base"
    tiny_lm().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    assert run(folder, data, tmp_path / "out") == 1
    assert "chat template" in capsys.readouterr().err


def test_one_folder_for_all_tasks_or_a_path_for_each(model, data, tmp_path, capsys):
    file = data / "gsm8k" / "test.jsonl"
    assert run(model, f"gsm8k={file}", tmp_path / "out", "--k", "1") == 0
    assert run(model, data, tmp_path / "out", "--data", f"gsm8k={file}") == 1
    assert "give one folder for all tasks, or TASK=PATH for each" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["tasks", "protocols", "scores"])
def test_list(what, capsys):
    assert main(["list", what]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 4


def test_a_reader_that_had_enough_is_no_error():
    process = subprocess.run(
        f"{sys.executable} -m eval list scores | head -1; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, env={**os.environ},
    )  # fmt: skip
    assert process.stderr == ""
    assert process.stdout.splitlines()[-1] == "0"


def test_extra_body_reaches_the_server_and_the_identity(data, tmp_path):
    with StubServer() as server:
        options = ("--base-url", server.url, "--k", "1", "--skip-preflight", "--extra-body", '{"top_k": -1}')
        assert run(server.model, data, tmp_path / "out", *options) == 0
        assert all(body["top_k"] == -1 for body in server.bodies)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["model"]["extra_body"] == {"top_k": -1}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--extra-body", "top_k", "is no JSON object"), ("--batch-size", "0", "'0' is no number of at least 1")],
)
def test_an_option_that_cannot_be_read_is_a_usage_error(capsys, option, value, message):
    with pytest.raises(SystemExit):
        main(["run", option, value])
    assert message in capsys.readouterr().err


def test_stop_is_asked_of_an_endpoint_only_where_a_task_stops(data, tmp_path, capsys):
    with StubServer(ignores=("stop",)) as server:
        assert run(server.model, data, tmp_path / "a", "--base-url", server.url, "--k", "1") == 0
        assert run(server.model, data, tmp_path / "b", "--base-url", server.url, protocol="deepseek-v3-base") == 1
    assert "does not honour stop" in capsys.readouterr().err


def test_one_dead_endpoint_of_two_is_left_out_at_once(data, tmp_path, capsys):
    began = time.perf_counter()
    with StubServer() as server:
        urls = ("--base-url", server.url, "--base-url", "http://127.0.0.1:9/v1")
        assert run(server.model, data, tmp_path / "out", *urls, "--k", "1") == 0
    assert time.perf_counter() - began < 20
