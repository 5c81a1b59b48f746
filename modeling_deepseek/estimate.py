"""Numbers before you buy: memory, hours and dollars of training and serving a configuration on given hardware.

    python -m modeling_deepseek.estimate count deepseek-v3
    python -m modeling_deepseek.estimate serve deepseek-v3 --gpu h200 --gpus 8 --dtype fp8 --context 32768
    python -m modeling_deepseek.estimate train moonlight-16b-a3b --gpu h100 --gpus 8 --tokens 2B --mfu 0.3
    python -m modeling_deepseek.estimate fits

`counts` says what is exact. Here are the assumptions: what autograd keeps, what a step holds at its peak, what a GPU
reaches. Each is a named constant or an argument, and marked "our choice" where nobody published it. Memory is checked
against real allocations (tests/modeling_deepseek/test_estimate.py); rates are bounds by the datasheet, which real runs
stay below.

Bytes are bytes, and GB are 10^9 of them. Importing this costs milliseconds; a model's name costs the import of
transformers, and with it torch, which the configuration classes need.

Legend: D hidden size, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim, C = kv_lora_rank,
E routed experts, K experts per token, F expert width.
"""

import argparse
import copy
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from .counts import (
    CACHE_DTYPES,
    PARTS,
    VALUE_BYTES,
    WEIGHT_DTYPES,
    cache_bytes_per_token,
    count_parameters,
    forward_flops,
    tensor_bytes,
    training_flops,
    weight_bytes,
    weights,
)

if TYPE_CHECKING:
    from .configuration_deepseek import DeepseekConfig


@dataclass(frozen=True)
class Gpu:
    """One card. Peaks are dense (no 2:4 sparsity) with float32 accumulation, as training and serving use them."""

    memory_bytes: int  # the name's GB as 10^9 bytes: what drivers report is the same or a few percent more
    bandwidth_bytes_per_second: float
    bf16_flops_per_second: float
    fp8_flops_per_second: float | None  # None: no FP8 units, so FP8 weights are multiplied in bfloat16
    source: str


def _gpu(gigabytes: int, gigabytes_per_second: float, bf16_tflops: float, fp8_tflops: float | None, source: str) -> Gpu:
    fp8 = fp8_tflops * 1e12 if fp8_tflops else None
    return Gpu(gigabytes * 10**9, gigabytes_per_second * 1e9, bf16_tflops * 1e12, fp8, source)


# Datasheets print peaks with sparsity: half of those stands here.
GPUS = {
    "l4": _gpu(24, 300, 121, 242.5, "NVIDIA L4 datasheet"),
    "l40s": _gpu(48, 864, 362.05, 733, "NVIDIA L40S datasheet"),
    "rtx-3090": _gpu(24, 936, 71, None, "NVIDIA GA102 whitepaper, FP32 accumulate"),
    "rtx-4090": _gpu(24, 1008, 165.2, 330.3, "NVIDIA Ada whitepaper, FP32 accumulate"),
    "rtx-5090": _gpu(32, 1792, 209.5, 419, "NVIDIA RTX Blackwell whitepaper, FP32 accumulate"),
    "a100-40gb": _gpu(40, 1555, 312, None, "NVIDIA A100 datasheet, SXM"),
    "a100-80gb": _gpu(80, 2039, 312, None, "NVIDIA A100 datasheet, SXM"),
    "h100": _gpu(80, 3350, 989.4, 1978.9, "NVIDIA H100 datasheet, SXM"),
    "h800": _gpu(80, 3350, 989.4, 1978.9, "as H100 SXM; it differs in NVLink and FP64 (arXiv 2505.09343)"),
    "h200": _gpu(141, 4800, 989.4, 1978.9, "NVIDIA H200 datasheet, SXM"),
    "mi300x": _gpu(192, 5300, 1307.4, 2614.9, "AMD Instinct MI300X data sheet"),
}
# V3's own assumption (its table 1), and the only price here: rents change by the month.
V3_DOLLARS_PER_H800_HOUR = 2.0

# Allowances, our choice. The process on each GPU, before any tensor: context, kernels, workspaces of the libraries.
PROCESS_BYTES = 600 * 10**6
# What the allocator holds and cannot use, as a share of all tensors.
FRAGMENTATION = 0.03
# Experts that are dequantised at a time: `quantization.WORKSPACE`, which is not imported for torch's sake.
EXPERT_WORKSPACE_BYTES = 2**28
# Tokens of prompts that pass at once, as servers and `generate(prefill_chunk_size=...)` do it.
PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class Precision:
    """Bytes for each trainable parameter beside the optimizer's, and of an activation's value."""

    weights: int  # what is multiplied
    master: int  # the copy that the optimizer moves, where it is another one
    gradients: int
    activations: int


# "mixed" is torch's autocast as well (float32 weights and their cached bfloat16 casts); "fp8" is V3 3.3.
PRECISIONS = {
    "fp32": Precision(4, 0, 4, 4),
    "bf16": Precision(2, 0, 2, 2),
    "mixed": Precision(2, 4, 4, 2),
    "fp8": Precision(1, 4, 4, 2),
}
# Bytes of both moments for each trainable parameter. bitsandbytes' 8-bit AdamW has a float32 scale for 256 values.
OPTIMIZERS = {"adamw": 8.0, "adamw-bf16": 4.0, "adamw-8bit": 2 * (1 + 4 / 256), "sgd": 0.0}
LORA_SETS = ("attention", "dense_mlp", "shared_experts", "routed_experts", "mtp")  # as in `adapter_targets`


