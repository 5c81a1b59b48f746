"""What serving costs: what fits, how several GPUs share a model, what bounds decoding."""

import pytest
import torch

from modeling_deepseek import quantization
from modeling_deepseek.counts import load_config
from modeling_deepseek.hardware import GPUS, PROCESS_BYTES, Gpu
from modeling_deepseek.inference_cost import (
    EXPERT_WORKSPACE_BYTES,
    decode_bytes_read,
    estimate_serving,
    longest_context,
    most_sequences,
    serving_memory,
    what_fits,
)
from modeling_deepseek.moe import route
from tests.tiny import tiny_config


@pytest.mark.parametrize("gigabytes", [12, 13, 14, 15, 16, 17])
def test_longest_context_and_most_sequences_are_the_last_that_fit(gigabytes):
    config, memory = load_config("deepseek-v2-lite"), gigabytes * 10**9

    def needed(context, sequences=1):
        return serving_memory(config, context, batch_size=sequences, weights_dtype="nf4").bytes_per_gpu

    longest = longest_context(config, memory, weights_dtype="nf4")
    assert 0 < longest < config.max_position_embeddings
    assert needed(longest) <= memory < needed(longest + 1)
    most = most_sequences(config, memory, 1024, weights_dtype="nf4")
    assert most > 1
    assert needed(1024, most) <= memory < needed(1024, most + 1)


def test_nothing_fits_where_the_weights_do_not():
    config = load_config("deepseek-v2-lite")
    assert longest_context(config, 8 * 10**9, weights_dtype="nf4") == 0
    assert most_sequences(config, 8 * 10**9, 4096, weights_dtype="nf4") == 0


def test_a_16b_model_on_one_24_gb_card():
    for model in ("deepseek-v2-lite", "moonlight-16b-a3b"):
        cells = {
            dtype: fit.context_tokens for dtype in ("bf16", "nf4") for fit in what_fits([model], [dtype], [(1, 24)])
        }
        assert cells == {"bf16": 0, "nf4": load_config(model).max_position_embeddings}
    # V3's 671 GB: not on eight cards of 80 GB, but on eight of 141.
    fits = [fit.context_tokens for fit in what_fits(["deepseek-v3"], ["fp8"], [(8, 80), (8, 141)])]
    assert fits == [0, 163840]


def test_layers_are_dealt_out_and_tensors_are_cut():
    config = load_config("deepseek-v3")
    one = serving_memory(config, 32768, weights_dtype="fp8")
    layers = serving_memory(config, 32768, weights_dtype="fp8", gpus=8)
    tensor = serving_memory(config, 32768, weights_dtype="fp8", gpus=8, split="tensor")
    assert one.weights_bytes == layers.weights_bytes == one.weights_bytes_per_gpu
    assert tensor.weights_bytes_per_gpu == one.weights_bytes // 8
    assert tensor.cache_bytes_per_gpu == one.cache_bytes  # latents have no heads to be split by
    # Dealt out whole, 61 layers give some GPU eight at least; an eighth and one more are 8.6.
    assert 8 / 61 < layers.weights_bytes_per_gpu / one.weights_bytes < 9 / 61
    assert 8 / 61 < layers.cache_bytes_per_gpu / one.cache_bytes < 9 / 61


def test_a_batch_meets_the_experts_that_even_routing_says():
    config = tiny_config("v3", num_nextn_predict_layers=0, n_group=1, topk_group=1)
    generator = torch.Generator().manual_seed(0)
    met = []
    for _ in range(2000):
        scores = torch.rand(4, 8, generator=generator)
        indices = route(scores, None, top_k=3, topk_method="greedy")[1]
        met.append(indices.unique().numel() / 8)
    routed, others = 2 * 3 * 8 * 64 * 32 * 4, decode_bytes_read(config, 0, "fp32")
    share = (decode_bytes_read(config, 4, "fp32") - others) / routed
    assert share == pytest.approx(sum(met) / len(met), abs=0.01)


def test_decoding_is_bound_by_reading_at_small_batches_and_by_computing_at_large_ones():
    gpu = GPUS["h200"]
    one = estimate_serving("deepseek-v3", gpu="h200", gpus=8, weights_dtype="fp8", split="tensor")
    config = load_config("deepseek-v3")
    read = decode_bytes_read(config, 1, "fp8") / 8 + 4096 * 70272
    assert one.decode_tokens_per_second == pytest.approx(gpu.bandwidth_bytes_per_second / read)
    # Enough sequences for every expert to be busy: the peak over the FLOPs of a token.
    tiny = Gpu(10**15, 1e15, 1e9, None, "a test's")
    busy = estimate_serving("tiny-v3", gpu=tiny, batch_size=64, context_tokens=16)
    assert busy.decode_tokens_per_second == pytest.approx(1e9 / busy.decode_flops_per_token)
    # A price is of all GPUs, whether they work or wait.
    priced = estimate_serving(
        "deepseek-v3", gpu="h200", gpus=8, weights_dtype="fp8", split="tensor", dollars_per_gpu_hour=3.0
    )
    per_hour = priced.decode_tokens_per_second * 3600
    assert priced.dollars_per_million_decode_tokens == pytest.approx(8 * 3.0 / per_hour * 1e6)
    assert one.dollars_per_million_decode_tokens is None


def test_the_bound_on_dequantised_experts_is_theirs():
    assert EXPERT_WORKSPACE_BYTES == quantization.WORKSPACE


def test_every_card_has_a_source_and_sound_numbers():
    for name, gpu in GPUS.items():
        assert gpu.source, name
        assert gpu.memory_bytes > PROCESS_BYTES
        if gpu.fp8_flops_per_second is not None:
            assert gpu.fp8_flops_per_second == pytest.approx(2 * gpu.bf16_flops_per_second, rel=0.02)
