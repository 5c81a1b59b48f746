"""Sampling from OpenAI-compatible endpoints: vLLM, SGLang, DeepSeek's API, `transformers serve`, any number of them.

    requests (read as places become free) -> own thread and event loop -> one task a request -> completions

A request that fails for a passing reason (429, 5xx, a lost connection, a torn body, no content) is asked again, with
exponential backoff or as the server's Retry-After says; one that fails for good is one failed completion with the
server's words. An endpoint that cannot be reached is left out for a while. Only when none can be reached does the run
end, in ConnectionError, after everything that was answered has been given out.
"""

import asyncio
import copy
import email.utils
import json
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from eval.sample import Completion
from eval.samplers import Message, Request, render_chat

logger = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
STOPPED = frozenset({"stop", "eos", "eos_token", "stop_sequence", "end_turn"})
# The server gave up on the request: vLLM and SGLang, DeepSeek's API.
BROKEN_OFF = frozenset({"abort", "error", "insufficient_system_resource"})
SEEDS = 2**53  # what JSON numbers hold everywhere
FIRST_DELAY, LONGEST_DELAY, LONGEST_RETRY_AFTER = 0.5, 60.0, 600.0
FIND_TIMEOUT = 15.0  # seconds for the list of models: a server that is up answers at once
TEMPLATE_TOKENS = 512  # room for what a server's chat template adds, when a prompt's length is bounded by its bytes

T = TypeVar("T")


class _Retry(Exception):
    """This attempt failed for a reason that may pass."""

    def __init__(self, why: str, after: float | None = None):
        super().__init__(why)
        self.after = after


class _Unreachable(_Retry):
    """No connection to this endpoint."""


class _Refused(Exception):
    """The server will not answer this request, now or later."""


@dataclass(eq=False)
class _Endpoint:
    url: str
    in_flight: int = 0
    dead_until: float = 0.0
    error: str = ""
    models: Mapping[str, Any] | None = None


@dataclass(eq=False)
class _Done:
    """What the loop hands back for one request."""

    request: Request
    completion: Completion | None = None
    error: Exception | None = field(default=None)


