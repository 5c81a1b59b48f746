"""Multi-token prediction (V3 2.2): the modules that sit behind the last layer, and the shifting of their targets.

Legend: B batch, S positions, D hidden size, k depth (1 for the first module).

Module k sees at position i the hidden state of depth k - 1 and the token i + k, and predicts token i + k + 1. With
tokens `a b c d` and one module, position 0 sees (state of a, b) and predicts c, position 1 sees (state of b, c) and
predicts d, and positions 2 and 3 predict nothing.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from .configuration_deepseek import DeepseekConfig
from .decoder_layer import DeepseekDecoderLayer
from .layers import DeepseekRMSNorm


def shift_left(x: torch.Tensor, steps: int, fill: float = 0) -> torch.Tensor:
    """Moves axis 1 to the left by `steps`, filling from the right: (a, b, c) by 1 is (b, c, fill)."""
    kept = x[:, steps:]
    tail = x.new_full((x.shape[0], x.shape[1] - kept.shape[1], *x.shape[2:]), fill)
    return torch.cat([kept, tail], dim=1)


def same_document(documents_BS: torch.Tensor | None, like_BS: torch.Tensor, steps: int) -> torch.Tensor:
    """True (B, S) where the token `steps` ahead exists and belongs to the same document."""
    batch, length = like_BS.shape[:2]
    if documents_BS is None:
        documents_BS = torch.zeros(batch, length, dtype=torch.int64, device=like_BS.device)
    return shift_left(documents_BS, steps, fill=-1) == documents_BS


def targets_ahead(labels_BS: torch.Tensor, documents_BS: torch.Tensor | None, steps: int) -> torch.Tensor:
    """The label `steps` positions ahead, -100 where there is none or another document begins. `steps` is 1 for the
    main model and k + 1 for module k."""
    ahead = shift_left(labels_BS, steps, fill=-100)
    return ahead.masked_fill(~same_document(documents_BS, labels_BS, steps), -100)


def one_column_further(
    outputs_BSD: torch.Tensor,
    inputs_BSD: torch.Tensor,
    documents_BS: torch.Tensor | None,
    valid_BS: torch.Tensor | None,
) -> torch.Tensor:
    """What a module sees that drafts on from its own output: at each position what it made of the one before, and what
    it saw there where no position of the document comes before. (a, b, c) of (x, y, z) is (x, a, b)."""
    begins_BS = torch.zeros(inputs_BSD.shape[:2], dtype=torch.bool, device=inputs_BSD.device)
    if documents_BS is not None:
        begins_BS[:, 1:] |= documents_BS.diff(dim=1).to(begins_BS.device) != 0
    if valid_BS is not None:
        begins_BS[:, 1:] |= ~valid_BS[:, :-1].to(begins_BS.device)
    before_BSD = torch.cat([inputs_BSD[:, :1], outputs_BSD[:, :-1]], dim=1)
    return torch.where(begins_BS[..., None], inputs_BSD, before_BSD)


class SharedHead(nn.Module):
    """Holds the norm before the head. The head itself, and the embedding, are the main model's, not copies."""

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.norm = DeepseekRMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPOutput(NamedTuple):
    """A `LayerOutput` and the state that goes before the head. The norm runs inside the module, whose weights FSDP
    takes away again as soon as its forward is over."""

    hidden_states: torch.Tensor  # (B, S, D)
    router_logits: torch.Tensor | None  # (T, E), None for a dense layer
    router_indices: torch.Tensor | None  # (T, K)
    normed_states: torch.Tensor  # (B, S, D), `shared_head.norm` of `hidden_states`


class DeepseekMTPLayer(DeepseekDecoderLayer):
    """Module k, at `model.layers[num_hidden_layers + k - 1]` as in the released files."""

    def __init__(self, config: DeepseekConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = DeepseekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = DeepseekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def forward(self, hidden_states: torch.Tensor, next_embeds: torch.Tensor, **kwargs: Any) -> MTPOutput:  # type: ignore[override]  # two inputs
        """`hidden_states` (B, S, D) of the previous depth and `next_embeds` (B, S, D) of the tokens k ahead."""
        joined = self.eh_proj(torch.cat([self.enorm(next_embeds), self.hnorm(hidden_states)], dim=-1))
        output = super().forward(joined, **kwargs)
        return MTPOutput(*output, self.shared_head.norm(output.hidden_states))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Saved files hold copies of the shared embedding and head for each module; `load_state_dict` leaves them out.
        for copy in ("embed_tokens.weight", "shared_head.head.weight"):
            state_dict.pop(prefix + copy, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
