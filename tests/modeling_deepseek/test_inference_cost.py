"""What serving costs: what fits, how several GPUs share a model, what bounds decoding."""

import re

import pytest
import torch

from modeling_deepseek import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, quantization
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
    assert one.weights_bytes // 8 < tensor.weights_bytes_per_gpu < one.weights_bytes // 8 + 3e9
    assert tensor.cache_bytes_per_gpu == one.cache_bytes  # latents have no heads to be split by
    # Dealt out whole, 61 layers give some GPU eight at least; an eighth and one more are 8.6.
    assert 8 / 61 < layers.weights_bytes_per_gpu / one.weights_bytes < 9 / 61
    assert 8 / 61 < layers.cache_bytes_per_gpu / one.cache_bytes < 9 / 61


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "tiny-v2"])
def test_tensor_parallelism_cuts_what_the_plan_cuts(name):
    """transformers' plans name what is split. "mla_kv_a_proj" only sums gradients, and so names what is whole."""
    config = load_config(name)
    model_class = DeepseekV2ForCausalLM if config.model_type == "deepseek_v2" else DeepseekV3ForCausalLM
    with torch.device("meta"):
        model = model_class(config)
    plan = {f"model.{rule}": style for rule, style in config.base_model_tp_plan.items()} | model_class._tp_plan
    held = 0
    for parameter, tensor in model.named_parameters():
        path = re.sub(r"\.\d+\.", ".*.", parameter)
        style = plan.get(path, plan.get(path.removesuffix(".weight"), "mla_kv_a_proj"))
        held += 2 * tensor.numel() // (1 if style == "mla_kv_a_proj" else 4)
    held += 4 * sum(buffer.numel() for buffer_name, buffer in model.named_buffers() if "bias" in buffer_name)
    memory = serving_memory(config, 16, gpus=4, split="tensor", mtp=True)
    assert memory.weights_bytes_per_gpu == pytest.approx(held, abs=200)


def test_each_gpu_works_on_its_heads():
    """V3 with one expert a token, 2,048 tokens: on one GPU the peak is in the attention of 128 heads, on eight with 16
    of them it is in the rows of the expert, which are weighted in float32."""
    config = load_config("deepseek-v3")
    config.num_experts_per_tok = 1
    one, eight = (serving_memory(config, 2048, gpus=gpus, split="tensor").workspace_bytes for gpus in (1, 8))
    attention, rows = 2048 * 128 * (4 * 192 + 640) * 2, 2048 * 2 * 7168 * (2 + 4)
    assert one - eight == attention - rows


def test_the_first_of_large_pieces_builds_the_keys_of_all_heads():
    """V3's attention to 32K tokens at once needs no less where more follow, whose keys are built for some heads at a
    time. One expert a token, or the rows of experts would need still more."""
    config = load_config("deepseek-v3")
    config.num_experts_per_tok = 1
    contexts = (32768, 33000)
    alone, first = (serving_memory(config, length, prefill_tokens=32768).workspace_bytes for length in contexts)
    assert alone < first


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
    # Whole on each GPU: the gates, and what comes before the heads, a byte a value and a scale for 128 x 128.
    gates = 58 * 256 * 7168 * 2
    whole = gates + 61 * (7168 * (1536 + 576) + 4 * 56 * (12 + 5)) + 2 * (61 * (2 * 7168 + 1536 + 512) + 7168)
    read = (decode_bytes_read(config, 1, "fp8") - whole) / 8 + whole + 4096 * 70272
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
