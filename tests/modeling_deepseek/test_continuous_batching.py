"""Continuous batching: the tokens of `generate`, from pages that hold latents and nothing else."""

import contextlib
import gc
import json
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
)
from transformers.generation.continuous_batching.cache import PagedAttentionCache, PagedAttentionMemoryHandler
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

from modeling_deepseek import GenerationBatchError
from modeling_deepseek.paged import group_by_length
from tests.tiny import tiny_config, tiny_model, tokens

TEACHER = Path(__file__).parents[2] / "recipes/tiny_teacher"
# So many of the 256 tokens end a text that texts have all lengths.
GREEDY = GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=list(range(200, 212)), pad_token_id=0)
SMALL_PAGES = {"page_size": 16, "num_blocks": 64}


def ragged(count: int = 7, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens, in no order."""
    noise = random.Random(seed)
    lengths = [1, 2, longest, *(noise.randint(3, longest) for _ in range(count - 3))]
    noise.shuffle(lengths)
    return [tokens(1, length, seed=seed * 1000 + number)[0].tolist() for number, length in enumerate(lengths)]


def padded_generate(model, prompts: list[list[int]], config: GenerationConfig = GREEDY) -> list[list[int]]:
    """What `generate` adds to each prompt in one batch, padded on the left, up to the first token that ends a text."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    last = [next((place for place, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[: place + 1] for row, place in zip(rows, last, strict=True)]


def batched(model, prompts: list[list[int]], config: GenerationConfig = GREEDY, **settings) -> list[list[int]]:
    """What `generate_batch` adds to each prompt."""
    results = model.generate_batch(prompts, config, ContinuousBatchingConfig(**{**SMALL_PAGES, **settings}))
    assert [result.prompt_ids for result in results.values()] == prompts
    return [result.generated_tokens for result in results.values()]


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> Iterator[None]:
    """transformers collects garbage several times a batch, among all that the test run has imported: half a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def seen(monkeypatch) -> dict:
    """What became of the caches made in this test: the objects, tokens found in shared pages, requests put back."""
    seen: dict = {"caches": [], "shared": 0, "offloads": 0}
    init, search = PagedAttentionCache.__init__, PagedAttentionCache.search_prefix_match
    offload = OffloadingManager.offload_requests

    def spy_init(self, *args, **kwargs):
        seen["caches"].append(self)
        init(self, *args, **kwargs)

    def spy_search(self, *args):
        found = search(self, *args)
        seen["shared"] += found
        return found

    def spy_offload(self):
        waiting = len(self.scheduler.waiting_requests)
        done = offload(self)
        seen["offloads"] += len(self.scheduler.waiting_requests) - waiting
        return done

    monkeypatch.setattr(PagedAttentionCache, "__init__", spy_init)
    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", spy_search)
    monkeypatch.setattr(OffloadingManager, "offload_requests", spy_offload)
    return seen


# The tokens of `generate`.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["v2", "v3"])
def test_ragged_prompts_get_the_tokens_of_generate(family, attention):
    model, prompts = tiny_model(family, attn_implementation=attention), ragged()
    expected = padded_generate(model, prompts)
    assert len({len(text) for text in expected}) > 2
    assert batched(model, prompts) == expected
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("path", ["expanded", "absorbed"])
def test_both_paths_of_attention(path):
    """On whole prompts, on chunks behind cached tokens, and on single tokens."""
    model, prompts = tiny_model(), ragged()
    expected = padded_generate(model, prompts)
    model.config.mla_path = path
    assert batched(model, prompts, max_batch_tokens=24) == expected


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_few_pages_send_requests_back_to_the_queue(family, seen):
    """Eight pages of 16 tokens hold a long request and a short one: the others wait, and some begin again."""
    model, prompts = tiny_model(family), ragged()
    config = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=250, pad_token_id=0)
    expected = padded_generate(model, prompts, config)
    assert batched(model, prompts, config, num_blocks=8, safety_margin=0.0) == expected
    assert seen["offloads"] > 0


def test_prompts_longer_than_a_batch_come_in_chunks():
    model, prompts = tiny_model(), ragged(longest=90)
    expected = padded_generate(model, prompts)
    for budget in (7, 32):
        assert batched(model, prompts, max_batch_tokens=budget) == expected


@pytest.mark.parametrize("sharing", [True, False])
def test_shared_prefixes(sharing, seen):
    model, beginning = tiny_model(), tokens(1, 40, seed=9)[0].tolist()
    prompts = [beginning + prompt for prompt in ragged(6, 20)] + [beginning]
    expected = padded_generate(model, prompts)
    settings = {"allow_block_sharing": sharing, "max_requests_per_batch": 2}  # the first fill the pages of the others
    assert batched(model, prompts, **settings) == expected
    assert (seen["shared"] >= 32 * 4) is sharing


def test_a_cache_of_an_odd_width():
    model, prompts = tiny_model(kv_lora_rank=31), ragged(5)
    assert batched(model, prompts) == padded_generate(model, prompts)


def test_bfloat16_up_to_its_rounding():
    """Padded and packed matrix products round differently: the first tokens agree, and most of all."""
    model, prompts = tiny_model().to(torch.bfloat16), ragged()
    config = GenerationConfig(**{**GREEDY.to_dict(), "max_new_tokens": 1})
    pairs = list(zip(batched(model, prompts, config), padded_generate(model, prompts, config), strict=True))
    assert sum(ours == theirs for ours, theirs in pairs) >= len(pairs) - 1


@pytest.fixture(scope="module")
def teacher():
    """The trained model in this repository, and its prompts for questions of several lengths."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    noise = random.Random(4)
    questions = [
        "State the final answer to the following arithmetic problem: "
        + " + ".join(str(noise.randint(10, 999)) for _ in range(noise.randint(2, 6)))
        + " ="
        for _ in range(5)
    ] + [f"Spell this word backward (example: sun -> nus): {word}" for word in ("lamp", "horses", "understanding")]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True).input_ids
        for question in questions
    ]
    return model, prompts


