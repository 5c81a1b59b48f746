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
    above_zero,
    at_least_one,
    count_parameters,
    load_config,
    one_of,
    training_flops,
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


# "mixed": bfloat16 weights that are copies of float32 ones, as in FSDP, ZeRO and Megatron. Under `torch.autocast` over
# float32 weights the stream between the layers is float32 as well: "fp32" bounds it. "fp8" is V3 3.3.
PRECISIONS = {
    "fp32": Precision(4, 0, 4, 4),
    "bf16": Precision(2, 0, 2, 2),
    "mixed": Precision(2, 4, 4, 2),
    "fp8": Precision(1, 4, 4, 2),
}
# Bytes of both moments for each trainable parameter. bitsandbytes' 8-bit AdamW has a float32 scale for 256 values.
OPTIMIZERS = {"adamw": 8.0, "adamw-bf16": 4.0, "adamw-8bit": 2 * (1 + 4 / 256), "sgd": 0.0}
LORA_SETS = ("attention", "dense_mlp", "shared_experts", "routed_experts", "mtp")  # as in `adapters`


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters on every linear layer of these `LORA_SETS`, float32 as PEFT makes them, all else frozen."""

    rank: int
    sets: tuple[str, ...]


def _kept_input(
    part: str, width: int, readers: int, adapters: Adapters | None, *, mtp: bool = False, dtype_bytes: int = 2
) -> int:
    """What `readers` matrices of a part keep of the `width` values that they all multiply, for one token: one copy for
    the gradients of their weights. Frozen they need none; with adapters each casts its own to float32, and keeps the
    product of its first factor."""
    if adapters is None:
        return width * dtype_bytes
    if ("mtp" if mtp else part) not in adapters.sets:
        return 0
    return (readers if dtype_bytes < 4 else 1) * width * 4 + readers * adapters.rank * 4


def saved_bytes_per_token(
    config: "DeepseekConfig",
    *,
    moe: bool,
    dtype_bytes: int = 2,
    fused_norms: bool = True,
    adapters: Adapters | None = None,
    mtp: bool = False,
) -> int:
    """What autograd keeps of one decoder layer for one token, with sdpa and grouped experts.

    `fused_norms`: on CUDA a norm keeps its input; on CPU, where torch composes it, that in float32, and for the
    gradient of its weight what it multiplies too.
    """
    hidden, heads, value = config.hidden_size, config.num_attention_heads, dtype_bytes
    rank, rope, value_dim = config.kv_lora_rank, config.qk_rope_head_dim, config.v_head_dim
    query_dim = config.qk_nope_head_dim + rope
    padded_dim = max(query_dim, value_dim)  # sdpa's flash kernels: values as wide as the keys

    def norm(size: int, stored: int) -> int:
        if fused_norms:
            return stored * value + 4
        return 4 + (4 * stored if value == 4 else 4 * size) + (4 * size if adapters is None else 0)

    def kept(part: str, width: int, readers: int) -> int:
        return _kept_input(part, width, readers, adapters, mtp=mtp, dtype_bytes=value)

    saved = norm(hidden, hidden) + kept("attention", hidden, 2)  # the residual stream; what the projections multiply
    if config.q_lora_rank is not None:
        saved += norm(config.q_lora_rank, config.q_lora_rank) + kept("attention", config.q_lora_rank, 1)
    saved += norm(rank, rank + rope) + kept("attention", rank, 1)
    # Query, key, padded value, output, its log-sum-exp in float32; the output without the padding for o_proj.
    saved += heads * (2 * (query_dim + padded_dim) * value + 4) + kept("attention", heads * value_dim, 1)
    saved += norm(hidden, hidden)
    if not moe:
        width = config.intermediate_size
        return saved + kept("dense_mlp", hidden, 2) + 3 * width * value + kept("dense_mlp", width, 1)
    assert config.n_routed_experts is not None
    assert config.num_experts_per_tok is not None
    experts, top_k, width = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    if adapters is None or config.n_shared_experts:  # read by the gate too, whose weight no adapter trains
        saved += kept("shared_experts", hidden, 2)
    shared = width * (config.n_shared_experts or 0)
    if shared:
        saved += 3 * shared * value + kept("shared_experts", shared, 1)
    # Of each expert's row the input, what the router's weight multiplies, and the products between.
    saved += top_k * (kept("routed_experts", hidden, 2) + (hidden + 3 * width) * value)
    saved += top_k * kept("routed_experts", width, 1)
    if adapters is None and value < 4 and config.router_logits_dtype == "float32":
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
    adapters: Adapters | None = None,
) -> tuple[int, int]:
    """What autograd keeps of `tokens` tokens between forward and backward, the loss left out; and what one layer adds
    to it in the backward pass, when `checkpointing`, which keeps the layers' inputs only, computes it again. With
    `adapters` an upper bound: layers below the first adapter keep nothing at all."""
    main = config.num_hidden_layers
    modules = config.num_nextn_predict_layers if mtp else 0
    layers = [
        saved_bytes_per_token(
            config, moe=config.is_moe_layer(index), dtype_bytes=dtype_bytes, fused_norms=fused_norms,
            adapters=adapters, mtp=index >= main,
        )
        for index in range(main + modules)
    ]  # fmt: skip
    state = config.hidden_size * dtype_bytes
    norm = state + 4 if fused_norms else (8 if adapters is None else 4) * config.hidden_size + 4
    for module in range(main, main + modules):
        # enorm, hnorm, what eh_proj multiplies, the norm before the head. What hnorm reads is what the head before it
        # multiplies, except as a float32 copy.
        shared = state if fused_norms or dtype_bytes == 4 else 0
        joined = _kept_input("mtp", 2 * config.hidden_size, 1, adapters, mtp=True, dtype_bytes=dtype_bytes)
        layers[module] += 3 * norm + joined - shared
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
    having its own for gate, up and down. "mtp" is all of the MTP modules, which the other sets leave out.

    Raises:
        ValueError: for an unknown set, and one that the model has nothing of.
    """
    total = 0
    for name in dict.fromkeys(sets):
        one_of("set to adapt", name, LORA_SETS)
        adapted = 0
        for weight in weights(config):
            if ("mtp" if weight.mtp else weight.part) == name and weight.matrix and weight.part != "gate":
                *experts, rows, columns = weight.shape
                fused = 2 if weight.name.endswith("gate_up_proj") else 1
                adapted += weight.layers * prod(experts) * rank * (rows + fused * columns)
        if not adapted:
            raise ValueError(f"this model has nothing of the set {name!r} to adapt; leave it out")
        total += adapted
    return total


