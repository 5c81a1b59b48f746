"""Lossless self-speculation: `generate(use_mtp=True)` drafts tokens with the MTP modules (V3 2.2; `drafting.py`) and
verifies them in one forward pass of the model.

    prefill -> first token -> [ draft k tokens -> verify them -> keep those that the model itself would have drawn ] ...

A round ends with one more token than drafts were kept: the model's own choice behind the last of them. Rows of a batch
keep different numbers and go on at their own pace (`row_cache.py`). What comes out is distributed exactly as without
drafts (Leviathan et al., arXiv 2211.17192, theorem 1), and with greedy decoding it is the same tokens.

Legend: B batch, S tokens or columns, Q tokens of one forward pass, K drafts, D hidden size, V vocabulary.
"""

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
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .drafting import Drafter, Pace, Prompt, Rows, round_costs
from .mla import is_flash
from .row_cache import Columns, RowCache, check_rows_can_be_paced, row_bound

# While drafts do not pay, states that the modules have not seen wait for each other, up to so many of a row.
MOST_WAITING = 32


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
        eos = {
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
        config = model.config
        most = max(0, min(generation_config.num_assistant_tokens, self.limit - input_ids.shape[1] - 1))
        self.room = self.limit + most + 1
        self.prompt.make_room(self.room + self.prompt.offset)
        modules = list(model.stack.layers[config.num_hidden_layers :])
        modules = modules[: min(len(modules), most, self.prompt.length - self.prompt.first)]
        self.drafter = Drafter(model, modules, self.prompt, self.room + self.prompt.offset)
        self.rows = Rows(input_ids, processors, generation_config, self.room, eos)
        # Plain decoding pads rows that are done only if some criterion knows of an end token.
        self.rows.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        batch = len(input_ids)
        self.pace = Pace(round_costs(model, modules, batch, most if modules else 0), len(modules))
        self.drafted = torch.zeros(batch, most, dtype=torch.int64)
        self.accepted = torch.zeros(batch, most, dtype=torch.int64)
        # What the modules have not seen yet: states from the token before `fresh_starts` on, and the tokens since.
        self.fresh_BQD: torch.Tensor | None = None
        self.fresh_starts: list[int] = []
        self.grown: list[int] = []
        self.rounds = 0
        self.first_length = self.judged = input_ids.shape[1]  # see `catch_up`
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
        if count == 0 and min(self.grown) == max(self.grown) < MOST_WAITING:
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
        rows = self.rows
        logits_BQV = logits_BQV.to(rows.sequences_BS.device, torch.float32)
        scores_BQV = rows.scores(logits_BQV, [seen + 1 for seen in rows.seen])
        drafts_BK = Columns(rows.lengths, count, rows.sequences_BS.device).take(rows.sequences_BS)
        if rows.do_sample:
            draft_probs_BKV = torch.stack(rows.draft_probs, dim=1) if count else None
            kept_B, tokens_BQ = keep_sampled(scores_BQV.softmax(dim=-1), drafts_BK, draft_probs_BKV)
        else:
            kept_B, tokens_BQ = keep_greedy(scores_BQV, drafts_BK)
        self.record(logits_BQV, scores_BQV)
        table = torch.cat([kept_B[:, None], tokens_BQ], dim=1).tolist()  # the one wait for the device in a round

        blocks = [
            self.cut(tokens[: min(kept + 1, self.limit - length)]) if active else []
            for (kept, *tokens), length, active in zip(table, rows.lengths, rows.active, strict=True)
        ]
        self.write(blocks, count + 1)
        if self.fresh_BQD is None:
            self.fresh_BQD, self.fresh_starts = self.states_BQD, list(rows.lengths)
            self.grown = [max(1, len(block)) for block in blocks]
        else:
            self.fresh_BQD = torch.cat([self.fresh_BQD, self.states_BQD[:, :1]], dim=1)
            self.grown = [new + 1 for new in self.grown]
        before = list(rows.lengths)
        for row, block in enumerate(blocks):
            if not block:
                rows.seen[row] = min(rows.seen[row] + count + 1, self.limit - 1)
                continue
            rows.lengths[row] += len(block)
            rows.seen[row] = rows.lengths[row] - 1
            if rows.lengths[row] == self.limit or block[-1] in rows.eos:
                rows.stop(row, rows.lengths[row])
            rows.active[row] = rows.active[row] and rows.lengths[row] < self.limit
        self.catch_up()

        for row, (kept, *_) in enumerate(table):
            if blocks[row]:
                drafted = min(count, self.limit - before[row] - 1)
                self.pace.learn(drafted, min(kept, drafted))
                self.drafted[row, :drafted] += 1
                self.accepted[row, : min(kept, drafted, max(0, rows.lengths[row] - before[row]))] += 1
        self.pace.forget()

    def cut(self, block: list[int]) -> list[int]:
        """A row's new tokens, up to one that ends it."""
        end = next((place for place, token in enumerate(block) if token in self.rows.eos), len(block))
        return block[: end + 1]

    def write(self, blocks: list[list[int]], width: int) -> None:
        """The tokens of each block behind its row, padding behind them over what is left of the drafts."""
        rows = self.rows
        padded = [block + [rows.pad] * (width - len(block)) for block in blocks]
        tokens_BQ = torch.tensor(padded, device=rows.sequences_BS.device)
        Columns(rows.lengths, width, tokens_BQ.device).put(rows.sequences_BS, tokens_BQ)

    def catch_up(self) -> None:
        """What plain decoding does behind each token, for the lengths that all rows have come to meanwhile: hands the
        token to the streamer and asks the criteria, which see the rows as there. A row that was ahead loses what lies
        behind its stop."""
        rows = self.rows
        while self.judged < self.ready():
            self.judged += 1
            if self.streamer is not None:
                self.streamer.put(rows.sequences_BS[:, self.judged - 1].cpu())
            if self.criteria:
                scores = None if self.scores is None else tuple(self.scores[: self.judged - self.first_length])
                told = self.criteria(rows.sequences_BS[:, : self.judged], scores).tolist()
                for row, stop in enumerate(told):
                    if stop:
                        rows.stop(row, self.judged)

    def ready(self) -> int:
        """The length that all rows have, those that are done with padding."""
        rows = self.rows
        going = [length for length, stop in zip(rows.lengths, rows.stops, strict=True) if stop is None or not rows.pads]
        return min(going if None in rows.stops else [*going, self.length])

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
        return None in self.rows.stops or self.judged < self.length

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
            self.record(logits_BQV, rows.scores(logits_BQV, [start + 1] * len(rows.seen)))
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
    most = generation_config.num_assistant_tokens
    if not isinstance(most, int) or most < 0:
        raise ValueError(f"`num_assistant_tokens` bounds the drafts of a round, so it is 0 or more; got {most!r}")
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
    if (
        getattr(model.prepare_inputs_for_generation, "__func__", None)
        is not GenerationMixin.prepare_inputs_for_generation
    ):
        raise ValueError(
            "`use_mtp=True` prepares the inputs itself and would ignore this model's own "
            f"`prepare_inputs_for_generation` (PEFT's prompt tuning sets one); {out}"
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
