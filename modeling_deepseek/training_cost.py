"""What training takes on given hardware: memory of a step on each GPU, hours and dollars of a run, of all parameters or
of adapters. `counts` says what is exact, `inference_cost` is the same for serving, `estimate` prints both.

Here are the assumptions: what autograd keeps, what a step holds at its peak. Memory is checked against real allocations
(tests/modeling_deepseek/test_memory.py). How much of its peak a GPU reaches is not predicted: it is an argument.

Bytes are bytes, and GB are 10^9 of them.

Legend: D hidden size, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim, C = kv_lora_rank,
E routed experts, K experts per token, F expert width.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from .counts import (
    at_least_one,
    count_parameters,
    load_config,
    training_flops,
    unknown,
    weight_bytes,
    weights,
    within_context,
)
from .hardware import FRAGMENTATION, PROCESS_BYTES, Gpu, find_gpu
from .inference_cost import dequantized_bytes, layer_bytes

if TYPE_CHECKING:
    from .configuration_deepseek import DeepseekConfig


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
LORA_SETS = ("attention", "dense_mlp", "shared_experts", "routed_experts", "mtp")  # as in `adapters`


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
            raise ValueError(unknown("set to adapt", name, LORA_SETS))
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
        lora_rank: train adapters in float32 on `lora_sets` (those of `adapters`) only, over frozen weights in
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
    ...                         precision="fp8", dollars_per_gpu_hour=2.0)
    >>> f"{run.gpu_hours / 1e3:,.0f}K hours, ${run.dollars / 1e6:.2f}M"
    '2,673K hours, $5.35M'
    """
    config, card = load_config(model), find_gpu(gpu)
    if logits_workspace_mib is not None:
        at_least_one(logits_workspace_mib=logits_workspace_mib)
        config = copy.copy(config)
        config.logits_workspace_mib = logits_workspace_mib
    at_least_one(gpus=gpus, context_tokens=context_tokens, batch_size=batch_size)
    within_context(config, context_tokens)
    for what, name, names in (("precision", precision, PRECISIONS), ("optimizer", optimizer, OPTIMIZERS)):
        if name not in names:
            raise ValueError(unknown(what, name, list(names)))
    if lora_rank is not None:
        at_least_one(lora_rank=lora_rank)
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
