"""Lossless self-speculation: `generate(use_mtp=True)` drafts tokens with the MTP modules (V3 2.2) and verifies them in
one forward pass of the model.

    prefill -> first token -> [ draft k tokens -> verify them -> keep those that the model itself would have drawn ] ...

A round ends with one more token than drafts were kept: the model's own choice behind the last of them. Rows of a batch
keep different numbers and go on at their own pace (`row_cache.py`). What comes out is distributed exactly as without
drafts (Leviathan et al., arXiv 2211.17192, theorem 1), and with greedy decoding it is the same tokens.

With D modules and a row of S tokens, of which the model has seen all but the last: draft 1 comes from module 1, which
sees at column S - 2 the state there and token S - 1; draft k from module k, which sees the output of module k - 1 and
draft k - 1. Drafts beyond D come from module D applied again, one column further each time, to its own output.

Legend: B batch, S tokens or columns, Q tokens of one forward pass, K drafts, D hidden size, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers.cache_utils import Cache
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .mla import is_flash
from .packing import sequence_context
from .row_cache import Columns, OneLayerCache, RowCache, check_rows_can_be_paced, row_bound

# These look at nothing but the scores: one call for all positions.
_SCORES_ONLY = (
    EpsilonLogitsWarper, EtaLogitsWarper, InfNanRemoveLogitsProcessor, LogitNormalization, MinPLogitsWarper,
    SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopHLogitsWarper, TopKLogitsWarper, TopPLogitsWarper,
    TypicalLogitsWarper,
)  # fmt: skip


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """transformers' output, and how the drafts fared: `drafted` and `accepted` (B, K) int64 count for each row how
    often position k of a draft was drafted and kept, K the longest draft; `rounds` is the number of verifications."""

    drafted: torch.Tensor | None = None
    accepted: torch.Tensor | None = None
    rounds: int | None = None

    @property
    def acceptance(self) -> list[float]:
        """For each position of a draft the share that was kept, which needs all before it to be kept as well."""
        assert self.drafted is not None
        assert self.accepted is not None
        return (self.accepted.sum(0) / self.drafted.sum(0)).tolist()


# Choosing tokens


def keep_greedy(scores_BQV: torch.Tensor, drafts_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many drafts of each row are kept, (B,), and the tokens (B, K + 1) of which one more than that count."""
    best_BQ = scores_BQV.argmax(dim=-1)
    kept_B = (best_BQ[:, :-1] == drafts_BK).cumprod(dim=1).sum(dim=1)
    return kept_B, best_BQ


