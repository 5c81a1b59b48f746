"""RMSNorm and the gated MLP, the parts that every other file uses.

Legend: D hidden size, F intermediate size, ... any leading axes.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration_deepseek import DeepseekConfig


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
