"""Continuous batching: pages that hold latents, and which rows of them the tokens of a batch attend to.

transformers' continuous batching packs new tokens of many requests into one row and keeps what they attend to in pages
of one memory. It sizes a page for keys and values of `num_key_value_heads` heads; `LatentBatchingManager` shows it one
head of half a latent, so that a page's bytes are, token by token, the C values of the normalised latent and the R of
the rotated shared key, and nothing else. Its scheduler, prefix sharing, forks and offloading move pages without
knowing what is in them. `config.head_dim` stays what the model's other readers expect.

`paged_batch` turns what it hands to the model into groups of requests of about one length; `mla` attends group by
group, so that no request is compared with another's tokens.

Legend: T packed new tokens, n requests of a group, Q new tokens and S attended ones of its longest, C kv_lora_rank,
R qk_rope_head_dim.
"""

import copy
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import (
    ContinuousBatchingManager,
    ContinuousMixin,
    PagedAttentionCache,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.continuous_batching.utils import WorkloadHints, drain_queue
from transformers.utils import logging

from .configuration_deepseek import DeepseekConfig

logger = logging.get_logger(__name__)

# Whether the one who starts a manager does nothing but wait for its results, and may as well work for them.
CALLER_WAITS = ContextVar("CALLER_WAITS", default=False)

# A group takes in one more request while padding all to its longest keeps the scores to compute under this multiple
# of the wanted ones, or under so many more: a group of its own costs about as much as that. And while all heads'
# scores are no more than MAX_SCORES.
MAX_PADDING = 1.1
FREE_SCORES = 512
MAX_SCORES = 2**26

# Tokens in the pages of a server on a CPU, where its settings do not say: 4.6 GB for V3 in bfloat16.
CPU_TOKENS = 2**16

# Logits processors that transformers has not marked as fit for continuous batching, and that are functions of the
# logits alone. The others see the last token where they expect the whole sequence.
POINTWISE_PROCESSORS = {
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TypicalLogitsWarper",
}


@dataclass(frozen=True)
class Group:
    """Requests that attend together, the shorter ones padded with copies of their last token."""

    tokens_nQ: torch.Tensor  # place of each new token in the packed row
    rows_nS: torch.Tensor | None  # rows of the pages; None where the new tokens are all there is to attend to
    mask: torch.Tensor | None  # (n, 1, Q, S), True for "attend"; None for causal, or for all of S where Q is 1


@dataclass(frozen=True)
class PagedBatch:
    """One step of continuous batching, the same for every layer."""

    cache: PagedAttentionCache
    write_T: torch.Tensor  # row of the pages of each packed token
    groups: tuple[Group, ...]
    places_T: torch.Tensor  # place of each packed token among the padded tokens of all groups in turn

    def pages(self, layer_idx: int) -> torch.Tensor:
        """The memory of all pages from this layer's first on, one row of C + R values for each token. Rows are counted
        from there, so that a token has the same number in each layer."""
        allocator = self.cache.layer_to_allocator[layer_idx]
        rows = allocator.cache_tensor.flatten(1)
        return rows[allocator.layer_indices.index(layer_idx) * allocator.tokens_per_page :]


def group_by_length(lengths: Sequence[tuple[int, int]], max_scores: int = MAX_SCORES) -> list[list[int]]:
    """Numbers of requests with (Q, S) new and attended tokens, in groups whose padding is worth it and which compare no
    more than `max_scores` pairs of tokens.

    Requests with one new token, whole prompts, and tokens behind cached ones do not mix.

    >>> group_by_length([(1, 90), (1, 100), (200, 200), (1, 4000), (8, 208)])
    [[0, 1], [3], [2], [4]]
    """
    kinds: tuple[list[int], ...] = ([], [], [])
    for number, (q, s) in enumerate(lengths):
        if q:
            kinds[0 if q == 1 else 1 if q == s else 2].append(number)
    groups: list[list[int]] = []
    for members in kinds:
        group: list[int] = []
        wanted = longest_q = 0
        for number in sorted(members, key=lambda number: lengths[number][::-1]):
            q, s = lengths[number]  # s is the longest so far
            padded, needed = (len(group) + 1) * max(longest_q, q) * s, wanted + q * s
            if group and (padded > max(needed * MAX_PADDING, needed + FREE_SCORES) or padded > max_scores):
                groups.append(group)
                group, wanted, longest_q = [], 0, 0
            group.append(number)
            wanted, longest_q = wanted + q * s, max(longest_q, q)
        if group:
            groups.append(group)
    return groups


def paged_batch(config: DeepseekConfig, arguments: dict[str, Any]) -> PagedBatch:
    """The groups of one step, from the keyword arguments that transformers' manager passes to the model."""
    cache: PagedAttentionCache = arguments["cache"]
    ((layer_type, allocator),) = cache.cache_allocators.items()
    q_bounds = arguments["cu_seq_lens_q"].tolist()
    s_bounds = arguments["cu_seq_lens_k"][layer_type].tolist()
    q_lengths = [end - start for start, end in pairwise(q_bounds)]
    s_lengths = [end - start for start, end in pairwise(s_bounds)]
    read = _rows(arguments["read_index"][0], allocator.tokens_per_page)
    write_T = _rows(arguments["write_index"][0], allocator.tokens_per_page)
    device = write_T.device
    # Kernels need no causal mask where nothing is cached, attention written out does.
    causal = config._attn_implementation not in (None, "eager", "paged|eager")

    groups, place, first_place = [], 0, [0] * len(q_lengths)
    members_of = group_by_length(list(zip(q_lengths, s_lengths, strict=True)), MAX_SCORES // config.num_attention_heads)
    for members in members_of:
        columns = [[column[number] for number in members] for column in (q_bounds, q_lengths, s_bounds, s_lengths)]
        longest_q, longest_s = max(columns[1]), max(columns[3])
        for row, number in enumerate(members):
            first_place[number] = place + row * longest_q
        place += len(members) * longest_q

        q_start, q_count, s_start, s_count = torch.tensor(columns, device=device).unsqueeze(-1)
        arange_Q, arange_S = torch.arange(longest_q, device=device), torch.arange(longest_s, device=device)
        cached = columns[1] != columns[3]
        rows_nS = read[s_start + torch.minimum(arange_S, s_count - 1)] if cached else None
        needs_mask = cached or not causal if longest_q > 1 else len(set(columns[3])) > 1
        mask = None
        if needs_mask:
            last_nQ = s_count - q_count + arange_Q
            mask = (arange_S <= last_nQ.unsqueeze(-1)).unsqueeze(1)
        groups.append(Group(q_start + torch.minimum(arange_Q, q_count - 1), rows_nS, mask))

    shifts = [place - start for place, start in zip(first_place, q_bounds[:-1], strict=True)]
    shift_T = torch.tensor(shifts, device=device).repeat_interleave(torch.tensor(q_lengths, device=device))
    return PagedBatch(cache, write_T, tuple(groups), torch.arange(len(write_T), device=device) + shift_T)


def _rows(index: torch.Tensor, page_size: int) -> torch.Tensor:
    """transformers counts a token's place in rows of half the width, with a page of values behind each of keys."""
    in_page = index % page_size
    return (index - in_page) // 2 + in_page


def page_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """What the memory of pages is sized by, in place of the model's configuration: one key and one value head, each
    half a latent wide (one value is left over where C + R is odd), and the activations that our attention has.

    The name of the attention says to transformers what is true of ours: no mask is read, so none is allocated, and of
    the pages read no head has a copy of its own.
    """
    view = copy.copy(config)
    view.num_key_value_heads = 1
    view.head_dim = (config.kv_lora_rank + config.qk_rope_head_dim + 1) // 2
    # A new token has a query, a key and a value a head where keys are expanded; transformers counts the query.
    per_head = 2 * config.qk_head_dim + config.v_head_dim
    view.num_attention_heads = -(-config.num_attention_heads * per_head // view.head_dim)
    view._attn_implementation = "flash on latents"
    return view


class WaitingCaller:
    """In place of the manager's thread: the thread that waits for results takes the steps itself. On a CPU each thread
    has a team of OpenMP's own, and two teams on the same cores wait for each other at each product: a small model is
    more than twice as slow in a second thread."""

    def __init__(self) -> None:
        self.alive = True

    def is_alive(self) -> bool:
        return self.alive

    def join(self, timeout: float | None = None) -> None:
        self.alive = False


class LatentBatchingManager(ContinuousBatchingManager):
    """transformers' manager, with pages of latents and without the paths that would read them as keys and values.

    Raises:
        ValueError: for what it cannot honour, which transformers would leave out with a warning or without.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        workload_hints: WorkloadHints | None = None,
    ):
        settings = copy.deepcopy(continuous_batching_config)
        _refuse(model, generation_config, settings)
        self.asked_for = _asked_for(generation_config, settings)
        # The decoding fast path reads pages of keys; graphs replay one grouping of requests for all.
        settings.max_blocks_per_request, settings.use_cuda_graph, settings.use_async_batching = 0, False, False
        self.workload_hints = workload_hints
        super().__init__(model, generation_config, settings, workload_hints)

    def add_request(  # type: ignore[override]  # what follows is passed on by keyword
        self, input_ids: list[int], request_id: str | None = None, max_new_tokens: int | None = None, **kwargs: Any
    ) -> str | None:
        """As transformers', for prompts of the vocabulary's tokens, at least one and no more than
        `max_position_embeddings`. Where nothing limits its new tokens, a text ends there as well. With a limit it may
        grow beyond, as with `generate`: servers ask for 1,024 tokens where a client says nothing."""
        check_request(self.model.config, input_ids, 0)
        if max_new_tokens is None and self.generation_config.max_new_tokens is None:
            max_new_tokens = max(1, self.model.config.max_position_embeddings - len(input_ids))
        while isinstance(self._generation_thread, WaitingCaller) and self.input_queue.full() and self.is_running():
            self._take_step()
        return super().add_request(input_ids, request_id, max_new_tokens, **kwargs)

    def start(self) -> None:
        """As transformers', but a program that ends without `stop` (a server that is interrupted) does not wait for
        the thread for ever: it is a daemon, as what a daemon starts. Within `generate_batch` there is no thread."""
        if CALLER_WAITS.get():
            with self._request_lock:
                if self.is_running():
                    raise RuntimeError(
                        "the manager that was kept by `persistent_manager=True` is at work, in another thread or in "
                        "`continuous_batching_context_manager`: call `generate_batch` when it has ended, or hand this "
                        "manager the requests by `add_requests`"
                    )
                self._generation_thread = WaitingCaller()  # type: ignore[assignment]
            self.background_thread_status.clear()
            for left_over in (self.input_queue, self.cancel_queue, self.output_router.output_queue):
                drain_queue(left_over)  # by a batch that was interrupted: these are no results of this one
            try:
                self.batch_processor, self.current_batch = self._create_batch_processor(), 0
            except BaseException:
                self._generation_thread = None
                raise
            return
        starter = threading.Thread(target=super().start, daemon=True)
        starter.start()
        starter.join()

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """As transformers'; within `generate_batch` it takes the steps that lead to the next result, however long that
        takes: to wait for a while in between would be to do nothing."""
        if isinstance(self._generation_thread, WaitingCaller):
            results = self.output_router.output_queue
            while results.empty() and self.is_running():
                self._take_step()
                # A cancelled request has no result. Of several ranks only the first knows what is still to come.
                if self.distributed_helper.tp_size == 1 and results.empty() and not self._has_requests():
                    logger.error("The requests that are left were cancelled.")
                    self._generation_thread.alive = False
            timeout = 0
        return super().get_result(request_id, timeout)

    def _has_requests(self) -> bool:
        assert self.batch_processor is not None
        return self.batch_processor.has_pending_requests() or not self.input_queue.empty()

    def _take_step(self) -> None:
        """What transformers' `_run_generation_loop` does again and again, with its ends."""
        going_on = False
        try:
            assert self.batch_processor is not None
            going_on = self._generation_loop_body(self.batch_processor, bootstrapping=False)
        except Exception as error:
            logger.error("Error in generation loop: %s", error, exc_info=True)
            self._handle_critical_error(error, self.batch_processor)
        if not going_on:
            self.background_thread_status.mark_as_stopped()
            self._generation_thread.alive = False  # type: ignore[attr-defined]

    def _generation_step(self) -> None:
        # A prompt with several samples is forked before its last token, and may have no other that is new.
        assert self.batch_processor is not None
        if self.batch_processor.inputs_and_outputs.num_q_tokens:  # type: ignore[union-attr]  # not the asynchronous one
            super()._generation_step()

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        try:
            return super()._generation_loop_body(batch_processor, bootstrapping)
        except RuntimeError as error:
            if "No requests can be scheduled" not in str(error):
                raise
        # The pages hold one request that is active, or none, and no more of it: the others need not end with it.
        scheduler = batch_processor.scheduler
        state = next(iter((scheduler.active_requests or scheduler.waiting_requests).values()))
        too_long = RuntimeError(
            f"a request needs more than the {batch_processor.cache.num_blocks} pages of "
            f"{self.continuous_batching_config.page_size} tokens that there are; raise `num_blocks` or "
            "`max_memory_percent`, or leave both out"
        )
        children = [state.fork(f"{state.request_id}__child#{number}") for number in range(state.num_children)]
        for failed in (state, *children):
            batch_processor._handle_request_error(too_long, failed)
        scheduler.finish_request(state.request_id)
        if scheduler.waiting_requests.pop(state.request_id, None) is not None:
            scheduler.waiting_requests_order.remove(state.request_id)
        scheduler.block_new_requests = False
        return True

    @torch.inference_mode(False)  # or what is made in it could not be written to outside, by the next batch
    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        # What is made here knows the model by these four alone, the configuration being what sizes the pages.
        model, settings, hints = self.model, self.continuous_batching_config, self.workload_hints
        pages = page_config(model.config)
        self.model = SimpleNamespace(  # type: ignore[assignment]
            config=pages,
            device=model.device,
            dtype=model.dtype,
            _supports_logits_to_keep=model._supports_logits_to_keep,
        )
        try:
            # transformers would fill most of a computer's memory with pages, and take its time for it: on a CPU, no
            # more than the announced requests can fill, or a number for those that are to come.
            if settings.num_blocks is None and model.device.type == "cpu":
                settings.num_blocks = -(-CPU_TOKENS // settings.page_size)
                if hints is not None:
                    blocks = -(-(hints.max_prompt_length + hints.max_generated_length) // settings.page_size)
                    settings.num_blocks = max(1, hints.num_requests * blocks)
                try:
                    return super()._create_batch_processor()
                except MemoryError:  # raised before anything is allocated: as many as fit
                    settings.num_blocks = None
            return super()._create_batch_processor()
        except BaseException:
            if self._original_attn_impl is not None:  # `stop`, which would see to it, is not called
                model.set_attn_implementation(self._original_attn_impl)
                self._original_attn_impl = None
            raise
        finally:
            self.model = model


class LatentBatching(ContinuousMixin):
    """Continuous batching of a causal language model: `generate_batch` and what `transformers serve` calls."""

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: WorkloadHints | None = None,
    ) -> ContinuousBatchingManager:
        """As transformers', with `LatentBatchingManager`, and with what `generation_config` leaves open taken from the
        model's own, as `generate` does.

        Raises:
            ValueError: where a manager was kept (`persistent_manager=True`) and these settings are not its own.
        """
        generation_config, _ = self._prepare_generation_config(generation_config)  # type: ignore[attr-defined]
        self._prepare_special_tokens(generation_config, device=self.device)  # type: ignore[attr-defined]
        if generation_config.eos_token_id is None:
            generation_config.eos_token_id = -1  # or the manager would take that of the configuration
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        if isinstance(kept, LatentBatchingManager):
            asked = _asked_for(generation_config, continuous_batching_config)
            if changed := sorted(name for name in asked if asked[name] != kept.asked_for[name]):
                raise ValueError(
                    f"the manager that was kept by `persistent_manager=True` has another {', '.join(changed)}, and "
                    "would go on with it: call `destroy_cached_continuous_batching_manager()` first"
                )
            return super().init_continuous_batching()
        settings = continuous_batching_config or ContinuousBatchingConfig()
        return LatentBatchingManager(self, generation_config, settings, workload_hints)

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        **kwargs: Any,
    ) -> dict[str, GenerationOutput]:
        """Generates for many prompts (lists of token ids, without padding) at once: each takes part for as long as it
        lasts, and the next takes its place. Greedy tokens are those of `generate`, which also names the keywords.

        Returns:
            By request, in the order of `inputs` (with `num_return_sequences`, those of a prompt behind each other):
            `prompt_ids`, `generated_tokens` and more.

        Raises:
            ValueError: for what cannot be honoured: beams, logits processors that look at earlier tokens, ...
            GenerationBatchError: if requests failed; it holds the results of the others.
        """
        for prompt in inputs:
            if isinstance(prompt, str | int):
                raise TypeError(f"`generate_batch` takes prompts that are lists of token ids, got {prompt!r}")
        prompts = [prompt.tolist() if isinstance(prompt, torch.Tensor) else list(prompt) for prompt in inputs]
        generation_config, unknown = self._prepare_generation_config(generation_config, **kwargs)  # type: ignore[attr-defined]
        if unknown:
            raise TypeError(f"generate_batch() got unexpected keywords {sorted(unknown)}")
        if generation_config.max_new_tokens is None:
            if generation_config.max_length != 20:
                raise ValueError(
                    f"`generate_batch` counts new tokens only, got max_length={generation_config.max_length}; pass "
                    "`max_new_tokens`"
                )
            generation_config.max_new_tokens = 20  # as `generate`, which has no other limit by default
        for prompt in prompts:
            check_request(self.config, prompt, generation_config.max_new_tokens)  # type: ignore[attr-defined]
        was_training = self.training  # type: ignore[attr-defined]
        waiting = CALLER_WAITS.set(True)
        try:
            results = super().generate_batch(
                prompts,
                generation_config,
                continuous_batching_config,
                record_timestamps=record_timestamps,
                progress_bar=progress_bar,
                persistent_manager=persistent_manager,
                warmup=warmup,
            )
        finally:
            CALLER_WAITS.reset(waiting)
            self.train(was_training)  # type: ignore[attr-defined]  # the manager has switched to evaluation
        failed = {name: result.error for name, result in results.items() if result.error is not None}
        wanted = len(prompts) * (generation_config.num_return_sequences or 1)
        if failed or len(results) < wanted:
            first = next(iter(failed.values()), "the generation loop ended before they were done; its log says why")
            raise GenerationBatchError(
                f"{wanted - len(results) + len(failed)} of {wanted} requests failed: {first}",
                {name: result for name, result in results.items() if result.error is None},
            )
        return results


class RequestError(ValueError):
    """A request that no model of this configuration can serve."""


class GenerationBatchError(RuntimeError):
    """Requests of a batch failed. `results` holds those of the others, by request."""

    def __init__(self, message: str, results: dict[str, GenerationOutput]):
        super().__init__(message)
        self.results = results


def _asked_for(generation_config: GenerationConfig, settings: ContinuousBatchingConfig | None) -> dict[str, Any]:
    """What a manager keeps to, by name: the settings as they were given, and all of the generation configuration but
    the length, which comes with each request."""
    asked_for = dict(vars(copy.deepcopy(settings))) if settings else {}
    for name, value in generation_config.to_dict().items():
        if name != "max_new_tokens" and not name.startswith("_"):  # not what `generate` notes there for itself
            asked_for[name] = value
    return asked_for


def check_request(config: PreTrainedConfig, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raises `RequestError` for a prompt that is empty, has a token that is none, or is longer, with its new tokens,
    than the model's positions: at the latest in the middle of a batch, it would end the others with it."""
    if not prompt:
        raise RequestError("a prompt has no token; begin it with `bos_token_id`")
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise RequestError(f"a prompt has the token {token}; the vocabulary ends with {config.vocab_size - 1}")
    length, limit = len(prompt) + max_new_tokens, config.max_position_embeddings
    if length > limit:
        raise RequestError(
            f"a prompt of {len(prompt)} tokens with {max_new_tokens} new ones exceeds `max_position_embeddings` {limit}"
            ": shorten it, or lower `max_new_tokens`"
        )


def _refuse(model: Any, generation_config: GenerationConfig, settings: ContinuousBatchingConfig) -> None:
    """Raises `ValueError` for settings that would be ignored, or that read pages as keys and values."""
    if hasattr(model, "_pp_stage"):
        raise ValueError(
            "continuous batching needs all layers on each rank, and pp_size > 1 parts them: spread the model by "
            "tp_size and ep_size, or use `generate`"
        )
    for name, value in {
        "use_cuda_graph": any(settings.cuda_graph_booleans),
        "use_async_batching": settings.use_async_batching,
        "varlen_compile_config": settings.varlen_compile_config,
        "decode_compile_config": settings.decode_compile_config,
        "default_compile_level": settings.default_compile_level,
    }.items():
        if value:
            raise ValueError(
                f"`{name}` cannot run on pages of latents, whose requests are grouped anew at each step: leave it out"
            )
    for name, ignored in {
        "num_beams": (generation_config.num_beams or 1) > 1,
        "stop_strings": generation_config.stop_strings,
        "max_time": generation_config.max_time,
        "prompt_lookup_num_tokens": generation_config.prompt_lookup_num_tokens,
    }.items():
        if ignored:
            raise ValueError(
                f"continuous batching has no `{name}` (got {getattr(generation_config, name)!r}); leave it out, or use "
                "`generate`"
            )
    for processor in model._get_logits_processor(generation_config, input_ids_seq_length=1):
        name = type(processor).__name__
        if not processor.supports_continuous_batching and name not in POINTWISE_PROCESSORS:
            raise ValueError(
                f"continuous batching cannot apply {name}, which looks at more than the logits at hand; leave out the "
                "setting of the generation configuration that asks for it, or use `generate`"
            )
