"""Tokens in, tokens out: the cache that holds rows of different lengths, the prefill, the choice of a token.

`local_sampler.py` is the caller and speaks in texts. transformers' `generate` keeps a batch together until its last row
is done and copies the whole cache at every step; here a row that is done makes room for the next one, samples of one
prompt share its prefill, and a step writes one column.
"""

import copy
import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

MIN_SHARED = 32  # tokens; a shorter common prefix is not worth a forward pass of its own


class RowLayer(DynamicLayer):
    """One layer's keys and values, (rows, heads, columns, size), of rows that all end in the same column.

    The columns in use are `[end - width, end)` of a larger buffer. A row shorter than `width` begins later, and the
    attention mask hides what stands before it: zeros in every row, since even a masked NaN would spread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.buffers: list[torch.Tensor] = []  # keys, values
        self.rows = self.width = self.end = 0
        self.ahead = 0  # columns written by a forward pass that is not over

    def get_seq_length(self) -> int:
        return self.width + self.ahead

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        new, held = key_states.shape[-2], self.width + self.ahead
        if self.end + self.ahead + new > self.buffers[0].shape[-2]:
            self.move(len(self.buffers[0]), held, room=new + (held + new) // 2)
        first = self.end + self.ahead
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, first : first + new] = states
        self.ahead += new
        used = slice(self.end - self.width, self.end + self.ahead)
        return self.buffers[0][: self.rows, :, used], self.buffers[1][: self.rows, :, used]

    def move(self, rows: int, columns: int, room: int) -> None:
        """Into buffers of `rows` rows, the columns in use ending at `columns`, with `room` after them."""
        used, held = slice(self.end - self.width, self.end + self.ahead), self.width + self.ahead
        for number, old in enumerate(self.buffers):
            new = old.new_zeros(rows, old.shape[1], columns + room, old.shape[3])
            new[: self.rows, :, columns - held : columns] = old[: self.rows, :, used]
            self.buffers[number] = new
        self.end = columns - self.ahead

    def admit(self, sources: Sequence[tuple[Any, int, int]], width: int) -> None:
        """Adds rows: (layer of a prefill, row in it, length). `width` is the longest length there is now."""
        if not self.buffers:
            self.buffers = [states[:0, :, :0] for states in (sources[0][0].keys, sources[0][0].values)]
        capacity, total = len(self.buffers[0]), self.rows + len(sources)
        if total > capacity or width > self.end:
            self.move(max(total, capacity), max(width, self.end), room=max(64, width // 2))
        for number, buffer in enumerate(self.buffers):
            for row, (layer, index, length) in enumerate(sources, start=self.rows):
                states = layer.values if number else layer.keys
                buffer[row, :, : self.end - length] = 0
                buffer[row, :, self.end - length : self.end] = states[index, :, :length]
        self.rows, self.width = total, width

    def drop(self, row: int, width: int) -> None:
        """The last row takes the place of `row`, and `width` is the longest length that is left."""
        self.rows -= 1
        if row != self.rows:
            for buffer in self.buffers:
                buffer[row, :, : self.end] = buffer[self.rows, :, : self.end]
        self.width = width

    def commit(self) -> None:
        """The forward pass is over."""
        self.end, self.width, self.ahead = self.end + self.ahead, self.width + self.ahead, 0

    def forget(self, rows: int, width: int) -> None:
        """Forgets a forward pass that is not over, and all but the first `rows` rows."""
        self.rows, self.width, self.ahead = rows, width, 0


class Rows:
    """The rows in flight: admitted after their prefill, one more token for each at every step, dropped when done."""

    ragged = True  # rows of different lengths may be together, and come and go

    def __init__(self, model: PreTrainedModel, layers: int):
        self.model, self.lengths = model, list[int]()
        self.layers = [RowLayer() for _ in range(layers)]
        self.cache = DynamicCache()
        self.cache.layers = list(self.layers)

    def admit(self, sources: Sequence[tuple[DynamicCache, int, int]]) -> None:
        """Adds rows, each the first `length` columns of one row of a prefill: (cache, row, length)."""
        width = max([*self.lengths, *(length for _, _, length in sources)])
        for number, layer in enumerate(self.layers):
            layer.admit([(cache.layers[number], row, length) for cache, row, length in sources], width)
        self.lengths += [length for _, _, length in sources]

    def drop(self, row: int) -> None:
        """Row `row` is done; the last row takes its place."""
        self.lengths[row] = self.lengths[-1]
        self.lengths.pop()
        for layer in self.layers:
            layer.drop(row, max(self.lengths, default=0))

    def forward(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits (rows, n, vocabulary) after the next tokens of each row; fewer than n are padded at the end."""
        input_ids = _padded(tokens, self.model)
        new, width = input_ids.shape[1], max(self.lengths)
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if min(self.lengths) < width:
            starts = torch.tensor([width - length for length in self.lengths], device=input_ids.device)
            inputs["attention_mask"] = (torch.arange(width + new, device=input_ids.device) >= starts[:, None]).long()
        if "position_ids" in _parameters(self.model):
            lengths = torch.tensor(self.lengths, device=input_ids.device)
            inputs["position_ids"] = lengths[:, None] + torch.arange(new, device=input_ids.device)
        return self.model(**inputs, past_key_values=self.cache, use_cache=True).logits

    def commit(self) -> None:
        """The tokens of the last forward pass stay."""
        self.lengths = [length + self.layers[0].ahead for length in self.lengths]
        for layer in self.layers:
            layer.commit()

    def clear(self) -> None:
        """No rows; the buffers stay for the next ones."""
        self.lengths.clear()
        for layer in self.layers:
            layer.forget(0, 0)

    def shrink(self, rows: int) -> int:
        """After a forward pass or an admission that ran out of memory: keeps the first `rows` rows, in buffers of their
        size. Returns how many are kept."""
        del self.lengths[rows:]
        for layer in self.layers:
            layer.forget(len(self.lengths), max(self.lengths, default=0))
            layer.move(layer.rows, layer.width, room=64)
        return len(self.lengths)