def test_a_trained_model_on_real_prompts(teacher, seen):
    model, prompts = teacher
    config = GenerationConfig(max_new_tokens=80, do_sample=False)
    expected = padded_generate(model, prompts, GenerationConfig(**config.to_diff_dict(), eos_token_id=2))
    assert sum(text[-1] == 2 for text in expected) > len(expected) / 2
    assert batched(model, prompts, config, num_blocks=24, max_batch_tokens=64, safety_margin=0.0) == expected
    assert batched(model, prompts, config, num_blocks=None, page_size=256) == expected


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model, prompts = peft.get_peft_model(tiny_model(), config).eval(), ragged(5)
    expected = padded_generate(model, prompts)
    assert expected != padded_generate(tiny_model(), prompts)
    assert batched(model, prompts) == expected


@pytest.mark.filterwarnings("ignore")  # bitsandbytes looks for kernels that a CPU need not have
def test_weights_in_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model().save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    prompts = ragged(5)
    assert batched(model, prompts) == padded_generate(model, prompts)


def test_drafting_by_default_is_left_to_generate():
    """A checkpoint may draft with its MTP module by default; a batch has its own way, to the same tokens."""
    model, prompts = tiny_model(), ragged(5)
    expected = padded_generate(model, prompts)
    model.generation_config.use_mtp = True
    assert batched(model, prompts) == expected


# What is in the pages.


def test_pages_hold_the_latents_of_the_cache(seen, monkeypatch):
    """A page is so many rows of C + R values, those of the ordinary cache, in the order of the tokens."""
    model, prompts = tiny_model(), ragged(4)
    layers, width = model.config.num_hidden_layers, model.config.kv_lora_rank + model.config.qk_rope_head_dim
    pages, free = {}, FullAttentionCacheAllocator.free_blocks

    def keep(self, request_id, no_cache=False):
        (block,) = self.block_table[request_id]
        pages[request_id] = self._copy_view[block].view(torch.float32).view(layers, 128, width).clone()
        return free(self, request_id, no_cache)

    monkeypatch.setattr(FullAttentionCacheAllocator, "free_blocks", keep)
    batched(model, prompts, GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1), page_size=128)
    assert seen["caches"][0].cache_tensor.numel() == (64 + 2) * 128 * model.config.cache_values_per_token * 4
    for number, prompt in enumerate(prompts):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([prompt]), past_key_values=cache)
        for layer in range(layers):
            latents = torch.cat([cache.layers[layer].keys, cache.layers[layer].values], dim=-1)[0, 0]
            torch.testing.assert_close(pages[f"req_{number}"][layer, : len(prompt)], latents, atol=1e-5, rtol=1e-5)