@dataclass(frozen=True)
class TrainingMemory:
    """A training step on one GPU. `gathered_bytes` stand beside the shares for a time: weights and gradients that are
    whole while a layer runs, or the buckets in which DDP sends the gradients; and what a product dequantises.
    `peak_bytes` is weights, optimizer, the allowance and the largest of three moments: the start of the backward pass
    (activations, logits or a layer computed again, the gradient of the head), its end, and the step (all gradients);
    where gradients accumulate they stand beside all activations.
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
    adapters: Adapters | None = None,
    base_dtype: str = "bf16",
    fused: bool = True,
) -> TrainingMemory:
    """Memory of a training step on each GPU. See `estimate_training` for the arguments."""
    table, held = config.vocab_size * config.hidden_size, PRECISIONS[precision]
    tables = table if config.tie_word_embeddings else 2 * table
    if adapters is None:
        count = count_parameters(config)
        trainable = count.total if mtp else count.main
        weights_bytes, gradient_bytes, value = (
            trainable * (held.weights + held.master),
            held.gradients,
            held.activations,
        )
        head_gradient, layer = table * gradient_bytes, layer_bytes(config, "bf16") // 2
        whole_weights = (2 * layer + tables) * held.weights
        whole_gradients = max(layer * gradient_bytes + head_gradient, tables * gradient_bytes)
    else:
        trainable = lora_parameters(config, adapters.rank, adapters.sets)
        weights_bytes, gradient_bytes = weight_bytes(config, base_dtype, mtp=mtp) + 4 * trainable, 4
        value, head_gradient, whole_gradients = (4 if base_dtype == "fp32" else 2), 0, 0
        whole_weights = 2 * layer_bytes(config, base_dtype) + tables * value
    gradients_bytes, optimizer_bytes = trainable * gradient_bytes, round(trainable * OPTIMIZERS[optimizer])

    tokens = context_tokens * batch_size
    activations, recomputed = activation_bytes(
        config, tokens, checkpointing=checkpointing, mtp=mtp, dtype_bytes=value, fused_norms=fused, adapters=adapters
    )
    logits = loss_bytes(config, tokens, mtp=mtp, dtype_bytes=value, head_gradient_bytes=head_gradient)
    # An optimizer that loops over the parameters has two float32 temporaries, of one of them at a time.
    step = 0 if fused or adapters is not None else 8 * max(prod(weight.shape) for weight in weights(config))
    gathered = dequantized_bytes(config, base_dtype) if adapters is not None else 0
    if gpus > 1 and sharded:
        # Each layer is a unit, and the next one is fetched ahead; embedding and head, in the unit around, stay whole
        # throughout the pass.
        weights_bytes, gradients_bytes = weights_bytes // gpus, gradients_bytes // gpus
        optimizer_bytes, step = optimizer_bytes // gpus, step // gpus
        gathered += whole_weights + whole_gradients
        head_gradient = 0  # among the whole ones
    elif gpus > 1:
        gathered += gradients_bytes
    start = activations + max(logits, recomputed)  # of the backward pass: one after the other
    if accumulates:
        backward = gradients_bytes + start
    else:
        backward = max(start + head_gradient, gradients_bytes + recomputed)
    tensors = weights_bytes + optimizer_bytes + max(gathered + backward, gradients_bytes + step)
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
    precision: str | None = None,
    optimizer: str = "adamw",
    checkpointing: bool = True,
    logits_workspace_mib: int | None = None,
    accumulates: bool = False,
    sharded: bool = True,
    mtp: bool = True,
    lora_rank: int | None = None,
    lora_sets: Sequence[str] | None = None,
    base_dtype: str | None = None,
    tokens: float | None = None,
    mfu: float | None = None,
    tokens_per_second: float | None = None,
    dollars_per_gpu_hour: float | None = None,
    fused: bool = True,
) -> TrainingEstimate:
    """Memory of a step on each GPU, and hours and dollars of `tokens` tokens.

    Args:
        context_tokens, batch_size: of one forward pass on one GPU.
        precision: one of `PRECISIONS`, "mixed" by default, of full training.
        sharded: weights, gradients and optimizer are spread over the GPUs (FSDP, ZeRO-3), and some layers are whole at
            a time; otherwise each GPU has all of them (DDP).
        logits_workspace_mib: instead of the configuration's; the loss takes logits in pieces below it.
        lora_rank: train adapters in float32 on `lora_sets` (those of `adapters`, by default "attention") only, over
            frozen weights in `base_dtype` (by default "bf16"; "nf4" is QLoRA). Activations are those without
            `torch.autocast`, which would cast the adapters' float32 inputs down again. Of the FLOPs, gradients of
            frozen weights are left out.
        mfu: share of the GPUs' dense bfloat16 peak that the model's FLOPs reach (attention counted causally), in FP8
            too, as DeepSeek states it. No default: it depends on everything.
        tokens_per_second: measured, of all GPUs together, instead of `mfu`.
        fused: norms and optimizer run as single kernels, as they can on CUDA; on CPU they do not, and need more.

    Raises:
        ValueError: for unknown names, numbers out of range, a context beyond `max_position_embeddings`, `tokens`
            without exactly one of `mfu` and `tokens_per_second`, a price without `tokens`, and arguments of adapters
            in full training or the reverse.

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
    one_of("optimizer", optimizer, OPTIMIZERS)
    adapters = None
    if lora_rank is None:
        precision = "mixed" if precision is None else precision
        one_of("precision", precision, PRECISIONS)
        if lora_sets is not None or base_dtype is not None:
            raise ValueError("`lora_sets` and `base_dtype` are of adapters: pass `lora_rank` too, or leave them out")
    else:
        at_least_one(lora_rank=lora_rank)
        if precision is not None:
            raise ValueError(
                "`precision` is of full training: with `lora_rank`, `base_dtype` says how weights are held"
            )
        adapters = Adapters(lora_rank, tuple(lora_sets or ("attention",)))
        if "mtp" in adapters.sets and not mtp:
            raise ValueError("`lora_sets` name 'mtp', but `mtp=False` leaves the MTP modules out")
    memory = training_memory(
        config, context_tokens, batch_size=batch_size, gpus=gpus, precision=precision or "mixed", optimizer=optimizer,
        checkpointing=checkpointing, accumulates=accumulates, sharded=sharded, mtp=mtp, adapters=adapters,
        base_dtype=base_dtype or "bf16", fused=fused,
    )  # fmt: skip
    count = count_parameters(config)
    flops = training_flops(config, context_tokens, mtp=mtp, frozen=adapters is not None)
    peak = gpus * card.bf16_flops_per_second
    above_zero(tokens=tokens, tokens_per_second=tokens_per_second, dollars_per_gpu_hour=dollars_per_gpu_hour)
    if dollars_per_gpu_hour is not None and tokens is None:
        raise ValueError("a price for a GPU's hour needs the `tokens` of the run to become dollars")
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
