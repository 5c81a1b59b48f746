"""What follows from a configuration exactly: parameters, FLOPs, bytes of weights and of the cache. `inference_cost` and
`training_cost` put hardware, time and money to it. Beside the model, not part of it: nothing here travels with a
checkpoint.

Everything rests on `weights`, the list of every tensor of the model by its shape, which the tests compare with the
tensors of the model itself.

Legend: D hidden size, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim, C = kv_lora_rank,
E routed experts, K experts per token, F expert width, S tokens attended to.

Neither torch nor transformers is imported: a configuration brings them, if it is one of transformers'.
"""

import copy
import difflib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import ceil, inf, prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .configuration_deepseek import DeepseekConfig

# The parts of the model, in the order of a forward pass; "mtp" are whole modules, with attention and experts of theirs.
PARTS = ("embedding", "attention", "dense_mlp", "gate", "routed_experts", "shared_experts", "norms", "head", "mtp")
# Bytes of a value that is neither quantised nor scaled.
VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
WEIGHT_DTYPES = ("fp32", "bf16", "fp16", "fp8", "int8", "nf4", "nf4-dq")
CACHE_DTYPES = ("fp32", "bf16", "fp16", "fp8")
FP8_BLOCK = 128  # the released checkpoints scale blocks of 128 x 128
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256  # bitsandbytes' defaults: values to a scale, scales to a scale of scales


class Weight(NamedTuple):
    """One tensor, and how many layers have one like it."""

    part: str  # one of PARTS, for a tensor of an MTP module too
    name: str  # as in the state dict, behind `model.layers.{i}.` where it is a layer's
    shape: tuple[int, ...]
    layers: int
    mtp: bool = False

    @property
    def values(self) -> int:
        return self.layers * prod(self.shape)

    @property
    def matrix(self) -> bool:
        """Whether it multiplies: not a norm, a bias or the embedding table, of which a token reads one row."""
        return len(self.shape) > 1 and self.part != "embedding"


def weights(config: "DeepseekConfig") -> Iterator[Weight]:
    """Every parameter of `DeepseekForCausalLM(config)`, MTP modules last. A tied head is left out, as it is among
    `model.parameters()`. Not in it: `e_score_correction_bias`, which is state (`correction_bias_values`)."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    yield Weight("embedding", "embed_tokens.weight", (vocabulary, hidden), 1)
    for mtp, indices in _layers(config).items():
        if not indices:
            continue
        layers = len(indices)
        moe = sum(config.is_moe_layer(index) for index in indices)
        for name, shape in _attention(config):
            part = "norms" if name.endswith("layernorm.weight") else "attention"
            yield Weight(part, f"self_attn.{name}", shape, layers, mtp)
        if layers > moe:
            yield from _mlp("dense_mlp", "mlp", hidden, config.intermediate_size, layers - moe, mtp)
        if moe:
            assert config.n_routed_experts is not None
            experts, width = config.n_routed_experts, config.moe_intermediate_size
            yield Weight("gate", "mlp.gate.weight", (experts, hidden), moe, mtp)
            yield Weight("routed_experts", "mlp.experts.gate_up_proj", (experts, 2 * width, hidden), moe, mtp)
            yield Weight("routed_experts", "mlp.experts.down_proj", (experts, hidden, width), moe, mtp)
            if config.n_shared_experts:
                shared = width * config.n_shared_experts
                yield from _mlp("shared_experts", "mlp.shared_experts", hidden, shared, moe, mtp)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Weight("norms", f"{norm}.weight", (hidden,), layers, mtp)
        if mtp:
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield Weight("norms", f"{norm}.weight", (hidden,), layers, mtp)
            yield Weight("mtp", "eh_proj.weight", (hidden, 2 * hidden), layers, mtp)
        else:
            yield Weight("norms", "norm.weight", (hidden,), 1)
            if not config.tie_word_embeddings:
                yield Weight("head", "lm_head.weight", (vocabulary, hidden), 1)


def _layers(config: "DeepseekConfig") -> dict[bool, range]:
    """Indices of the main model's layers (False) and of the MTP modules (True)."""
    main = config.num_hidden_layers
    return {False: range(main), True: range(main, main + config.num_nextn_predict_layers)}


def _attention(config: "DeepseekConfig") -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, rank, query_rank = (
        config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank
    )  # fmt: skip
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    biased: list[tuple[str, tuple[int, ...]]] = [
        ("kv_a_proj_with_mqa", (rank + rope, hidden)),
        ("o_proj", (hidden, heads * value)),
    ]
    if query_rank is None:
        yield "q_proj.weight", (heads * (nope + rope), hidden)
    else:
        biased.append(("q_a_proj", (query_rank, hidden)))
        yield "q_a_layernorm.weight", (query_rank,)
        yield "q_b_proj.weight", (heads * (nope + rope), query_rank)
    yield "kv_a_layernorm.weight", (rank,)
    yield "kv_b_proj.weight", (heads * (nope + value), rank)
    for name, shape in biased:
        yield f"{name}.weight", shape
        if config.attention_bias:
            yield f"{name}.bias", shape[:1]


