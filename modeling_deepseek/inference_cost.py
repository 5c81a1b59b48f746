"""What serving takes on given hardware: memory, the longest context and the most sequences that fit, bounds of speed
and dollars. `counts` says what is exact, `training_cost` is the same for training, `estimate` prints both.

Memory is checked against real allocations (tests/modeling_deepseek/test_memory.py). Rates are bounds by the datasheet,
which real runs stay below.

Bytes are bytes, and GB are 10^9 of them.

Legend: D hidden size, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim, C = kv_lora_rank,
E routed experts, K experts per token, F expert width.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from .counts import (
    VALUE_BYTES,
    Weight,
    above_zero,
    at_least_one,
    cache_bytes_per_token,
    count_parameters,
    forward_flops,
    load_config,
    one_of,
    tensor_bytes,
    weight_bytes,
    weights,
    within_context,
)
from .hardware import FRAGMENTATION, PROCESS_BYTES, Gpu, find_gpu

if TYPE_CHECKING:
    from .configuration_deepseek import DeepseekConfig

# Experts that are dequantised at a time: `quantization.WORKSPACE`, which is not imported for torch's sake.
EXPERT_WORKSPACE_BYTES = 2**28
# Tokens of prompts that pass at once, as servers and `generate(prefill_chunk_size=...)` do it.
PREFILL_TOKENS = 2048
SPLITS = ("layers", "tensor")


def prefill_workspace_bytes(
    config: "DeepseekConfig", tokens: int, cached_tokens: int = 0, *, batch_size: int = 1, dtype: str = "bf16"
) -> int:
    """What a forward pass without gradients holds at its peak beside weights and cache, for `tokens` new ones of all
    sequences together behind `cached_tokens`.

    The peak is in the attention (query twice, key, value and its padded copy, output twice) or in the MLP (the products
    between; of experts the rows in and out too, and float32 rows weighted by the router). Keys and values of a cached
    prefix are built for some heads at a time (`config.mla_workspace_mib`), and it takes a mask, in two dtypes.
    """
    value, hidden = VALUE_BYTES[dtype], config.hidden_size
    heads, query_dim = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
    key_value = config.qk_nope_head_dim + config.v_head_dim + 2 * query_dim  # kv_b_proj's output, key, padded value
    context = tokens + cached_tokens
    built, mask = context * heads * key_value * value, 0
    if cached_tokens:
        # The bound counts a key and a value of each head; the projection and the padded copy stand beside them.
        bound = config.mla_workspace_mib * 2**20 * key_value // (query_dim + config.v_head_dim)
        built = min(built, max(bound, built // heads))
        mask = tokens * context // batch_size * (1 + value)
    attention = 4 * tokens * heads * query_dim * value + built + mask
    mlp = 3 * tokens * config.intermediate_size * value
    if config.n_routed_experts is not None:
        assert config.num_experts_per_tok is not None
        weighted = 4 if config.router_logits_dtype == "float32" else value
        row = max(hidden + 4 * config.moe_intermediate_size, 2 * hidden) * value
        row = max(row, 2 * hidden * (value + weighted))
        mlp = max(mlp, tokens * config.num_experts_per_tok * row)
    return 6 * tokens * hidden * value + max(attention, mlp)


def decode_workspace_bytes(
    config: "DeepseekConfig", context_tokens: int, batch_size: int = 1, *, dtype: str = "bf16"
) -> int:
    """The scores of all heads over the context, their float32 softmax and its cast, and the logits."""
    value = VALUE_BYTES[dtype]
    cast = value if value < 4 else 0
    scores = batch_size * config.num_attention_heads * context_tokens * (value + 4 + cast)
    return scores + batch_size * config.vocab_size * (4 + value)


def dequantized_bytes(config: "DeepseekConfig", dtype: str) -> int:
    """What a product holds of quantised weights in bfloat16: a whole matrix, or a group of experts."""
    if dtype not in ("int8", "nf4", "nf4-dq"):
        return 0
    largest = 0
    for weight in weights(config):
        if weight.matrix and weight.part not in ("head", "gate"):
            size = 2 * prod(weight.shape)
            largest = max(largest, min(size, EXPERT_WORKSPACE_BYTES) if weight.part == "routed_experts" else size)
    return largest


@dataclass(frozen=True)
class ServingMemory:
    """Weights and cache of all GPUs together, and of the fullest one; workspace and allowance are each GPU's."""

    weights_bytes: int
    cache_bytes: int
    weights_bytes_per_gpu: int
    cache_bytes_per_gpu: int
    workspace_bytes: int
    allowance_bytes: int

    @property
    def bytes_per_gpu(self) -> int:
        return self.weights_bytes_per_gpu + self.cache_bytes_per_gpu + self.workspace_bytes + self.allowance_bytes


