"""What a training step keeps beside weights, gradients and optimizer: the tensors that wait in autograd's graph, the
logits of the loss, the factors of adapters. From a configuration alone; `training_cost` adds it up.

Checked against autograd's own graph (tests/modeling_deepseek/test_memory.py).

Legend: D hidden size, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim, C = kv_lora_rank,
E routed experts, K experts per token, F expert width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from .counts import mtp_passes, one_of, weights

if TYPE_CHECKING:
    from .configuration_deepseek import DeepseekConfig

LORA_SETS = ("attention", "dense_mlp", "shared_experts", "routed_experts", "mtp")  # as in `adapter_targets`


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
    modules = mtp_passes(config) if mtp else 0
    last = main + config.num_nextn_predict_layers - 1  # what further passes go through
    moe = [config.is_moe_layer(min(index, last)) for index in range(main + modules)]
    layers = [
        saved_bytes_per_token(
            config, moe=moe[index], dtype_bytes=dtype_bytes, fused_norms=fused_norms,
            adapters=adapters, mtp=index >= main,
        )
        for index in range(main + modules)
    ]  # fmt: skip
    state = config.hidden_size * dtype_bytes
    norm = state + 4 if fused_norms else (8 if adapters is None else 4) * config.hidden_size + 4
    for module in range(main, main + modules):
        # enorm, hnorm, what eh_proj multiplies, the norm before the head. What hnorm reads is what the head before it
        # multiplies, except as a float32 copy, and except of a further pass, which sees it one column further.
        shared = state if (fused_norms or dtype_bytes == 4) and module <= last else 0
        joined = _kept_input("mtp", 2 * config.hidden_size, 1, adapters, mtp=True, dtype_bytes=dtype_bytes)
        layers[module] += 3 * norm + joined - shared
    heads = norm + (1 + modules) * state  # the last norm, and what each head multiplies
    if checkpointing:
        # The input of a layer; of a module the embeddings ahead, beside what the head before it reads. The balance
        # loss is outside of the layers.
        routing = sum(moe) * _balance_loss_bytes(config)
        further = main + modules - 1 - last if modules else 0
        return tokens * (heads + state * (len(layers) + further) + routing), tokens * max(layers)
    return tokens * (heads + sum(layers)), 0


def loss_bytes(
    config: "DeepseekConfig", tokens: int, *, mtp: bool = True, dtype_bytes: int = 2, head_gradient_bytes: int = 0
) -> int:
    """Peak of the loss: logits, and three float32 copies when its backward pass begins (log-probabilities, gradient of
    the loss, gradient of the logits). More tokens than `config.logits_workspace_mib` holds the logits of pass in
    pieces, each adding to the head's gradient what it computed; otherwise MTP modules have theirs waiting beside."""
    if tokens > config.logits_at_once:
        return config.logits_at_once * config.vocab_size * (dtype_bytes + 12) + head_gradient_bytes
    waiting = mtp_passes(config) if mtp else 0
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