def _mlp(part: str, prefix: str, hidden: int, width: int, layers: int, mtp: bool) -> Iterator[Weight]:
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield Weight(part, f"{prefix}.{name}_proj.weight", shape, layers, mtp)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part, numbers of values. `head` is 0 where it is tied to the embedding; `mtp` holds the MTP
    modules whole, without the embedding and head that they share.

    `active` is what multiplies for one token: K of E routed experts, all the rest of the main model, the head (tied or
    not) but not the embedding, of which a token reads one row. This is the definition under which the published 37B
    (V3), 21B (V2) and 32B (Kimi-K2) come out; Moonlight's 2.24B also leaves out the head (`active - head`).
    """

    embedding: int
    attention: int
    dense_mlp: int
    gate: int
    routed_experts: int
    shared_experts: int
    norms: int
    head: int
    mtp: int
    active: int
    active_mtp: int

    @property
    def main(self) -> int:
        """Without MTP modules: the published totals."""
        return self.total - self.mtp

    @property
    def total(self) -> int:
        """`sum(p.numel() for p in model.parameters())`."""
        return sum(getattr(self, part) for part in PARTS)


def count_parameters(model: "str | os.PathLike[str] | DeepseekConfig") -> ParameterCount:
    """Parameters of the model, exactly those of the real one. See `load_config` for what may be passed.

    >>> count = count_parameters("deepseek-v3")
    >>> print(f"{count.main / 1e9:.1f}B and {count.mtp / 1e9:.1f}B of MTP, {count.active / 1e9:.1f}B active")
    671.0B and 11.6B of MTP, 36.6B active
    """
    config = load_config(model)
    parts = dict.fromkeys(PARTS, 0)
    active = {False: 0, True: 0}
    for weight in weights(config):
        parts["mtp" if weight.mtp else weight.part] += weight.values
        if weight.part != "embedding":
            active[weight.mtp] += _per_token(config, weight)
    if config.tie_word_embeddings:
        active[False] += parts["embedding"]
    return ParameterCount(**parts, active=active[False], active_mtp=active[True])


def _per_token(config: "DeepseekConfig", weight: Weight) -> int:
    """Values of a weight that one token meets."""
    if weight.part != "routed_experts":
        return weight.values
    assert config.num_experts_per_tok is not None
    assert config.n_routed_experts is not None
    return weight.values // config.n_routed_experts * config.num_experts_per_tok


# FLOPs: a multiplication and an addition are two. Norms, softmax, RoPE and activations are left out, as is usual.


def linear_flops(config: "DeepseekConfig", *, mtp: bool = False, head: bool = True) -> int:
    """FLOPs of a token's forward pass through all matrices: 2 for each weight that multiplies.

    Args:
        mtp: the MTP modules alone, each with a pass through the shared head, instead of the main model.
        head: with the head, which a prompt's tokens but the last one skip.
    """
    matrices = [weight for weight in weights(config) if weight.matrix and weight.mtp == mtp and weight.part != "head"]
    flops = 2 * sum(_per_token(config, weight) for weight in matrices)
    passes = config.num_nextn_predict_layers if mtp else 1
    return flops + head * passes * 2 * config.vocab_size * config.hidden_size


def mtp_passes(config: "DeepseekConfig") -> int:
    """How many passes through MTP modules the loss takes: each once, the last `config.mtp_passes` times."""
    modules = config.num_nextn_predict_layers
    return modules + config.mtp_passes - 1 if modules else 0


def attention_flops(config: "DeepseekConfig", path: str, *, pairs: float, cached_tokens: int = 0) -> float:
    """FLOPs of one layer's attention, beside its projections, for `pairs` of a query with a token it attends to.

    "expanded": 2 H (N + R + V) for a pair, and 2 C H (N + V) for each cached token, whose key and value are built anew
    in every call. "absorbed": 2 H (2 C + R) for a pair, nothing for a cached token. What `kv_b_proj` costs for the
    new tokens themselves is the same on both paths, and counted with the projections.

    Raises:
        ValueError: for another path.
    """
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    one_of("path", path, ("expanded", "absorbed"))
    if path == "absorbed":
        return 2 * heads * (2 * rank + rope) * pairs
    return 2 * heads * (nope + rope + value) * pairs + 2 * rank * heads * (nope + value) * cached_tokens


def forward_flops(
    config: "DeepseekConfig", new_tokens: int, context_tokens: int, path: str = "auto", *, all_logits: bool = False
) -> float:
    """FLOPs of the main model for `new_tokens`, the last ones of `context_tokens`, the others being in the cache.

    Causal: a token attends to those before it and itself. `path` is "expanded", "absorbed" or, as for `mla_path`,
    "auto": the cheaper one for these shapes. Logits are made of the last token only unless `all_logits`.

    Raises:
        ValueError: for another path, and unless 1 <= `new_tokens` <= `context_tokens`.
    """
    if not 1 <= new_tokens <= context_tokens:
        raise ValueError(f"`new_tokens` must lie in [1, `context_tokens` {context_tokens:,}], got {new_tokens:,}")
    cached = context_tokens - new_tokens
    pairs = new_tokens * cached + new_tokens * (new_tokens + 1) / 2
    rectangle = new_tokens * context_tokens  # what a kernel without a causal shortcut does, and what "auto" goes by
    if path == "auto":
        path = min(
            ("expanded", "absorbed"),
            key=lambda each: attention_flops(config, each, pairs=rectangle, cached_tokens=cached),
        )
    attention = config.num_hidden_layers * attention_flops(config, path, pairs=pairs, cached_tokens=cached)
    logits = new_tokens if all_logits else 1
    head = 2 * config.vocab_size * config.hidden_size
    return new_tokens * linear_flops(config, head=False) + logits * head + attention


def training_flops(
    config: "DeepseekConfig", context_tokens: int, *, mtp: bool = True, causal: bool = True, frozen: bool = False
) -> float:
    """FLOPs per token of forward and backward over sequences of `context_tokens`: 6 for each weight that multiplies,
    and three times the attention. Recomputation under activation checkpointing is not counted (it would be a third
    more), so that MFU keeps its usual meaning. `causal=False` counts the masked half of the attention too; `frozen`
    leaves out the gradients of the weights, as under adapters, whose own part is small.

    V3's 4,096 tokens, without MTP:

    >>> from modeling_deepseek import DeepseekV3Config
    >>> print(f"{training_flops(DeepseekV3Config.from_preset('deepseek-v3'), 4096, mtp=False) / 1e9:.0f} GFLOPs")
    250 GFLOPs
    """
    pairs = (context_tokens + 1) / 2 if causal else context_tokens
    attention = attention_flops(config, "expanded", pairs=pairs)
    passes, linear = mtp_passes(config) if mtp else 0, float(linear_flops(config))
    if passes:
        all_but_last = copy.copy(config)
        all_but_last.num_nextn_predict_layers -= 1
        modules = linear_flops(config, mtp=True)
        linear += modules + (config.mtp_passes - 1) * (modules - linear_flops(all_but_last, mtp=True))
    return (2 if frozen else 3) * linear + 3 * (config.num_hidden_layers + passes) * attention


# Bytes


def cache_bytes_per_token(config: "DeepseekConfig", dtype: str = "bf16", *, mtp: bool = False) -> int:
    """Bytes of the cache for one token: C + R values for each layer, and with `mtp` for each MTP module that drafts.

    >>> from modeling_deepseek import DeepseekV3Config
    >>> cache_bytes_per_token(DeepseekV3Config.from_preset("deepseek-v3"))
    70272

    Raises:
        ValueError: for a dtype that is not among `CACHE_DTYPES`.
    """
    one_of("cache dtype", dtype, CACHE_DTYPES)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers * mtp
    return layers * (config.kv_lora_rank + config.qk_rope_head_dim) * VALUE_BYTES[dtype]


def correction_bias_values(config: "DeepseekConfig", *, mtp: bool = True) -> int:
    """Values of `e_score_correction_bias` over all gates, float32 whatever the model's dtype."""
    if config.topk_method != "noaux_tc" or config.n_routed_experts is None:
        return 0
    indices = [index for is_mtp, some in _layers(config).items() if mtp or not is_mtp for index in some]
    return config.n_routed_experts * sum(config.is_moe_layer(index) for index in indices)


