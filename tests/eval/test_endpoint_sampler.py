"""Endpoints: the same completions with and without faults, one failure one failed completion, liars reported."""

import asyncio
import gc
import importlib.util
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import pytest

from eval.endpoint_sampler import EndpointSampler, _retry_after
from eval.preflight import Finding, preflight
from eval.sample import Completion
from eval.samplers import Request
from eval.thinking import split_thought
from tests.eval.models import tiny_lm, tiny_tokenizer
from tests.eval.stub_server import FAULTS, StubServer, words_of

REPOSITORY = Path(__file__).parents[2]
NOBODY = "http://127.0.0.1:9/v1"  # the discard port, where nobody listens


def chat(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def requests(items: int = 40, k: int = 4, **overrides) -> list[Request]:
    settings = {"max_tokens": 100, "temperature": 0.6, "top_p": 0.95, **overrides}
    return [
        Request(chat(f"problem {item}"), seed=1000 * item + index, tag=(item, index), **settings)
        for item in range(items)
        for index in range(k)
    ]


def sampler_of(*servers: StubServer | str, **options) -> EndpointSampler:
    urls = [server if isinstance(server, str) else server.url for server in servers]
    return EndpointSampler(urls, "stub", **{"concurrency": 16, "first_delay": 0.01, "timeout": 20.0, **options})


def sampled(sampler: EndpointSampler, asked: list[Request]) -> dict:
    out = {request.tag: completion for request, completion in sampler.sample(asked)}
    assert len(out) == len(asked)
    return out


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def expected(request: Request) -> str:
    return words_of(request.prompt[-1]["content"], request.seed)


# Answers.


def test_everything_asked_is_answered_and_counted():
    with StubServer() as server:
        answers = sampled(sampler_of(server), requests())
        assert server.calls == len(requests())
    for request in requests():
        completion = answers[request.tag]
        assert completion.text == expected(request)
        assert completion.finish_reason == "stop"
        assert completion.prompt_tokens == 2
        assert completion.completion_tokens == len(completion.text.split())
    assert threads().isdisjoint({"endpoints"})


def test_what_a_request_says_is_what_is_sent():
    request = Request(chat("q"), seed=2**60 + 5, max_tokens=7, temperature=0.7, top_p=0.9, stop=("END",), tag="mine")
    with StubServer() as server:
        list(sampler_of(server, extra_body={"top_k": -1}).sample([request]))
        ((_, text),) = sampler_of(server).sample([Request("plain", max_tokens=7)])
        chatted, plain = server.bodies
    assert chatted == {
        "model": "stub", "messages": [{"role": "user", "content": "q"}], "stream": False, "max_tokens": 7,
        "temperature": 0.7, "top_p": 0.9, "seed": 5, "stop": ["END"], "top_k": -1,
    }  # fmt: skip
    assert plain["prompt"] == "plain"
    assert "messages" not in plain
    assert text.finish_reason == "length"
    assert text.completion_tokens == 7


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_overcome(kind):
    asked = requests(10, 2)
    with StubServer(faults=0.6, kinds=[kind]) as server:
        answers = sampled(sampler_of(server, timeout=0.3 if kind == "slow" else 20.0, retries=30), asked)
        assert server.calls > len(asked) * 1.5
        assert max(server.asked.values()) > 2
    assert {tag: completion.text for tag, completion in answers.items()} == {one.tag: expected(one) for one in asked}


def test_thirty_per_cent_faults_give_the_completions_of_none():
    with StubServer() as server:
        clean = sampled(sampler_of(server), requests())
    with StubServer(faults=0.3) as server:
        assert sampled(sampler_of(server, timeout=0.5), requests()) == clean
        assert server.calls - server.answered > 20
        assert server.answered == len(requests())


def test_one_failing_request_is_one_failed_completion():
    with StubServer(broken=["problem 3"]) as server:
        answers = sampled(sampler_of(server, retries=2), requests(8, 2))
        assert server.asked["problem 3", 3000] == 3
    failed = {tag: completion for tag, completion in answers.items() if completion.finish_reason == "failed"}
    assert set(failed) == {(3, 0), (3, 1)}
    assert "500: this prompt never works (attempt 3, the last)" in failed[3, 0].error
    assert answers[2, 0].text == expected(requests(8, 2)[4])


def test_a_request_that_is_refused_is_not_asked_again():
    with StubServer(max_model_len=50) as server:
        long = Request(chat("word " * 45), max_tokens=20, tag="long")
        answers = sampled(sampler_of(server), [long, Request(chat("short"), max_tokens=20, tag="short")])
        assert server.calls == 2
    assert answers["long"].finish_reason == "failed"
    assert "400: This model's maximum context length is 50 tokens" in answers["long"].error
    assert answers["short"].finish_reason != "failed"


# Reasoning in its own field.


def thinking(prompt: str, noise: int) -> str:
    return f"so we add {noise} and have it</think>\\boxed{{{noise}}}"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_a_thought_in_its_own_field_is_kept_and_a_cut_one_is_no_fault(name):
    with StubServer(answer=thinking, reasoning=name) as server:
        whole = sampled(sampler_of(server), requests(2, 1))[1, 0]
        cut = sampled(sampler_of(server), requests(2, 1, max_tokens=4))[1, 0]
        assert server.calls == 4
    assert (whole.reasoning, whole.text) == ("so we add 1000 and have it", "\\boxed{1000}")
    assert (cut.reasoning, cut.text, cut.finish_reason) == ("so we add 1000", "", "length")
    assert split_thought(cut.text, reasoning=cut.reasoning, finish_reason=cut.finish_reason).state == "truncated"


def test_how_a_server_ended_decides_what_a_completion_is():
    from eval.endpoint_sampler import _completion, _Refused, _Retry

    def answer(finish, **message):
        return {"choices": [{"finish_reason": finish, "message": {"role": "assistant", **message}}]}

    assert _completion(answer("stop", content=""), True) == Completion(text="")
    assert _completion(answer("eos", content="x"), True).finish_reason == "stop"
    assert _completion(answer("stop", content=None, reasoning="so"), True) == Completion(text="", reasoning="so")
    for finish in ("abort", "insufficient_system_resource", None):
        with pytest.raises(_Retry, match="broke off"):
            _completion(answer(finish, content="half"), True)
    with pytest.raises(_Retry, match="null"):
        _completion(answer("stop", content=None), True)
    for finish in ("content_filter", "tool_calls"):
        with pytest.raises(_Refused, match=finish):
            _completion(answer(finish, content="x"), True)
    for torn in ({}, {"choices": []}, {"choices": [{"finish_reason": "stop"}]}, {"choices": ["x"]}, {"choices": None}):
        with pytest.raises(_Retry, match="no choice with a text"):
            _completion(torn, True)


# Laziness, order, concurrency.


def test_requests_are_read_as_places_become_free():
    read = 0

    def endless():
        nonlocal read
        for read in itertools.count(1):
            yield Request(chat(f"problem {read}"), max_tokens=5)

    with StubServer() as server:
        stream = sampler_of(server, concurrency=4).sample(endless())
        for _ in range(50):
            next(stream)
        assert read <= 50 + 8
        stream.close()
        assert server.most_in_flight <= 4
    assert threads().isdisjoint({"endpoints"})


def test_places_stay_filled_while_the_caller_works():
    """Each answer takes the server 50 ms and the caller 10 ms: 8 places hide the caller's work, one would not."""
    with StubServer(delay=0.05) as server:
        start = time.perf_counter()
        for _ in sampler_of(server, concurrency=8).sample(requests(40, 1)):
            time.sleep(0.01)
        assert time.perf_counter() - start < 1.0
        assert server.most_in_flight == 8


def test_none_waits_for_a_completion():
    answers = []

    def rounds():
        for number in range(3):
            yield Request(chat(f"{number} after {len(answers)}"), max_tokens=50)
            while len(answers) <= number:
                yield None

    with StubServer() as server:
        for _, completion in sampler_of(server).sample(rounds()):
            answers.append(completion.text)
        assert answers == [words_of(f"{number} after {number}", 0) for number in range(3)]
        with pytest.raises(RuntimeError, match="None"):
            list(sampler_of(server).sample(iter([None])))


def test_within_a_running_event_loop():
    async def main() -> dict:
        return sampled(sampler_of(server), requests(5, 2))

    with StubServer() as server:
        answers = asyncio.run(main())
    assert {tag: one.text for tag, one in answers.items()} == {one.tag: expected(one) for one in requests(5, 2)}


@pytest.fixture
def interruptible():
    """What a shell starts in the background ignores SIGINT, and so would the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_caller_that_stops_leaves_nothing_running(caplog, interruptible):
    with StubServer(delay=5.0) as server:
        stream = sampler_of(server).sample(requests(40, 1))
        killer = threading.Timer(0.3, lambda: os.kill(os.getpid(), 2))
        killer.start()
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert time.perf_counter() - start < 2
    gc.collect()
    assert threads().isdisjoint({"endpoints"})
    assert not [record for record in caplog.records if "pending" in record.message or "never awaited" in record.message]


def test_an_error_of_the_request_source_reaches_the_caller():
    def source():
        yield Request(chat("q"), max_tokens=5)
        raise OSError("the file of problems is gone")

    with StubServer() as server, pytest.raises(OSError, match="problems is gone"):
        list(sampler_of(server).sample(source()))
    assert threads().isdisjoint({"endpoints"})


# Several endpoints, dead ones.


def test_work_is_shared_and_a_dead_endpoint_is_left_out_with_a_notice(caplog):
    with StubServer(delay=0.01) as first, StubServer(delay=0.01) as second:
        sampler = sampler_of(first, NOBODY, second)
        with caplog.at_level(logging.WARNING):
            answers = sampled(sampler, requests())
        assert min(first.calls, second.calls) > 40
    assert {one.text for one in answers.values()} == {expected(one) for one in requests()}
    notices = [record.message for record in caplog.records if "left out" in record.message]
    assert len(notices) == 1
    assert NOBODY in notices[0]


def test_an_endpoint_that_comes_back_is_asked_again(caplog):
    with StubServer() as first:
        late = StubServer(port=_free_port())
        sampler = sampler_of(first, late.url, revive_after=0.05)
        stream = sampler.sample(Request(chat(f"problem {n}"), max_tokens=50) for n in itertools.count())
        with caplog.at_level(logging.WARNING):
            next(stream)
            with late:
                deadline = time.monotonic() + 10
                while late.calls < 20 and time.monotonic() < deadline:
                    next(stream)
                assert late.calls >= 20
        assert any("is back" in record.message for record in caplog.records)
        stream.close()


def test_when_all_are_dead_what_was_answered_is_given_out_first():
    server = StubServer()
    sampler = sampler_of(server.__enter__(), NOBODY, retries=2, concurrency=2)
    answered = []

    def ask() -> None:
        for request, _ in sampler.sample(requests(400, 4)):
            answered.append(request.tag)
            if len(answered) == 50:
                server.__exit__()

    with pytest.raises(ConnectionError) as error:
        ask()
    assert 50 <= len(answered) < 400
    assert server.url in str(error.value)
    assert NOBODY in str(error.value)
    assert threads().isdisjoint({"endpoints"})


def test_an_endpoint_that_is_down_is_an_error_before_any_sampling():
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9"):
        sampler_of(NOBODY).check([])


# Context.


def test_check_says_what_the_context_cannot_hold_before_the_first_token():
    with StubServer(max_model_len=1000) as server:
        sampler = sampler_of(server)
        assert sampler.context_length == 1000
        fits = [Request(chat(" word" * 300), seed=seed, max_tokens=690) for seed in range(5)]
        sampler.check(fits)  # 1,500 bytes, but 300 tokens
        with pytest.raises(ValueError, match=r"prompt of 320 tokens and max_tokens=690 need 1010.*context of 1000"):
            sampler.check([*fits, Request(chat(" word" * 320), max_tokens=690)])
        with pytest.raises(ValueError, match="max_tokens=1001"):
            sampler.check([Request(chat("q"), max_tokens=1001)])
        assert server.calls == 0
    with StubServer() as server:
        assert sampler_of(server).context_length is None
        sampler_of(server).check(fits)
        with pytest.raises(ValueError, match="model='other' is not served there; served are stub"):
            EndpointSampler(server.url, "other").check([])


# Secrets.


def test_the_key_is_sent_and_never_shown(caplog, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-mine")
    with StubServer(api_key="sk-secret-of-mine") as server, caplog.at_level(logging.DEBUG):
        sampler = sampler_of(server)
        assert sampled(sampler, requests(1, 1))[0, 0].finish_reason == "stop"
        wrong = sampler_of(server, api_key="sk-another-secret")
        ((_, refused),) = wrong.sample(requests(1, 1))
        assert "401: Incorrect API key provided: Bearer ***" in refused.error
        with pytest.raises(ConnectionError) as error:
            sampler_of("http://me:hidden@127.0.0.1:9/v1").check([])
    assert "hidden" not in str(error.value)
    shown = [repr(sampler), repr(wrong), json.dumps(sampler.identity), refused.to_json(), caplog.text]
    assert not [text for text in shown if "secret" in text or "hidden" in text]


def test_identity_is_that_of_the_model_and_not_of_the_address():
    first = EndpointSampler(["http://a/v1", "http://b/v1"], "m", concurrency=3).identity
    assert EndpointSampler("http://c/v1", "m").identity == first
    assert EndpointSampler("http://a/v1", "m", revision="step 1000").identity != first
    assert EndpointSampler("http://a/v1", "m", extra_body={"top_k": 5}).identity != first


def test_addresses_are_checked():
    for wrong in ("localhost:8000", "ftp://x/v1", ""):
        with pytest.raises(ValueError, match="base_url"):
            EndpointSampler(wrong, "m")
    with pytest.raises(ValueError, match="no base_url"):
        EndpointSampler([], "m")
    with pytest.raises(ValueError, match="concurrency=0"):
        EndpointSampler("http://a/v1", "m", concurrency=0)


def test_retry_after_in_seconds_and_as_a_date():
    assert _retry_after("3") == 3
    assert _retry_after("0.5") == 0.5
    assert 8 < _retry_after(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert _retry_after(formatdate(time.time() - 10, usegmt=True)) == 0
    assert _retry_after("soon") is None
    assert _retry_after(None) is None


def test_retry_after_is_waited_for():
    with StubServer(faults=1.0, kinds=["429"], retry_after=0.5) as server:
        start = time.perf_counter()
        ((_, completion),) = sampler_of(server, retries=2).sample(requests(1, 1))
        assert time.perf_counter() - start > 1.0
        assert server.calls == 3
    assert "429: slow down" in completion.error


# Rendering here.


def test_with_a_tokenizer_chats_are_rendered_here():
    sampler = EndpointSampler("http://a/v1", "m", tokenizer=tiny_tokenizer())
    assert sampler.render(chat("q"), open_thought=True) == "<s><|user|>q\n<|assistant|><think>\n"
    assert EndpointSampler("http://a/v1", "m").render(chat("q"), open_thought=True) == chat("q")


# Log-likelihoods.


def test_scores_come_from_the_echo():
    """The stub's tokens are words with the space before them; the log-probability of one is minus its length / 10."""
    request = Request("one two three ", choices=("four", "eleven twelve", " x"), tag=0)
    with StubServer() as server:
        sampler = sampler_of(server)
        sampler.check([request])
        completion = sampled(sampler, [request])[0]
    assert completion.logprobs == pytest.approx((-0.5, -0.7 - 0.7, -0.3))  # " four"; " eleven", " twelve"; "  x"
    assert completion.choice_tokens == (1, 2, 1)
    assert completion.choice_greedy == (False, False, False)
    assert completion.prompt_tokens == 3


def test_scores_without_echo_are_refused_by_name():
    request = Request("one two", choices=(" three",), tag=0)
    with StubServer(ignores=["echo"]) as server:
        sampler = sampler_of(server)
        with pytest.raises(ValueError, match="does not return the log-probabilities of a prompt"):
            sampler.check([request])
        assert "vLLM" in sampled(sampler, [request])[0].error


# Preflight.


def test_an_honest_server_passes():
    with StubServer() as server:
        for kind in (True, False):
            report = preflight(sampler_of(server), chat=kind)
            assert [one for one in report.findings if one.status != "honoured"] == []
            assert {one.parameter for one in report.findings} == {
                "temperature", "top_p", "seed", "max_tokens", "stop", "n", "logprobs",
            }  # fmt: skip


@pytest.mark.parametrize("lie", ["temperature", "top_p", "seed", "max_tokens", "stop", "n", "logprobs"])
def test_each_lie_is_found(lie):
    with StubServer() as honest, StubServer(ignores=[lie]) as server:
        report = preflight(sampler_of(honest, server))
    (found,) = report.ignored
    assert (found.endpoint, found.parameter, found.status) == (server.url, lie, "ignored")
    assert f"  {lie} ignored: " in str(report)
    assert bool(report.serious) == (lie in ("temperature", "top_p", "max_tokens", "stop"))


def test_a_server_that_is_greedy_whatever_it_is_asked():
    with StubServer(answer=lambda prompt, noise: words_of(prompt, 0)) as server:
        report = preflight(sampler_of(server))
    assert [one.parameter for one in report.serious] == ["temperature"]
    assert "temperature 2 gave 1 in 4; perhaps the server decodes greedily" in str(report)


def test_a_server_that_refuses_is_a_finding():
    with StubServer(api_key="x") as server:
        report = preflight(sampler_of(server, api_key="y"))
    assert report.findings == (Finding(server.url, "requests", "refused", report.findings[0].detail),)
    assert "401" in report.findings[0].detail
    with pytest.raises(ConnectionError):
        preflight(sampler_of(NOBODY, retries=0))


# At size.


def _far_server() -> tuple[subprocess.Popen, str]:
    """A stub in a process of its own, so that the client alone is measured."""
    program = (
        "import sys; from tests.eval.stub_server import StubServer\n"
        "with StubServer(answer=lambda prompt, noise: '42') as server: print(server.url, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


_CLIENT = """
import sys, time
from eval.endpoint_sampler import EndpointSampler
from eval.samplers import Request
url, count = sys.argv[1], int(sys.argv[2])
text = "x" * 500
requests = (
    Request(({"role": "user", "content": f"problem {n} {text}"},), seed=n, max_tokens=10) for n in range(count)
)
begin = time.process_time()
done = sum(completion.text == "42" for _, completion in EndpointSampler(url, "stub").sample(requests))
used = time.process_time() - begin
# Not `ru_maxrss`, which a process inherits from the one that started it.
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(done, used / count * 1000, int(peak) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("count", [5_000, pytest.param(500_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_the_client_adds_less_than_a_millisecond_and_little_memory(count):
    process, url = _far_server()
    try:
        output = subprocess.run(
            [sys.executable, "-c", _CLIENT, url, str(count)], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout
    finally:
        process.communicate("")
    done, milliseconds, mebibytes = (float(value) for value in output.split())
    print(f"{count} requests: {milliseconds:.3f} ms each, {mebibytes:.0f} MiB")
    assert done == count
    assert milliseconds < 1.0
    assert mebibytes < 500


def test_neither_torch_nor_transformers_is_imported():
    program = "import sys; from eval.preflight import preflight; print({'torch', 'transformers'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"


# A second real server.


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("samples", [True, False])
def test_transformers_serve(tmp_path, samples):
    """A real server with known lies: no `stop`, no `n`, no log-probabilities, seeds that do not hold among others, and
    greedy decoding unless the model's own generation config says `do_sample`."""
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"`transformers serve` needs {', '.join(missing)}: pip install 'transformers[serving]'")
    model, tokenizer = tiny_lm(), tiny_tokenizer()
    model.generation_config.do_sample = samples
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    port = _free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path), "--device", "cpu"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log)
    try:
        sampler = EndpointSampler(f"http://127.0.0.1:{port}/v1", str(tmp_path), concurrency=1, first_delay=0.2)
        deadline = time.monotonic() + 120
        while True:
            try:
                sampler.check([])
                break
            except ConnectionError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, "it did not start within two minutes"
                time.sleep(0.5)
        report = preflight(sampler)
        asked = [Request(chat(f"problem {n}"), max_tokens=12, tag=n) for n in range(6)]
        answers = sampled(sampler, asked)
        again = sampled(EndpointSampler(f"http://127.0.0.1:{port}/v1", str(tmp_path), concurrency=4), asked)
    finally:
        process.terminate()
        process.wait()
        log.close()
    print(report)
    ignored = Counter(one.parameter for one in report.ignored)
    assert {"n", "logprobs"} <= set(ignored)
    assert ("temperature" in ignored) == (not samples)
    assert "max_tokens" not in ignored
    from eval.local_sampler import TransformersSampler

    local = TransformersSampler(model, tokenizer)
    here = {
        request.tag: completion
        for request, completion in local.sample(
            [Request(local.render(one.prompt), max_tokens=12, tag=one.tag) for one in asked]
        )
    }
    assert {n: (one.text, one.completion_tokens) for n, one in answers.items()} == {
        n: (one.text, one.completion_tokens) for n, one in here.items()
    }
    assert again == answers