def load_config(model: "str | os.PathLike[str] | DeepseekConfig") -> "DeepseekConfig":
    """The configuration itself, a preset's, or that of a folder or Hub id with a `config.json`.

    Raises:
        ValueError: for a name that is none of these, with the nearest preset, or a model of another type.
    """
    if not isinstance(model, (str, os.PathLike)):
        return model
    from .configuration_deepseek import PRESETS, DeepseekV2Config, DeepseekV3Config

    name = os.fspath(model)
    if name in PRESETS:
        config_class = DeepseekV2Config if PRESETS[name]["model_type"] == "deepseek_v2" else DeepseekV3Config
        return config_class.from_preset(name)
    if not os.path.exists(name) and name.count("/") != 1:
        raise ValueError(_unknown("model", name, list(PRESETS)) + ", or a folder or Hub id with a config.json")
    fields, _ = DeepseekV3Config.get_config_dict(name)
    model_type = fields.get("model_type")
    if model_type not in ("deepseek_v2", "deepseek_v3", "kimi_k2"):
        raise ValueError(f"{name} is a {model_type!r}; this package knows deepseek_v2, deepseek_v3 and kimi_k2")
    return (DeepseekV2Config if model_type == "deepseek_v2" else DeepseekV3Config).from_dict(fields)


def find_gpu(gpu: str | Gpu) -> Gpu:
    """One of `GPUS` by its name, or the `Gpu` itself.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    if isinstance(gpu, Gpu):
        return gpu
    if gpu.lower() not in GPUS:
        raise ValueError(_unknown("GPU", gpu, list(GPUS)))
    return GPUS[gpu.lower()]


def _unknown(what: str, name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return f"unknown {what} {name!r}{f', did you mean {near[0]!r}' if near else ''}; one of {', '.join(names)}"


# Serving


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
    all_tokens = batch_size * context_tokens
    pieces = min(prefill_tokens, all_tokens)  # the last one has all others before it
    workspace = dequantized_bytes(config, weights_dtype) + max(
        prefill_workspace_bytes(config, pieces, all_tokens - pieces, batch_size=batch_size, dtype=compute),
        decode_workspace_bytes(config, context_tokens, batch_size, dtype=compute),
    )
    workspace += cache_bytes // config.num_hidden_layers  # a dynamic cache grows by a copy of one layer's at a time
    weights_per_gpu, cache_per_gpu = weights_bytes // gpus, cache_bytes
    if split == "layers":
        cache_per_gpu = cache_bytes // gpus
        if gpus > 1:  # layers, embedding and head are dealt out whole: the fullest has up to one above its share
            table = config.vocab_size * config.hidden_size * VALUE_BYTES[compute]
            weights_per_gpu += max(layer_bytes(config, weights_dtype), table)
            cache_per_gpu += cache_bytes // config.num_hidden_layers
    allowance = PROCESS_BYTES + int(FRAGMENTATION * (weights_per_gpu + cache_per_gpu + workspace))
    return ServingMemory(weights_bytes, cache_bytes, weights_per_gpu, cache_per_gpu, workspace, allowance)


def layer_bytes(config: "DeepseekConfig", dtype: str) -> int:
    """Bytes of the largest decoder layer."""
    last = config.num_hidden_layers - 1
    moe = any(config.is_moe_layer(index) for index in range(last + 1))
    routed = ("gate", "routed_experts", "shared_experts")
    skipped = {"embedding", "head", "mtp", "dense_mlp"} if moe else {"embedding", "head", "mtp", *routed}
    some = [weight for weight in weights(config) if not weight.mtp and weight.part not in skipped]
    return sum(tensor_bytes(weight, dtype) for weight in some if weight.name != "norm.weight")


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
            their cache, and they work one after the other. "tensor": each has a part of every matrix and works at the
            same time; the latents cannot be split by heads, so each has the whole cache.
        mtp: with the MTP modules, their weights and cache, for drafting. Speeds are those of plain decoding.
        prefill_tokens: tokens of all prompts together that pass at once; longer ones go in pieces.

    Raises:
        ValueError: for unknown names, and a context beyond `max_position_embeddings`.

    >>> estimate = estimate_serving("deepseek-v2-lite", gpu="rtx-4090", weights_dtype="nf4", context_tokens=32768)
    >>> estimate.fits, f"{estimate.memory.weights_bytes / 1e9:.1f} + {estimate.memory.cache_bytes / 1e9:.1f} GB"
    (True, '9.5 + 1.0 GB')
    """
    config, card = load_config(model), find_gpu(gpu)
    _at_least_one(gpus=gpus, context_tokens=context_tokens, batch_size=batch_size, prefill_tokens=prefill_tokens)
    _not_beyond(config, context_tokens)
    if split not in ("layers", "tensor"):
        raise ValueError(f"`split` must be 'layers' or 'tensor', got {split!r}")
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
    read = decode_bytes_read(config, batch_size, weights_dtype) / at_work + memory.cache_bytes
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