def weight_bytes(config: "DeepseekConfig", dtype: str = "bf16", *, mtp: bool = True) -> int:
    """Bytes of the weights in memory, and of the correction biases (float32).

    "fp8" is what serving engines hold, and what the released files have without their copies of embedding and head:
    matrices of the layers, but the gate and `eh_proj`, as one byte a value and a float32 scale for each block of
    128 x 128; the rest bfloat16. (This package loads such files into bfloat16.)
    "int8", "nf4" and "nf4-dq" are bitsandbytes' (`load_in_8bit`, `load_in_4bit`, with `bnb_4bit_use_double_quant`), as
    `from_pretrained` loads them: linear layers but `kv_b_proj`, and the routed experts; embedding, head, gates and
    norms stay bfloat16. int8 has a float32 scale for each row; nf4 half a byte a value and a float32 scale for 64
    values, which double quantisation makes one byte, a float32 for 256 scales and one for each matrix.

    Raises:
        ValueError: for a dtype that is not among `WEIGHT_DTYPES`.
    """
    one_of("weight dtype", dtype, WEIGHT_DTYPES)
    tensors = [weight for weight in weights(config) if mtp or not weight.mtp]
    biases = 4 * correction_bias_values(config, mtp=mtp)
    return biases + sum(weight.layers * tensor_bytes(weight, dtype) for weight in tensors)


