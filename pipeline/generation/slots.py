"""The key-value cache of the native engine: rows come and go while the others are being written.

Every row's newest token stands in the same column, whatever the row's length, so that relative
positions (sliding windows, ALiBi) are those of left padding. A row that joins is written so that it
ends in that column; a row that leaves makes room for the last one. Nothing is copied a token.

    column   0 1 2 3 4 5 6 7        start = 2, stop = 7: the next token goes to column 7
    row 0    . . a b c d e          (rows begin at 2, 4 and 3)
    row 1    . . . . f g h
    row 2    . . . i j k l
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotCache(Cache):
    """Keys and values of up to `max_rows` rows in `capacity` columns, one buffer a layer."""

    def __init__(self, layers: int, max_rows: int, capacity: int) -> None:
        self.max_rows, self.capacity = max_rows, capacity
        self.rows = 0  # slots [0, rows) are being written
        self.joining = 0  # slots [rows, rows + joining) are being filled with prompts
        self.start = self.stop = 0
        # Of steps of fixed shape (`graphs`): how many columns they see, and where they write.
        self.width: int | None = None
        self.column: Tensor | None = None
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])

    @property
    def past(self) -> int:
        """Columns before the tokens of this pass."""
        return 0 if self.joining else self.stop - self.start

    @contextmanager
    def fixed(self, width: int) -> Iterator[None]:
        """Within it, a pass decodes all slots over the first `width` columns."""
        self.width = width
        self._set_compileable(True)
        try:
            yield
        finally:
            self.width = None
            self._set_compileable(False)

    def joined(self) -> None:
        """The prompts of this pass are written: their rows go on with the others."""
        self.rows, self.joining = self.rows + self.joining, 0

    def leave(self, alive: list[int]) -> list[int]:
        """Keep the slots `alive`; returns which old slot each new one holds.

        Rows from the end fill the holes, so that few are copied.
        """
        count = len(alive)
        kept = set(alive)
        holes = [slot for slot in range(count) if slot not in kept]
        movers = [slot for slot in alive if slot >= count]
        columns = slice(self.start, self.stop)
        for buffer in self._buffers() if holes else ():
            buffer[holes, :, columns] = buffer[movers, :, columns]
        order = list(range(count))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        self.rows = count
        return order

    def shift(self) -> int:
        """Move all rows to the left, over columns that no row needs; returns how far."""
        distance = self.start
        for buffer in self._buffers():
            moved = buffer[: self.rows, :, self.start : self.stop].clone()
            buffer[: self.rows, :, : self.stop - self.start] = moved
        self.start, self.stop = 0, self.stop - distance
        return distance

    def free(self) -> None:
        """Drop the buffers now: cache and layers refer to one another, and would wait for gc."""
        for layer in self.layers:
            assert isinstance(layer, _SlotLayer)
            layer.keys = layer.values = None

    def _set_compileable(self, value: bool) -> None:
        """Whether transformers builds the mask without looking into it, which would be a wait."""
        for layer in self.layers:
            layer.is_compileable = value

    def _buffers(self) -> Iterator[Tensor]:
        for layer in self.layers:
            assert isinstance(layer, _SlotLayer)
            assert layer.keys is not None and layer.values is not None
            yield from (layer.keys, layer.values)


class _SlotLayer(CacheLayerMixin):
    """One layer's buffers (rows, heads, columns, width); where to write stands in the cache."""

    is_sliding = False  # a window is a matter of the mask: all columns are kept

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, untouched: memory that no row needs is never filled."""

        def buffer(states: Tensor) -> Tensor:
            _, heads, _, width = states.shape
            shape = (self.cache.max_rows, heads, self.cache.capacity, width)
            # Steps of fixed shape read every column, if only to count it 0 times.
            make = torch.empty if self.cache.column is None else torch.zeros
            return make(shape, dtype=states.dtype, device=states.device)

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write this pass's keys and values; returns all that its queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        cache, width = self.cache, key_states.shape[2]
        if cache.joining:
            rows = slice(cache.rows, cache.rows + cache.joining)
            columns = slice(cache.stop - width, cache.stop)
            # Masked columns count as 0 x their value: they must be numbers.
            before = slice(cache.start, columns.start)
            self.keys[rows, :, before] = 0
            self.values[rows, :, before] = 0
            self.keys[rows, :, columns] = key_states
            self.values[rows, :, columns] = value_states
            return key_states, value_states
        if cache.width is not None:
            assert cache.column is not None
            self.keys.index_copy_(2, cache.column, key_states)
            self.values.index_copy_(2, cache.column, value_states)
            return self.keys[:, :, : cache.width], self.values[:, :, : cache.width]
        rows, seen = slice(0, cache.rows), slice(cache.start, cache.stop + 1)
        self.keys[rows, :, cache.stop] = key_states[:, :, 0]
        self.values[rows, :, cache.stop] = value_states[:, :, 0]
        return self.keys[rows, :, seen], self.values[rows, :, seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the mask covers, and the first of them."""
        if self.cache.width is not None:
            return self.cache.width, 0
        return self.cache.past + query_length, 0

    def get_seq_length(self) -> Any:
        """Columns before this pass; a tensor in steps of fixed shape, as in a static cache."""
        return self.cache.past if self.cache.width is None else self.cache.column

    def get_max_length(self) -> int:
        """Columns there are."""
        return self.cache.capacity