class EndpointSampler:
    """Samples from `model` behind one or several base URLs (`http://host:8000/v1`). See `samplers.Sampler`.

    With `tokenizer` (an object with `apply_chat_template`, or a name or folder to load one from), chats are rendered
    here and sent as text to `/completions`: the prompt is then known to the last token, and a thought can be opened.
    Without it, messages go to `/chat/completions` and the server renders them.

    `concurrency` counts requests at a time over all endpoints. `timeout` is that of one attempt, which includes
    the whole answer. `retries` counts attempts after the first. `extra_body` is sent with every request (`top_k`,
    `chat_template_kwargs`, ...); vLLM takes defaults such as `top_k` from the model's generation config unless it is
    told otherwise there. `revision` says which weights the endpoints serve; with another one, no stored sample is
    taken for theirs. The key is that of the environment variable `api_key_env`, unless given; it is never shown.
    """

    def __init__(
        self,
        base_urls: str | Sequence[str],
        model: str,
        *,
        api_key: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 64,
        timeout: float = 1800.0,
        retries: int = 8,
        revive_after: float = 30.0,
        revision: str | None = None,
        tokenizer: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        context_length: int | None = None,
        extra_body: Mapping[str, Any] | None = None,
        first_delay: float = FIRST_DELAY,
    ):
        urls = [base_urls] if isinstance(base_urls, str) else list(base_urls)
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
                raise ValueError(f"base_url={_shown(url)!r} is no address; write http://host:port/v1")
        if not urls:
            raise ValueError("no base_url: name at least one endpoint, as http://host:port/v1")
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency}: at least one request must be allowed at a time")
        self.model, self.revision = model, revision
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.revive_after, self.first_delay = revive_after, first_delay
        self.extra_body = dict(extra_body or {})
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        if isinstance(tokenizer, (str, os.PathLike)):
            from transformers import AutoTokenizer  # slow to import, and only needed here

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.tokenizer = tokenizer
        self._context_length = context_length
        self._endpoints = [_Endpoint(url.rstrip("/")) for url in urls]
        self._key = api_key or os.environ.get(api_key_env, "")

    def __repr__(self) -> str:
        return f"EndpointSampler({list(self.base_urls)}, {self.model!r}, concurrency={self.concurrency})"

    @property
    def base_urls(self) -> tuple[str, ...]:
        """The addresses, without passwords."""
        return tuple(_shown(endpoint.url) for endpoint in self._endpoints)

    def each(self) -> Iterator["EndpointSampler"]:
        """A sampler of each endpoint alone, but for those that `check` could not reach; it asks as this one does, and
        gives up sooner."""
        for endpoint in self._endpoints:
            if endpoint.error:
                continue
            alone = copy.copy(self)
            alone.retries = min(self.retries, 2)
            alone._endpoints = [_Endpoint(endpoint.url)]
            yield alone

    def raw(self, request: Request, extra_body: Mapping[str, Any]) -> dict[str, Any]:
        """The endpoint's own JSON for one request; ValueError if it refuses. For probing."""

        async def ask(session: aiohttp.ClientSession) -> dict[str, Any]:
            for attempt in range(self.retries + 1):
                try:
                    return await self._generate(session, self._endpoints[0], request, extra_body)
                except _Refused as error:
                    raise ValueError(self._clean(str(error))) from None
                except _Retry as error:
                    problem = self._clean(str(error))
                    await asyncio.sleep(min(LONGEST_DELAY, self.first_delay * 2**attempt))
            raise ValueError(problem)

        return self._call(ask)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "sampler": "endpoint/1",
            "model": self.model,
            "revision": self.revision,
            "extra_body": self.extra_body,
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    @property
    def context_length(self) -> int | None:
        """As given, or the smallest `max_model_len` that the endpoints name; None where none does."""
        if self._context_length is None:
            if not any(one.models for one in self._endpoints):
                self._call(self._find)
            lengths = [one.models.get("max_model_len") for one in self._endpoints if one.models]
            self._context_length = min((length for length in lengths if length), default=None)
        return self._context_length

    def render(self, messages: Sequence[Message], *, open_thought: bool = False) -> str | tuple[Message, ...]:
        """The messages themselves, for the server's own template (which opens the thought or does not: R1's does); with
        a tokenizer, the text, which ends in `<think>` if `open_thought` says so."""
        if self.tokenizer is None:
            return tuple(messages)
        return render_chat(self.tokenizer, messages, open_thought, self.chat_template_kwargs)

    def check(self, requests: Iterable[Request]) -> None:
        """Before the first token: ConnectionError if no endpoint answers, ValueError if the model is not served, or if
        prompt and budget exceed the context. Prompts whose bytes would fit are not counted; the others are, by
        the server's tokenizer where it offers one (vLLM), else by ours, else the server must refuse them itself."""
        self._call(self._find)
        served = {endpoint.models["id"] for endpoint in self._endpoints if endpoint.models}
        others = {name for endpoint in self._endpoints if endpoint.models for name in endpoint.models["others"]}
        if others and self.model not in served:
            raise ValueError(f"model={self.model!r} is not served there; served are {', '.join(sorted(others))}")
        context, scored, counted = self.context_length, False, dict[str, int]()
        for request in requests:
            scored |= bool(request.choices)
            budget = max((len(choice.encode()) for choice in request.choices), default=request.max_tokens)
            text = request.prompt if isinstance(request.prompt, str) else json.dumps(request.prompt, default=dict)
            # No token is shorter than a byte.
            if context is None or len(text.encode()) + TEMPLATE_TOKENS + budget <= context:
                continue
            if text not in counted:
                counted = {text: self._count(request.prompt)}  # k samples of a prompt come one after the other
            if counted[text] + budget > context:
                raise ValueError(
                    f"a prompt of {counted[text]} tokens and max_tokens={budget} need {counted[text] + budget}, and "
                    f"{self.model} has a context of {context} there; lower the budget or the number of worked "
                    "examples: nothing is cut to fit"
                )
        if scored:
            ((_, completion),) = self.sample([Request("1 + 1 =", choices=(" 2",))])
            if completion.error:
                raise ValueError(completion.error)

    def _count(self, prompt: str | tuple[Message, ...]) -> int:
        """Tokens of a prompt, at least: 0 where nobody can count them."""
        if self.tokenizer is not None and isinstance(prompt, str):
            return len(self.tokenizer.encode(prompt))
        body = {"prompt": prompt} if isinstance(prompt, str) else {"messages": [dict(message) for message in prompt]}

        async def count(session: aiohttp.ClientSession) -> int:
            url = self._endpoints[0].url.removesuffix("/v1") + "/tokenize"
            try:
                answer = await self._send(session, url, {"model": self.model, **body})
                return int(answer["count"])
            except (_Retry, _Refused, KeyError, TypeError, ValueError):
                return 0

        return self._call(count)

    def sample(self, requests: Iterable[Request | None]) -> Iterator[tuple[Request, Completion]]:
        """Every request with its completion; see `samplers.Sampler.sample`. Also from within a running event loop.

        Raises ConnectionError when no endpoint can be reached any more, after giving out what was answered.
        """
        with _Loop(self._session) as loop:
            done: queue.SimpleQueue[_Done] = queue.SimpleQueue()
            places = asyncio.Semaphore(self.concurrency)

            async def one(request: Request) -> None:
                async with places:
                    try:
                        done.put(_Done(request, await self._ask(loop.session, request)))
                    except Exception as error:  # for the caller, below
                        done.put(_Done(request, error=error))

            source, exhausted, pending = iter(requests), False, 0
            while True:
                # As many again as are being asked wait, so that no place is empty while the caller looks at an answer.
                while not exhausted and pending < 2 * self.concurrency:
                    request = next(source, _END)
                    exhausted = request is _END
                    if request is None:
                        if not pending:
                            raise RuntimeError("`requests` gave None, to wait for a completion, and none is on its way")
                        break
                    if not exhausted:
                        loop.start(one(request))
                        pending += 1
                if not pending:
                    return
                answer = done.get()
                pending -= 1
                if answer.error is not None:
                    while not done.empty():
                        if (other := done.get()).completion is not None:
                            yield other.request, other.completion
                    raise answer.error
                if answer.completion is not None:
                    yield answer.request, answer.completion

    async def _ask(self, session: aiohttp.ClientSession, request: Request) -> Completion:
        """The completion of one request, after as many attempts as it takes."""
        attempt, noise = 0, random.Random(request.seed)
        while True:
            endpoint = self._pick()
            endpoint.in_flight += 1
            problem: _Retry
            try:
                completion = await self._attempt(session, endpoint, request)
                self._reached(endpoint)
                return completion
            except _Refused as error:
                self._reached(endpoint)
                return Completion(finish_reason="failed", error=self._clean(str(error)))
            except _Unreachable as error:
                self._leave_out(endpoint, str(error))
                if any(one.dead_until <= time.monotonic() for one in self._endpoints):
                    continue  # another one is there
                problem = error
            except _Retry as error:
                self._reached(endpoint)
                problem = error
            finally:
                endpoint.in_flight -= 1
            if attempt == self.retries:
                break
            delay = min(LONGEST_DELAY, self.first_delay * 2**attempt) * (0.5 + noise.random() / 2)
            attempt += 1
            await asyncio.sleep(max(delay, min(problem.after or 0.0, LONGEST_RETRY_AFTER)))
        if all(one.error for one in self._endpoints):
            raise ConnectionError(self._clean("; ".join(one.error for one in self._endpoints)))
        return Completion(finish_reason="failed", error=self._clean(f"{problem} (attempt {attempt + 1}, the last)"))

    def _pick(self) -> _Endpoint:
        """The endpoint with the fewest requests of those that answer; if none does, the one left out longest ago."""
        now = time.monotonic()
        alive = [one for one in self._endpoints if one.dead_until <= now]
        if not alive:
            return min(self._endpoints, key=lambda one: (one.dead_until, one.in_flight))
        endpoint = min(alive, key=lambda one: one.in_flight)
        if endpoint.error:
            endpoint.dead_until = now + self.revive_after  # this one request finds out whether it is back
        return endpoint

    def _reached(self, endpoint: _Endpoint) -> None:
        if endpoint.error:
            logger.warning("%s is back", _shown(endpoint.url))
        endpoint.error, endpoint.dead_until = "", 0.0

    def _leave_out(self, endpoint: _Endpoint, error: str) -> None:
        if not endpoint.error:
            logger.warning("left out for %g s: %s", self.revive_after, self._clean(error))
        endpoint.error, endpoint.dead_until = error, time.monotonic() + self.revive_after

    async def _attempt(self, session: aiohttp.ClientSession, endpoint: _Endpoint, request: Request) -> Completion:
        if request.choices:
            return await self._score(session, endpoint, request)
        return _completion(await self._generate(session, endpoint, request), not isinstance(request.prompt, str))

    async def _generate(
        self,
        session: aiohttp.ClientSession,
        endpoint: _Endpoint,
        request: Request,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        body = self._body(request) | {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed % SEEDS,
            **({"stop": list(request.stop)} if request.stop else {}),
            **self.extra_body,
            **(extra or {}),
        }
        path = "/completions" if isinstance(request.prompt, str) else "/chat/completions"
        return await self._send(session, endpoint.url + path, body)

    def _body(self, request: Request) -> dict[str, Any]:
        if isinstance(request.prompt, str):
            return {"model": self.model, "prompt": request.prompt, "stream": False}
        messages = [dict(message) for message in request.prompt]
        body: dict[str, Any] = {"model": self.model, "messages": messages, "stream": False}
        if self.chat_template_kwargs:
            body["chat_template_kwargs"] = self.chat_template_kwargs
        return body

    async def _send(self, session: aiohttp.ClientSession, url: str, body: Any) -> dict[str, Any]:
        """The JSON object that the endpoint answers. Raises _Retry, _Unreachable or _Refused."""
        # An address with user and password says itself how to get in.
        headers = {"Authorization": f"Bearer {self._key}"} if self._key and not urlsplit(url).username else {}
        try:
            async with session.request("GET" if body is None else "POST", url, json=body, headers=headers) as response:
                raw = await response.read()
                status, after = response.status, _retry_after(response.headers.get("Retry-After"))
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as error:
            # Only the connection: `sock_connect` is the one socket timeout that is set.
            why = getattr(error, "os_error", error)  # without aiohttp's words on TLS
            raise _Unreachable(f"{_shown(url)} cannot be reached: {why}") from error
        except TimeoutError as error:
            raise _Retry(f"{_shown(url)} gave no answer within timeout={self.timeout:g} s") from error
        except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise _Retry(f"{_shown(url)} broke off: {type(error).__name__}: {error}") from error
        if status in RETRIED_STATUSES or status >= 500:
            raise _Retry(f"{_shown(url)} answered {status}: {_message(raw)}", after)
        if status >= 400:
            raise _Refused(f"{_shown(url)} answered {status}: {_message(raw)}")
        try:
            answer = json.loads(raw)
        except ValueError as error:
            raise _Retry(f"{_shown(url)} answered no valid JSON: {raw[:80]!r}") from error
        if not isinstance(answer, dict):
            raise _Retry(f"{_shown(url)} answered {type(answer).__name__}, not an object")
        if "error" in answer and "choices" not in answer:  # some proxies answer 200
            raise _Retry(f"{_shown(url)} answered an error: {_message(raw)}")
        return answer

    async def _score(self, session: aiohttp.ClientSession, endpoint: _Endpoint, request: Request) -> Completion:
        """Log-probabilities through `/completions` with `echo`: vLLM and SGLang have it, chat APIs do not."""
        if not isinstance(request.prompt, str):
            raise _Refused("choices can only follow a prompt of text; endpoints score no chat. Give `tokenizer`")
        # As lm-eval has it: the choice's tokens are those after as many as the prompt alone has, stripped at its end.
        context = request.prompt.rstrip()
        if not context:
            raise _Refused(
                "choices can only follow a prompt that is not empty: nothing precedes their first token there"
            )
        before, _ = await self._echo(session, endpoint, request, context)
        scores = []
        for choice in request.choices:
            total, logprobs = await self._echo(session, endpoint, request, request.prompt + choice)
            values, tokens, top = (
                logprobs[name][before:total] for name in ("token_logprobs", "tokens", "top_logprobs")
            )
            if not values or None in values:
                raise _Refused(f"the choice {choice!r} has no token of its own after its prompt; nothing can be scored")
            greedy = all(token == max(likely, key=likely.get) for token, likely in zip(tokens, top, strict=True))
            scores.append((sum(values), len(values), greedy))
        return Completion(
            prompt_tokens=before,
            logprobs=tuple(score[0] for score in scores),
            choice_tokens=tuple(score[1] for score in scores),
            choice_greedy=tuple(score[2] for score in scores),
        )

    async def _echo(
        self, session: aiohttp.ClientSession, endpoint: _Endpoint, request: Request, text: str
    ) -> tuple[int, dict[str, list]]:
        """The number of tokens of a text, and their log-probabilities as the server returns them."""
        asked = {"prompt": text, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        answer = await self._send(session, endpoint.url + "/completions", self._body(request) | self.extra_body | asked)
        try:
            logprobs, total = answer["choices"][0]["logprobs"], answer["usage"]["prompt_tokens"]
            if min(len(logprobs[name]) for name in ("token_logprobs", "tokens", "top_logprobs")) < total:
                raise ValueError("fewer log-probabilities than tokens")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _Refused(
                f"{_shown(endpoint.url)} does not return the log-probabilities of a prompt (`echo` with `logprobs` on "
                "/completions, as vLLM does), which multiple choice by perplexity needs: serve the model by vLLM, run "
                "it in this process, or take a protocol that generates"
            ) from error
        return total, logprobs

    async def _find(self, session: aiohttp.ClientSession) -> None:
        """Asks every endpoint for its models. ConnectionError if none answers at all."""

        async def one(endpoint: _Endpoint) -> None:
            try:
                answer = await asyncio.wait_for(self._send(session, endpoint.url + "/models", None), FIND_TIMEOUT)
            except TimeoutError:
                self._leave_out(endpoint, f"{_shown(endpoint.url)} gave no answer within {FIND_TIMEOUT:g} s")
                return
            except _Unreachable as error:
                self._leave_out(endpoint, str(error))
                return
            except (_Retry, _Refused):
                return  # it is there, and does not say what it serves
            entries = answer.get("data")
            entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
            mine: dict[str, Any] = next((entry for entry in entries if entry.get("id") == self.model), {})
            others = [str(entry.get("id")) for entry in entries]
            endpoint.error, endpoint.models = "", {**mine, "id": mine.get("id"), "others": others}

        await asyncio.gather(*(one(endpoint) for endpoint in self._endpoints))
        if all(endpoint.error for endpoint in self._endpoints):
            raise ConnectionError(self._clean("; ".join(endpoint.error for endpoint in self._endpoints)))

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self.timeout, sock_connect=min(10.0, self.timeout)),
            connector=aiohttp.TCPConnector(limit=0),
        )

    def _call(self, work: Callable[[aiohttp.ClientSession], Coroutine[Any, Any, T]]) -> T:
        """Runs one coroutine in a loop of its own."""
        with _Loop(self._session) as loop:
            return loop.run(work(loop.session))

    def _clean(self, text: str) -> str:
        """No key in what is shown or stored, whatever a server or proxy repeats of it."""
        for secret in (self._key, *(urlsplit(one.url).password for one in self._endpoints)):
            if secret:
                text = text.replace(secret, "***")
        return text