def tensor_bytes(weight: Weight, dtype: str) -> int:
    """One layer's tensor, (rows, columns) or (E, rows, columns), with its scales. See `weight_bytes`."""
    values = prod(weight.shape)
    whole = {"fp8": ("eh_proj.weight",), "fp32": (), "bf16": (), "fp16": ()}.get(dtype, ("self_attn.kv_b_proj.weight",))
    quantised = dtype not in ("fp32", "bf16", "fp16") and weight.matrix and weight.part not in ("head", "gate")
    if not quantised or weight.name in whole:
        return values * (4 if dtype == "fp32" else 2)
    # The files, and bitsandbytes here, hold each expert's gate, up and down projection by itself.
    fused = 2 if weight.name.endswith("gate_up_proj") else 1
    matrices, rows, columns = fused * prod(weight.shape[:-2]), weight.shape[-2] // fused, weight.shape[-1]
    if dtype == "fp8":
        return values + 4 * matrices * ceil(rows / FP8_BLOCK) * ceil(columns / FP8_BLOCK)
    if dtype == "int8":
        return values + 4 * matrices * rows
    scales = ceil(rows * columns / NF4_BLOCK)
    if dtype == "nf4":
        return matrices * (ceil(rows * columns / 2) + 4 * scales)
    return matrices * (ceil(rows * columns / 2) + scales + 4 * ceil(scales / NF4_NESTED_BLOCK) + 4)


# What is asked about: a model by its name, and numbers that make sense for it


def load_config(model: "str | os.PathLike[str] | DeepseekConfig") -> "DeepseekConfig":
    """The configuration itself (transformers' own of these types as ours), a preset's, or that of a folder or Hub id
    with a `config.json`.

    Raises:
        ValueError: for a name that is none of these, with the nearest preset, or a model of another type.
    """
    from .configuration_deepseek import PRESETS, DeepseekConfig, DeepseekV2Config, DeepseekV3Config

    if isinstance(model, DeepseekConfig):
        return model
    if isinstance(model, (str, os.PathLike)):
        name = os.fspath(model)
        if name in PRESETS:
            config_class = DeepseekV2Config if PRESETS[name]["model_type"] == "deepseek_v2" else DeepseekV3Config
            return config_class.from_preset(name)
        if not os.path.exists(name) and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
            raise ValueError(unknown("model", name, list(PRESETS)) + ", or a folder or Hub id with a config.json")
        fields, _ = DeepseekV3Config.get_config_dict(name)
    else:
        name = type(model).__name__
        fields = model.to_dict() if hasattr(model, "to_dict") else {}
        fields.pop("dtype", None)
    model_type = fields.get("model_type")
    if model_type is None:
        raise ValueError(
            f"{name} has no config.json that names a model type: pass a model's folder, its Hub id, a preset"
        )
    if model_type not in ("deepseek_v2", "deepseek_v3", "kimi_k2"):
        raise ValueError(f"{name} is a {model_type!r}; this package knows deepseek_v2, deepseek_v3 and kimi_k2")
    return (DeepseekV2Config if model_type == "deepseek_v2" else DeepseekV3Config).from_dict(fields)


def unknown(what: str, name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return f"unknown {what} {name!r}{f', did you mean {near[0]!r}' if near else ''}; one of {', '.join(names)}"


def one_of(what: str, name: str, names: Collection[str]) -> None:
    if name not in names:
        raise ValueError(unknown(what, name, names))


def at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")


def above_zero(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < inf:  # NaN included
            raise ValueError(f"`{name}` must be a positive number, got {value}")


def within_context(config: "DeepseekConfig", context_tokens: int) -> None:
    if context_tokens > config.max_position_embeddings:
        raise ValueError(
            f"`context_tokens` {context_tokens:,} is beyond the model's `max_position_embeddings` "
            f"{config.max_position_embeddings:,}"
        )
