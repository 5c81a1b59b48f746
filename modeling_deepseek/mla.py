"""Multi-head latent attention (V2 2.1, V3 2.1.1): one set of weights, two ways to run it.

*expanded*: keys and values of every head are built from the latents by `kv_b_proj`, then ordinary attention through
transformers' attention interface. Cheapest for prefill and training.
*absorbed*: `kv_b_proj` = [W_UK; W_UV] is folded into the query and the output, so that all heads attend to the
latents themselves, as multi-query attention with head size C + R. Cheapest for decoding: no cached token is expanded.

Legend: B batch, Q new tokens, S tokens attended to, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim,
V = v_head_dim, C = kv_lora_rank, E = N + V, D hidden size.

The cache (any of transformers' classes) holds per token and layer the C values of the normalised latent as "key" and
the R values of the rotated shared key as "value", and nothing else.
"""

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_deepseek import DeepseekConfig
from .layers import DeepseekRMSNorm, dequantized_weight
from .paged import PagedBatch
from .parallel import is_split, summed_gradient
from .rope import apply_rope, rope_magnitudes

# Score matrices of the absorbed path are built for as many queries at a time as keep them under this many values
# (256 MiB in float32): enough for a verification step, and a bound when long prompts are forced through it.
MAX_SCORE_VALUES = 2**26


def is_flash(attn_implementation: str | None) -> bool:
    """Whether it names one of the flash-attention interfaces (not the paged ones of continuous batching)."""
    return attn_implementation is not None and "flash" in attn_implementation and "paged" not in attn_implementation


def choose_mla_path(config: DeepseekConfig, q_len: int, kv_len: int) -> str:
    """ "expanded" or "absorbed": `config.mla_path`, or for "auto" the one with fewer multiplications per head.

    expanded: S C (N + V) to expand, Q S (N + R + V) to attend; absorbed: Q C (N + V) to fold, Q S (2 C + R).
    With V3's sizes and a long context, absorbed wins up to 170 new tokens:

        >>> from modeling_deepseek import DeepseekV3Config
        >>> config = DeepseekV3Config()
        >>> [choose_mla_path(config, q_len, 8192) for q_len in (1, 160, 180, 8192)]
        ['absorbed', 'absorbed', 'expanded', 'expanded']

    Raises:
        ValueError: if "absorbed" is forced on an attention implementation that sees keys and values only through its
            own cache (anything but eager, sdpa, flash and flex_attention).
    """
    implementation = config._attn_implementation
    absorbable = implementation in (None, "eager", "paged|eager", "sdpa", "flex_attention") or is_flash(implementation)
    if config.mla_path == "absorbed" and not absorbable:
        raise ValueError(
            f"`mla_path='absorbed'` cannot run with attn_implementation={implementation!r}, which needs expanded keys "
            "and values; use 'eager', 'sdpa', a flash implementation or 'flex_attention', or `mla_path='auto'`"
        )
    if config.mla_path != "auto":
        return config.mla_path
    if not absorbable:
        return "expanded"
    rank, nope, rope, value = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    expanded = kv_len * rank * (nope + value) + q_len * kv_len * (nope + rope + value)
    absorbed = q_len * rank * (nope + value) + q_len * kv_len * (2 * rank + rope)
    return "absorbed" if absorbed < expanded else "expanded"


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, with the signature of transformers' interface: (B, Q, H, V) and weights (B, H, Q, S)."""
    scores_BHQS = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores_BHQS = scores_BHQS.masked_fill(~attention_mask, torch.finfo(scores_BHQS.dtype).min)
    elif attention_mask is not None:
        scores_BHQS = scores_BHQS + attention_mask
    weights_BHQS = F.softmax(scores_BHQS, dim=-1, dtype=torch.float32).to(query.dtype)
    weights_BHQS = F.dropout(weights_BHQS, p=dropout, training=module.training)
    return torch.matmul(weights_BHQS, value).transpose(1, 2).contiguous(), weights_BHQS