def test_the_number_of_pages_that_fit_is_what_latents_take(seen, monkeypatch):
    """Also on a CPU, where the pages asked for are fewer unless even these do not fit."""
    available = 30 * 2**20
    monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda self: available)
    config = tiny_config()
    model = tiny_model()
    with model.continuous_batching_context_manager(
        GREEDY, continuous_batching_config=ContinuousBatchingConfig(max_batch_tokens=64, page_size=16)
    ):
        pass
    cache = seen["caches"][-1]  # the first did not fit
    per_token = config.cache_values_per_token * 4
    # Beside a token in the pages: the copy of its latent that a layer reads, and its number.
    beside = (config.kv_lora_rank + config.qk_rope_head_dim) * 4 + 8
    tokens_that_fit = cache.num_blocks * 16
    logits = 1024 * (config.vocab_size + config.hidden_size) * 4  # of as many requests as may come
    assert (available - logits) * 0.98 < tokens_that_fit * (per_token + beside) < available - logits


def test_nothing_else_sees_the_width_of_a_page():
    model = tiny_model()
    batched(model.train(), ragged(3))
    assert model.training
    assert model.config.head_dim == model.config.qk_rope_head_dim
    assert model.config.num_key_value_heads == model.config.num_attention_heads
    assert model.config.to_dict() == tiny_model().config.to_dict()


def test_groups_cover_each_request_once():
    noise = random.Random(1)
    lengths = []
    for _ in range(300):
        q = noise.choice([1, 1, noise.randint(2, 300)])
        lengths.append((q, noise.choice([q, q + noise.randint(1, 3000)])))
    groups = group_by_length(lengths, max_scores=10**6)
    assert sorted(number for group in groups for number in group) == list(range(300))
    for group in groups:
        kinds = {(q > 1, q > 1 and s > q) for q, s in (lengths[number] for number in group)}
        padded = len(group) * max(lengths[n][0] for n in group) * max(lengths[n][1] for n in group)
        wanted = sum(lengths[n][0] * lengths[n][1] for n in group)
        assert len(kinds) == 1
        assert len(group) == 1 or padded <= max(1.1 * wanted, wanted + 512)
        assert len(group) == 1 or padded <= 10**6
    assert len(groups) < 200


# Sampling, and what a generation configuration asks for.


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}])
def test_one_request_is_sampled_as_by_generate(settings):
    """Both draw one token a step from torch's generator, so that the same seed gives the same text."""
    model = tiny_model()
    config = GenerationConfig(max_new_tokens=12, do_sample=True, top_k=0, eos_token_id=250, pad_token_id=0)
    config.update(**settings)
    (prompt,) = ragged(3)[:1]
    torch.manual_seed(7)
    expected = padded_generate(model, [prompt], config)
    assert batched(model, [prompt], config, seed=7) == expected
    assert batched(model, [prompt], config, seed=8) != expected


def test_samples_of_one_prompt_follow_each_other():
    """Also for prompts all but whose last token another has left in the pages, and for those of one token."""
    model, shared = tiny_model(), tokens(1, 32, seed=9)[0].tolist()
    prompts = [*ragged(4), [*shared, 7], [*shared, 8], [*shared, 9]]
    config = GenerationConfig(max_new_tokens=5, do_sample=True, num_return_sequences=3, eos_token_id=250)
    settings = ContinuousBatchingConfig(**SMALL_PAGES, seed=3, max_requests_per_batch=1)
    results = list(model.generate_batch(prompts, config, settings).values())
    assert len(results) == 21
    for number, prompt in enumerate(prompts):
        texts = {tuple(result.generated_tokens) for result in results[3 * number : 3 * number + 3]}
        assert all(result.prompt_ids == prompt for result in results[3 * number : 3 * number + 3])
        assert len(texts) == 3
    again = model.generate_batch(prompts, config, settings)
    assert [result.generated_tokens for result in again.values()] == [result.generated_tokens for result in results]


