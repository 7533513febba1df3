"""Cache operations on packed stores: batch selection, crops, moves, copies, joins.

Each function takes a store and the layout of its cache tensor, and returns the store of the result. It returns None if
the result has no packed form and the dense tensor is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from think_compile.cache.canonical import BATCH, TOKEN, Layout, shape_of, to_canonical, token_axis
from think_compile.cache.packed import Packed
from think_compile.cache.rows import Rows
from think_compile.cache.store import Dense, Store

aten = torch.ops.aten


def clone(store: Store, layout: Layout, /, **_: Any) -> Store:
    """A copy; a packed store has only one memory format."""
    return store.map_batch(torch.clone)


def to_copy(store: Store, layout: Layout, /, **kwargs: Any) -> Store | None:
    """A copy on another device or in another floating-point type."""
    dtype = kwargs.get("dtype") or store.dtype
    if not dtype.is_floating_point or kwargs.get("pin_memory"):
        return None
    return store.to(kwargs.get("device") or store.device, dtype, bool(kwargs.get("non_blocking")))


def index_select(store: Store, layout: Layout, dim: int, index: Tensor) -> Store | None:
    """Select rows of the batch."""
    if layout[dim] != (BATCH,):
        return None
    index = index.to(store.device)
    return store.map_batch(lambda t: t.index_select(0, index))


def index(store: Store, layout: Layout, indices: Sequence[Tensor | None]) -> Store | None:
    """Advanced indexing by one list of rows or one mask along the batch."""
    picked = [(dim, chosen) for dim, chosen in enumerate(indices) if chosen is not None]
    if len(picked) != 1 or picked[0][1].dim() != 1:
        return None
    dim, chosen = picked[0]
    size = shape_of(store.logical_shape, layout)[dim]
    if chosen.dtype in (torch.bool, torch.uint8):
        if chosen.shape[0] != size:
            return None
        chosen = chosen.nonzero()[:, 0]
    return index_select(store, layout, dim, chosen + (chosen < 0) * size)


def slice_of(
    store: Store, layout: Layout, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Store | None:
    """First or last tokens of a growing cache, or a batch range; the store itself if everything is kept."""
    size = shape_of(store.logical_shape, layout)[dim]
    start, end, step = slice(start, end, step).indices(size)
    if step == 1 and (start, end) == (0, size):
        return store
    axes = layout[dim]
    if axes == (BATCH,) and step > 0 and start < end and not isinstance(store, Dense):
        return store.map_batch(lambda t: t[start:end:step].clone())
    if axes == (TOKEN,) and step == 1 and start < end and isinstance(store, Packed) and store.grows:
        return store.crop(end) if start == 0 else store.tail(end - start) if end == size else None
    return None


def token_range(layout: Layout, index: Any) -> tuple[int | None, int | None] | None:
    """(start, end) if ``index``, as in ``x[index]``, takes a range of tokens and all of the other axes."""
    items = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice) or i is Ellipsis for i in items):
        return None
    dots = [at for at, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1 or len(items) - len(dots) > len(layout):
        return None
    at = dots[0] if dots else len(items)
    missing = len(layout) - len(items) + len(dots)
    full = [*items[:at], *[slice(None)] * missing, *items[at + 1 :]]
    token = full.pop(token_axis(layout)) if len(full) == len(layout) else None
    if token is None or token.step not in (None, 1) or any(i != slice(None) for i in full):
        return None
    return token.start, token.stop


def canonical(x: Tensor, store: Store, layout: Layout) -> Tensor:
    """``x``, in the layout of the store's tensor, as [B, H, S, D]."""
    _, heads, _, width = store.logical_shape
    return to_canonical(x, layout, heads, width)


def append(store: Store, layout: Layout, new: Sequence[Tensor]) -> Store | None:
    """Append new tokens to a growing cache, outside of our graphs."""
    if not isinstance(store, Packed) or not store.grows:
        return None
    shape = shape_of(store.logical_shape, layout)
    for rows in new:
        expected = [
            size if axes != (TOKEN,) else rows.shape[i]
            for i, (axes, size) in enumerate(zip(layout, shape, strict=True))
            if i < rows.dim()
        ]
        if rows.dtype != store.dtype or rows.device != store.device or list(rows.shape) != expected:
            return None
        store = store.append(canonical(rows, store, layout))
    return store


def join_batches(stores: Sequence[Store]) -> Store | None:
    """Join the batches of growing stores with the same history; None: not all grow, or their histories differ."""
    packed = [s for s in stores if isinstance(s, Packed) and s.grows]
    if len(packed) != len(stores):
        return None
    packed = [s.from_zero(s.length) if s._counters.oldest else s for s in packed]
    if len({(s.of, s.side, s.dtype, s.counters, s._ring_rows, s.evicted) for s in packed}) != 1:
        return None
    first = packed[0]
    records = -(-first.end // first._group)
    rows = {name: torch.cat([s.rows.parts[name][:, :, :records] for s in packed]) for name in first.rows.parts}
    own = {name: torch.cat([s.own[name] for s in packed]) for name in first.own}
    return replace(first, rows=Rows(rows), own=own)


# Operations whose first argument is the cache and whose result is a new one.
OPERATIONS: dict[Any, Callable[..., Store | None]] = {
    aten.clone.default: clone,
    aten._to_copy.default: to_copy,
    aten.index_select.default: index_select,
    aten.index.Tensor: index,
}