def absorbed_attention(
    q_nope_BHQN: torch.Tensor,
    q_rope_BHQR: torch.Tensor,
    c_kv_BSC: torch.Tensor,
    k_rope_BSR: torch.Tensor,
    kv_b_HEC: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention on the latents. `mask` (B or 1, 1, Q, S) is additive, or boolean with True for "attend"; None attends
    to everything. Returns (B, Q, H, V) and weights (B, H, Q, S).

    q_nope . (W_UK c) = (W_UK^T q_nope) . c, and sum_s p_s (W_UV c_s) = W_UV (sum_s p_s c_s). All heads share the
    latents, so heads and queries are one axis of two plain matrix products, and no tensor has S x H x head size values.
    """
    batch, heads, q_len, nope = q_nope_BHQN.shape
    w_uk_HNC, w_uv_HVC = kv_b_HEC[:, :nope], kv_b_HEC[:, nope:]
    # Heads lead, so that the weights are read once for the whole batch.
    q_latent = torch.bmm(q_nope_BHQN.transpose(0, 1).reshape(heads, batch * q_len, nope), w_uk_HNC)
    q_latent = q_latent.view(heads, batch, q_len, -1).transpose(0, 1).reshape(batch, heads * q_len, -1) * scaling
    q_rope = q_rope_BHQR.reshape(batch, heads * q_len, -1) * scaling

    scores = torch.baddbmm(torch.bmm(q_latent, c_kv_BSC.transpose(1, 2)), q_rope, k_rope_BSR.transpose(1, 2))
    scores_BHQS = scores.view(batch, heads, q_len, -1)
    if mask is not None and mask.dtype == torch.bool:
        # Not -inf: a padded query that may attend to nothing must not become NaN.
        scores_BHQS = scores_BHQS.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores_BHQS = scores_BHQS + mask
    weights_BHQS = F.softmax(scores_BHQS, dim=-1, dtype=torch.float32).to(q_nope_BHQN.dtype)
    weights_BHQS = F.dropout(weights_BHQS, p=dropout, training=dropout > 0)

    latent = torch.bmm(weights_BHQS.reshape(batch, heads * q_len, -1), c_kv_BSC)
    latent = latent.view(batch, heads, q_len, -1).transpose(0, 1).reshape(heads, batch * q_len, -1)
    output = _unfold(latent, w_uv_HVC).view(heads, batch, q_len, -1)
    return output.permute(1, 2, 0, 3).contiguous(), weights_BHQS


def _unfold(latent: torch.Tensor, w_uv_HVC: torch.Tensor) -> torch.Tensor:
    """W_UV on the latents of each head, (H, B x Q, C) to (H, B x Q, V)."""
    if latent.device.type == "cpu" and latent.dtype != torch.float32:
        # oneDNN copies a transposed right factor, here the weight, at every call; a transposed left one it does not.
        return torch.bmm(w_uv_HVC, latent.transpose(1, 2)).transpose(1, 2).contiguous()
    return torch.bmm(latent, w_uv_HVC.transpose(1, 2))


class DeepseekMLA(nn.Module):
    """Latent attention of one layer. `layer_idx` is its slot in the cache."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: DeepseekConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.attention_dropout = config.attention_dropout
        self.qk_nope_head_dim, self.qk_rope_head_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_head_dim, self.kv_lora_rank = config.v_head_dim, config.kv_lora_rank
        self.qk_head_dim = config.qk_head_dim
        self.scaling = self.qk_head_dim**-0.5 * rope_magnitudes(config.rope)[1]
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias

        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * self.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            # The official code leaves `rms_norm_eps` to the other norms: these two have 1e-6 in every release.
            self.q_a_layernorm = DeepseekRMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_lora_rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = DeepseekRMSNorm(self.kv_lora_rank)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=bias)

    def kv_b_weight(self, device: torch.device) -> torch.Tensor:
        """[W_UK; W_UV] per head, (H, N + V, C); under tensor parallelism of this rank's heads. Read from the layer,
        dequantised where it is quantised, or, where the layer is more than a weight (adapters, offloaded layers), as
        its answer to the unit vectors on `device`, where it is used."""
        plain = type(self.kv_b_proj) is nn.Linear
        if plain and not self.kv_b_proj.weight.is_meta and not hasattr(self.kv_b_proj.weight, "ds_id"):  # DeepSpeed's
            weight = self.kv_b_proj.weight
            if is_split(weight):
                weight = weight.to_local()
        elif (dequantized := dequantized_weight(self.kv_b_proj, self.kv_a_layernorm.weight.dtype)) is not None:
            weight = dequantized
        else:
            if self.training and any(isinstance(one, nn.Dropout) and one.p > 0 for one in self.kv_b_proj.modules()):
                raise ValueError(
                    "the adapter on kv_b_proj drops parts of each token, and absorbed attention would drop the same of "
                    "all; train it with mla_path='expanded', without dropout, or not on kv_b_proj"
                )
            eye_CC = torch.eye(self.kv_lora_rank, dtype=self.kv_a_layernorm.weight.dtype, device=device)
            # As a batch of one, so that PEFT's `adapter_names`, one for each row of a batch, never fit unit vectors.
            weight = self.kv_b_proj(eye_CC[None])[0].transpose(0, 1)
        return weight.reshape(-1, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)

    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (B, H, S, N + R) and values (B, H, S, V) from latents (B, 1, S, C) and rotated keys (B, 1, S, R).

        Name and shapes are a contract: vLLM's Transformers backend replaces this method.
        """
        return self._join_kv(self.kv_b_proj(kv_nope.squeeze(1)), k_rot)

    def _join_kv(self, kv: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kv_BSHE = kv.unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))
        k_nope_BSHN, v_BSHV = kv_BSHE.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rope_BSHR = k_rot.transpose(1, 2).expand(-1, -1, k_nope_BSHN.shape[2], -1)
        return torch.cat([k_nope_BSHN, k_rope_BSHR], dim=-1).transpose(1, 2), v_BSHV.transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        paged: PagedBatch | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, Q, D) to (B, Q, D) and the attention weights (B, H, Q, S), None where the implementation keeps none.

        `position_embeddings` are cos and sin (B, Q, R/2); `attention_mask` is what transformers' mask functions make
        for the implementation in use (a dense one for the absorbed path under flash attention). With `paged` the tokens
        are those of many requests in one row, (1, T, D), whose cache is in pages.
        """
        batch, q_len, _ = hidden_states.shape
        if self.config.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query_BHQK = query.view(batch, q_len, -1, self.qk_head_dim).transpose(1, 2)
        q_nope_BHQN, q_rope_BHQR = query_BHQK.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

        compressed = self.kv_a_proj_with_mqa(hidden_states)
        c_kv, k_rope = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        c_kv, k_rope = self.kv_a_layernorm(c_kv).unsqueeze(1), k_rope.unsqueeze(1)
        cos, sin = position_embeddings
        q_rope_BHQR = apply_rope(q_rope_BHQR, cos, sin, self.config.rope_interleave)
        k_rope = apply_rope(k_rope, cos, sin, self.config.rope_interleave)
        if past_key_values is not None:
            past = past_key_values.get_seq_length(self.layer_idx)
            c_kv, k_rope = past_key_values.update(c_kv, k_rope, self.layer_idx)
            # The first tokens of a static cache: its empty places, masked anyway, would be expanded with the rest.
            if isinstance(past, int) and past == 0 and isinstance(attention_mask, (torch.Tensor, NoneType)):
                c_kv, k_rope = c_kv[:, :, :q_len], k_rope[:, :, :q_len]
                if attention_mask is not None and attention_mask.ndim == 4:
                    attention_mask = attention_mask[..., :q_len]

        if paged is not None:
            output_BQHV, weights = self._paged(q_nope_BHQN, q_rope_BHQR, c_kv, k_rope, paged), None
        else:
            output_BQHV, weights = self._run(q_nope_BHQN, q_rope_BHQR, c_kv, k_rope, attention_mask, **kwargs)
        return self.o_proj(output_BQHV.reshape(batch, q_len, -1)), weights

    def _run(self, q_nope, q_rope, c_kv, k_rope, mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        path = choose_mla_path(self.config, q_nope.shape[2], c_kv.shape[2])
        if isinstance(mask, torch.Tensor) and mask.ndim == 4 and is_flash(self.config._attn_implementation):
            path = "absorbed"  # rows at their own pace: flash kernels read no such mask
        attend = self._absorbed if path == "absorbed" else self._expanded
        return attend(q_nope, q_rope, c_kv, k_rope, mask, **kwargs)

    def _paged(self, q_nope_1HTN, q_rope_1HTR, c_kv, k_rope, paged: PagedBatch) -> torch.Tensor:
        """Attention of each group of requests to its latents, (T, H, V). Their new latents go into the pages."""
        pages, latents = paged.pages(self.layer_idx), torch.cat([c_kv, k_rope], dim=-1)[0, 0]
        if pages.shape[1] > latents.shape[1]:  # a page holds an even number of values a token
            latents = F.pad(latents, (0, 1))
        pages.index_copy_(0, paged.write_T, latents.to(pages.dtype))  # under autocast they differ
        outputs = []
        for group in paged.groups:
            q_nope, q_rope = (x[0][:, group.tokens_nQ].transpose(0, 1) for x in (q_nope_1HTN, q_rope_1HTR))
            source, rows = (latents, group.tokens_nQ) if group.rows_nS is None else (pages, group.rows_nS)
            read_n1SL = source.index_select(0, rows.flatten()).view(rows.shape[0], 1, rows.shape[1], -1)
            read_n1SL = read_n1SL.to(latents.dtype)
            c_kv = read_n1SL[..., : self.kv_lora_rank]
            k_rope = read_n1SL[..., self.kv_lora_rank : self.kv_lora_rank + self.qk_rope_head_dim]
            outputs.append(self._run(q_nope, q_rope, c_kv, k_rope, group.mask)[0].flatten(0, 1))
        return torch.cat(outputs)[paged.places_T]

    def _absorbed(self, q_nope, q_rope, c_kv, k_rope, mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        kv_b_HEC = self.kv_b_weight(c_kv.device)
        split = getattr(self.kv_b_proj, "weight", None)
        if is_split(split):
            c_kv = summed_gradient(c_kv, split.device_mesh)
        dropout = self.attention_dropout if self.training else 0.0
        if self.config._attn_implementation == "flex_attention":
            q_latent = torch.einsum("bhqn,hnc->bhqc", q_nope, kv_b_HEC[:, : self.qk_nope_head_dim])
            query, key = torch.cat([q_latent, q_rope], dim=-1), torch.cat([c_kv, k_rope], dim=-1)
            flex = ALL_ATTENTION_FUNCTIONS["flex_attention"]
            latent, weights = flex(self, query, key, c_kv, mask, dropout=dropout, scaling=self.scaling, **kwargs)
            return torch.einsum("bqhc,hvc->bqhv", latent, kv_b_HEC[:, self.qk_nope_head_dim :]), None

        batch, heads, q_len, _ = q_nope.shape
        kv_len = c_kv.shape[2]
        if mask is None and q_len > 1:  # the mask functions leave a plain causal mask to the kernel
            positions = torch.arange(kv_len, device=q_nope.device)
            mask = positions[None, None, None, :] <= positions[None, None, :q_len, None]
        block = max(1, MAX_SCORE_VALUES // (batch * heads * kv_len))
        parts = []
        for start in range(0, q_len, block):
            rows = slice(start, start + block)
            part_mask = mask[:, :, rows] if mask is not None else None
            parts.append(
                absorbed_attention(
                    q_nope[:, :, rows], q_rope[:, :, rows], c_kv.squeeze(1), k_rope.squeeze(1), kv_b_HEC,
                    part_mask, self.scaling, dropout,
                )
            )  # fmt: skip
        weights = None
        if self.config._attn_implementation == "eager":
            weights = torch.cat([weights for _, weights in parts], dim=2)
        return torch.cat([output for output, _ in parts], dim=1) if len(parts) > 1 else parts[0][0], weights

    def _expanded(self, q_nope, q_rope, c_kv, k_rope, mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = torch.cat([q_nope, q_rope], dim=-1)
        heads, block = query.shape[1], self._heads_per_block(query, c_kv)
        if block >= heads:
            return self._attend(query, *self.expand_kv(c_kv, k_rope), mask, **kwargs)
        # A few new tokens on a long cached prefix: expand some heads of it at a time.
        kv_b_HEC = self.kv_b_weight(q_nope.device)
        parts = []
        for start in range(0, heads, block):
            some = slice(start, start + block)
            kv = F.linear(c_kv.squeeze(1), kv_b_HEC[some].flatten(0, 1))
            per_head = isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[1] > 1
            some_mask = mask[:, some] if per_head else mask
            parts.append(self._attend(query[:, some], *self._join_kv(kv, k_rope), some_mask, **kwargs))
        weights = [weights for _, weights in parts if weights is not None]
        return torch.cat([output for output, _ in parts], dim=2), torch.cat(weights, dim=1) if weights else None

    def _heads_per_block(self, query: torch.Tensor, c_kv: torch.Tensor) -> int:
        heads, q_len = query.shape[1:3]
        batch, _, kv_len, _ = c_kv.shape
        if kv_len == q_len or torch.is_grad_enabled():  # no cached prefix, or the graph keeps everything anyway
            return heads
        values_per_head = batch * kv_len * (self.qk_head_dim + self.v_head_dim)
        return max(1, (self.config.mla_workspace_mib * 2**20) // (values_per_head * query.element_size()))

    def _attend(self, query, key, value, mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        implementation = self.config._attn_implementation
        if implementation == "paged|eager":
            implementation = "eager"
        elif is_flash(implementation) and isinstance(mask, torch.Tensor) and mask.ndim == 4:
            implementation = (
                "sdpa"  # flash kernels take no dense mask; groups of requests behind cached tokens have one
            )
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        if implementation == "sdpa" and query.shape[2] > 1 and self.v_head_dim < self.qk_head_dim:
            # sdpa's flash kernels want one head size for key and value; without it they fall back to one that is
            # several times slower, on CPU and GPU.
            value = F.pad(value, [0, self.qk_head_dim - self.v_head_dim])
        output, weights = interface(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output[..., : self.v_head_dim], weights