def test_log_probabilities_are_those_of_a_forward_pass():
    model, prompts = tiny_model(), ragged(5)
    settings = ContinuousBatchingConfig(**SMALL_PAGES, return_logprobs=True)
    for result in model.generate_batch(prompts, GREEDY, settings).values():
        text = result.prompt_ids + result.generated_tokens
        logits = model(torch.tensor([text])).logits[0, len(result.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(result.generated_tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_what_is_left_open_is_taken_from_the_model():
    """transformers takes a generation configuration as it is here: without an end of text where it names none, and
    with keywords thrown away."""
    model, prompts = tiny_model(), ragged(4, 20)
    model.generation_config.eos_token_id = GREEDY.eos_token_id
    expected = padded_generate(model, prompts, GenerationConfig(**{**GREEDY.to_dict(), "max_new_tokens": 24}))
    short = [text[:20] for text in expected]
    assert short != expected
    assert batched(model, prompts, GenerationConfig(max_new_tokens=24)) == expected
    settings = ContinuousBatchingConfig(**SMALL_PAGES)
    for results, texts in (
        (model.generate_batch(prompts, continuous_batching_config=settings, max_new_tokens=24), expected),
        (model.generate_batch(prompts, continuous_batching_config=settings), short),
        (model.generate_batch([torch.tensor(prompt) for prompt in prompts], max_new_tokens=24), expected),
    ):
        assert [result.generated_tokens for result in results.values()] == texts
    assert model.generate_batch([]) == {}


# Errors.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 1.2}, "RepetitionPenalty"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
        ({"min_new_tokens": 5}, "MinNewTokens"),
        ({"num_beams": 2}, "num_beams"),
        ({"stop_strings": ["."]}, "stop_strings"),
        ({"max_length": 100, "max_new_tokens": None}, "max_new_tokens"),
    ],
)
def test_what_would_be_ignored_is_refused(settings, message):
    config = GenerationConfig(**{**GREEDY.to_diff_dict(), **settings})
    with pytest.raises(ValueError, match=message):
        batched(tiny_model(), ragged(3), config)


@pytest.mark.parametrize("name", ["use_cuda_graph", "use_async_batching", "default_compile_level"])
def test_what_pages_of_latents_cannot_do_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` cannot run on pages of latents"):
        batched(tiny_model(), ragged(3), **{name: True})


def test_an_attention_that_cannot_be_paged_is_refused():
    with pytest.raises(ValueError, match=r"flex_attention is not supported.*'paged\|eager', 'sdpa'"):
        batched(tiny_model(attn_implementation="flex_attention"), ragged(3))


def test_a_request_that_cannot_be_is_refused_before_any_runs():
    model = tiny_model()
    with pytest.raises(ValueError, match="`max_position_embeddings` 512"):
        batched(model, [[5] * 497, [5]])
    with pytest.raises(ValueError, match="no token"):
        batched(model, [[5], []])
    for token in (256, -1):
        with pytest.raises(ValueError, match=rf"the token {token}; the vocabulary ends with 255"):
            batched(model, [[5], [5, token]])
    for prompts in (["five"], [5]):
        with pytest.raises(TypeError, match="lists of token ids, got"):
            batched(model, prompts)
    with pytest.raises(TypeError, match="max_tokens"):
        model.generate_batch([[5]], max_tokens=3)


def test_a_request_too_long_for_the_pages_ends_alone():
    """transformers ends the whole loop: of a batch, and of a server for good."""
    model, prompts = tiny_model(), [[5] * 200, *ragged(3, 20)]
    expected = padded_generate(model, prompts[1:])
    with pytest.raises(GenerationBatchError, match=r"1 of 4 requests failed: .* 4 pages of 16 tokens") as error:
        batched(model, prompts, num_blocks=4)
    assert [result.generated_tokens for result in error.value.results.values()] == expected
    config = GenerationConfig(**{**GREEDY.to_dict(), "do_sample": True, "top_k": 1, "num_return_sequences": 2})
    with pytest.raises(GenerationBatchError, match=r"2 of 8 requests failed: .* 4 pages of 16 tokens") as error:
        batched(model, prompts, config, num_blocks=4)
    assert [result.generated_tokens for result in error.value.results.values()] == [
        text for text in expected for _ in range(2)
    ]


def test_a_manager_keeps_to_its_settings():
    """transformers goes on with those of the call that it was made for, and with another number of samples for ever."""
    model, prompts = tiny_model(), ragged(3)
    expected = padded_generate(model, prompts)
    settings = ContinuousBatchingConfig(**SMALL_PAGES)
    longer = GenerationConfig(**{**GREEDY.to_dict(), "max_new_tokens": 18})
    for config in (GREEDY, longer):
        results = model.generate_batch(prompts, config, settings, persistent_manager=True)
        assert [result.generated_tokens[:16] for result in results.values()] == expected
    sampled = GenerationConfig(**{**GREEDY.to_dict(), "do_sample": True, "num_return_sequences": 2})
    with pytest.raises(ValueError, match="has another do_sample, num_return_sequences, and would go on"):
        model.generate_batch(prompts, sampled, persistent_manager=True)
    with pytest.raises(ValueError, match="has another page_size, and would go on"):
        model.generate_batch(prompts, GREEDY, ContinuousBatchingConfig(num_blocks=64, page_size=32))
    model.destroy_cached_continuous_batching_manager()
    assert len(model.generate_batch(prompts, sampled, settings)) == 6


def test_requests_come_one_by_one_each_with_its_own_length():
    """And without one, a text ends with the model's positions."""
    model, prompts = tiny_model(max_position_embeddings=64), ragged(4, 40)
    config = GenerationConfig(**{**GREEDY.to_dict(), "eos_token_id": -1})
    expected = [padded_generate(model, [p], GenerationConfig(**{**config.to_dict(), "max_new_tokens": 64 - len(p)}))[0]
                for p in prompts]  # fmt: skip
    config.max_new_tokens = None
    settings = ContinuousBatchingConfig(**SMALL_PAGES)
    found: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(config, continuous_batching_config=settings) as manager:
        for number, prompt in enumerate(prompts):
            manager.add_request(prompt, f"text {number}", 3 + number if number < 3 else None, streaming=number == 0)
        with pytest.raises(ValueError, match="no token"):
            manager.add_request([])
        streamed = []
        for result in manager:
            if result.request_id == "text 0":
                streamed.append(list(result.generated_tokens))
            if result.is_finished():
                found[result.request_id] = result.generated_tokens
            if len(found) == 4:
                break
    assert streamed == [expected[0][:length] for length in (1, 2, 3)]
    limits = (3, 4, 5, None)
    assert found == {f"text {n}": expected[n][:limit] for n, limit in enumerate(limits)}


def test_requests_that_fail_are_an_exception_that_holds_the_rest(monkeypatch):
    """transformers returns normally, with the error on each request."""
    model, forward, calls = tiny_model(), tiny_model().model.layers[0].forward, []

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) == 30:
            raise RuntimeError("the first layer fell over")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model.layers[0], "forward", breaks)
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=-1)
    with pytest.raises(GenerationBatchError, match="3 of 4 requests failed: the first layer fell over") as error:
        batched(model, [[5] * 9, [6] * 9, [7] * 9, [8]], config, max_requests_per_batch=1)
    (result,) = error.value.results.values()
    assert result.error is None
    assert len(result.generated_tokens) == 24


@pytest.mark.parametrize("queued", [0, 2])
def test_the_caller_of_generate_batch_does_the_work_itself(queued, monkeypatch):
    """In a second thread, OpenMP would make a small model more than twice as slow on a CPU. A queue shorter than the
    prompts, for which transformers waits for its thread, is worked off on the way."""
    model, prompts, workers = tiny_model(), ragged(), set()
    expected, forward = padded_generate(model, prompts), model.model.forward

    def seen(*args, **kwargs):
        workers.add(threading.current_thread())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", seen)
    assert batched(model, prompts, max_queue_size=queued) == expected
    assert workers == {threading.current_thread()}
    with model.continuous_batching_context_manager(
        GREEDY, continuous_batching_config=ContinuousBatchingConfig(**SMALL_PAGES)
    ) as manager:
        manager.add_request(prompts[0])
        assert next(iter(manager)).generated_tokens == expected[0]
    assert len(workers) == 2


def test_an_interrupted_batch_leaves_the_model_as_it_was(monkeypatch):
    model, prompts = tiny_model().train(), ragged()
    expected, forward, calls = padded_generate(model, prompts), model.model.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batched(model, prompts)
    assert len(calls) == 3
    assert model.training
    assert batched(model, prompts) == expected


def test_the_caller_does_not_wait_beside_its_own_work(monkeypatch):
    """However long the next result takes: transformers asks for it again and again, a second each time."""
    model, get = tiny_model(), queue.Queue.get
    forward = model.model.forward

    def slow(*args, **kwargs):
        time.sleep(0.1)
        return forward(*args, **kwargs)

    def at_once(self, block=True, timeout=None):
        assert not (self.empty() and block and timeout != 0)
        return get(self, block, timeout)

    monkeypatch.setattr(model.model, "forward", slow)
    monkeypatch.setattr(queue.Queue, "get", at_once)
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert [len(text) for text in batched(model, ragged(3), config)] == [12] * 3


def test_a_batch_on_a_kept_manager_has_no_results_from_before():
    model, prompts = tiny_model(), ragged()
    expected, settings = padded_generate(model, prompts), ContinuousBatchingConfig(**SMALL_PAGES)
    with model.continuous_batching_context_manager(
        GREEDY, continuous_batching_config=settings, persistent_manager=True
    ) as manager:
        manager.add_requests(prompts)  # which nobody fetches
    results = model.generate_batch(prompts, GREEDY, settings, persistent_manager=True)
    assert [result.generated_tokens for result in results.values()] == expected
    model.destroy_cached_continuous_batching_manager()


def test_a_kept_manager_that_is_at_work_takes_no_batch():
    """The batch would take the results of those who wait for them, and two callers would take one step."""
    model, prompts = tiny_model(), ragged()
    expected, settings = padded_generate(model, prompts), ContinuousBatchingConfig(**SMALL_PAGES)
    model.generate_batch(prompts, GREEDY, settings, persistent_manager=True)
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=settings) as manager:
        request = manager.add_request(prompts[0])
        with pytest.raises(RuntimeError, match="is at work"):
            model.generate_batch(prompts, GREEDY, settings)
        result = next(iter(manager))
        assert (result.request_id, result.generated_tokens) == (request, expected[0])


def test_a_manager_made_in_inference_mode_goes_on_outside():
    model, prompts = tiny_model(), ragged()
    settings = ContinuousBatchingConfig(**SMALL_PAGES)
    with torch.inference_mode():
        first = model.generate_batch(prompts, GREEDY, settings, persistent_manager=True)
    second = model.generate_batch(prompts, GREEDY, settings)
    assert [a.generated_tokens for a in first.values()] == [b.generated_tokens for b in second.values()]


def test_a_batch_ends_when_what_is_left_of_it_is_cancelled(monkeypatch):
    model, prompts, calls = tiny_model(), ragged(3), []
    settings, forward = ContinuousBatchingConfig(**SMALL_PAGES), model.model.forward
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    first = model.generate_batch(prompts, config, settings, persistent_manager=True)
    manager = model.init_continuous_batching(config, settings)

    def cancelling(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            manager.cancel_request("req_4")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", cancelling)
    with pytest.raises(GenerationBatchError, match="1 of 3 requests failed") as error:
        model.generate_batch(prompts, config, settings)
    expected = [first["req_0"].generated_tokens, first["req_2"].generated_tokens]
    assert [result.generated_tokens for result in error.value.results.values()] == expected


@pytest.mark.parametrize("warmup", [True, False])
def test_pages_that_do_not_fit_leave_the_attention_as_it_was(warmup):
    model = tiny_model(attn_implementation="eager")
    with pytest.raises(MemoryError):
        model.generate_batch(ragged(), GREEDY, ContinuousBatchingConfig(num_blocks=10**9), warmup=warmup)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("path", ["expanded", "absorbed"])
def test_under_autocast_the_tokens_are_those_of_generate(path):
    """Trainer's and accelerate's mixed precision: the weights, and so the pages, are wider than the states."""
    model, prompts = tiny_model(), ragged(4, 20)
    model.config.mla_path = path
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = [padded_generate(model, [prompt])[0] for prompt in prompts]
        assert batched(model, prompts) == alone


# A server.


QUESTIONS = ["Spell this word backward (example: sun -> nus): " + word for word in ("lamp", "horses", "a", "planet")]


def expected_answers(teacher) -> list[str]:
    """What the teacher says greedily to each question, with the special tokens left out."""
    model, _ = teacher
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids for chat in chats]
    config = GenerationConfig(max_new_tokens=60, do_sample=False, eos_token_id=2, pad_token_id=0)
    return tokenizer.batch_decode(padded_generate(model, prompts, config), skip_special_tokens=True)


def ask(url: str, question: str, stream: bool = False, **settings) -> tuple[int, str]:
    """The status and the text (of the error, if it is one) that a server answers."""
    body = {"model": str(TEACHER), "messages": [{"role": "user", "content": question}], "stream": stream}
    body |= {"max_tokens": 60, "temperature": 0.0, **settings}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            lines = answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    if not stream:
        return 200, json.loads(lines)["choices"][0]["message"]["content"]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines.splitlines() if line]
    return 200, "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


@contextlib.contextmanager
def server(tmp_path: Path, *arguments: str, ends_by: int = signal.SIGTERM) -> Iterator[str]:
    """A process of `python -m modeling_deepseek.serve` on the teacher, once it answers. It ends by the signal alone."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "modeling_deepseek.serve", str(TEACHER), "--device", "cpu", "--dtype", "float32"]
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *arguments],
            stdout=stream, stderr=stream, cwd=TEACHER.parents[1],
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "it did not start within two minutes"
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(ends_by)
        try:
            process.wait(timeout=30)
        finally:
            process.kill()


def test_a_server_answers_many_at_once_with_these_classes(tmp_path, teacher):
    expected = expected_answers(teacher)
    with server(tmp_path, "--continuous-batching", ends_by=signal.SIGINT) as url, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda question: ask(url, question), QUESTIONS * 2))
        streamed = list(pool.map(lambda question: ask(url, question, stream=True), QUESTIONS))
        unlimited = ask(url, QUESTIONS[0], max_tokens=None)
        too_long = [ask(url, "1 + " * 600, stream=stream) for stream in (False, True)]
    assert answers == [(200, text) for text in expected * 2]
    assert [text for _, text in streamed] == expected
    assert unlimited == (200, expected[0])
    for status, body in too_long:
        assert status == 400
        assert "exceeds `max_position_embeddings` 512" in json.loads(body)["error"]["message"]
    assert "CB: True" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_server_without_continuous_batching_and_the_sampler_of_eval(tmp_path, teacher):
    from eval.endpoint_sampler import EndpointSampler
    from eval.samplers import Request

    expected = expected_answers(teacher)
    asked = [Request(({"role": "user", "content": q},), max_tokens=60, tag=n) for n, q in enumerate(QUESTIONS)]
    for arguments in ((), ("--continuous-batching",)):
        with server(tmp_path, *arguments) as url:
            assert [ask(url, question) for question in QUESTIONS] == [(200, text) for text in expected]
            assert [ask(url, question, stream=True)[1] for question in QUESTIONS] == expected
            sampler = EndpointSampler(url, str(TEACHER), concurrency=4)
            sampler.check(asked)
            answers = {request.tag: completion for request, completion in sampler.sample(asked)}
        assert [answers[number].text for number in range(len(asked))] == expected
        assert all(answer.finish_reason == "stop" for answer in answers.values())
