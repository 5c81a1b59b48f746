"""transformers' caches for rows that grow at their own pace: token i of a row always lies in column i, as in a cache
that was filled in step, and a row that takes tokens back writes over them.

`speculation.py` is the caller. While it runs, the layers of the user's cache are replaced by `RowLayer`s; the cache
object itself stays, and with it what it does between layers (offloading).

Legend: B batch, S columns, Q new tokens of each row, C and R as in mla.py.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer


class Columns:
    """Where the next `count` tokens of each row go: row b's into columns [starts[b], starts[b] + count).

    >>> Columns([3, 5], 2, torch.device("cpu")).index_BQ
    tensor([[3, 4],
            [5, 6]])
    """

    def __init__(self, starts: list[int], count: int, device: torch.device):
        self.count, self.longest = count, max(starts)
        self.end = self.longest + count
        self.in_step = min(starts) == self.longest
        index_Q = torch.arange(count, device=device)
        self.index_BQ = index_Q[None] + (
            self.longest if self.in_step else torch.tensor(starts, device=device)[:, None]
        )  # (1, Q) where the rows are in step

    def take(self, x_BS: torch.Tensor) -> torch.Tensor:
        """What stands in these columns, (B, Q)."""
        if self.in_step:
            return x_BS[:, self.longest : self.end]
        return x_BS.gather(1, self.index_BQ.to(x_BS.device))

    def put(self, x_BS: torch.Tensor, new_BQ: torch.Tensor) -> None:
        """Writes into these columns of `x_BS`."""
        if self.in_step:
            x_BS[:, self.longest : self.end] = new_BQ
        else:
            x_BS.scatter_(1, self.index_BQ.to(x_BS.device), new_BQ)

    def mask(self, valid_BS: torch.Tensor | None, width: int, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores, (B or 1, 1, Q, `width`): each token sees the columns up to its own that are
        valid. None where it sees all."""
        if self.in_step and self.count == 1 and valid_BS is None:
            return None
        seen = torch.arange(width, device=self.index_BQ.device) <= self.index_BQ[:, :, None]
        if valid_BS is not None:
            seen = seen & valid_BS[:, None, :width]
        hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return hidden.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


class RowLayer(CacheLayerMixin):
    """One layer, with `columns` set before each forward pass. `keys` (B, 1, S, C) and `values` (B, 1, S, R) are
    buffers with room to spare, or the tensors of a static layer, which are written in place and never grow."""

    is_sliding = False

    def __init__(self, source: Any = None, room: int = 0):
        super().__init__()
        self.source, self.room = source, room  # no more columns than `room` will be asked for
        self.fixed = isinstance(source, StaticLayer)
        self.columns: Columns | None = None
        if source is not None:
            self.keys, self.values = source.keys, source.values
            self.dtype, self.device = source.dtype, source.device
            self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.columns is not None
        assert self.keys is not None
        assert self.values is not None
        end, capacity = self.columns.end, self.keys.shape[2]
        if end > capacity and not self.fixed:
            capacity = max(end, min(end + max(64, end // 4), self.room))
            self.keys, self.values = self._grown(self.keys, capacity), self._grown(self.values, capacity)
        self._write(self.keys, key_states)
        self._write(self.values, value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grown(self, buffer: torch.Tensor, capacity: int) -> torch.Tensor:
        batch, heads, held, size = buffer.shape
        # Zeros: what stands in a column that is masked must at least be finite.
        grown = buffer.new_zeros(batch, heads, capacity, size)
        grown[:, :, :held] = buffer
        return grown

    def _write(self, buffer: torch.Tensor, new: torch.Tensor) -> None:
        columns = self.columns
        assert columns is not None
        if columns.in_step:
            buffer[:, :, columns.longest : columns.end] = new
            return
        index_BQ, new_BQC, buffer_BSC = columns.index_BQ.to(buffer.device), new.squeeze(1), buffer.squeeze(1)
        if columns.end > buffer.shape[2]:
            # Rows that are done may overrun a static cache. Their tokens go nowhere: the first column is written with
            # what it holds.
            inside = (index_BQ < buffer.shape[2])[..., None]
            new_BQC = torch.where(inside, new_BQC, buffer_BSC[:, :1])
            index_BQ = index_BQ * inside.squeeze(-1)
        rows_B1 = torch.arange(len(index_BQ), device=buffer.device)[:, None]
        buffer_BSC[rows_B1, index_BQ] = new_BQC

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns.longest if self.columns is not None else 0

    def get_max_length(self) -> int:
        return -1


class OneLayerCache(Cache):
    """The cache of a layer that is alone, whatever its index in the model."""

    def __init__(self, room: int):
        self.layer = RowLayer(room=room)
        super().__init__(layers=[self.layer])

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return self.layer.update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layer.get_seq_length()


class RowCache:
    """Puts `RowLayer`s into a cache that holds a prompt, and what they hold back into its own layers at the end."""

    def __init__(self, cache: Cache, room: int):
        self.cache, self.own = cache, list[Any](cache.layers)
        self.layers: list[Any] = cache.layers
        self.layers[:] = [RowLayer(layer, room) for layer in self.own]

    def at(self, columns: Columns) -> Cache:
        """The cache, ready for a forward pass over these columns."""
        for layer in self.layers:
            layer.columns = columns
        return self.cache

    def release(self, length: int) -> None:
        """Gives the cache its own layers back, holding the first `length` columns."""
        for own, layer in zip(self.own, self.layers, strict=True):
            own.keys, own.values = layer.keys, layer.values
            if isinstance(own, StaticLayer):
                own.cumulative_length.fill_(length)
            elif own.keys.shape[2] != length:  # copied, so that nothing of the buffer stays behind
                own.keys, own.values = own.keys[:, :, :length].clone(), own.values[:, :, :length].clone()
        self.layers[:] = self.own


def row_bound(cache: Cache) -> int | None:
    """Columns of a static cache, None where there is no bound."""
    layer = cache.layers[0] if cache.layers else None
    return layer.max_cache_len if isinstance(layer, StaticLayer) else None


def check_rows_can_be_paced(cache: Any) -> None:
    """Raises:
    ValueError: for a cache whose layers cannot take tokens back exactly.
    """
    kinds: set[Any] = {type(layer) for layer in cache.layers} if isinstance(cache, Cache) else {type(cache)}
    if isinstance(cache, Cache) and not cache.layers:  # made at the first token
        kinds = {cache.layer_class_to_replicate}
    others = sorted(kind.__name__ for kind in kinds - {DynamicLayer, StaticLayer})
    if others:
        raise ValueError(
            f"`use_mtp=True` takes rejected drafts back out of the cache, which {', '.join(others)} cannot do exactly "
            "(quantised and sliding layers merge tokens); use a dynamic or static cache, offloaded or not, or leave "
            "`use_mtp` out"
        )
