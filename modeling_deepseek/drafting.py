"""Drafts for `generate(use_mtp=True)`: how many (`Pace`), of which tokens (`Rows`), from which states (`Drafter`).
`speculation.py` runs the rounds and decides what is kept.

With D modules and a row of S tokens, of which the model has seen all but the last: draft 1 comes from module 1, which
sees at column S - 2 the state there and token S - 1; draft k from module k, which sees the output of module k - 1 and
draft k - 1. Drafts beyond D come from module D applied again, one column further each time, to its own output.

Legend: B batch, S tokens or columns, Q tokens of one forward pass, K drafts, D hidden size, V vocabulary.
"""

from collections import Counter
from typing import Any

import torch
from transformers.generation import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .packing import sequence_context
from .row_cache import Columns, OneLayerCache

# Choosing how many tokens to draft

# What the launches of a layer's kernels cost, as bytes of weights that could be read in that time, and from how many
# tokens on computing costs more than reading the weights. CPU: measured on two cores. GPU: reckoned from an H100's
# bandwidth and arithmetic, and half a millisecond a layer.
LAUNCH_BYTES = {"cpu": 10_000_000}
DRAFT_LAYERS = 1.4  # launches of a draft, in layers: joining, embedding, rotation, head and choice come on top
RIDGE_TOKENS = {"cpu": 8}
LAUNCH_BYTES_GPU, RIDGE_TOKENS_GPU = 1_000_000_000, 300


class Pace:
    """Chooses the number of drafts that promises the most tokens for the time, from how the drafts of this call fared
    so far. Deterministic: what time costs is reckoned from the sizes of the weights, not taken from a clock."""

    PRIOR, PRIOR_WEIGHT, MEMORY = 0.7, 4.0, 0.98

    def __init__(self, costs: list[float], fewest: int):
        """`costs[k]` is the time of a round with k drafts; a draft has 0 or at least `fewest` tokens."""
        self.costs, self.fewest = costs, fewest
        self.tried, self.kept = [0.0] * (len(costs) - 1), [0.0] * (len(costs) - 1)

    def rates(self) -> list[float]:
        """For each position the share of drafts kept among those whose predecessors were. A position without a past
        is expected to do as the one before."""
        rates, rate = [], self.PRIOR
        for tried, kept in zip(self.tried, self.kept, strict=True):
            rate = (kept + self.PRIOR_WEIGHT * rate) / (tried + self.PRIOR_WEIGHT)
            rates.append(rate)
        return rates

    def choose(self, rooms: list[int]) -> int:
        """Drafts for the next round, where row b can use up to `rooms[b]`."""
        best, best_value, expected, reached = 0, len(rooms) / self.costs[0], float(len(rooms)), 1.0
        for count, rate in enumerate(self.rates()[: max(rooms)], start=1):
            reached *= rate
            expected += reached * sum(room >= count for room in rooms)
            if count >= self.fewest and expected / self.costs[count] > best_value:
                best, best_value = count, expected / self.costs[count]
        return best

    def learn(self, drafted: int, kept: int) -> None:
        """One row's round: of its drafts the first `kept` were right."""
        for position in range(min(drafted, kept + 1)):
            self.tried[position] += 1
            self.kept[position] += position < kept

    def forget(self) -> None:
        """Once a round: what is long ago counts less, so that a position given up is tried again."""
        self.tried = [self.MEMORY * value for value in self.tried]
        self.kept = [self.MEMORY * value for value in self.kept]


def round_costs(model: Any, modules: list[Any], batch: int, most: int) -> list[float]:
    """Time of a round with 0 ... `most` drafts, in units of a forward pass of one token a row."""
    device = model.device.type
    launch, ridge = LAUNCH_BYTES.get(device, LAUNCH_BYTES_GPU), RIDGE_TOKENS.get(device, RIDGE_TOKENS_GPU)

    def sizes(layer: Any) -> tuple[float, float]:
        """Bytes of the weights: the routed experts', and the others."""
        whole = sum(parameter.nbytes for parameter in layer.parameters())
        experts = sum(parameter.nbytes for parameter in layer.mlp.experts.parameters()) if layer.is_moe else 0
        return experts, whole - experts

    share = model.config.num_experts_per_tok / model.config.n_routed_experts if model.config.n_routed_experts else 0.0

    def reading(experts: float, others: float, tokens: int) -> float:
        """The weights that `tokens` tokens touch, or their arithmetic, where that takes longer."""
        return max(others + experts * (1 - (1 - share) ** tokens), (others + experts * share) * tokens / ridge)

    head = float(model.lm_head.weight.nbytes)
    layers = Counter(sizes(layer) for layer in model.stack.layers[: model.config.num_hidden_layers])

    def verify(tokens: int) -> float:
        return sum(n * (launch + reading(*size, tokens)) for size, n in layers.items()) + reading(0, head, tokens)

    draft = [DRAFT_LAYERS * launch + reading(*sizes(module), batch) + reading(0, head, batch) for module in modules]
    costs = []
    for count in range(most + 1):
        drafts = sum(draft[:count]) + sum(draft[-1:]) * max(0, count - len(draft))
        costs.append((verify(batch * (count + 1)) + drafts) / verify(batch))
    return costs