def keep_sampled(
    probs_BQV: torch.Tensor, drafts_BK: torch.Tensor, draft_probs_BKV: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `keep_greedy`, for drafts drawn from `draft_probs_BKV` and a model that says `probs_BQV`, Q = K + 1.

    A draft is kept with probability min(1, p / q); the first that is not is replaced by a draw from max(0, p - q),
    normed. The token is then distributed as p, whatever q is. Behind the last draft q is zero, and the draw is from p.
    """
    batch, count = drafts_BK.shape
    if count == 0:
        return drafts_BK.new_zeros(batch), torch.multinomial(probs_BQV[:, 0], 1)
    assert draft_probs_BKV is not None
    p_BK = probs_BQV[:, :-1].gather(2, drafts_BK[..., None]).squeeze(2)
    q_BK = draft_probs_BKV.gather(2, drafts_BK[..., None]).squeeze(2)
    kept_B = (torch.rand_like(q_BK) * q_BK < p_BK).cumprod(dim=1).sum(dim=1)
    rows_B = torch.arange(batch, device=kept_B.device)
    p_BV, q_BV = probs_BQV[rows_B, kept_B], draft_probs_BKV[rows_B, kept_B.clamp(max=count - 1)]
    rest_BV = (p_BV - q_BV * (kept_B < count)[:, None]).clamp_(min=0)
    # Where rounding leaves nothing, p and q were equal.
    rest_BV = torch.where(rest_BV.sum(dim=1, keepdim=True) > 0, rest_BV, p_BV)
    tokens_BQ = torch.cat([drafts_BK, drafts_BK[:, -1:]], dim=1)
    tokens_BQ[rows_B, kept_B] = torch.multinomial(rest_BV, 1).squeeze(1)
    return kept_B, tokens_BQ


def process_scores(
    processors: LogitsProcessorList, sequences_BS: torch.Tensor, lengths: list[int], logits_BQV: torch.Tensor
) -> torch.Tensor:
    """Scores (B, Q, V) after the processors, each of which sees the tokens before: `lengths[b]` + j at position j.

    A processor is called with all rows at once, as in plain decoding, since it may know them by their number; where
    rows differ in length, once for each length, and only the rows that have it are taken from what it returns.
    """
    count = logits_BQV.shape[1]
    for processor in processors:
        if type(processor) in _SCORES_ONLY:
            logits_BQV = processor(sequences_BS[:, :1], logits_BQV.flatten(0, 1)).view_as(logits_BQV)
            continue
        result_BQV = torch.empty_like(logits_BQV)
        for length in sorted({first + step for first in lengths for step in range(count)}):
            steps = [length - first for first in lengths]
            rows = [row for row, step in enumerate(steps) if 0 <= step < count]
            at_B = torch.tensor([min(max(step, 0), count - 1) for step in steps], device=logits_BQV.device)
            all_B = torch.arange(len(at_B), device=at_B.device)
            scores_BV = processor(sequences_BS[:, :length], logits_BQV[all_B, at_B])
            result_BQV[all_B[rows], at_B[rows]] = scores_BV[rows]
        logits_BQV = result_BQV
    return logits_BQV


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


# Drafting


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


# One call of `generate`


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

    def __init__(self, input_ids, processors: LogitsProcessorList, generation_config: GenerationConfig, room: int):
        batch, length = input_ids.shape
        pad = generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        self.sequences_BS = torch.nn.functional.pad(input_ids, (0, room - length), value=self.pad)
        self.lengths, self.seen = [length] * batch, [length - 1] * batch
        self.stops: list[int | None] = [None] * batch  # length at which a row was told to stop
        self.active = [True] * batch
        self.processors, self.do_sample = processors, generation_config.do_sample
        self.draft_probs: list[torch.Tensor] = []  # (B, V) each

    def add_draft(self, logits_B1V: torch.Tensor, lengths: list[int]) -> None:
        """Draws a draft for each row, which then has one token more than `lengths`, and writes it behind the row."""
        logits_B1V = logits_B1V.to(self.sequences_BS.device, torch.float32)
        scores_BV = process_scores(self.processors, self.sequences_BS, lengths, logits_B1V)[:, 0]
        if self.do_sample:
            self.draft_probs.append(scores_BV.softmax(dim=-1))
            token_B1 = torch.multinomial(self.draft_probs[-1], 1)
        else:
            token_B1 = scores_BV.argmax(dim=-1, keepdim=True)
        if not all(self.active):
            token_B1 = token_B1.masked_fill(~torch.tensor(self.active, device=token_B1.device)[:, None], self.pad)
        Columns(lengths, 1, token_B1.device).put(self.sequences_BS, token_B1)


class Speculation:
    """Prefill, then rounds of drafting, verifying and settling, as `speculate` calls them."""

    def __init__(self, model, input_ids, processors, criteria, generation_config: GenerationConfig, streamer, kwargs):
        self.model, self.config, self.streamer = model, generation_config, streamer
        self.user_cache: Cache = kwargs.pop("past_key_values")
        self.prompt = Prompt(input_ids, generation_config, model.device, {**kwargs, "past_key_values": self.user_cache})
        known = ("attention_mask", "position_ids", "inputs_embeds", "logits_to_keep", "use_cache")
        self.extra = {name: value for name, value in kwargs.items() if name not in known}
        limits = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        self.limit = min([*limits, generation_config.max_length])
        self.eos = {
            int(token)
            for criterion in criteria
            if type(criterion) is EosTokenCriteria
            for token in criterion.eos_token_id.flatten()
        }
        self.criteria = StoppingCriteriaList(
            [criterion for criterion in criteria if type(criterion) not in (MaxLengthCriteria, EosTokenCriteria)]
        )
        self.bound, needed = row_bound(self.user_cache), self.limit - 1 + self.prompt.offset
        if self.bound is not None and self.bound < needed:
            raise ValueError(
                f"the static cache holds {self.bound} tokens, and prompt and new tokens are up to {needed}; make it "
                "larger, or lower `max_new_tokens`"
            )
        # Plain decoding pads rows that are done only if some criterion knows of an end token.
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)

        config = model.config
        most = max(0, min(generation_config.num_assistant_tokens, self.limit - input_ids.shape[1] - 1))
        self.room = self.limit + most + 1
        self.prompt.make_room(self.room + self.prompt.offset)
        modules = list(model.stack.layers[config.num_hidden_layers :])
        modules = modules[: min(len(modules), most, self.prompt.length - self.prompt.first)]
        self.drafter = Drafter(model, modules, self.prompt, self.room + self.prompt.offset)
        self.rows = Rows(input_ids, processors, generation_config, self.room)
        batch = len(input_ids)
        self.pace = Pace(round_costs(model, modules, batch, most if modules else 0), len(modules))
        self.drafted = torch.zeros(batch, most, dtype=torch.int64)
        self.accepted = torch.zeros(batch, most, dtype=torch.int64)
        # What the modules have not seen yet: states from the token before `fresh_starts` on, and the tokens since.
        self.fresh_BQD: torch.Tensor | None = None
        self.fresh_starts: list[int] = []
        self.grown: list[int] = []
        self.rounds, self.streamed = 0, input_ids.shape[1]
        self.first_length = input_ids.shape[1]
        self.scores: list[torch.Tensor] | None = None
        self.logits: list[torch.Tensor] | None = None
        if generation_config.return_dict_in_generate:
            self.scores = [] if generation_config.output_scores else None
            self.logits = [] if generation_config.output_logits else None

    def states(self, outputs) -> torch.Tensor:
        return outputs.last_hidden_state if self.drafter.after_norm else outputs.pre_norm_hidden_state

    def prefill(self) -> torch.Tensor:
        """Runs the model and the modules over the prompt; logits (B, 1, V) behind it."""
        prompt, stack = self.prompt, self.model.stack
        embeds_BSD = prompt.embeds_BSD if prompt.embeds_BSD is not None else stack.embed_tokens(prompt.input_ids)
        new = embeds_BSD.shape[1]
        chunk = self.config.prefill_chunk_size or new
        for start in range(0, new, chunk):
            part = slice(start, min(start + chunk, new))
            outputs = stack(
                inputs_embeds=embeds_BSD[:, part],
                attention_mask=None if prompt.mask_BS is None else prompt.mask_BS[:, : prompt.first + part.stop],
                position_ids=prompt.positions_BS[:, part],
                past_key_values=self.user_cache,
                use_cache=True,
                **self.extra,
            )
            self.drafter.prefill(self.states(outputs), embeds_BSD[:, part])
        self.states_BQD = self.states(outputs)[:, -1:]
        return self.model.lm_head(outputs.last_hidden_state[:, -1:])

    def forward(self, starts: list[int], count: int) -> torch.Tensor:
        """Logits (B, Q, V) of the next `count` tokens of each row from `starts` on, which the model now sees."""
        prompt, device = self.prompt, self.model.device
        tokens_BQ = Columns(starts, count, self.rows.sequences_BS.device).take(self.rows.sequences_BS)
        columns = Columns([start + prompt.offset for start in starts], count, device)
        width = columns.end if self.bound is None else min(columns.end, self.bound)
        outputs = self.model.stack(
            input_ids=tokens_BQ.to(device),
            attention_mask=columns.mask(prompt.valid_BS, width, self.model.dtype),
            position_ids=prompt.positions_at(columns),
            past_key_values=self.cache.at(columns),
            use_cache=True,
            **self.extra,
        )
        self.states_BQD = self.states(outputs)
        return self.model.lm_head(outputs.last_hidden_state)

    def draft(self) -> int:
        """Writes drafts behind the rows and returns how many to a row."""
        rows, drafter = self.rows, self.drafter
        rows.draft_probs = []
        if not drafter.modules:
            return 0
        rooms = [self.limit - length - 1 if on else 0 for length, on in zip(rows.lengths, rows.active, strict=True)]
        count = self.pace.choose(rooms)
        assert self.fresh_BQD is not None
        if count == 0 and min(self.grown) == max(self.grown):
            self.fresh_BQD = self.fresh_BQD[:, : self.grown[0]]  # wait for more
            return 0
        # Of a row that is done it does not matter what the modules see, as long as it stays within the buffers.
        starts = [
            start if on else min(start, self.limit - new)
            for start, new, on in zip(self.fresh_starts, self.grown, rows.active, strict=True)
        ]
        drafter.draft(count, self.fresh_BQD, starts, self.grown, rows)
        self.fresh_BQD = None
        return count

    def verify(self, count: int) -> torch.Tensor:
        """Logits (B, count + 1, V) behind the last token of each row and behind each of its drafts."""
        self.rounds += 1
        return self.forward(self.rows.seen, count + 1)

    def settle(self, logits_BQV: torch.Tensor, count: int) -> None:
        """Keeps of each row's `count` drafts what the model would have drawn itself, and one token more, up to where
        the row stops."""
        rows, batch = self.rows, len(self.rows.lengths)
        logits_BQV = logits_BQV.to(rows.sequences_BS.device, torch.float32)
        scores_BQV = process_scores(rows.processors, rows.sequences_BS, [seen + 1 for seen in rows.seen], logits_BQV)
        drafts_BK = Columns(rows.lengths, count, rows.sequences_BS.device).take(rows.sequences_BS)
        if rows.do_sample:
            draft_probs_BKV = torch.stack(rows.draft_probs, dim=1) if count else None
            kept_B, tokens_BQ = keep_sampled(scores_BQV.softmax(dim=-1), drafts_BK, draft_probs_BKV)
        else:
            kept_B, tokens_BQ = keep_greedy(scores_BQV, drafts_BK)
        self.record(logits_BQV, scores_BQV)
        table = torch.cat([kept_B[:, None], tokens_BQ], dim=1).tolist()  # the one wait for the device in a round

        blocks: list[list[int]] = []
        for row, (kept, *tokens) in enumerate(table):
            room = self.limit - rows.lengths[row]
            blocks.append(tokens[: min(kept + 1, room)] if rows.active[row] else [])
        stops = self.find_stops(blocks)
        for row, (kept, *_) in enumerate(table):
            if not rows.active[row]:
                rows.seen[row] = min(rows.seen[row] + count + 1, self.limit - 1)
                continue
            room = self.limit - rows.lengths[row]
            drafted = min(count, room - 1)
            if stops[row] is not None and self.pads:
                del blocks[row][stops[row] - rows.lengths[row] :]
            self.pace.learn(drafted, min(kept, drafted))
            self.drafted[row, :drafted] += 1
            self.accepted[row, : min(kept, len(blocks[row]))] += 1
        self.pace.forget()
        self.write(blocks, count + 1)

        if self.fresh_BQD is None:
            self.fresh_BQD, self.fresh_starts = self.states_BQD, list(rows.lengths)
            self.grown = [max(1, len(block)) for block in blocks]
        else:
            self.fresh_BQD = torch.cat([self.fresh_BQD, self.states_BQD[:, :1]], dim=1)
            self.grown = [new + 1 for new in self.grown]
        for row in range(batch):
            if not rows.active[row]:
                continue
            rows.lengths[row] += len(blocks[row])
            rows.seen[row] = rows.lengths[row] - 1
            rows.stops[row] = stops[row] if rows.stops[row] is None else rows.stops[row]
            rows.active[row] = rows.lengths[row] < self.limit and not (self.pads and rows.stops[row] is not None)
        self.stream()

    def write(self, blocks: list[list[int]], width: int) -> None:
        """The tokens of each block behind its row, padding behind them over what is left of the drafts."""
        rows = self.rows
        padded = [block + [rows.pad] * (width - len(block)) for block in blocks]
        tokens_BQ = torch.tensor(padded, device=rows.sequences_BS.device)
        Columns(rows.lengths, width, tokens_BQ.device).put(rows.sequences_BS, tokens_BQ)

    def find_stops(self, blocks: list[list[int]]) -> list[int | None]:
        """The length at which each row stops within its block of new tokens, None where it does not."""
        rows = self.rows
        stops: list[int | None] = []
        for length, block in zip(rows.lengths, blocks, strict=True):
            ends = [length + place + 1 for place, token in enumerate(block) if token in self.eos]
            ends += [self.limit] if length + len(block) >= self.limit and block else []
            stops.append(min(ends, default=None))
        if self.criteria:
            self.write(blocks, max(map(len, blocks)))
            scores = None if self.scores is None else tuple(self.scores)
            grown = zip(rows.lengths, blocks, strict=True)
            for length in sorted({first + place + 1 for first, block in grown for place in range(len(block))}):
                told = self.criteria(rows.sequences_BS[:, :length], scores and scores[: length - self.first_length])
                for row, stop in enumerate(told.tolist()):
                    inside = rows.lengths[row] < length <= rows.lengths[row] + len(blocks[row])
                    earliest = stops[row]
                    if stop and inside and (earliest is None or length < earliest):
                        stops[row] = length
        return stops

    def record(self, logits_BQV: torch.Tensor, scores_BQV: torch.Tensor) -> None:
        """Keeps scores and logits for the output, by the place of the token they are for."""
        for kept, new_BQV in ((self.scores, scores_BQV), (self.logits, logits_BQV)):
            if kept is None:
                continue
            for row, seen in enumerate(self.rows.seen):
                for step in range(new_BQV.shape[1]):
                    place = seen + 1 + step - self.first_length
                    while len(kept) <= place:
                        kept.append(torch.zeros_like(new_BQV[:, 0]))
                    kept[place][row] = new_BQV[row, step]

    @property
    def length(self) -> int:
        """Of the sequences once all rows have stopped."""
        return max(stop for stop in self.rows.stops if stop is not None)

    def unfinished(self) -> bool:
        rows = self.rows
        return None in rows.stops or (not self.pads and min(rows.lengths) < self.length)

    def stream(self) -> None:
        """A token of every row at a time, as soon as the slowest has it."""
        if self.streamer is None:
            return
        rows = self.rows
        waiting = [length for length, stop in zip(rows.lengths, rows.stops, strict=True) if stop is None]
        ready = min(waiting) if waiting else self.length
        if not self.pads:
            ready = min(ready, *rows.lengths)
        for place in range(self.streamed, ready):
            self.streamer.put(rows.sequences_BS[:, place].cpu())
        self.streamed = max(self.streamed, ready)

    @contextmanager
    def rows_paced(self) -> Iterator[None]:
        """Within, the user's cache lets rows grow at their own pace; behind, it is as plain decoding leaves it, or,
        after an exception, holds what all rows have."""
        self.cache = RowCache(self.user_cache, self.room + self.prompt.offset)
        length = None
        try:
            yield
            length = self.length - 1
        finally:
            self.cache.release((min(self.rows.seen) if length is None else length) + self.prompt.offset)

    def pad_cache(self) -> None:
        """Rows that were done early get the padding behind them into the cache, as in plain decoding, if anybody is
        going to see it."""
        rows, start = self.rows, min(self.rows.seen)
        returned = self.config.return_dict_in_generate or getattr(self.user_cache, "_is_user_defined", False)
        if not returned or start >= self.length - 1:
            return
        rows.seen = [start] * len(rows.seen)
        logits_BQV = self.forward(rows.seen, self.length - 1 - start)
        if self.scores is not None or self.logits is not None:
            logits_BQV = logits_BQV.to(rows.sequences_BS.device, torch.float32)
            places = [start + 1] * len(rows.seen)
            self.record(logits_BQV, process_scores(rows.processors, rows.sequences_BS, places, logits_BQV))
        rows.seen = [self.length - 1] * len(rows.seen)

    def output(self) -> SpeculativeOutput | torch.Tensor:
        if self.streamer is not None:
            self.streamer.end()
        sequences_BS = self.rows.sequences_BS[:, : self.length].clone()
        if not self.config.return_dict_in_generate:
            return sequences_BS
        steps, deepest = self.length - self.first_length, int((self.drafted.sum(0) > 0).sum())
        return SpeculativeOutput(
            sequences=cast(torch.LongTensor, sequences_BS),
            scores=None if self.scores is None else tuple(self.scores[:steps]),  # type: ignore[arg-type]  # annotated there as a tuple of one
            logits=None if self.logits is None else tuple(self.logits[:steps]),  # type: ignore[arg-type]
            past_key_values=self.user_cache,
            drafted=self.drafted[:, :deepest],
            accepted=self.accepted[:, :deepest],
            rounds=self.rounds,
        )


def check_speculation(model: Any, generation_config: GenerationConfig, mode_kwargs: dict[str, Any]) -> None:
    """Raises:
    ValueError: where `use_mtp=True` cannot be, or cannot be lossless.
    """
    config, out = model.config, "or pass `use_mtp=False`"
    if not config.num_nextn_predict_layers:
        raise ValueError(
            "`use_mtp=True` drafts with MTP modules, and this model has none (`num_nextn_predict_layers=0`); load a "
            f"checkpoint that has them, {out}"
        )
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(f"`use_mtp=True` cannot go with beam search (num_beams={generation_config.num_beams}); {out}")
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "assistant_ensemble_weight", "dola_layers"):
        if getattr(generation_config, name, None) is not None:
            raise ValueError(f"`use_mtp=True` cannot go with `{name}`: both say how to draft; leave one out, {out}")
    if mode_kwargs.get("assistant_model") is not None:
        raise ValueError(f"`use_mtp=True` cannot go with `assistant_model`: drafts come from one of them; {out}")
    if generation_config.guidance_scale not in (None, 1):
        raise ValueError(
            "`use_mtp=True` cannot go with classifier-free guidance "
            f"(guidance_scale={generation_config.guidance_scale}), which runs a second sequence of its own; {out}"
        )
    if mode_kwargs.get("synced_gpus"):
        raise ValueError(
            "`use_mtp=True` needs a different number of passes in each process, and `synced_gpus` (FSDP, ZeRO-3) the "
            f"same; {out}"
        )
    if generation_config.use_cache is False:
        raise ValueError(f"`use_mtp=True` needs a cache; leave `use_cache=False` out, {out}")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, False):
            raise ValueError(f"`use_mtp=True` runs several tokens in a pass and has no `{name}` for each; {out}")
    if is_flash(config._attn_implementation) and config.mla_path == "expanded":
        raise ValueError(
            "`use_mtp=True` needs the absorbed path under flash attention, whose kernels take no rows at their own "
            f"pace; set `mla_path='auto'`, {out}"
        )


def speculate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **model_kwargs: Any,
) -> SpeculativeOutput | torch.Tensor:
    """The decoding method behind `generate(use_mtp=True)`, with the arguments and results of transformers' own.

    `generation_config.num_assistant_tokens` bounds the drafts of a round; how many there are follows from how many
    were kept so far (`Pace`).
    """
    stateful = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
    for processor in logits_processor:
        if isinstance(processor, stateful):
            raise ValueError(
                f"`use_mtp=True` cannot go with {type(processor).__name__}, which counts its calls: positions that are "
                "rejected would count as well; pass `use_mtp=False`"
            )
    check_rows_can_be_paced(model_kwargs.get("past_key_values"))
    run = Speculation(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
    run.settle(run.prefill(), 0)
    with run.rows_paced():
        while run.unfinished():
            count = run.draft()
            run.settle(run.verify(count), count)
        run.pad_cache()
    return run.output()
