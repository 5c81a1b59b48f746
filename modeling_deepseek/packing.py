"""Which tokens see which: padding, packed documents, and the mask for each attention implementation and path.

Legend: B batch, S tokens at hand, D hidden size.

A row may hold several documents one behind the other. They are told apart by their positions, which do not run on where
a document begins. transformers' masks do so only where there is neither an attention mask nor a cache; here documents
stay apart with both. Collators that name documents in another way, by `seq_idx` or `cu_seq_lens_q`, are understood too.
TRL's packing strategy "wrapped" says nothing about documents, and its rows are one document each.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.masking_utils import create_causal_mask
from transformers.utils.import_utils import is_tracing

from .configuration_deepseek import DeepseekConfig
from .mla import choose_mla_path, is_flash
from .paged import paged_batch


@dataclass(frozen=True)
class SequenceContext:
    """What the layers need to know about the tokens at hand."""

    attention_mask: Any  # for the attention interface in use
    attention_kwargs: dict[str, Any]  # what that interface needs besides the mask
    position_ids_BS: torch.Tensor  # (B or 1, S)
    documents_BS: torch.Tensor | None  # document of each token, None where each row is one
    valid_BS: torch.Tensor | None  # False for padding, None where there is none


def document_ids(position_ids_BS: torch.Tensor) -> torch.Tensor:
    """Number of the document that each position belongs to, (B, S) int64: a new one begins wherever the position is
    not its predecessor's plus one.

    >>> document_ids(torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([[0, 0, 0, 1, 1]])
    """
    starts_BS = torch.zeros_like(position_ids_BS)
    starts_BS[:, 1:] = position_ids_BS.diff(dim=-1) != 1
    return starts_BS.cumsum(dim=-1)


def packed_positions(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """`position_ids` of the forward's `inputs`; where there are none, positions that begin anew with each document of
    `seq_idx` (B, S: document of each token) or `cu_seq_lens_q` (where each begins in the flattened batch, and its
    end), which collators hand to attention kernels; None where there is nothing of the kind.

    >>> packed_positions({"input_ids": torch.zeros(1, 5), "seq_idx": torch.tensor([[0, 0, 0, 1, 1]])})
    tensor([[0, 1, 2, 0, 1]])
    """
    position_ids, seq_idx, bounds = (inputs.get(name) for name in ("position_ids", "seq_idx", "cu_seq_lens_q"))
    if position_ids is not None or (seq_idx is None and bounds is None):
        return position_ids
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    starts_BS = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if seq_idx is not None:
        starts_BS[:, 1:] = seq_idx.diff(dim=-1) != 0
    elif bounds is not None:
        starts_BS.view(-1)[bounds[:-1].long()] = True
    index_BS = torch.arange(tokens.shape[1], device=tokens.device).expand_as(starts_BS)
    return index_BS - torch.where(starts_BS, index_BS, 0).cummax(dim=-1).values


def documents(position_ids: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """Document of each token (B, S), None where no row holds more than one."""
    if position_ids is None or length == 1:
        return None
    documents_BS = document_ids(position_ids.expand(batch, -1))
    if not is_tracing(documents_BS) and not documents_BS[:, -1].any():
        return None
    return documents_BS


def documents_apart(
    documents_BS: torch.Tensor | None, position_ids: torch.Tensor, valid_BS: torch.Tensor | None
) -> torch.Tensor | None:
    """Number of the document that attention keeps each token in, (B, S), None where each row is one. Padding has
    positions of any kind, so that a token behind it begins a document only where its position falls back."""
    if documents_BS is None or valid_BS is None:
        return documents_BS
    position_ids = position_ids.expand(valid_BS.shape[0], -1)
    index_BS = torch.arange(valid_BS.shape[1], device=valid_BS.device).expand_as(valid_BS)
    # Index of the last token before each that is not padding, -1 where there is none.
    before_BS = torch.where(valid_BS, index_BS, -1).cummax(dim=-1).values[:, :-1]
    step_BS = position_ids[:, 1:] - position_ids.gather(1, before_BS.clamp(min=0))
    starts_BS = torch.where(before_BS == index_BS[:, :-1], step_BS != 1, step_BS <= 0)
    apart_BS = F.pad((starts_BS & valid_BS[:, 1:] & (before_BS >= 0)).cumsum(dim=-1), (1, 0))
    return apart_BS if is_tracing(apart_BS) or apart_BS[:, -1].any() else None


def flash_lengths(apart_BS: torch.Tensor, valid_BS: torch.Tensor | None) -> dict[str, Any]:
    """Where each document, or padding between two, begins in the flattened batch: flash kernels take this in place of
    a mask, and transformers' interface finds it out by itself only for a batch of one without an attention mask."""
    segments_BS = apart_BS * 2 if valid_BS is None else apart_BS * 2 + valid_BS
    starts_BS = F.pad(segments_BS.diff(dim=-1) != 0, (1, 0), value=True)
    bounds = F.pad(starts_BS.flatten().nonzero().flatten(), (0, 1), value=starts_BS.numel()).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def sequence_context(
    config: DeepseekConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
) -> SequenceContext:
    """Everything that follows from positions, padding and cache for the tokens at hand, (B, S, D) as embeddings."""
    batch, length = inputs_embeds.shape[:2]
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    # A dynamic cache that holds nothing says nothing about the mask, and would keep transformers from looking for
    # packed documents.
    static = past_key_values is not None and past_key_values.is_compileable
    mask_cache = past_key_values if static or (isinstance(past, int) and past > 0) else None

    documents_BS = documents(position_ids, batch, length)
    if position_ids is None:
        position_ids = (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)
    valid_BS = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        if isinstance(past, int):  # the mask of a whole prompt may come with each chunk of it
            attention_mask = attention_mask[:, : past + length]
        valid_BS = attention_mask[:, -length:].to(device=inputs_embeds.device, dtype=torch.bool)

    apart_BS = documents_apart(documents_BS, position_ids, valid_BS)
    if documents_BS is not None and mask_cache is not None and (is_tracing(documents_BS) or past > 0):
        ready = attention_mask is not None and valid_BS is None  # a 4-D mask says itself what sees what
        if apart_BS is not None and not ready and not is_tracing(documents_BS):
            raise ValueError(
                f"`position_ids` begin a new document in tokens that follow {int(past)} cached ones: packed documents "
                "need an empty cache; pass them at once, or one by one"
            )
        documents_BS = apart_BS = None
    kv_length = mask_cache.get_mask_sizes(length, 0)[0] if mask_cache is not None else length
    attended = length if isinstance(past, int) and past == 0 else kv_length  # as the layers see it
    attention_kwargs: dict[str, Any] = {}
    mask_config = config
    if is_flash(config._attn_implementation):
        if choose_mla_path(config, length, attended) == "absorbed":
            mask_config = copy.copy(config)  # flash kernels take no head size above 256: a dense mask for our own
            mask_config._attn_implementation = "sdpa"
        elif apart_BS is not None and is_tracing(apart_BS):
            attention_kwargs = {"position_ids": position_ids}
        elif apart_BS is not None and mask_cache is None:
            attention_kwargs, attention_mask = flash_lengths(apart_BS, valid_BS), None
    causal_mask = create_causal_mask(
        config=mask_config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=mask_cache,
        position_ids=position_ids,
        and_mask_function=_same_document(apart_BS, kv_length)
        if valid_BS is not None or mask_cache is not None
        else None,
    )
    return SequenceContext(causal_mask, attention_kwargs, position_ids, documents_BS, valid_BS)


def paged_context(
    config: DeepseekConfig, position_ids: torch.Tensor | None, arguments: dict[str, Any]
) -> tuple[SequenceContext, dict[str, Any]]:
    """The same for a step of continuous batching, whose new tokens lie in one row, (1, S), and what is left of the
    keyword arguments: the rest is for the attention interfaces of transformers, which are not called with pages."""
    assert position_ids is not None
    attention_kwargs = {"paged": paged_batch(config, arguments)}
    rest = {name: value for name, value in arguments.items() if name not in PagedAttentionArgs.__annotations__}
    return SequenceContext(None, attention_kwargs, position_ids, None, None), rest


def _same_document(apart_BS: torch.Tensor | None, kv_length: int) -> Callable | None:
    """Mask function (row, head, query, key) that is true within a document, None where each row is one."""
    if apart_BS is None:
        return None
    padded = F.pad(apart_BS, (0, kv_length - apart_BS.shape[1]), value=-1)  # places of a static cache not yet filled
    return lambda row, head, query, key: padded[row, query] == padded[row, key]