# The sequences

# These look at nothing but the scores: one call for all positions.
_SCORES_ONLY = (
    EpsilonLogitsWarper, EtaLogitsWarper, InfNanRemoveLogitsProcessor, LogitNormalization, MinPLogitsWarper,
    SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopHLogitsWarper, TopKLogitsWarper, TopPLogitsWarper,
    TypicalLogitsWarper,
)  # fmt: skip


def process_scores(
    processors: LogitsProcessorList,
    sequences_BS: torch.Tensor,
    lengths: list[int],
    wanted: list[int],
    logits_BQV: torch.Tensor,
) -> torch.Tensor:
    """Scores (B, Q, V) after the processors, each of which sees the tokens before: `lengths[b]` + j at position j, of
    which the first `wanted[b]` count.

    A processor is called with all rows at once, as in plain decoding, since it may know them by their number; where
    rows differ in length, once for each length, and only the rows that have it are taken from what it returns. A row
    that is shorter looks like one that is not: a processor that follows a grammar meets nothing that breaks it.
    """
    count = logits_BQV.shape[1]
    for processor in processors:
        if type(processor) in _SCORES_ONLY:
            logits_BQV = processor(sequences_BS[:, :1], logits_BQV.flatten(0, 1)).view_as(logits_BQV)
            continue
        result_BQV = logits_BQV.clone()
        for length in sorted(
            {first + step for first, some in zip(lengths, wanted, strict=True) for step in range(some)}
        ):
            steps = [length - first for first in lengths]
            rows = [row for row, step in enumerate(steps) if 0 <= step < wanted[row]]
            at = [min(max(step, 0), count - 1) for step in steps]
            if type(processor) is PrefixConstrainedLogitsProcessor:
                scores_RV = _for_rows(processor, rows)(
                    sequences_BS[rows, :length], logits_BQV[rows, [at[row] for row in rows]]
                )
            else:
                shown = [row if step < wanted[row] else rows[0] for row, step in enumerate(steps)]
                scores_RV = processor(sequences_BS[shown, :length], logits_BQV[list(range(len(at))), at])[rows]
            result_BQV[rows, [at[row] for row in rows]] = scores_RV
        logits_BQV = result_BQV
    return logits_BQV


def _for_rows(processor: PrefixConstrainedLogitsProcessor, rows: list[int]) -> PrefixConstrainedLogitsProcessor:
    """The same for some of the rows: the user's function may have a grammar for each."""
    return PrefixConstrainedLogitsProcessor(
        lambda place, prefix_S: processor._prefix_allowed_tokens_fn(rows[place], prefix_S), num_beams=1
    )


class Prompt:
    """What `generate` hands over, as columns of the cache: those before `first` are in it already."""

    def __init__(self, input_ids: torch.Tensor, generation_config: GenerationConfig, device, model_kwargs: dict):
        past = int(model_kwargs["past_key_values"].get_seq_length())
        mask_BS, embeds_BSD = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        whole = mask_BS.shape[1] if mask_BS is not None else getattr(generation_config, "_mask_length", -1)
        if embeds_BSD is not None:
            self.length = embeds_BSD.shape[1]
        elif whole == input_ids.shape[1] or past == 0:
            self.length = input_ids.shape[1]
        else:  # the new tokens only, with a mask for all
            self.length = past + input_ids.shape[1]
        self.first, new = past, self.length - past
        if new < 1:
            raise ValueError(
                f"the cache holds {past} tokens and the prompt {self.length}: `use_mtp=True` needs at least one token "
                "that is not in the cache; crop it by one"
            )
        self.offset = self.length - input_ids.shape[1]  # column of a token less its place in the sequence
        self.input_ids = None if embeds_BSD is not None else input_ids[:, -new:].to(device)
        self.embeds_BSD = None if embeds_BSD is None else embeds_BSD[:, -new:].to(device)
        batch = len(input_ids if embeds_BSD is None else embeds_BSD)
        self.positions_BS = model_kwargs["position_ids"][:, -new:].expand(batch, -1).to(device)
        self.mask_BS = None if mask_BS is None else mask_BS.to(device)
        self.valid_BS: torch.Tensor | None = None
        self.origin_B = self.positions_BS[:, -1] - (self.length - 1)  # position of a new token less its column

    def make_room(self, room: int) -> None:
        """All columns behind the prompt are valid."""
        if self.mask_BS is not None:
            self.valid_BS = torch.nn.functional.pad(self.mask_BS.bool(), (0, room - self.length), value=True)

    def positions_at(self, columns: Columns, first: int = 0) -> torch.Tensor:
        """Positions (B, Q) of tokens behind the prompt, where `columns` count from column `first`."""
        return columns.index_BQ + (self.origin_B + first)[:, None]


