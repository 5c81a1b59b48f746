"""RMSNorm, the gated MLP, the rotary embedding and the weight of a quantised layer, the parts that others use.

Legend: D hidden size, F intermediate size, ... any leading axes.
"""

import importlib
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration_deepseek import DeepseekConfig
from .rope import rope_angles, rope_frequencies, rope_magnitudes


class DeepseekRMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 for lower dtypes."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Under autocast x is bfloat16 beside a float32 weight, a pair for which torch has no fused kernel.
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class DeepseekMLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)): the dense layers' MLP and, narrower, the shared experts."""

    def __init__(self, config: DeepseekConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DeepseekRotaryEmbedding(nn.Module):
    """Turns positions into cos and sin, in float32 whatever the model's dtype."""

    inv_freq: torch.Tensor

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.config = config
        self.magnitude = rope_magnitudes(config.rope)[0]
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> torch.Tensor:
        return rope_frequencies(self.config.rope, self.config.qk_rope_head_dim)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:  # `model.to(bfloat16)` must not round the angles
            self.inv_freq = self.frequencies().to(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, position_ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rope_angles(position_ids_BS, self.inv_freq.float(), self.magnitude)


def dequantized_weight(linear: nn.Module, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight (outputs, inputs) of one of bitsandbytes' layers as it multiplies; None for any other layer, among
    them adapters on one of these."""
    kind = type(linear).__name__ if type(linear).__module__.startswith("bitsandbytes.") else ""
    weight = cast(Any, getattr(linear, "weight", None))
    if kind not in ("Linear4bit", "Linear8bitLt") or weight.is_meta:
        return None
    functional = importlib.import_module("bitsandbytes").functional
    if kind == "Linear4bit":
        if getattr(weight.quant_state, "packing_format_for_cpu", False):  # rearranged, see `replace_experts`
            return None
        return functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    state = cast(Any, linear).state
    scale = weight.SCB if state.SCB is None else state.SCB  # moved by the layer's first forward pass
    return None if scale is None else functional.int8_vectorwise_dequant(weight.data, scale).to(dtype)
