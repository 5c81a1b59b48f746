"""Sampling and log-likelihoods from a transformers model in this process.

The same request gives the same sample whatever the batch size, the order, the limit or the run: its noise comes from
its own seed. That holds as long as the logits themselves do not depend on the batch. In float32 they differ by about
1e-6 between batch sizes, which changes a token once in a million draws or so; kernels in bfloat16 differ by far more,
and two batch sizes then give two samples of the same distribution.

Nothing is ever cut to fit. Sampling parameters come from the request alone: of the model's generation config only the
end-of-text tokens are read, no `top_k` and no `repetition_penalty`, which published protocols do not know.
"""

import hashlib
import json
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modeling_deepseek  # noqa: F401  # the Auto classes give our models from here on
from eval.decoding import Prefill, choose, rows_for
from eval.sample import Completion, FinishReason
from eval.samplers import Message, Request, render_chat
from eval.thinking import CLOSE, OPEN

MAX_LOGITS = 2**27  # values of the logits of one forward pass that scores long continuations: 512 MiB in float32
WEIGHTS = ("*.json", "*.safetensors", "*.bin", "*.jinja", "*.model", "*.txt")


@dataclass(slots=True, eq=False)
class _Row:
    """One request on its way: its prompt's tokens, and those written so far."""

    request: Request
    prompt: tuple[int, ...]
    stop_ids: frozenset[int] = frozenset()
    continuations: tuple[tuple[int, ...], ...] = ()
    tokens: list[int] = field(default_factory=list)
    noise: random.Random = field(default_factory=random.Random)

    def restart(self) -> None:
        # Python's own generator: defined bit by bit, on every machine and device, and free to make.
        self.tokens, self.noise = [], random.Random(self.request.seed)


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability of a continuation, its number of tokens, and whether greedy decoding would write it."""

    logprob: float
    tokens: int
    greedy: bool


_Key = tuple[int, tuple[int, ...]]  # a continuation, after the prompt at this place in its group


class TransformersSampler:
    """Samples from `model`, up to `batch_size` completions at a time. See `samplers.Sampler`.

    Requests are read `window` at a time, sorted by length, longest first, and those that begin alike stand together:
    worked examples that several prompts share, and the prompt of k samples, run once. A completion that is done leaves
    its place to the next. `prefill_tokens` bounds the prompt tokens of one forward pass. Out of memory on a GPU halves
    what is in flight and goes on. `name` stands for the model in reports and in `identity`.

    `identity` holds the hash of the weights themselves unless the model came from the Hub at a known commit: a
    checkpoint trained further at the same path is another model. Read it once; hashing takes a second or so per GB.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
        window: int | None = None,
        prefill_tokens: int = 8192,
        context_length: int | None = None,
        name: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: at least one completion must fit")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.window, self.prefill_tokens = batch_size, window or 16 * batch_size, prefill_tokens
        self.name = name or model.name_or_path or type(model).__name__
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.context_length: int | None = context_length or getattr(
            model.config.get_text_config(), "max_position_embeddings", None
        )
        self._weights: dict[str, Any] | None = None
        self._limit = batch_size  # falls when memory runs out
        # k samples of a prompt come one after the other, and so do the questions behind the same worked examples.
        self._encode_cached = lru_cache(maxsize=256)(self._encode)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> "TransformersSampler":
        """A model and its tokenizer from a folder or the Hub; `options` are those of the class. ValueError where it
        cannot be loaded."""
        where = dict(revision=revision or "main", trust_remote_code=trust_remote_code)
        if device_map is None and torch.cuda.is_available():
            device_map = "auto"
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, **where)
            loaded = AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype, device_map=device_map, **where, **(model_kwargs or {})
            )
        except (OSError, ValueError) as error:  # some of transformers' messages do not name what was to be loaded
            raise ValueError(f"the model {str(model)!r} cannot be loaded: {error}") from error
        sampler = cls(loaded, tokenizer, **{"name": str(model), **options})
        commit = getattr(loaded.config, "_commit_hash", None)
        if Path(model).is_dir():
            sampler._weights = {"files": hash_files(Path(model))}
        elif commit:
            sampler._weights = {"revision": commit}
        return sampler

    @property
    def identity(self) -> dict[str, Any]:
        template = self.tokenizer.chat_template
        return {
            "sampler": "transformers/1",
            "model": self.name,
            "weights": self._weights or {"tensors": hash_tensors(self.model)},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "tokenizer": _hash(_vocabulary(self.tokenizer)),
            "chat_template": _hash(json.dumps([template, self.chat_template_kwargs], sort_keys=True)),
            "eos_token_id": sorted(self._eos),
        }

    @cached_property
    def _eos(self) -> frozenset[int]:
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        if eos is None:
            eos = self.tokenizer.eos_token_id
        return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)

    @cached_property
    def _special(self) -> dict[str, int]:
        """Special tokens, which no text shows. A tokenizer may call the tags of a thought special: they are text."""
        added = self.tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
        texts = self.tokenizer.convert_ids_to_tokens(sorted(special))
        return {text: number for text, number in zip(texts, sorted(special), strict=True) if text not in (OPEN, CLOSE)}

    @cached_property
    def _hidden(self) -> frozenset[int]:
        return frozenset(self._special.values()) | self._eos

    def render(self, messages: Sequence[Message], *, open_thought: bool = False) -> str:
        """The chat template's text, ready for the reply, which begins in `<think>` if `open_thought` says so.

        Raises ValueError where the tokenizer has no chat template.
        """
        return render_chat(self.tokenizer, messages, open_thought, self.chat_template_kwargs)

    def check(self, requests: Iterable[Request]) -> None:
        """ValueError for the first request that the context cannot hold."""
        for request in requests:
            if problem := self._too_long(self._row(request)):
                raise ValueError(problem)

    def _too_long(self, row: _Row) -> str | None:
        budget = max(map(len, row.continuations)) if row.continuations else row.request.max_tokens
        total = len(row.prompt) + budget
        if self.context_length is None or total <= self.context_length:
            return None
        what = "a longest choice of " if row.continuations else "max_tokens="
        return (
            f"a prompt of {len(row.prompt)} tokens and {what}{budget} need {total}, and the context of {self.name} "
            f"has context_length={self.context_length}; lower the budget or the number of worked examples: nothing is "
            "cut to fit"
        )

    def sample(self, requests: Iterable[Request | None]) -> Iterator[tuple[Request, Completion]]:
        """Every request with its completion; see `samplers.Sampler.sample`."""
        training = self.model.training
        self.model.eval()
        try:
            yield from _Run(self, iter(requests)).completions()
        finally:
            self.model.train(training)

    def score(self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """The score of each pair of tokens, context and continuation."""
        rows = [
            _Row(Request("", choices=("",)), tuple(context), continuations=(tuple(more),)) for context, more in pairs
        ]
        scores: dict[int, Score] = {}
        training = self.model.training
        self.model.eval()
        try:
            for row, (score,) in _Scoring(self).scored(rows):
                scores[id(row)] = score
        finally:
            self.model.train(training)
        return [scores[id(row)] for row in rows]

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt; no second beginning-of-text where a chat template wrote the first."""
        bos = self.tokenizer.bos_token
        return self.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.encode(text))

    def _row(self, request: Request) -> _Row:
        prompt = request.prompt if isinstance(request.prompt, str) else self.render(request.prompt)
        if request.choices:
            context, continuations = self._pairs(prompt, request.choices)
            return _Row(request, context, continuations=continuations)
        tokens = self._encode_cached(prompt)
        # A special token as a stop string never shows in the text.
        stop_ids = {self._special[stop] for stop in request.stop if stop in self._special}
        row = _Row(request, tokens or (self.prefix_token,), frozenset(stop_ids) | self._eos)
        row.restart()
        return row

    @property
    def prefix_token(self) -> int:
        """What stands before an empty prompt."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError(f"an empty prompt needs a token to begin with, and {self.name} has neither bos nor eos")

    def _pairs(self, prompt: str, choices: Sequence[str]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Tokens of the prompt and of each choice after it, cut as lm-eval cuts them: spaces at the end of the prompt
        go to the choice, prompt and choice are encoded as one text, and what follows the prompt's own length is the
        choice."""
        if not prompt:
            prefix = (self.prefix_token,)
            encoded = [tuple(self.tokenizer.encode(choice, add_special_tokens=False)) for choice in choices]
            # A choice that begins with that token itself is not asked to predict it twice.
            return prefix, tuple(tokens[1:] if tokens[:1] == prefix else tokens for tokens in encoded)
        context = prompt.rstrip()
        spaces = prompt[len(context) :]
        tokens = self._encode_cached(context)
        whole = self.tokenizer(
            [context + spaces + choice for choice in choices], add_special_tokens=not self._has_bos(context)
        ).input_ids
        continuations = tuple(tuple(one[len(tokens) :]) for one in whole)
        if not all(continuations):
            empty = choices[continuations.index(())]
            raise ValueError(f"the choice {empty!r} has no token of its own after its prompt; nothing can be scored")
        return tokens or (self.prefix_token,), continuations

    def _has_bos(self, text: str) -> bool:
        return bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of completion tokens, without special ones."""
        shown = [token for token in tokens if token not in self._hidden]
        text = self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class _Run:
    """One call of `sample`: what waits, what is prefilled, what is in flight."""

    def __init__(self, sampler: TransformersSampler, requests: Iterator[Request | None]):
        self.sampler, self.requests = sampler, requests
        self.cache = rows_for(sampler.model)
        self.prefill = Prefill(sampler.model, self.cache.ragged)
        self.waiting: deque[_Row] = deque()
        self.ready: deque[tuple[_Row, tuple[Any, int, int]]] = deque()  # prefilled, first token chosen
        self.rows: list[_Row] = []  # in flight, in the order of the cache
        self.scoring: _Scoring | None = None
        self.exhausted = False

    def completions(self) -> Iterator[tuple[Request, Completion]]:
        asked = False  # since the last completion
        while True:
            if not self.waiting and not self.exhausted:
                for out in self.read_window():
                    asked = False
                    yield out
                if not (self.waiting or self.ready or self.rows or self.exhausted):
                    if asked:
                        raise RuntimeError("`requests` gave None, to wait for a completion, and none is on its way")
                    asked = True
                    continue
            if not (self.waiting or self.ready or self.rows):
                return
            for out in self.advance():
                asked = False
                yield out

    def read_window(self) -> Iterator[tuple[Request, Completion]]:
        rows: list[_Row] = []
        scoring: list[_Row] = []
        while len(rows) + len(scoring) < self.sampler.window:
            try:
                request = next(self.requests)
            except StopIteration:
                self.exhausted = True
                break
            if request is None:
                break
            try:
                row = self.sampler._row(request)
            except ValueError as error:
                yield request, _failed(str(error))
                continue
            if problem := self.sampler._too_long(row):
                yield request, _failed(problem)
            else:
                (scoring if request.choices else rows).append(row)
        self.waiting.extend(_in_order(rows))
        if scoring:
            self.scoring = self.scoring or _Scoring(self.sampler)
            for row, scores in self.scoring.scored(scoring):
                yield row.request, _scored_completion(row, scores)

    @torch.no_grad()
    def advance(self) -> list[tuple[Request, Completion]]:
        """One more token for every row in flight, or the prefill of new ones."""
        done: list[tuple[Request, Completion]] = []
        try:
            room = self.sampler._limit - len(self.rows)
            if self.waiting and not self.ready and (self.rows == [] or (self.cache.ragged and room >= self.patience)):
                done += self.start(room)
            if self.ready and (self.cache.ragged or not self.rows):
                new = [self.ready.popleft() for _ in range(min(room, len(self.ready)))]
                self.rows += [row for row, _ in new]
                self.cache.admit([source for _, source in new])
            if self.rows:
                logits = self.cache.forward([row.tokens[-1:] for row in self.rows])[:, -1]
                self.cache.commit()
                alive = self.take(self.rows, logits, done)
                for index in range(len(self.rows) - 1, -1, -1):
                    if not alive[index]:
                        self.cache.drop(index)
                        self.rows[index] = self.rows[-1]
                        self.rows.pop()
        except torch.OutOfMemoryError:
            done += self.retreat()
        return done

    @property
    def patience(self) -> int:
        """Free places that are waited for, so that prompts are prefilled together."""
        return max(1, self.sampler._limit // 4)

    def start(self, room: int) -> list[tuple[Request, Completion]]:
        """Prefills the next prompts, each once for all of its samples, and chooses their first tokens."""
        done: list[tuple[Request, Completion]] = []
        group = _next_group(self.waiting, room, self.sampler.prefill_tokens, self.cache.ragged)
        prompts = list(dict.fromkeys(row.prompt for row in group))
        try:
            filled, logits = self.prefill(prompts)
        except torch.OutOfMemoryError:
            self.release()
            if len(prompts) > 1:
                self.sampler.prefill_tokens = max(1, len(prompts) * max(map(len, prompts)) // 2)
            elif self.rows:
                self.sampler._limit = len(self.rows)  # wait for them
            else:
                error = f"out of memory for a prompt of {len(prompts[0])} tokens, alone"
                return [(row.request, _failed(error, row)) for row in group]
            self.waiting.extendleft(reversed(group))
            return done
        indices = {prompt: index for index, prompt in enumerate(prompts)}
        chosen = [indices[row.prompt] for row in group]
        alive = self.take(group, logits[torch.tensor(chosen)], done)
        self.ready.extend(
            (row, (filled, index, len(row.prompt)))
            for row, index, goes_on in zip(group, chosen, alive, strict=True)
            if goes_on
        )
        return done

    def take(self, rows: list[_Row], logits: torch.Tensor, done: list[tuple[Request, Completion]]) -> list[bool]:
        """Chooses the next token of each row; returns which rows go on, and adds the others to `done`."""
        requests = [row.request for row in rows]
        tokens = choose(
            logits,
            [request.temperature for request in requests],
            [request.top_p for request in requests],
            [row.noise.random() for row in rows],
        )
        alive = []
        for row, token in zip(rows, tokens, strict=True):
            completion = self.grown(row, token)
            alive.append(completion is None)
            if completion is not None:
                done.append((row.request, completion))
        return alive

    def grown(self, row: _Row, token: int) -> Completion | None:
        """The completion, if `token` ends it."""
        if token < 0:
            return _failed(f"the logits after {len(row.tokens)} tokens hold NaN or infinity", row)
        row.tokens.append(token)
        if token in row.stop_ids:
            return self.ended(row, row.tokens[:-1], "stop")
        if row.request.stop and (text := self.cut_at_stop(row)) is not None:
            return self.ended(row, text, "stop")
        if len(row.tokens) >= row.request.max_tokens:
            return self.ended(row, row.tokens, "length")
        return None

    def cut_at_stop(self, row: _Row) -> str | None:
        """The text before the first stop string, if there is one."""
        stops = row.request.stop
        # A stop string that the last token completes lies within as many tokens as it has bytes; a few more, since the
        # first token of a piece may lose its space. Only if it is there is the whole text decoded.
        tail = self.sampler.decode(row.tokens[-(max(len(stop.encode()) for stop in stops) + 4) :])
        if not any(stop in tail for stop in stops):
            return None
        text = self.sampler.decode(row.tokens)
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        return text[: min(found)] if found else None

    def ended(self, row: _Row, shown: list[int] | str, reason: FinishReason) -> Completion:
        return Completion(
            text=shown if isinstance(shown, str) else self.sampler.decode(shown),
            finish_reason=reason,
            prompt_tokens=len(row.prompt),
            completion_tokens=len(row.tokens),
        )

    def retreat(self) -> list[tuple[Request, Completion]]:
        """Memory ran out: half of the rows go on, the others begin again later, with the same noise and so the same
        text."""
        done: list[tuple[Request, Completion]] = []
        half = len(self.rows) // 2
        if len(self.rows) == 1 and not self.ready:
            (row,) = self.rows
            done = [(row.request, _failed(f"out of memory after {len(row.tokens)} tokens, alone", row))]
        self.sampler._limit = max(1, half)
        kept = self.cache.shrink(half)
        again = [] if done else self.rows[kept:]
        again += [row for row, _ in self.ready]
        del self.rows[kept:]
        self.ready.clear()
        for row in again:
            row.restart()
        self.waiting.extendleft(reversed(_in_order(again)))
        self.release()
        return done

    def release(self) -> None:
        self.prefill.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Scoring:
    """Log-probabilities of continuations."""

    def __init__(self, sampler: TransformersSampler):
        self.sampler = sampler
        self.cache = rows_for(sampler.model)
        self.prefill = Prefill(sampler.model, self.cache.ragged)

    def scored(self, rows: list[_Row]) -> Iterator[tuple[_Row, list[Score]]]:
        """Each row with the scores of its continuations."""
        waiting = deque(_in_order(rows))
        while waiting:
            group = _next_group(waiting, self.sampler._limit, self.sampler.prefill_tokens, self.cache.ragged)
            try:
                scores = self.score_group(group)
            except torch.OutOfMemoryError:
                if len(group) == 1:
                    raise
                self.sampler._limit = len(group) // 2
                waiting.extendleft(reversed(group))
                self.__init__(self.sampler)  # type: ignore[misc]  # begins again with nothing held
                torch.cuda.empty_cache()
                continue
            yield from zip(group, scores, strict=True)

    @torch.no_grad()
    def score_group(self, group: list[_Row]) -> list[list[Score]]:
        prompts = list(dict.fromkeys(row.prompt for row in group))
        filled, logits = self.prefill(prompts)
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.argmax(-1).tolist()
        places = {prompt: index for index, prompt in enumerate(prompts)}
        wanted = [[(places[row.prompt], tokens) for tokens in row.continuations] for row in group]
        keys = list(dict.fromkeys(key for keys in wanted for key in keys))
        # The first token of each continuation is read from the prompt's last position ...
        rows, firsts = torch.tensor([(index, tokens[0]) for index, tokens in keys], device=logits.device).unbind(1)
        first = dict(zip(keys, logprobs[rows, firsts].unsqueeze(-1).cpu(), strict=True))
        # ... and the others after the prompt's cache, the longest first.
        ragged = self.cache.ragged
        longer = deque(
            sorted((key for key in keys if len(key[1]) > 1), key=lambda key: (0 if ragged else key[0], -len(key[1])))
        )
        rest: dict[_Key, tuple[torch.Tensor, bool]] = {}
        while longer:
            some = [longer.popleft()]
            size = (len(some[0][1]) - 1) * logits.shape[-1]
            while longer and (len(some) + 1) * size <= MAX_LOGITS and (ragged or longer[0][0] == some[0][0]):
                some.append(longer.popleft())
            rest |= self.score_rest(some, filled, [len(prompts[index]) for index, _ in some])
        scores = {}
        for index, tokens in keys:
            later, greedy = rest.get((index, tokens), (torch.empty(0), True))
            total = torch.cat([first[index, tokens], later]).sum().item()  # in float32, as lm-eval sums
            scores[index, tokens] = Score(total, len(tokens), greedy and best[index] == tokens[0])
        return [[scores[key] for key in keys] for keys in wanted]

    def score_rest(self, keys: list[_Key], filled: Any, lengths: list[int]) -> dict[_Key, tuple[torch.Tensor, bool]]:
        """Log-probabilities of all tokens but the first of each continuation, and whether each is the likeliest."""
        self.cache.admit([(filled, index, length) for (index, _), length in zip(keys, lengths, strict=True)])
        logits = self.cache.forward([tokens[:-1] for _, tokens in keys]).float()
        self.cache.clear()
        targets = pad_sequence([torch.tensor(tokens[1:]) for _, tokens in keys], batch_first=True).to(logits.device)
        logprobs = logits.log_softmax(-1).gather(-1, targets[:, :, None]).squeeze(-1).cpu()
        likeliest = (logits.argmax(-1) == targets).tolist()
        return {
            key: (logprobs[row, : len(key[1]) - 1], all(likeliest[row][: len(key[1]) - 1]))
            for row, key in enumerate(keys)
        }


def _next_group(waiting: deque[_Row], room: int, prefill_tokens: int, ragged: bool) -> list[_Row]:
    """Takes the next rows to prefill together: no more than `room`, except that samples of one prompt stay together."""
    group, prompts = [waiting.popleft()], 1
    while waiting:
        row = waiting[0]
        if row.prompt != group[-1].prompt:
            prompts += 1
            longest = max(len(group[0].prompt), len(row.prompt))
            too_many = len(group) >= room or prompts * longest > prefill_tokens
            if too_many or not (ragged or len(row.prompt) == len(group[0].prompt)):
                break
        group.append(waiting.popleft())
    return group


def _in_order(rows: list[_Row]) -> list[_Row]:
    """Longest first, so that memory runs out at once if it does; prompts that begin alike stand together."""
    longest: dict[tuple[int, ...], int] = {}
    for row in rows:
        head = row.prompt[:32]
        longest[head] = max(longest.get(head, 0), len(row.prompt))
    return sorted(rows, key=lambda row: (-longest[row.prompt[:32]], row.prompt[:32], -len(row.prompt), row.prompt))


def _failed(error: str, row: _Row | None = None) -> Completion:
    if row is None:
        return Completion(finish_reason="failed", error=error)
    return Completion(
        finish_reason="failed", error=error, prompt_tokens=len(row.prompt), completion_tokens=len(row.tokens)
    )


def _scored_completion(row: _Row, scores: list[Score]) -> Completion:
    if not all(torch.tensor([score.logprob for score in scores]).isfinite()):
        return _failed("the log-probability of a choice is NaN or infinite", row)
    return Completion(
        prompt_tokens=len(row.prompt),
        logprobs=tuple(score.logprob for score in scores),
        choice_tokens=tuple(score.tokens for score in scores),
        choice_greedy=tuple(score.greedy for score in scores),
    )


def hash_files(folder: Path) -> str:
    """sha256 of a checkpoint's files, names and contents."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hash_tensors(model: PreTrainedModel) -> str:
    """sha256 of a model's parameters and buffers, names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:
            raise ValueError(f"{name} is not in memory, so that the weights cannot be hashed; load the model by path")
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
