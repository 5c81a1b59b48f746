"""One decoder layer: latent attention, then a dense MLP or a mixture of experts, each behind a norm and a residual.

Legend: B batch, S tokens, D hidden size, T = B x S, E routed experts, K experts per token.
"""

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_deepseek import DeepseekConfig
from .layers import DeepseekMLP, DeepseekRMSNorm
from .mla import DeepseekMLA
from .moe import DeepseekMoE


class LayerOutput(NamedTuple):
    """Returned by every layer, so that what the router did leaves a recomputed (checkpointed) layer exactly once."""

    hidden_states: torch.Tensor  # (B, S, D)
    router_logits: torch.Tensor | None  # (T, E), None for a dense layer
    router_indices: torch.Tensor | None  # (T, K)


class DeepseekDecoderLayer(GradientCheckpointingLayer):
    """Layer `layer_idx` of the stack; `config.is_moe_layer` says whether its MLP routes."""

    def __init__(self, config: DeepseekConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DeepseekMLA(config, layer_idx)
        self.is_moe = config.is_moe_layer(layer_idx)
        self.mlp = DeepseekMoE(config) if self.is_moe else DeepseekMLP(config, config.intermediate_size)
        self.input_layernorm = DeepseekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> LayerOutput:
        attention, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attention
        mlp_input = self.post_attention_layernorm(hidden_states)
        logits, indices = None, None
        if self.is_moe:
            mlp_output, logits, indices = self.mlp(mlp_input)
        else:
            mlp_output = self.mlp(mlp_input)
        return LayerOutput(hidden_states + mlp_output, logits, indices)