_END: Any = object()


class _Loop:
    """An event loop in a thread of its own, so that callers may have one too. Leaving it cancels what is left."""

    def __init__(self, session: Any):
        self._make_session, self._ready = session, threading.Event()
        self._tasks: set[asyncio.Task] = set()
        self.session: Any = None

    def __enter__(self) -> "_Loop":
        self._thread = threading.Thread(target=asyncio.run, args=(self._main(),), name="endpoints", daemon=True)
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self._make_session() as self.session:
            self._ready.set()
            await self._stop.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        self._loop.call_soon_threadsafe(self._start, work)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _completion(answer: Mapping[str, Any], chat: bool) -> Completion:
    """The completion in an answer. Raises _Retry where there is none, _Refused where there will be none."""
    try:
        choice = answer["choices"][0]
        finish = choice.get("finish_reason")
        message = choice["message"] if chat else {"content": choice["text"]}
        text, reasoning = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
        usage = answer.get("usage") or {}
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Retry(f"the answer has no choice with a text: {str(answer)[:200]}") from error
    if finish in BROKEN_OFF or finish is None:
        raise _Retry(f"the server broke off with finish_reason={finish!r}")
    if finish != "length" and finish not in STOPPED:
        raise _Refused(f"the server ended with finish_reason={finish!r}")
    if text is None and not reasoning:
        raise _Retry("the answer's content is null")
    if not isinstance(text, str | None) or not isinstance(reasoning, str | None):
        raise _Retry(f"the answer's content is no text: {str(message)[:200]}")
    # No content beside a thought is a thought that the budget cut, or that was never closed: an answer as it came.
    return Completion(
        text=text or "",
        reasoning=reasoning or None,
        finish_reason="length" if finish == "length" else "stop",
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
    )


def _message(raw: bytes) -> str:
    """What an error's body says, in one line."""
    try:
        body = json.loads(raw)
    except ValueError:
        body = raw.decode(errors="replace")
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    return " ".join(str(body).split())[:500]


def _retry_after(value: str | None) -> float | None:
    """Seconds from now, of a header in seconds or as a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _shown(url: str) -> str:
    """An address without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))
