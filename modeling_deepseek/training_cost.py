"""What training takes on given hardware: memory of a step on each GPU, hours and dollars of a run, of all parameters or
of adapters. `counts` says what is exact, `inference_cost` is the same for serving, `estimate` prints both.

What a step holds at its peak is checked against real allocations (tests/modeling_deepseek/test_memory.py). How much of
its peak a GPU reaches is not predicted: it is an argument.

Bytes are bytes, and GB are 10^9 of them.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from .activation_memory import Adapters, activation_bytes, lora_parameters, loss_bytes
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
        lora_rank: train adapters in float32 on `lora_sets` (of `adapter_targets`, by default "attention") only, over
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
    one_of("precision", precision or "mixed", PRECISIONS)
    above_zero(tokens=tokens, tokens_per_second=tokens_per_second, dollars_per_gpu_hour=dollars_per_gpu_hour)
    if tokens is None and dollars_per_gpu_hour is not None:
        raise ValueError("a price for a GPU's hour needs the `tokens` of the run to become dollars")
    if tokens is not None and mfu is None and tokens_per_second is None:
        raise ValueError("`tokens` need `mfu` or a measured `tokens_per_second` to become hours")
    adapters = _adapters(lora_rank, lora_sets, precision, base_dtype, mtp)
    memory = training_memory(
        config, context_tokens, batch_size=batch_size, gpus=gpus, precision=precision or "mixed", optimizer=optimizer,
        checkpointing=checkpointing, accumulates=accumulates, sharded=sharded, mtp=mtp, adapters=adapters,
        base_dtype=base_dtype or "bf16", fused=fused,
    )  # fmt: skip
    count = count_parameters(config)
    flops = training_flops(config, context_tokens, mtp=mtp, frozen=adapters is not None)
    mfu, tokens_per_second = _speed(mfu, tokens_per_second, gpus * card.bf16_flops_per_second / flops)
    hours = None if tokens is None or tokens_per_second is None else tokens / tokens_per_second / 3600
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


def _adapters(
    rank: int | None, sets: Sequence[str] | None, precision: str | None, base_dtype: str | None, mtp: bool
) -> Adapters | None:
    """What `estimate_training` is asked to train; None for all parameters."""
    if rank is None:
        if sets is not None or base_dtype is not None:
            raise ValueError("`lora_sets` and `base_dtype` are of adapters: pass `lora_rank` too, or leave them out")
        return None
    at_least_one(lora_rank=rank)
    if precision is not None:
        raise ValueError("`precision` is of full training: with `lora_rank`, `base_dtype` says how weights are held")
    adapters = Adapters(rank, tuple(sets or ("attention",)))
    if "mtp" in adapters.sets and not mtp:
        raise ValueError("`lora_sets` name 'mtp', but `mtp=False` leaves the MTP modules out")
    return adapters


def _speed(mfu: float | None, tokens_per_second: float | None, most: float) -> tuple[float | None, float | None]:
    """Both from the one that is given, where `most` tokens a second would be an MFU of 1."""
    if mfu is not None and tokens_per_second is not None:
        raise ValueError("`mfu` and `tokens_per_second` both say how fast it is: pass one of them")
    if mfu is not None:
        if not 0 < mfu <= 1:
            raise ValueError(f"`mfu` must lie in (0, 1], got {mfu}")
        return mfu, mfu * most
    return (None, None) if tokens_per_second is None else (tokens_per_second / most, tokens_per_second)