def serving_memory(
    config: "DeepseekConfig",
    context_tokens: int,
    *,
    batch_size: int = 1,
    weights_dtype: str = "bf16",
    cache_dtype: str = "bf16",
    gpus: int = 1,
    split: str = "layers",
    mtp: bool = False,
    prefill_tokens: int = PREFILL_TOKENS,
) -> ServingMemory:
    """Memory to hold `batch_size` sequences of `context_tokens` each. See `estimate_serving` for the arguments."""
    compute = weights_dtype if weights_dtype in ("fp32", "fp16") else "bf16"
    weights_bytes = weight_bytes(config, weights_dtype, mtp=mtp)
    cache_bytes = batch_size * context_tokens * cache_bytes_per_token(config, cache_dtype, mtp=mtp)
    one_layers_cache = (
        batch_size * context_tokens * cache_bytes_per_token(config, cache_dtype) // config.num_hidden_layers
    )
    weights_per_gpu, cache_per_gpu, running = weights_bytes // gpus, cache_bytes, config
    if split == "tensor":
        check_tensor_split(config, gpus)
        weights_per_gpu = weights_bytes - sum(
            weight.layers * tensor_bytes(weight, weights_dtype) // gpus * (gpus - 1)
            for weight in weights(config)
            if is_cut(weight) and (mtp or not weight.mtp)
        )
        running = copy.copy(config)  # heads and widths that one GPU works on
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
            setattr(running, name, -(-getattr(config, name) // gpus))
    elif gpus > 1:  # layers, embedding and head are dealt out whole: the fullest has up to one above its share
        table = config.vocab_size * config.hidden_size * VALUE_BYTES[compute]
        weights_per_gpu += max(layer_bytes(config, weights_dtype), table)
        cache_per_gpu = cache_bytes // gpus + one_layers_cache
    all_tokens = batch_size * context_tokens
    piece = min(prefill_tokens, all_tokens)
    # The first piece builds the keys and values of all heads at once, the last one has all others before it.
    workspace = dequantized_bytes(config, weights_dtype) + max(
        prefill_workspace_bytes(running, piece, batch_size=batch_size, dtype=compute),
        prefill_workspace_bytes(running, piece, all_tokens - piece, batch_size=batch_size, dtype=compute),
        decode_workspace_bytes(running, context_tokens, batch_size, dtype=compute),
    )
    workspace += one_layers_cache  # a dynamic cache grows by a copy of one layer's at a time
    allowance = PROCESS_BYTES + int(FRAGMENTATION * (weights_per_gpu + cache_per_gpu + workspace))
    return ServingMemory(weights_bytes, cache_bytes, weights_per_gpu, cache_per_gpu, workspace, allowance)


def check_tensor_split(config: "DeepseekConfig", gpus: int) -> None:
    """Raises `ValueError` where heads cannot be dealt out evenly, as loading such a model would."""
    if config.num_attention_heads % gpus:
        raise ValueError(
            f"`gpus` ({gpus}) must divide the {config.num_attention_heads} heads where `split` is 'tensor': take a "
            "divisor, or 'layers'"
        )


def is_cut(weight: Weight) -> bool:
    """Whether tensor parallelism gives each GPU a part of it, as `base_model_tp_plan` says. What comes before the heads
    is whole everywhere, and so are embedding, gates and norms."""
    whole = weight.name.startswith(("self_attn.q_a_proj", "self_attn.kv_a_proj")) or weight.part in ("gate", "norms")
    return weight.matrix and not whole


def layer_bytes(config: "DeepseekConfig", dtype: str) -> int:
    """Bytes of the largest decoder layer."""
    parts: dict[str, int] = {}
    for weight in weights(config):
        if not weight.mtp and weight.name != "norm.weight":
            parts[weight.part] = parts.get(weight.part, 0) + tensor_bytes(weight, dtype)
    routed = sum(parts.get(part, 0) for part in ("gate", "routed_experts", "shared_experts"))
    return parts["attention"] + parts["norms"] + max(routed, parts.get("dense_mlp", 0))


def longest_context(
    config: "DeepseekConfig", memory_bytes: int, *, batch_size: int = 1, gpus: int = 1, **kwargs: Any
) -> int:
    """Tokens of context that `gpus` GPUs of `memory_bytes` each hold, at most `max_position_embeddings`; 0 where not
    even one fits. `kwargs` are those of `serving_memory`."""
    low, high = 0, config.max_position_embeddings
    middle = high  # most often all of it fits, or nothing
    while low < high:
        needed = serving_memory(config, middle, batch_size=batch_size, gpus=gpus, **kwargs).bytes_per_gpu
        low, high = (middle, high) if needed <= memory_bytes else (low, middle - 1)
        middle = (low + high + 1) // 2
    return low


def most_sequences(
    config: "DeepseekConfig", memory_bytes: int, context_tokens: int, *, gpus: int = 1, **kwargs: Any
) -> int:
    """Sequences of `context_tokens` each that `gpus` GPUs of `memory_bytes` each hold at a time; 0 where not even one
    fits. `kwargs` are those of `serving_memory`."""

    def fits(sequences: int) -> bool:
        memory = serving_memory(config, context_tokens, batch_size=sequences, gpus=gpus, **kwargs)
        return memory.bytes_per_gpu <= memory_bytes

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class ServingEstimate:
    """Memory of serving, and bounds of its speed.

    Tokens per second are upper bounds: prefill by the peak of the datasheet, decoding by the slower of reading every
    byte that a step needs once (weights of the experts that a batch meets under even routing, the cache) and
    computing. Dollars, lower bounds, are None without a price.
    """

    parameters: int
    active_parameters: int
    memory: ServingMemory
    gpu_memory_bytes: int
    fits: bool
    longest_context_tokens: int
    prefill_flops_per_token: float
    decode_flops_per_token: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    dollars_per_million_prefill_tokens: float | None
    dollars_per_million_decode_tokens: float | None


def estimate_serving(
    model: "str | os.PathLike[str] | DeepseekConfig",
    *,
    gpu: str | Gpu = "h100",
    gpus: int = 1,
    context_tokens: int = 4096,
    batch_size: int = 1,
    weights_dtype: str = "bf16",
    cache_dtype: str = "bf16",
    split: str = "layers",
    mtp: bool = False,
    prefill_tokens: int = PREFILL_TOKENS,
    dollars_per_gpu_hour: float | None = None,
) -> ServingEstimate:
    """Memory and bounds of speed of serving `batch_size` sequences of `context_tokens` each.

    Args:
        split: how several GPUs share the model. "layers" (`device_map`, pipeline stages): each has whole layers and
            their cache, and they work one after the other. "tensor": each has a part of every matrix behind the heads
            and of every MLP, and works at the same time; the latents cannot be split by heads, so each has the whole
            cache.
        mtp: with the MTP modules, their weights and cache, for drafting. Speeds are those of plain decoding.
        prefill_tokens: tokens of all prompts together that pass at once; longer ones go in pieces.

    Raises:
        ValueError: for unknown names, numbers out of range, a context beyond `max_position_embeddings`, and heads that
            cannot be split over so many GPUs.

    >>> estimate = estimate_serving("deepseek-v2-lite", gpu="rtx-4090", weights_dtype="nf4", context_tokens=32768)
    >>> estimate.fits, f"{estimate.memory.weights_bytes / 1e9:.1f} + {estimate.memory.cache_bytes / 1e9:.1f} GB"
    (True, '9.5 + 1.0 GB')
    """
    config, card = load_config(model), find_gpu(gpu)
    at_least_one(gpus=gpus, context_tokens=context_tokens, batch_size=batch_size, prefill_tokens=prefill_tokens)
    within_context(config, context_tokens)
    one_of("split", split, SPLITS)
    above_zero(dollars_per_gpu_hour=dollars_per_gpu_hour)
    options: dict[str, Any] = {
        "batch_size": batch_size, "weights_dtype": weights_dtype, "cache_dtype": cache_dtype, "gpus": gpus,
        "split": split, "mtp": mtp, "prefill_tokens": prefill_tokens,
    }  # fmt: skip
    memory = serving_memory(config, context_tokens, **options)
    count = count_parameters(config)

    at_work = gpus if split == "tensor" else 1
    peak = card.bf16_flops_per_second
    if weights_dtype == "fp8" and card.fp8_flops_per_second:
        peak = card.fp8_flops_per_second
    prefill_flops = forward_flops(config, context_tokens, context_tokens, "expanded") / context_tokens
    decode_flops = forward_flops(config, 1, context_tokens)
    read = decode_bytes_read(config, batch_size, weights_dtype, cut_by=at_work) + memory.cache_bytes
    # Reading and computing overlap at best.
    step_seconds = max(read / card.bandwidth_bytes_per_second, batch_size * decode_flops / (peak * at_work))
    rates = {"prefill": peak * at_work / prefill_flops, "decode": batch_size / step_seconds}
    dollars = {
        name: None if dollars_per_gpu_hour is None else dollars_per_gpu_hour * gpus / 3600 / rate * 1e6
        for name, rate in rates.items()
    }
    return ServingEstimate(
        parameters=count.total if mtp else count.main,
        active_parameters=count.active,
        memory=memory,
        gpu_memory_bytes=card.memory_bytes,
        fits=memory.bytes_per_gpu <= card.memory_bytes,
        longest_context_tokens=longest_context(config, card.memory_bytes, **options),
        prefill_flops_per_token=prefill_flops,
        decode_flops_per_token=decode_flops,
        prefill_tokens_per_second=rates["prefill"],
        decode_tokens_per_second=rates["decode"],
        dollars_per_million_prefill_tokens=dollars["prefill"],
        dollars_per_million_decode_tokens=dollars["decode"],
    )


def decode_bytes_read(config: "DeepseekConfig", batch_size: int, dtype: str, *, cut_by: int = 1) -> float:
    """Bytes of weights that a step of one token for each sequence reads: all but the embedding, and of the routed
    experts those that some token meets. Under even routing B tokens meet E (1 - (1 - K / E)^B) of E. Each of `cut_by`
    GPUs that share every matrix reads its part.

    >>> from modeling_deepseek import DeepseekV3Config
    >>> config = DeepseekV3Config.from_preset("deepseek-v3")
    >>> [f"{decode_bytes_read(config, batch, 'fp8') / 1e9:.0f} GB" for batch in (1, 8, 1024)]
    ['38 GB', '164 GB', '671 GB']
    """
    total = 0.0
    for weight in weights(config):
        if weight.mtp or (weight.part == "embedding" and not config.tie_word_embeddings):
            continue
        share = 1.0
        if weight.part == "routed_experts":
            assert config.num_experts_per_tok is not None
            assert config.n_routed_experts is not None
            share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch_size
        total += share * weight.layers * tensor_bytes(weight, dtype) / (cut_by if is_cut(weight) else 1)
    return total


# What fits where

FITS_MODELS = ("deepseek-v2-lite", "moonlight-16b-a3b", "deepseek-v3")
FITS_DTYPES = ("bf16", "fp8", "int8", "nf4")
# (GPUs, GB of each): the sizes that are sold, and nodes of eight.
FITS_MEMORY = ((1, 8), (1, 16), (1, 24), (1, 40), (1, 48), (1, 80), (1, 141), (8, 80), (8, 141))


@dataclass(frozen=True)
class Fit:
    """One cell of the table: into the memory of `gpus` GPUs fit `batch_size` sequences of at most `context_tokens`."""

    model: str
    weights_dtype: str
    weights_bytes: int
    gpus: int
    gpu_memory_bytes: int
    batch_size: int
    context_tokens: int


def what_fits(
    models: Sequence[str] = FITS_MODELS,
    dtypes: Sequence[str] = FITS_DTYPES,
    memory: Sequence[tuple[int, int]] = FITS_MEMORY,
    *,
    batch_size: int = 1,
    context_tokens: int | None = None,
    cache_dtype: str = "bf16",
    prefill_tokens: int = PREFILL_TOKENS,
) -> list[Fit]:
    """What fits for each model, dtype of its weights and (GPUs, GB each), without MTP modules; several GPUs hold whole
    layers each. The longest context of `batch_size` sequences, or with `context_tokens` the most sequences of that
    context, which is cut to the model's own limit. 0 where the weights alone are too large.

    >>> sizes = [(1, 24), (1, 40), (1, 80)]
    >>> [fit.context_tokens for fit in what_fits(["deepseek-v2-lite"], ["bf16"], sizes)]
    [0, 147527, 163840]
    >>> [fit.batch_size for fit in what_fits(["deepseek-v2-lite"], ["nf4"], sizes, context_tokens=32768)]
    [10, 25, 60]
    """
    table = []
    for model in models:
        config = load_config(model)
        limit = config.max_position_embeddings
        for dtype in dtypes:
            size = weight_bytes(config, dtype, mtp=False)
            kwargs = {"weights_dtype": dtype, "cache_dtype": cache_dtype, "prefill_tokens": prefill_tokens}
            for gpus, gigabytes in memory:
                bytes_each = gigabytes * 10**9
                if context_tokens is None:
                    longest = longest_context(config, bytes_each, batch_size=batch_size, gpus=gpus, **kwargs)
                    cell = (batch_size, longest)
                else:
                    context = min(context_tokens, limit)
                    cell = (most_sequences(config, bytes_each, context, gpus=gpus, **kwargs), context)
                table.append(Fit(os.fspath(model), dtype, size, gpus, bytes_each, *cell))
    return table
