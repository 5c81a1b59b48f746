"""Tokens generated with any cache and any way of decoding are those of full forward passes without a cache; what the
caches hold; and decoding in one compiled graph."""

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from tests.caches import CACHES, LOSSLESS, MAX_LENGTH, new_cache
from tests.tiny import tiny_model, tokens

FAMILIES = ["v2", "v3"]
PATHS = ["auto", "expanded", "absorbed"]
PROMPT, NEW = 9, 8
LEFT_MASK = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
RANK, ROPE, LAYERS = 32, 8, 3  # of the tiny models


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return model_that_never_stops(request.param)


def model_that_never_stops(family: str, **overrides):
    model = tiny_model(family, **overrides)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def greedy(model, input_ids: torch.Tensor, new_tokens: int = NEW) -> torch.Tensor:
    """New tokens of each row, one full forward pass a token."""
    for _ in range(new_tokens):
        logits = model(input_ids, use_cache=False).logits[:, -1:]
        input_ids = torch.cat([input_ids, logits.argmax(-1)], dim=1)
    return input_ids[:, -new_tokens:]


def greedy_of_rows(model, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same for rows of different lengths, each alone and without its padding."""
    rows = [greedy(model, row[mask_of_row.bool()][None]) for row, mask_of_row in zip(input_ids, mask, strict=True)]
    return torch.cat(rows)


def generate(model, input_ids: torch.Tensor, **options) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(input_ids, **options)[:, -options["max_new_tokens"] :]


# Caches.


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", LOSSLESS)
@torch.no_grad()
def test_every_cache_gives_the_tokens_of_no_cache(model, name, path, monkeypatch):
    input_ids = tokens(3, PROMPT)
    expected = greedy_of_rows(model, input_ids, LEFT_MASK)
    sequences = torch.cat([input_ids, expected], dim=1)
    mask = torch.cat([LEFT_MASK, torch.ones_like(expected)], dim=1)
    expected_logits = model(sequences, attention_mask=mask, use_cache=False).logits[:, -NEW - 1 : -1]

    monkeypatch.setattr(model.config, "mla_path", path)
    output = model.generate(
        input_ids,
        attention_mask=LEFT_MASK,
        past_key_values=new_cache(name, model.config, monkeypatch),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, sequences)
    logits = torch.stack(output.logits, dim=1)
    assert (logits - expected_logits).abs().max() < 1e-5 * expected_logits.abs().max()


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_caches_that_generate_makes(model, implementation):
    actual = generate(model, tokens(2, PROMPT), cache_implementation=implementation)
    assert torch.equal(actual, greedy(model, tokens(2, PROMPT)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["quanto", "fp8"])
@torch.no_grad()
def test_quantized_caches_stay_close(model, name, path, monkeypatch):
    monkeypatch.setattr(model.config, "mla_path", path)
    input_ids = tokens(2, 11)
    exact, lossy = DynamicCache(config=model.config), new_cache(name, model.config, monkeypatch)
    logits = {}
    for cache in (exact, lossy):
        model(input_ids[:, :8], past_key_values=cache, use_cache=True)
        logits[cache] = torch.cat(
            [model(token, past_key_values=cache, use_cache=True).logits for token in input_ids[:, 8:].split(1, dim=1)],
            dim=1,
        )
    # The latents of the first layer come from nothing lossy. 4 bits are 15 steps from the smallest value of a group to
    # the largest, and what is kept lies within half a step. The three latest tokens are not quantised yet.
    if name == "quanto":
        latents = exact.layers[0].keys
        kept = lossy.layers[0]._quantized_keys.dequantize()
        step = (latents.amax() - latents.amin()) / 15
        assert 0 < (kept - latents[:, :, :8]).abs().max() <= step / 2
        assert torch.equal(lossy.layers[0].keys, latents[:, :, 8:])
    similarity = torch.cosine_similarity(logits[lossy].flatten(), logits[exact].flatten(), dim=0)
    assert 0.9 < similarity < 1
    assert torch.isfinite(logits[lossy]).all()


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_what_a_cache_holds(model, name, monkeypatch):
    cache = new_cache(name, model.config, monkeypatch)
    model(tokens(2, PROMPT), past_key_values=cache, use_cache=True)
    model(tokens(2, 1), past_key_values=cache, use_cache=True)
    assert len(cache.layers) == LAYERS
    length = MAX_LENGTH if "static" in name else PROMPT + 1
    assert model.config.cache_values_per_token == LAYERS * (RANK + ROPE)
    for layer in cache.layers:
        # Quantised layers keep the latest tokens as they are, and the rest in a form of their own.
        keys, values = [layer.keys], [layer.values]
        if name == "quanto":
            keys.append(layer._quantized_keys)
            values.append(layer._quantized_values)
        elif name == "fp8":
            keys, values = [layer._quantized_keys[0]], [layer._quantized_values[0]]
        assert {tensor.shape[-1] for tensor in keys} == {RANK}
        assert {tensor.shape[-1] for tensor in values} == {ROPE}
        assert sum(tensor.numel() for tensor in keys + values) == 2 * length * (RANK + ROPE)
    if name in LOSSLESS:
        held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        assert held == 2 * LAYERS * length * (RANK + ROPE) * 4


@torch.no_grad()
def test_bytes_in_a_bfloat16_cache():
    cache = tiny_model().to(torch.bfloat16)(tokens(1, PROMPT), use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert held == LAYERS * PROMPT * (RANK + ROPE) * 2


# What is done to caches.


def test_beam_search_reorders_the_cache(model):
    input_ids = tokens(3, PROMPT)
    beams = {"attention_mask": LEFT_MASK, "num_beams": 3}
    expected = generate(model, input_ids, use_cache=False, **beams)
    assert not torch.equal(expected, generate(model, input_ids, attention_mask=LEFT_MASK))  # beams differ from greedy
    assert torch.equal(generate(model, input_ids, **beams), expected)
    assert torch.equal(generate(model, input_ids, cache_implementation="static", **beams), expected)


@torch.no_grad()
def test_batch_select_and_crop(model):
    input_ids = tokens(3, PROMPT)
    cache = model(input_ids, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.crop(-3)
    logits = model(input_ids[[2, 0], -3:], past_key_values=cache, use_cache=True).logits
    expected = model(input_ids[[2, 0]], use_cache=False).logits[:, -3:]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == PROMPT


@torch.no_grad()
def test_prefix_reuse(model):
    prefix = tokens(1, 6)
    saved = model(prefix, use_cache=True).past_key_values
    for seed in (5, 6):
        prompt = torch.cat([prefix, tokens(1, 4, seed=seed)], dim=1)
        actual = generate(model, prompt, past_key_values=copy.deepcopy(saved))
        assert torch.equal(actual, greedy(model, prompt))
    assert saved.get_seq_length() == 6


def test_a_conversation_goes_on_in_its_cache(model):
    cache = DynamicCache(config=model.config)
    first = tokens(1, PROMPT)
    answer = generate(model, first, past_key_values=cache)
    second = torch.cat([first, answer, tokens(1, 3, seed=7)], dim=1)
    assert torch.equal(generate(model, second, past_key_values=cache), greedy(model, second))


def test_a_static_cache_is_used_again(model):
    cache = StaticCache(model.config, max_cache_len=MAX_LENGTH)
    for seed in (1, 2):
        input_ids = tokens(2, PROMPT, seed=seed)
        assert torch.equal(generate(model, input_ids, past_key_values=cache), greedy(model, input_ids))
        cache.reset()


# Ways of decoding.


@pytest.mark.parametrize(
    "options", [{"assistant_model": 1}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}]
)
def test_speculation_changes_no_token(model, options):
    if "assistant_model" in options:
        family = model.config.model_type.removeprefix("deepseek_")
        options = {"assistant_model": model_that_never_stops(family, seed=0, num_hidden_layers=2)}
    # Text that repeats itself, so that prompt lookup has something to propose.
    input_ids = tokens(1, 4).repeat(1, 3)
    assert torch.equal(generate(model, input_ids, **options), greedy(model, input_ids))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("chunk", [1, 4])
def test_chunked_prefill_in_generate(model, chunk, options):
    input_ids = tokens(3, PROMPT)
    expected = greedy_of_rows(model, input_ids, LEFT_MASK)
    actual = generate(model, input_ids, attention_mask=LEFT_MASK, prefill_chunk_size=chunk, **options)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("whole_mask", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["dynamic", "static"])
@torch.no_grad()
def test_chunked_prefill_by_hand(model, name, path, whole_mask, monkeypatch):
    input_ids = tokens(3, PROMPT)
    expected = model(input_ids, attention_mask=LEFT_MASK, use_cache=False).logits[LEFT_MASK.bool()]
    monkeypatch.setattr(model.config, "mla_path", path)
    cache = new_cache(name, model.config, monkeypatch)
    chunks = []
    for start in range(0, PROMPT, 4):
        mask = LEFT_MASK if whole_mask else LEFT_MASK[:, : start + 4]
        chunk = input_ids[:, start : start + 4]
        chunks.append(model(chunk, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    actual = torch.cat(chunks, dim=1)[LEFT_MASK.bool()]
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def test_sampling_with_a_seed(model):
    sampled = []
    for use_cache in (False, True):
        torch.manual_seed(3)
        sampled.append(
            generate(model, tokens(3, PROMPT), attention_mask=LEFT_MASK, do_sample=True, use_cache=use_cache)
        )
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], generate(model, tokens(3, PROMPT), attention_mask=LEFT_MASK))


def test_generation_from_embeddings(model):
    input_ids = tokens(2, PROMPT)
    embeddings = model.get_input_embeddings()(input_ids)
    generated = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generated, greedy(model, input_ids))


def test_streaming(model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.flatten())

        def end(self):
            self.ended = True

    streamer, input_ids = Collect(), tokens(1, PROMPT)
    generate(model, input_ids, streamer=streamer)
    assert streamer.ended
    assert len(streamer.pieces) == 1 + NEW  # the prompt, then every token as it comes
    assert torch.equal(torch.cat(streamer.pieces), torch.cat([input_ids, greedy(model, input_ids)], dim=1)[0])


# Compiled decoding.


def compiled_steps(model, input_ids: torch.Tensor, backend: str) -> torch.Tensor:
    """Prefill as it is, then every step through one graph; a graph made after the first step is an error."""
    torch.compiler.reset()
    cache = StaticCache(model.config, max_cache_len=MAX_LENGTH)
    logits = model(input_ids, past_key_values=cache, use_cache=True).logits
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    generated = [logits[:, -1:].argmax(-1)]
    for number in range(1, NEW):
        with torch.compiler.set_stance("default" if number == 1 else "fail_on_recompile"):
            logits = step(generated[-1], past_key_values=cache, use_cache=True).logits
        generated.append(logits[:, -1:].argmax(-1))
    return torch.cat(generated, dim=1)


@pytest.mark.parametrize(("family", "path"), [("v2", "auto"), ("v3", "expanded")])
@torch.no_grad()
def test_decoding_traces_into_one_graph(family, path):
    model = tiny_model(family, mla_path=path)
    input_ids = tokens(2, PROMPT)
    assert model.config._experts_implementation == "grouped_mm"
    assert torch.equal(compiled_steps(model, input_ids, backend="aot_eager"), greedy(model, input_ids))


@pytest.mark.slow  # a minute of C++ compilation where nothing is cached; what it compiles is traced above
@torch.no_grad()
def test_decoding_compiles():
    model = tiny_model(num_hidden_layers=1, first_k_dense_replace=0)
    input_ids = tokens(2, PROMPT)
    assert torch.equal(compiled_steps(model, input_ids, backend="inductor"), greedy(model, input_ids))


def test_generate_compiles_its_decoding():
    # What `generate` does by itself on GPU: prefill, then one graph for all steps, with a ready 4-D mask.
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = model_that_never_stops("v3")
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True
    input_ids = tokens(3, PROMPT)
    actual = generate(
        model,
        input_ids,
        attention_mask=LEFT_MASK,
        cache_implementation="static",
        compile_config=compile_config,
    )
    assert torch.equal(actual, greedy_of_rows(model, input_ids, LEFT_MASK))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