class Together:
    """As `Rows`, for caches that cannot be cut by columns (linear attention, state spaces): rows of one length, from
    one prefill, of which some leave; the next ones wait for the last."""

    ragged = False

    def __init__(self, model: PreTrainedModel):
        self.model, self.lengths = model, list[int]()
        self.cache: Any = None

    def admit(self, sources: Sequence[tuple[DynamicCache, int, int]]) -> None:
        assert not self.lengths
        self.cache = copy.deepcopy(sources[0][0])
        self.lengths = [length for _, _, length in sources]
        self._keep([row for _, row, _ in sources])

    def _keep(self, rows: list[int]) -> None:
        self.cache.reorder_cache(torch.tensor(rows, device=self.model.device))

    def drop(self, row: int) -> None:
        last = len(self.lengths) - 1
        self.lengths.pop()
        if self.lengths:
            self._keep([last if index == row else index for index in range(last)])

    def forward(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        return self.model(input_ids=_padded(tokens, self.model), past_key_values=self.cache, use_cache=True).logits

    def commit(self) -> None:
        self.lengths = [length + 1 for length in self.lengths]

    def clear(self) -> None:
        self.lengths, self.cache = [], None

    def shrink(self, rows: int) -> int:
        self.clear()  # what the pass that failed has written cannot be told apart
        return 0


def rows_for(model: PreTrainedModel) -> Rows | Together:
    """An empty batch of the kind that this model's cache allows."""
    layers = DynamicCache(config=model.config).layers
    # The mask alone makes a window slide: keys before it are hidden, wherever they are kept.
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return Rows(model, len(layers)) if plain else Together(model)


class Prefill:
    """Runs prompts together. Their common prefix runs once, and is kept for the prompts that come next: the worked
    examples of a few-shot prompt are the longest part of it."""

    def __init__(self, model: PreTrainedModel, ragged: bool):
        self.model, self.ragged = model, ragged
        self._shared: tuple[int, ...] = ()
        self._shared_cache: DynamicCache | None = None

    def __call__(self, prompts: Sequence[tuple[int, ...]]) -> tuple[DynamicCache, torch.Tensor]:
        """The cache, a row for each prompt, and the logits (prompts, vocabulary) that follow each.

        Shorter prompts are padded at the end, where nothing real looks; a caller takes the columns that are real.
        """
        past, filled = 0, self._new_cache()
        if self.ragged and (past := self._share(prompts)):
            assert self._shared_cache is not None
            for number, (keys, values, _) in enumerate(self._shared_cache):
                shared = [states[:, :, :past].expand(len(prompts), -1, -1, -1) for states in (keys, values)]
                filled.update(shared[0], shared[1], number)
        input_ids = _padded([prompt[past:] for prompt in prompts], self.model)
        ends = [len(prompt) - past - 1 for prompt in prompts]
        positions = sorted(set(ends))
        if "logits_to_keep" in _parameters(self.model):
            keep = torch.tensor(positions, device=input_ids.device)
            logits = self.model(input_ids=input_ids, past_key_values=filled, use_cache=True, logits_to_keep=keep).logits
            ends = [positions.index(end) for end in ends]
        else:
            logits = self.model(input_ids=input_ids, past_key_values=filled, use_cache=True).logits
        return filled, logits[torch.arange(len(prompts)), torch.tensor(ends)]

    def _new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        if self.ragged:
            cache.layers = [DynamicLayer() for _ in cache.layers]
        return cache

    def _share(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """The number of tokens that all prompts begin with and that `_shared_cache` holds."""
        known = _common([*prompts, self._shared]) if self._shared else 0
        common = _common(prompts)
        limit = min(len(prompt) for prompt in prompts) - 1  # a token must be left to ask for logits
        if known >= MIN_SHARED and known >= common // 2:
            return min(known, limit)
        if len(prompts) == 1 or min(common, limit) < MIN_SHARED:
            return 0
        self._shared, self._shared_cache = prompts[0][:common], self._new_cache()
        input_ids = torch.tensor([self._shared], device=self.model.device)
        self.model(input_ids=input_ids, past_key_values=self._shared_cache, use_cache=True, **self._one_logit())
        return min(common, limit)

    def _one_logit(self) -> dict[str, int]:
        return {"logits_to_keep": 1} if "logits_to_keep" in _parameters(self.model) else {}

    def forget(self) -> None:
        self._shared, self._shared_cache = (), None


def choose(logits: torch.Tensor, temperatures: list[float], top_ps: list[float], uniforms: list[float]) -> list[int]:
    """The next token of each row of logits (rows, vocabulary); -1 where they hold NaN or infinity.

    Temperature 0 takes the largest. Else the token at which the cumulative distribution, in the order of the
    vocabulary, passes the row's uniform number: an error of 1e-7 in the logits moves the boundaries by as much, where
    the order of sorted probabilities might change altogether.
    """
    logits = logits.float() if logits.device.type != "mps" else logits.float().cpu()  # mps has no float64
    tokens = logits.argmax(-1)
    bad = ~logits.amax(-1).isfinite()
    hot = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if hot:
        at = torch.tensor(hot, device=logits.device)
        scale = torch.tensor([temperatures[row] for row in hot], device=logits.device)
        probabilities = (logits[at] / scale[:, None]).softmax(-1)
        if any(top_ps[row] < 1 for row in hot):
            kept = torch.tensor([top_ps[row] for row in hot], device=logits.device)
            ordered = probabilities.sort(-1, descending=True).values
            inside = (ordered.cumsum(-1) - ordered < kept[:, None]).sum(-1).clamp(min=1)
            # All tokens as likely as the last one inside are in, so that ties are not cut by the order of a sort.
            floor = ordered.gather(-1, inside[:, None] - 1)
            probabilities = probabilities.masked_fill(probabilities < floor, 0)
        cumulative = probabilities.double().cumsum(-1)
        points = torch.tensor([uniforms[row] for row in hot], dtype=torch.float64, device=logits.device)
        drawn = torch.searchsorted(cumulative, points[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
        tokens[at] = drawn.clamp(max=logits.shape[-1] - 1)  # only a row of NaN is beyond the end
    return torch.where(bad, -1, tokens).tolist()


def _padded(tokens: Sequence[Sequence[int]], model: PreTrainedModel) -> torch.Tensor:
    if all(len(row) == len(tokens[0]) for row in tokens):
        return torch.tensor(tokens, device=model.device)
    return pad_sequence([torch.tensor(row) for row in tokens], batch_first=True).to(model.device)


def _common(sequences: Sequence[tuple[int, ...]]) -> int:
    """The length of the common prefix."""
    low, high = min(sequences), max(sequences)  # in order, all others lie between these two
    for index, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return index
    return len(low)


@cache
def _named(model_class: type) -> frozenset[str]:
    # All classes it is made of: a subclass may pass on `**kwargs`.
    forwards = [vars(one)["forward"] for one in model_class.__mro__ if "forward" in vars(one)]
    return frozenset(name for forward in forwards for name in inspect.signature(forward).parameters)


def _parameters(model: PreTrainedModel) -> frozenset[str]:
    """What the model's forward pass takes; of an adapted model (peft), that of the model inside."""
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    return _named(type(base))  # type: ignore[arg-type]  # a class is hashable