class Rows:
    """The sequences, and where each row stands: it has `lengths[b]` tokens, of which the model has seen `seen[b]`, all
    but the last; or, where a row is done, the padding behind it as well, like in plain decoding."""

    def __init__(
        self, input_ids, processors: LogitsProcessorList, generation_config: GenerationConfig, room: int, eos: set[int]
    ):
        batch, length = input_ids.shape
        pad = generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        self.sequences_BS = torch.nn.functional.pad(input_ids, (0, room - length), value=self.pad)
        self.lengths, self.seen = [length] * batch, [length - 1] * batch
        self.stops: list[int | None] = [None] * batch  # length at which a row was told to stop
        self.active = [True] * batch
        self.pads = True  # whether a row that was told to stop is done; else it goes on until all are
        self.processors, self.do_sample, self.eos = processors, generation_config.do_sample, eos
        self.keeps_scores = bool(generation_config.return_dict_in_generate and generation_config.output_scores)
        self.draft_probs: list[torch.Tensor] = []  # (B, V) each

    def stop(self, row: int, length: int) -> None:
        """Ends a row at `length`, which it has or has gone beyond, unless it has ended before."""
        before = self.stops[row]
        if before is not None and before <= length:
            return
        self.stops[row] = length
        if self.pads:
            self.lengths[row], self.seen[row], self.active[row] = length, length - 1, False
            self.sequences_BS[row, length:] = self.pad

    def scores(self, logits_BQV: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """`process_scores` behind `lengths[b]` tokens of each row, its drafts so far included."""
        count = logits_BQV.shape[1]
        wanted = [count] * len(lengths)
        if not all(type(processor) in _SCORES_ONLY for processor in self.processors):
            wanted = [self.wanted(row, length, count) for row, length in enumerate(lengths)]
        return process_scores(self.processors, self.sequences_BS, lengths, wanted, logits_BQV)

    def wanted(self, row: int, length: int, count: int) -> int:
        """Of `count` positions of a row behind `length` tokens those that plain decoding may come to: none behind a
        draft that ends the row, and of a row that is done only those whose scores the caller is to see."""
        if not self.active[row]:
            return count if self.keeps_scores else 0
        drafts = self.sequences_BS[row, self.lengths[row] : length + count - 1].tolist()
        end = next((place for place, token in enumerate(drafts, start=self.lengths[row]) if token in self.eos), None)
        return count if end is None else max(0, end + 1 - length)

    def add_draft(self, logits_B1V: torch.Tensor, lengths: list[int]) -> None:
        """Draws a draft for each row, which then has one token more than `lengths`, and writes it behind the row."""
        logits_B1V = logits_B1V.to(self.sequences_BS.device, torch.float32)
        scores_BV = self.scores(logits_B1V, lengths)[:, 0]
        if self.do_sample:
            self.draft_probs.append(scores_BV.softmax(dim=-1))
            token_B1 = torch.multinomial(self.draft_probs[-1], 1)
        else:
            token_B1 = scores_BV.argmax(dim=-1, keepdim=True)
        if not all(self.active):
            token_B1 = token_B1.masked_fill(~torch.tensor(self.active, device=token_B1.device)[:, None], self.pad)
        Columns(lengths, 1, token_B1.device).put(self.sequences_BS, token_B1)


# The modules


class Drafter:
    """The MTP modules in use and their latents, kept apart from the model's. The latents begin at column `first`: what
    a cache already held when it was passed in, the modules have not seen.

    Module k's entry in a column is made from the state there and the token k columns on. Tokens that are still drafts
    make entries that the next round writes again.
    """

    def __init__(self, model: Any, modules: list[Any], prompt: "Prompt", room: int):
        self.model, self.modules, self.prompt = model, modules, prompt
        self.first, self.seen = prompt.first, 0  # columns, and states among them
        self.caches = [OneLayerCache(room - self.first) for _ in modules]
        self.valid_BS = None if prompt.valid_BS is None else prompt.valid_BS[:, self.first :]
        self.after_norm = model.config.mtp_hidden_state == "after_norm"
        self.waiting: list[torch.Tensor | None] = [None] * len(modules)  # last state (B, 1, D), whose token is to come

    def prefill(self, states_BSD: torch.Tensor, embeds_BSD: torch.Tensor) -> None:
        """Entries for the next columns of the prompt, from their states and the embeddings of their tokens."""
        self.seen += states_BSD.shape[1]
        for depth, module in enumerate(self.modules, start=1):
            waiting, self.waiting[depth - 1] = self.waiting[depth - 1], states_BSD[:, -1:]
            states_BSD = states_BSD[:, :-1] if waiting is None else torch.cat([waiting, states_BSD[:, :-1]], dim=1)
            count = states_BSD.shape[1]
            if count == 0:
                return
            end = self.seen - depth
            cache = self.caches[depth - 1]
            cache.layer.columns = Columns([end - count], count, states_BSD.device)
            mask_BS, where = self.prompt.mask_BS, slice(self.first, self.first + end)
            context = sequence_context(
                self.model.config,
                states_BSD,
                None if mask_BS is None else mask_BS[:, where],
                self.prompt.positions_BS[:, end - count : end],
                cache,
            )
            states_BSD = module(
                states_BSD,
                embeds_BSD[:, -count:],
                position_embeddings=self.model.stack.rotary_emb(context.position_ids_BS),
                attention_mask=context.attention_mask,
                past_key_values=cache,
                **context.attention_kwargs,
            ).hidden_states
            if self.after_norm:
                states_BSD = module.shared_head.norm(states_BSD)

    def draft(self, count: int, states_BQD: torch.Tensor, starts: list[int], grown: list[int], rows: "Rows") -> None:
        """Writes `count` drafts behind each row of `rows`. Row b had `starts[b]` tokens when the modules last ran, and
        has grown by `grown[b]`; `states_BQD` are those from the last token before on. With `count` 0 the modules only
        see what is new."""
        depth, ends = len(self.modules), [start + new for start, new in zip(starts, grown, strict=True)]
        states_BQD = states_BQD[:, : max(grown)]
        for step in range(count or depth):
            module, cache = self.modules[min(step, depth - 1)], self.caches[min(step, depth - 1)]
            if step < depth:
                ahead, begin = step + 1, [start - 1 - step for start in starts]
                last = [new - 1 + step for new in grown]
            else:
                ahead, begin, last = depth, [end - 1 + step - depth for end in ends], [0]
            width = states_BQD.shape[1]
            tokens_BQ = Columns([start + ahead for start in begin], width, states_BQD.device).take(rows.sequences_BS)
            shift = self.prompt.offset - self.first
            columns = Columns([start + shift for start in begin], width, states_BQD.device)
            cache.layer.columns = columns
            states_BQD = module(
                states_BQD,
                self.model.stack.embed_tokens(tokens_BQ.to(states_BQD.device)),
                position_embeddings=self.model.stack.rotary_emb(self.prompt.positions_at(columns, self.first)),
                attention_mask=columns.mask(self.valid_BS, columns.end, states_BQD.dtype),
                past_key_values=cache,
            ).hidden_states
            if step < depth - 1:
                if self.after_norm:
                    states_BQD = module.shared_head.norm(states_BQD)
                last_B1D, waiting = _at(states_BQD, last), self.waiting[step + 1]
                assert waiting is not None
                self.waiting[step + 1] = _at(states_BQD, [new - 1 for new in grown])
                states_BQD = torch.cat([waiting, states_BQD], dim=1)
                normed_B1D = last_B1D if self.after_norm else module.shared_head.norm(last_B1D)
            else:
                last_B1D = _at(states_BQD, last)
                normed_B1D = module.shared_head.norm(last_B1D)
                states_BQD = normed_B1D if self.after_norm else last_B1D
            if count:
                rows.add_draft(self.model.lm_head(normed_B1D), [end + step for end in ends])


def _at(states_BQD: torch.Tensor, index: list[int]) -> torch.Tensor:
    """State number `index[b]` of each row, (B, 1, D)."""
    if min(index) == max(index):
        return states_BQD[:, index[0] : index[0] + 1]
    rows = torch.arange(len(index), device=states_BQD.device)
    return states_BQD[rows, torch.tensor(index, device=states_BQD.device)][:, None]