def decode_bytes_read(config: "DeepseekConfig", batch_size: int, dtype: str) -> float:
    """Bytes of weights that a step of one token for each sequence reads: all but the embedding, and of the routed
    experts those that some token meets. Under even routing B tokens meet E (1 - (1 - K / E)^B) of E.

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
        total += share * weight.layers * tensor_bytes(weight, dtype)
    return total


# Training


def saved_bytes_per_token(
    config: "DeepseekConfig", *, moe: bool, dtype_bytes: int = 2, fused_norms: bool = True
) -> int:
    """What autograd keeps of one decoder layer for one token, with sdpa and grouped experts.

    `fused_norms`: on CUDA a norm keeps its input; on CPU, where torch composes it, two float32 copies.
    """
    hidden, heads, value = config.hidden_size, config.num_attention_heads, dtype_bytes
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    query_dim = config.qk_nope_head_dim + rope
    value_dim = max(query_dim, config.v_head_dim)  # sdpa's flash kernels: padded to the width of the keys

    def norm(size: int, stored: int) -> int:
        if fused_norms:
            return stored * value + 4
        return 4 + 4 * size + (4 * stored if value == 4 else 4 * size)

    saved = norm(hidden, hidden) + hidden * value  # the residual stream; what the projections multiply
    if config.q_lora_rank is not None:
        saved += norm(config.q_lora_rank, config.q_lora_rank) + config.q_lora_rank * value
    saved += norm(rank, rank + rope) + rank * value
    # query, key, padded value, output, its log-sum-exp in float32; the output without the padding for o_proj
    saved += heads * (2 * (query_dim + value_dim) * value + 4 + config.v_head_dim * value)
    saved += norm(hidden, hidden) + hidden * value
    if not moe:
        return saved + 4 * config.intermediate_size * value
    assert config.n_routed_experts is not None
    assert config.num_experts_per_tok is not None
    experts, top_k, width = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    saved += 4 * width * (config.n_shared_experts or 0) * value
    saved += top_k * (2 * hidden + 4 * width) * value
    if value < 4 and config.router_logits_dtype == "float32":
        saved += 4 * hidden
    # Routing: affinities, sorted indices and weights of the choices, groups.
    saved += 4 * experts + 40 * top_k + 4
    if config.n_group is not None and config.n_group > 1 and config.topk_method != "greedy":
        saved += 17 * config.n_group + 8 * (config.topk_group or 1)
    return saved + _balance_loss_bytes(config)


def _balance_loss_bytes(config: "DeepseekConfig") -> int:
    return 8 * (config.n_routed_experts or 0) + 16 if config.aux_loss_alpha > 0 else 0


def activation_bytes(
    config: "DeepseekConfig",
    tokens: int,
    *,
    checkpointing: bool = False,
    mtp: bool = True,
    dtype_bytes: int = 2,
    fused_norms: bool = True,
) -> tuple[int, int]:
    """What autograd keeps of `tokens` tokens between forward and backward, the loss left out; and what one layer adds
    to it in the backward pass, when `checkpointing`, which keeps the layers' inputs only, computes it again."""
    main = config.num_hidden_layers
    modules = config.num_nextn_predict_layers if mtp else 0
    layers = [
        saved_bytes_per_token(config, moe=config.is_moe_layer(index), dtype_bytes=dtype_bytes, fused_norms=fused_norms)
        for index in range(main + modules)
    ]
    state = config.hidden_size * dtype_bytes
    norm = state + 4 if fused_norms else 8 * config.hidden_size + 4
    for module in range(main, main + modules):
        # enorm, hnorm, what eh_proj multiplies, the norm before the head. What hnorm reads is what the head before it
        # multiplies, except as a float32 copy.
        shared = state if fused_norms or dtype_bytes == 4 else 0
        layers[module] += 3 * norm + 2 * state - shared
    heads = norm + (1 + modules) * state  # the last norm, and what each head multiplies
    if checkpointing:
        # The input of a layer; of a module the embeddings ahead, beside what the head before it reads. The balance
        # loss is outside of the layers.
        routing = sum(config.is_moe_layer(index) for index in range(main + modules)) * _balance_loss_bytes(config)
        return tokens * (heads + state * len(layers) + routing), tokens * max(layers)
    return tokens * (heads + sum(layers)), 0


