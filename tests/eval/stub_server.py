"""An OpenAI-compatible server whose answers are a function of prompt and seed, honest or not, with faults on demand.

    with StubServer() as server:
        EndpointSampler(server.url, server.model)

A token is a word with the space before it. The server runs in a thread of its own; `calls` counts requests that were
sent, `answered` those that got an answer.
"""

import asyncio
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection
from email.utils import formatdate
from typing import Any

from aiohttp import web

FAULTS = ("429", "429 date", "500", "null", "no choices", "torn", "invalid", "disconnect", "slow")
WORDS = ["so", "then", "if", "we", "take", "half", "of", "it", "and", "add", "seven", "the", "sum", "is", "less", "but"]


def _number(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def words_of(prompt: str, noise: object) -> str:
    """Between 8 and 40 words for a prompt and its noise, ending in a boxed number."""
    state = _number(prompt, noise)
    count = 8 + state % 33
    return " ".join(WORDS[_number(state, index) % len(WORDS)] for index in range(count)) + f" \\boxed{{{state % 100}}}"


class StubServer:
    """`answer(prompt, noise)` gives the whole text; `noise` is the seed, 0 at temperature 0. The prompt of a chat is
    the content of its last message. `faults` of all calls fail, in the `kinds` named; which ones depends on prompt,
    seed and number of the attempt. `broken` prompts always answer 500. What is in `ignores` (temperature, top_p, n,
    seed, max_tokens, stop, logprobs, echo) is ignored. `reasoning` names a field that takes what stands before
    `</think>`.
    """

    def __init__(
        self,
        *,
        answer: Callable[[str, int], str] = words_of,
        faults: float = 0.0,
        kinds: Collection[str] = FAULTS,
        broken: Collection[str] = (),
        ignores: Collection[str] = (),
        delay: float = 0.0,
        slow: float = 30.0,
        retry_after: float = 0.01,
        max_model_len: int | None = None,
        api_key: str = "",
        reasoning: str = "",
        model: str = "stub",
        port: int = 0,
    ):
        self.answer, self.faults, self.kinds = answer, faults, tuple(kinds)
        self.broken, self.ignores = frozenset(broken), frozenset(ignores)
        self.delay, self.slow, self.retry_after = delay, slow, retry_after
        self.max_model_len, self.api_key, self.reasoning, self.model = max_model_len, api_key, reasoning, model
        self.calls, self.answered, self.in_flight, self.most_in_flight = 0, 0, 0, 0
        self.asked: Counter[tuple[str, int]] = Counter()  # (prompt, seed): how often
        self.bodies: list[dict[str, Any]] = []  # the last 1,000
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "StubServer":
        self._loop, started = asyncio.new_event_loop(), threading.Event()

        async def start() -> None:
            app = web.Application()
            app.router.add_get("/v1/models", self._models)
            app.router.add_post("/v1/chat/completions", self._complete)
            app.router.add_post("/v1/completions", self._complete)
            app.router.add_post("/tokenize", self._tokenize)
            self._runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
            await site.start()
            self.port = self._runner.addresses[0][1]

        async def stop() -> None:
            await self._runner.cleanup()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        def serve() -> None:
            self._loop.run_until_complete(start())
            self._loop.call_soon(started.set)  # only a loop that runs can be stopped
            self._loop.run_forever()
            self._loop.run_until_complete(stop())
            self._loop.close()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        if not started.wait(10):
            raise RuntimeError("the stub server did not start")
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _models(self, request: web.Request) -> web.Response:
        entry = {"id": self.model, "object": "model"}
        if self.max_model_len:
            entry["max_model_len"] = self.max_model_len  # type: ignore[assignment]  # a number among texts
        return web.json_response({"object": "list", "data": [entry]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"count": len(_tokens(_prompt(body))), "max_model_len": self.max_model_len})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.calls += 1
        self.bodies = [*self.bodies[-999:], body]
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            shown = request.headers.get("Authorization", "")
            return _error(401, f"Incorrect API key provided: {shown}")
        prompt, seed = _prompt(body), body.get("seed") or 0
        self.asked[prompt, seed] += 1
        attempt = self.asked[prompt, seed]
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay)
            if prompt in self.broken:
                return _error(500, "this prompt never works")
            tokens = len(_tokens(prompt))
            if self.max_model_len and tokens + body["max_tokens"] > self.max_model_len:
                return _error(
                    400,
                    f"This model's maximum context length is {self.max_model_len} tokens. However, you requested "
                    f"{tokens + body['max_tokens']} tokens. Please reduce the length of the messages or completion.",
                )
            if _number("fault", prompt, seed, attempt) % 10_000 < self.faults * 10_000:
                kind = self.kinds[_number("kind", prompt, seed, attempt) % len(self.kinds)]
                return await self._fault(request, kind, body)
            self.answered += 1
            return web.json_response(self._answer(body, "messages" in body))
        finally:
            self.in_flight -= 1

    async def _fault(self, request: web.Request, kind: str, body: dict[str, Any]) -> web.StreamResponse:
        if kind == "429":
            return _error(429, "slow down", {"Retry-After": str(self.retry_after)})
        if kind == "429 date":
            return _error(429, "slow down", {"Retry-After": formatdate(usegmt=True)})
        if kind == "500":
            return _error(500, "internal error")
        whole = self._answer(body, "messages" in body)
        if kind == "null":
            choice = whole["choices"][0]
            if "message" in choice:
                choice["message"] = {"role": "assistant", "content": None}
            else:
                choice["text"] = None
            return web.json_response(whole)
        if kind == "no choices":
            return web.json_response({**whole, "choices": []})
        raw = json.dumps(whole).encode()
        if kind == "invalid":
            return web.Response(body=raw[: len(raw) // 2], content_type="application/json")
        if kind == "torn":
            response = web.StreamResponse(headers={"Content-Length": str(len(raw)), "Content-Type": "application/json"})
            await response.prepare(request)
            await response.write(raw[: len(raw) // 2])
        if kind == "slow":
            await asyncio.sleep(self.slow)
        if request.transport is not None:
            request.transport.close()
        return web.Response()

    def _answer(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        prompt = _prompt(body)
        if body.get("echo") and "echo" not in self.ignores:
            return self._echo(prompt, body)
        count = 1 if "n" in self.ignores else body.get("n") or 1
        choices, used = [], 0
        for index in range(count):
            text, finish = self._text(prompt, body, index)
            used += len(_tokens(text))
            choice: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
            if body.get("logprobs") and "logprobs" not in self.ignores:
                choice["logprobs"] = {"content": [{"token": token, "logprob": -1.0} for token in _tokens(text)]}
            if chat:
                message: dict[str, Any] = {"role": "assistant", "content": text}
                if self.reasoning:
                    thought, closed, rest = text.partition("</think>")
                    message |= {self.reasoning: thought, "content": rest if closed else None}
                choice["message"] = message
            else:
                choice["text"] = text
            choices.append(choice)
        before = len(_tokens(prompt))
        usage = {"prompt_tokens": before, "completion_tokens": used, "total_tokens": before + used}
        return {"id": "stub", "object": "completion", "model": self.model, "choices": choices, "usage": usage}

    def _text(self, prompt: str, body: dict[str, Any], index: int) -> tuple[str, str]:
        temperature = 1.0 if "temperature" in self.ignores else body.get("temperature", 1.0)
        narrow = body.get("top_p", 1.0) < 0.01 and "top_p" not in self.ignores
        seed = body.get("seed") or 0
        if "seed" in self.ignores:
            seed = self.calls
        text = self.answer(prompt, (seed + index) if temperature > 0 and not narrow else 0)
        tokens = _tokens(text)
        finish = "stop"
        if "max_tokens" not in self.ignores and len(tokens) > body["max_tokens"]:
            text, finish = "".join(tokens[: body["max_tokens"]]), "length"
        stops = [] if "stop" in self.ignores else body.get("stop") or []
        found = [at for stop in ([stops] if isinstance(stops, str) else stops) if (at := text.find(stop)) >= 0]
        return (text[: min(found)], "stop") if found else (text, finish)

    def _echo(self, text: str, body: dict[str, Any]) -> dict[str, Any]:
        """Each token's log-probability is minus its length over ten; the likeliest token is the one that stands there,
        if it has an even length."""
        tokens = _tokens(text)
        values: list[float | None] = [None, *(-len(token) / 10 for token in tokens[1:])]
        top: list[dict[str, float] | None] = [None]
        for token in tokens[1:]:
            best = -len(token) / 10 if len(token) % 2 == 0 else -len(token) / 10 - 1
            top.append({token: best, "other": -len(token) / 10 - 0.5})
        written = [" and"] * body["max_tokens"]
        logprobs = {
            "tokens": tokens + written,
            "token_logprobs": values + [-0.5 for _ in written],
            "top_logprobs": [*top, *({token: -0.5} for token in written)],
        }
        choice = {"index": 0, "text": text + "".join(written), "logprobs": logprobs, "finish_reason": "length"}
        return {"choices": [choice], "usage": {"prompt_tokens": len(tokens), "completion_tokens": len(written)}}


def _prompt(body: dict[str, Any]) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


def _tokens(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "stub"}}, status=status, headers=headers)
