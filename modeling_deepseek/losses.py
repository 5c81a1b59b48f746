"""Cross-entropy over a large vocabulary in chunks of tokens, so that the logits of all tokens never exist at once.

Legend: B batch, S positions, D hidden size, N positions that have a target, V vocabulary.

8,192 tokens x 129,280 words are 4.2 GB of float32 logits, and their softmax and its gradient as much each. In chunks,
the logits of one chunk exist at a time; the backward pass computes them once more.

The head is called as the module that it is, so that adapters, quantisation, autocast and hooks hold.
`torch.nn.functional.linear_cross_entropy` knows a plain weight only, and rounds the losses to the dtype of the states.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils.import_utils import is_tracing

IGNORE_INDEX = -100


def token_losses(head: nn.Module, hidden_BSD: torch.Tensor, targets_BS: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Cross-entropy (B, S) in float32 of what `head` makes of `hidden_BSD`, 0 where the target is -100.

    Above `chunk_size` positions, logits are computed for that many at a time, of those that have a target, and again
    in the backward pass. Heads that collect their weight from other processes at every call (ZeRO-3, a head that is
    an FSDP unit by itself) compute them all at once: processes with more targets would wait for the others for ever.
    """
    if targets_BS.numel() <= chunk_size or gathers_at_every_call(head):
        return _losses(head, hidden_BSD, targets_BS)
    hidden_ND, targets_N = hidden_BSD.flatten(0, 1), targets_BS.flatten().to(hidden_BSD.device)
    known = None
    if not is_tracing(targets_N):  # a compiled graph has no room for a number that only the values tell
        known = (targets_N != IGNORE_INDEX).nonzero().squeeze(-1)
        hidden_ND, targets_N = hidden_ND[known], targets_N[known]
    chunks = zip(hidden_ND.split(chunk_size), targets_N.split(chunk_size), strict=True)
    losses_N = torch.cat([checkpoint(_losses, head, *chunk, use_reentrant=False) for chunk in chunks])
    if known is not None:
        losses_N = losses_N.new_zeros(targets_BS.numel()).index_put((known.to(losses_N.device),), losses_N)
    return losses_N.view_as(targets_BS)


def _losses(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of hidden states (..., D) and targets (...), all logits at once."""
    logits = head(hidden).float()
    targets = targets.to(logits.device)
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view_as(targets)


def gathers_at_every_call(head: nn.Module) -> bool:
    """Whether the head's weight lies in parts that are put together for each call: under DeepSpeed's ZeRO-3, or where
    the head has been wrapped by FSDP by itself. As part of a larger unit it is whole throughout the step."""
    if any(hasattr(parameter, "ds_id") for parameter in head.parameters()):
        return True
    return any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(head).__mro__)