def loss_bytes(
    config: "DeepseekConfig", tokens: int, *, mtp: bool = True, dtype_bytes: int = 2, head_gradient_bytes: int = 0
) -> int:
    """Peak of the loss: logits, and three float32 copies when its backward pass begins (log-probabilities, gradient of
    the loss, gradient of the logits). More tokens than `config.logits_workspace_mib` holds the logits of pass in
    pieces, each adding to the head's gradient what it computed; otherwise MTP modules have theirs waiting beside."""
    at_once = max(1, config.logits_workspace_mib * 2**20 // (4 * config.vocab_size))
    if tokens > at_once:
        return at_once * config.vocab_size * (dtype_bytes + 12) + head_gradient_bytes
    waiting = config.num_nextn_predict_layers if mtp else 0
    return tokens * config.vocab_size * (dtype_bytes + 12 + waiting * (4 + dtype_bytes))


def lora_parameters(config: "DeepseekConfig", rank: int, sets: Sequence[str] = ("attention",)) -> int:
    """Parameters of low-rank adapters on every linear layer of these sets: rank x (in + out) for each, each expert
    having its own for gate, up and down. "mtp" is all of the MTP modules, which the other sets leave out."""
    for name in sets:
        if name not in LORA_SETS:
            raise ValueError(_unknown("set to adapt", name, LORA_SETS))
    total = 0
    for weight in weights(config):
        if ("mtp" if weight.mtp else weight.part) in sets and weight.matrix and weight.part != "gate":
            *experts, rows, columns = weight.shape
            fused = 2 if weight.name.endswith("gate_up_proj") else 1
            total += weight.layers * prod(experts) * rank * (rows + fused * columns)
    return total


@dataclass(frozen=True)
class TrainingMemory:
    """A training step on one GPU. `gathered_bytes` are layers whole for a time: sharded ones, and what a product
    dequantises. `peak_bytes` is these, weights, optimizer, the allowance and the larger of two moments: the start of
    the backward pass (activations, logits or a layer computed again, the gradient of the head), and its end and the
    step (all gradients); where gradients accumulate they stand beside all activations.
    """

    trainable_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    gathered_bytes: int
    activations_bytes: int
    recomputed_bytes: int
    logits_bytes: int
    allowance_bytes: int
    peak_bytes: int


def training_memory(
    config: "DeepseekConfig",
    context_tokens: int,
    *,
    batch_size: int = 1,
    gpus: int = 1,
    precision: str = "mixed",
    optimizer: str = "adamw",
    checkpointing: bool = True,
    accumulates: bool = False,
    sharded: bool = True,
    mtp: bool = True,
    lora_rank: int | None = None,
    lora_sets: Sequence[str] = ("attention",),
    base_dtype: str = "bf16",
    fused: bool = True,
) -> TrainingMemory:
    """Memory of a training step on each GPU. See `estimate_training` for the arguments."""
    count, held = count_parameters(config), PRECISIONS[precision]
    if lora_rank is None:
        trainable = count.total if mtp else count.main
        weights_bytes, gradient_bytes = trainable * (held.weights + held.master), held.gradients
        head_gradient = config.vocab_size * config.hidden_size * gradient_bytes
        whole_layer = layer_bytes(config, "bf16") * held.weights // 2
    else:
        trainable = lora_parameters(config, lora_rank, lora_sets)
        weights_bytes, gradient_bytes = weight_bytes(config, base_dtype, mtp=mtp) + 4 * trainable, 4
        head_gradient, whole_layer = 0, layer_bytes(config, base_dtype)
    gradients_bytes, optimizer_bytes = trainable * gradient_bytes, round(trainable * OPTIMIZERS[optimizer])

    tokens, value = context_tokens * batch_size, held.activations
    activations, recomputed = activation_bytes(
        config, tokens, checkpointing=checkpointing, mtp=mtp, dtype_bytes=value, fused_norms=fused
    )
    logits = loss_bytes(config, tokens, mtp=mtp, dtype_bytes=value, head_gradient_bytes=head_gradient)
    # An optimizer that loops over the parameters has two float32 temporaries, of one of them at a time.
    step = 0 if fused or lora_rank is not None else 8 * max(prod(weight.shape) for weight in weights(config))
    gathered = dequantized_bytes(config, base_dtype) if lora_rank is not None else 0
    if sharded and gpus > 1:
        weights_bytes, gradients_bytes = weights_bytes // gpus, gradients_bytes // gpus
        optimizer_bytes, head_gradient = optimizer_bytes // gpus, head_gradient // gpus
        gathered += 2 * whole_layer
    start = activations + max(logits, recomputed)  # of the backward pass: one after the other
    if accumulates:
        moment = gradients_bytes + max(start, step)
    else:
        moment = max(start + head_gradient, gradients_bytes + max(recomputed, step))
    tensors = weights_bytes + optimizer_bytes + gathered + moment
    allowance = PROCESS_BYTES + int(FRAGMENTATION * tensors)
    return TrainingMemory(
        trainable_parameters=trainable,
        weights_bytes=weights_bytes,
        gradients_bytes=gradients_bytes,
        optimizer_bytes=optimizer_bytes,
        gathered_bytes=gathered,
        activations_bytes=activations,
        recomputed_bytes=recomputed,
        logits_bytes=logits,
        allowance_bytes=allowance,
        peak_bytes=tensors + allowance,
    )


@dataclass(frozen=True)
class TrainingEstimate:
    """Memory of a training step, and time and money of a run. `gpu_hours` is `hours` times GPUs; time is None without
    tokens, dollars without a price."""

    parameters: int
    flops_per_token: float
    memory: TrainingMemory
    gpu_memory_bytes: int
    fits: bool
    mfu: float | None
    tokens_per_second: float | None
    hours: float | None
    gpu_hours: float | None
    dollars: float | None


def estimate_training(
    model: "str | os.PathLike[str] | DeepseekConfig",
    *,
    gpu: str | Gpu = "h100",
    gpus: int = 1,
    context_tokens: int = 4096,
    batch_size: int = 1,
    precision: str = "mixed",
    optimizer: str = "adamw",
    checkpointing: bool = True,
    logits_workspace_mib: int | None = None,
    accumulates: bool = False,
    sharded: bool = True,
    mtp: bool = True,
    lora_rank: int | None = None,
    lora_sets: Sequence[str] = ("attention",),
    base_dtype: str = "bf16",
    tokens: float | None = None,
    mfu: float | None = None,
    tokens_per_second: float | None = None,
    dollars_per_gpu_hour: float | None = None,
    fused: bool = True,
) -> TrainingEstimate:
    """Memory of a step on each GPU, and hours and dollars of `tokens` tokens.

    Args:
        context_tokens, batch_size: of one forward pass on one GPU.
        sharded: weights, gradients and optimizer are spread over the GPUs (FSDP, ZeRO-3), and two layers are whole at
            a time; otherwise each GPU has all of them.
        logits_workspace_mib: instead of the configuration's; the loss takes logits in pieces below it.
        lora_rank: train adapters in float32 on `lora_sets` (those of `adapter_targets`) only, over frozen weights in
            `base_dtype` ("nf4" is QLoRA). Activations are taken as in full training, an upper bound: a frozen matrix
            need not keep its input. Of the FLOPs, gradients of frozen weights are left out.
        mfu: share of the GPUs' dense bfloat16 peak that the model's FLOPs reach (attention counted causally), in FP8
            too, as DeepSeek states it. No default: it depends on everything.
        tokens_per_second: measured, of all GPUs together, instead of `mfu`.
        fused: norms and optimizer run as single kernels, as they can on CUDA; on CPU they do not, and need more.

    Raises:
        ValueError: for unknown names, a context beyond `max_position_embeddings`, and `tokens` without exactly one of
            `mfu` and `tokens_per_second`.

    V3's pre-training, by the MFU that a later paper gives for it (arXiv 2505.09343, table 4), where V3's own table 1
    has 2,664K hours:

    >>> run = estimate_training("deepseek-v3", gpu="h800", gpus=2048, tokens=14.8e12, mfu=0.3894, mtp=False,
    ...                         precision="fp8", dollars_per_gpu_hour=V3_DOLLARS_PER_H800_HOUR)
    >>> f"{run.gpu_hours / 1e3:,.0f}K hours, ${run.dollars / 1e6:.2f}M"
    '2,673K hours, $5.35M'
    """
    config, card = load_config(model), find_gpu(gpu)
    if logits_workspace_mib is not None:
        _at_least_one(logits_workspace_mib=logits_workspace_mib)
        config = copy.copy(config)
        config.logits_workspace_mib = logits_workspace_mib
    _at_least_one(gpus=gpus, context_tokens=context_tokens, batch_size=batch_size)
    _not_beyond(config, context_tokens)
    for what, name, names in (("precision", precision, PRECISIONS), ("optimizer", optimizer, OPTIMIZERS)):
        if name not in names:
            raise ValueError(_unknown(what, name, list(names)))
    if lora_rank is not None:
        _at_least_one(lora_rank=lora_rank)
    memory = training_memory(
        config, context_tokens, batch_size=batch_size, gpus=gpus, precision=precision, optimizer=optimizer,
        checkpointing=checkpointing, accumulates=accumulates, sharded=sharded, mtp=mtp, lora_rank=lora_rank,
        lora_sets=lora_sets, base_dtype=base_dtype, fused=fused,
    )  # fmt: skip
    count = count_parameters(config)
    flops = training_flops(config, context_tokens, mtp=mtp, frozen=lora_rank is not None)
    peak = gpus * card.bf16_flops_per_second
    if mfu is not None and tokens_per_second is not None:
        raise ValueError("`mfu` and `tokens_per_second` both say how fast it is: pass one of them")
    if tokens is not None and mfu is None and tokens_per_second is None:
        raise ValueError("`tokens` need `mfu` or a measured `tokens_per_second` to become hours")
    if mfu is not None:
        if not 0 < mfu <= 1:
            raise ValueError(f"`mfu` must lie in (0, 1], got {mfu}")
        tokens_per_second = mfu * peak / flops
    elif tokens_per_second is not None:
        mfu = tokens_per_second * flops / peak
    hours = None
    if tokens is not None and tokens_per_second is not None:
        hours = tokens / tokens_per_second / 3600
    gpu_hours = None if hours is None else hours * gpus
    return TrainingEstimate(
        parameters=count.total if mtp else count.main,
        flops_per_token=flops,
        memory=memory,
        gpu_memory_bytes=card.memory_bytes,
        fits=memory.peak_bytes <= card.memory_bytes,
        mfu=mfu,
        tokens_per_second=tokens_per_second,
        hours=hours,
        gpu_hours=gpu_hours,
        dollars=None if gpu_hours is None or dollars_per_gpu_hour is None else gpu_hours * dollars_per_gpu_hour,
    )


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")


def _not_beyond(config: "DeepseekConfig", context_tokens: int) -> None:
    if context_tokens > config.max_position_embeddings:
        raise ValueError(
            f"`context_tokens` {context_tokens:,} is beyond the model's `max_position_embeddings` "
            f"{config.max_position_embeddings:,}"
        )


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


# The command line


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m modeling_deepseek.estimate`; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of a pipe (`| head`) had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_deepseek.estimate",
        description="Memory, hours and dollars of training and serving a DeepSeek model on given hardware.",
        epilog="COMMAND --help lists the options. Exit status 1 is an error; that something does not fit is none.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    json_option = argparse.ArgumentParser(add_help=False)
    json_option.add_argument("--json", action="store_true", help="the numbers as JSON, in the units of their names")
    model = argparse.ArgumentParser(add_help=False, parents=[json_option])
    model.add_argument("model", help="a preset (deepseek-v3, ...), or a folder or Hub id with a config.json")
    hardware = argparse.ArgumentParser(add_help=False)
    hardware.add_argument("--gpu", default="h100", metavar="NAME", type=_gpu_name, help=f"one of {', '.join(GPUS)}")
    hardware.add_argument("--gpus", type=int, default=1, metavar="N")
    hardware.add_argument("--dollars", type=float, metavar="PRICE", help="of one GPU for one hour")
    hardware.add_argument("--context", type=_count, default=4096, metavar="TOKENS", help="4096, 32K, ...")
    hardware.add_argument("--batch", type=int, default=1, metavar="SEQUENCES", help="at once (training: on each GPU)")

    count = commands.add_parser("count", parents=[model], help="parameters, FLOPs, bytes: what is exact")
    count.add_argument("--context", type=_count, default=4096, metavar="TOKENS")
    count.set_defaults(command=_print_count)

    serve = commands.add_parser("serve", parents=[model, hardware], help="memory and bounds of speed of serving")
    serve.add_argument("--dtype", choices=WEIGHT_DTYPES, default="bf16", help="of the weights")
    serve.add_argument("--cache-dtype", choices=CACHE_DTYPES, default="bf16")
    serve.add_argument("--split", choices=("layers", "tensor"), default="layers", help="of the model over the GPUs")
    serve.add_argument("--mtp", action="store_true", help="with the MTP modules, to draft")
    at_once = f"tokens of prompts that pass at once (default: {PREFILL_TOKENS})"
    serve.add_argument("--prefill-tokens", type=_count, default=PREFILL_TOKENS, metavar="N", help=at_once)
    serve.set_defaults(command=_print_serve)

    train = commands.add_parser("train", parents=[model, hardware], help="memory of a step, hours and dollars of a run")
    train.add_argument("--tokens", type=_count, help="of the run: 14.8T, 20B, ...")
    speed = train.add_mutually_exclusive_group()
    speed.add_argument("--mfu", type=float, help="share of the dense bfloat16 peak, 0 to 1")
    speed.add_argument("--tokens-per-second", type=_count, help="measured, all GPUs together")
    train.add_argument("--precision", choices=PRECISIONS, default="mixed")
    train.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    train.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    train.add_argument("--logits-mib", type=int, metavar="MIB", help="of logits at a time (default: the model's, 512)")
    train.add_argument("--accumulates", action="store_true", help="gradients of several passes are summed")
    train.add_argument("--not-sharded", action="store_true", help="each GPU holds all (DDP)")
    train.add_argument("--no-mtp", action="store_true", help="without the MTP modules")
    train.add_argument("--lora-rank", type=int, metavar="R", help="adapters over frozen weights")
    train.add_argument("--lora-sets", nargs="+", choices=LORA_SETS, default=["attention"])
    train.add_argument("--base-dtype", choices=WEIGHT_DTYPES, default="bf16", help="of the frozen weights")
    train.set_defaults(command=_print_train)

    fits = commands.add_parser("fits", parents=[json_option], help="table: what fits into which memory")
    fits.add_argument("models", nargs="*", default=list(FITS_MODELS), metavar="MODEL")
    fits.add_argument("--dtypes", nargs="+", choices=WEIGHT_DTYPES, default=list(FITS_DTYPES))
    question = fits.add_mutually_exclusive_group()
    question.add_argument("--batch", type=int, default=1, metavar="SEQUENCES", help="the longest context of so many")
    question.add_argument("--context", type=_count, metavar="TOKENS", help="the most sequences of this context")
    fits.add_argument("--cache-dtype", choices=CACHE_DTYPES, default="bf16")
    fits.add_argument("--prefill-tokens", type=_count, default=PREFILL_TOKENS, metavar="N", help=at_once)
    fits.set_defaults(command=_print_fits)

    gpus = commands.add_parser("gpus", parents=[json_option], help="the cards that are known, and by which source")
    gpus.set_defaults(command=_print_gpus)
    return parser


def _gpu_name(name: str) -> str:
    try:
        find_gpu(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name.lower()


def _count(text: str) -> int:
    """ "14.8T" is 14.8e12. K is 1,024, as contexts are written.

    >>> _count("32K"), _count("20B"), _count("4096")
    (32768, 20000000000, 4096)
    """
    scale = {"K": 1024, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:].upper())
    try:
        return round(float(text[:-1] if scale else text) * (scale or 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: write 4096, 32K, 20B or 14.8T") from None


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """The first column to the left, the others to the right; a row of one cell is a heading."""
    widths = [max(len(row[column]) for row in rows if len(row) > column) for column in range(max(map(len, rows)))]
    widths[0] = max(len(row[0]) for row in rows if len(row) > 1)
    for row in rows:
        cells = [row[0].ljust(widths[0]) if len(row) > 1 else row[0]]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        print("  ".join(cells).rstrip())


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _billions(number: float) -> str:
    return f"{number / 1e9:,.2f}B" if number >= 1e7 else f"{number:,.0f}"


def _gflops(flops: float) -> str:
    return f"{flops / 1e9:,.1f} GFLOPs"


def _print_count(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.model)
    _at_least_one(context_tokens=arguments.context)
    _not_beyond(config, arguments.context)
    count, context = count_parameters(config), arguments.context
    flops = {
        "training_flops_per_token": training_flops(config, context),
        "training_flops_per_token_without_mtp": training_flops(config, context, mtp=False),
        "prefill_flops_per_token": forward_flops(config, context, context, "expanded") / context,
        "decode_absorbed_flops_per_token": forward_flops(config, 1, context, "absorbed"),
        "decode_expanded_flops_per_token": forward_flops(config, 1, context, "expanded"),
    }
    cache = {dtype: cache_bytes_per_token(config, dtype) for dtype in CACHE_DTYPES}
    sizes = {dtype: weight_bytes(config, dtype) for dtype in WEIGHT_DTYPES}
    if arguments.json:
        totals = {"main": count.main, "total": count.total}
        bytes_of = {"cache_bytes_per_token": cache, "weights_bytes": sizes}
        _print_json({**dataclasses.asdict(count), **totals, "context_tokens": context, **flops, **bytes_of})
        return
    rows: list[tuple[str, ...]] = [("parameters", _billions(count.main))]
    rows += [(f"  {part.replace('_', ' ')}", _billions(getattr(count, part))) for part in PARTS if part != "mtp"]
    rows += [("  active per token (with the head, without the embedding)", _billions(count.active))]
    if count.mtp:
        rows += [("MTP modules, besides", _billions(count.mtp)), ("  active per token", _billions(count.active_mtp))]
    rows += [("",), (f"FLOPs per token, at a context of {context:,}",)]
    mtp = f" (without MTP {_gflops(flops['training_flops_per_token_without_mtp'])})" if count.mtp else ""
    rows += [(f"  training, forward and backward{mtp}", _gflops(flops["training_flops_per_token"]))]
    rows += [("  prefill, mean of the prompt", _gflops(flops["prefill_flops_per_token"]))]
    rows += [("  decode, absorbed", _gflops(flops["decode_absorbed_flops_per_token"]))]
    rows += [("  decode, expanded", _gflops(flops["decode_expanded_flops_per_token"]))]
    rows += [("",), ("cache, bytes per token",)] + [(f"  {dtype}", f"{size:,}") for dtype, size in cache.items()]
    rows += [("",), ("weights" + " with MTP" * bool(count.mtp),)]
    rows += [(f"  {dtype}", _gb(size)) for dtype, size in sizes.items()]
    _print_rows(rows)


def _print_serve(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.model)
    options: dict[str, Any] = {
        "gpu": arguments.gpu, "gpus": arguments.gpus, "context_tokens": arguments.context,
        "batch_size": arguments.batch, "weights_dtype": arguments.dtype, "cache_dtype": arguments.cache_dtype,
        "split": arguments.split, "mtp": arguments.mtp, "prefill_tokens": arguments.prefill_tokens,
        "dollars_per_gpu_hour": arguments.dollars,
    }  # fmt: skip
    estimate = estimate_serving(config, **options)
    if arguments.json:
        fullest = {"bytes_per_gpu": estimate.memory.bytes_per_gpu}
        _print_json({"model": arguments.model, **options, **dataclasses.asdict(estimate), **fullest})
        return
    several = arguments.gpus > 1
    where = f"{arguments.gpus} x {arguments.gpu}, split by {arguments.split}" if several else arguments.gpu
    columns = ("all", "fullest GPU") if several else ("",)

    def memory(text: str, together: int, fullest: int | None = None) -> tuple[str, ...]:
        return (text, _gb(together), _gb(together if fullest is None else fullest))[: 1 + len(columns)]

    def per_gpu(text: str, size: int) -> tuple[str, ...]:
        return (text, "", _gb(size)) if several else (text, _gb(size))

    rows: list[tuple[str, ...]] = [
        (f"{arguments.model} on {where}: {arguments.batch} x {arguments.context:,} tokens",),
        ("memory", *columns),
        memory(f"  weights, {arguments.dtype}", estimate.memory.weights_bytes, estimate.memory.weights_bytes_per_gpu),
        memory(f"  cache, {arguments.cache_dtype}", estimate.memory.cache_bytes, estimate.memory.cache_bytes_per_gpu),
        per_gpu(f"  workspace, prompts in pieces of {arguments.prefill_tokens:,}", estimate.memory.workspace_bytes),
        per_gpu("  allowance for process and allocator (our choice)", estimate.memory.allowance_bytes),
        per_gpu("  sum", estimate.memory.bytes_per_gpu),
        per_gpu("  of", estimate.gpu_memory_bytes),
    ]
    if not estimate.fits:
        rows.append((f"does not fit{_way_out(config, arguments)}",))
    rows.append((f"longest context that fits: {estimate.longest_context_tokens:,} tokens",))
    _print_rows(rows)
    if not estimate.fits:
        return
    rates = [("prefill", estimate.prefill_tokens_per_second, estimate.dollars_per_million_prefill_tokens)]
    rates += [("decode", estimate.decode_tokens_per_second, estimate.dollars_per_million_decode_tokens)]
    speed: list[tuple[str, ...]] = [("by the datasheet", "tokens/s, at most", "per million tokens, at least")]
    for name, rate, dollars in rates:
        speed.append((f"  {name}", f"{rate:,.0f}", "-" if dollars is None else f"${dollars:,.3f}"))
    print()
    _print_rows(speed)


def _way_out(config: "DeepseekConfig", arguments: argparse.Namespace) -> str:
    """What would make it fit: fewer bytes for each weight, or more GPUs."""
    memory = find_gpu(arguments.gpu).memory_bytes

    def fits(**changed: Any) -> bool:
        options = {
            "batch_size": arguments.batch, "weights_dtype": arguments.dtype, "cache_dtype": arguments.cache_dtype,
            "gpus": arguments.gpus, "split": arguments.split, "mtp": arguments.mtp,
            "prefill_tokens": arguments.prefill_tokens, **changed,
        }  # fmt: skip
        return serving_memory(config, arguments.context, **options).bytes_per_gpu <= memory

    ways = [f"--dtype {dtype}" for dtype in ("fp8", "int8", "nf4", "nf4-dq") if fits(weights_dtype=dtype)][:1]
    more = [2**n for n in range(1, 8) if 2**n > arguments.gpus and fits(gpus=2**n)]
    ways += [f"--gpus {count}" for count in more[:1]]
    return f"; it would with {' or with '.join(ways)}" if ways else ""


def _print_train(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.model)
    options: dict[str, Any] = {
        "gpu": arguments.gpu, "gpus": arguments.gpus, "context_tokens": arguments.context,
        "batch_size": arguments.batch, "precision": arguments.precision, "optimizer": arguments.optimizer,
        "checkpointing": not arguments.no_checkpointing, "logits_workspace_mib": arguments.logits_mib,
        "accumulates": arguments.accumulates, "sharded": not arguments.not_sharded, "mtp": not arguments.no_mtp,
        "lora_rank": arguments.lora_rank, "lora_sets": arguments.lora_sets, "base_dtype": arguments.base_dtype,
        "tokens": arguments.tokens, "mfu": arguments.mfu, "tokens_per_second": arguments.tokens_per_second,
        "dollars_per_gpu_hour": arguments.dollars,
    }  # fmt: skip
    estimate = estimate_training(config, **options)
    if arguments.json:
        _print_json({"model": arguments.model, **options, **dataclasses.asdict(estimate)})
        return
    where = f"{arguments.gpus} x {arguments.gpu}" if arguments.gpus > 1 else arguments.gpu
    kind = f"adapters of rank {arguments.lora_rank} over {arguments.base_dtype}" if arguments.lora_rank else "full"
    rows: list[tuple[str, ...]] = [
        (f"{arguments.model} on {where}: {kind}, {arguments.batch} x {arguments.context:,} tokens on each GPU",),
        (f"trains {_billions(estimate.memory.trainable_parameters)} of {_billions(estimate.parameters)} parameters",),
        ("memory on each GPU",),
        ("  weights", _gb(estimate.memory.weights_bytes)),
        ("  gradients", _gb(estimate.memory.gradients_bytes)),
        (f"  optimizer, {arguments.optimizer}", _gb(estimate.memory.optimizer_bytes)),
        ("  activations that wait for the backward pass", _gb(estimate.memory.activations_bytes)),
        ("  a layer computed again", _gb(estimate.memory.recomputed_bytes)),
        ("  logits of the loss", _gb(estimate.memory.logits_bytes)),
        ("  layers gathered, weights dequantised", _gb(estimate.memory.gathered_bytes)),
        ("  allowance for process and allocator (our choice)", _gb(estimate.memory.allowance_bytes)),
        ("  peak (not all of these at once)", _gb(estimate.memory.peak_bytes)),
        ("  of", f"{_gb(estimate.gpu_memory_bytes)}"),
    ]
    if not estimate.fits:
        rows.append(("does not fit",))
    if estimate.tokens_per_second is not None and estimate.mfu is not None:
        rows += [("time",), ("  FLOPs per token", _gflops(estimate.flops_per_token))]
        rows += [("  tokens per second, all GPUs", f"{estimate.tokens_per_second:,.0f}")]
        rows += [("  MFU, of the dense bfloat16 peak", f"{estimate.mfu:.1%}")]
    if estimate.hours is not None and estimate.gpu_hours is not None:
        rows += [("  hours", f"{estimate.hours:,.1f}"), ("  GPU hours", f"{estimate.gpu_hours:,.0f}")]
    if estimate.dollars is not None:
        rows += [("  dollars", f"${estimate.dollars:,.0f}")]
    _print_rows([row for row in rows if len(row) == 1 or row[1] != "0.0 GB"])


def _print_fits(arguments: argparse.Namespace) -> None:
    _at_least_one(batch_size=arguments.batch, prefill_tokens=arguments.prefill_tokens)
    if arguments.context is not None:
        _at_least_one(context_tokens=arguments.context)
    table = what_fits(
        arguments.models,
        arguments.dtypes,
        batch_size=arguments.batch,
        context_tokens=arguments.context,
        cache_dtype=arguments.cache_dtype,
        prefill_tokens=arguments.prefill_tokens,
    )
    if arguments.json:
        _print_json([dataclasses.asdict(fit) for fit in table])
        return
    if arguments.context is not None:
        print(f"Sequences of {arguments.context:,} tokens (at most the model's limit) that fit at a time")
    else:
        sequences = "one sequence" if arguments.batch == 1 else f"each of {arguments.batch} sequences"
        print(f"Longest context of {sequences} that fits, in tokens (K = 1,024)")
    print("(-: not even the weights). Cache " + arguments.cache_dtype + ", no MTP modules, prompts in pieces of")
    print(f"{arguments.prefill_tokens:,} tokens. Kept free on each card, our choice: {_gb(PROCESS_BYTES)} and", end=" ")
    print(f"{FRAGMENTATION:.0%} of the tensors.")
    if "fp8" in arguments.dtypes:
        print("fp8 is what serving engines hold; this package loads FP8 checkpoints as bf16, int8 or nf4.")
    memory = [f"{gpus}x{gigabytes} GB" if gpus > 1 else f"{gigabytes} GB" for gpus, gigabytes in FITS_MEMORY]
    rows: list[tuple[str, ...]] = [("model", "limit", "weights", "GB", *memory)]
    for start in range(0, len(table), len(FITS_MEMORY)):
        row = table[start : start + len(FITS_MEMORY)]
        limit = load_config(row[0].model).max_position_embeddings
        if arguments.context is None:
            cells = [_thousands(fit.context_tokens) for fit in row]
        else:
            cells = [f"{fit.batch_size:,}" if fit.batch_size else "-" for fit in row]
        size = f"{row[0].weights_bytes / 1e9:,.1f}"
        rows.append((row[0].model, _thousands(limit), row[0].weights_dtype, size, *cells))
    print()
    _print_rows(rows)


def _thousands(tokens: int) -> str:
    if tokens == 0:
        return "-"
    return f"{tokens // 1024}K" if tokens >= 1024 else f"{tokens}"


def _print_gpus(arguments: argparse.Namespace) -> None:
    if arguments.json:
        _print_json({name: dataclasses.asdict(gpu) for name, gpu in GPUS.items()})
        return
    rows: list[tuple[str, ...]] = [("GPU", "memory", "bandwidth", "bf16 TFLOP/s", "fp8 TFLOP/s", "source")]
    for name, gpu in GPUS.items():
        fp8 = "-" if gpu.fp8_flops_per_second is None else f"{gpu.fp8_flops_per_second / 1e12:,.0f}"
        bandwidth = f"{gpu.bandwidth_bytes_per_second / 1e9:,.0f} GB/s"
        bf16 = f"{gpu.bf16_flops_per_second / 1e12:,.0f}"
        rows.append((name, f"{gpu.memory_bytes / 1e9:,.0f} GB", bandwidth, bf16, fp8, gpu.source))
    _print_rows(rows)


if __name__ == "__main__":
    sys.exit(main())
