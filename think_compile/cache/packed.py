"""The stored form of a cache tensor, of one side of a layer.

A growing store is immutable: an append makes a new store that shares the row buffers, so an older store (a branch, a
reused prefix) does not change. It may drop its oldest tokens (a bounded window). The live rows then begin at
``oldest``, and move to the front of new buffers when the old ones are full. A store of fixed size is written in place,
like the buffer that it replaces. The side's list of parts names the tensors and how each behaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from think_compile.cache.rows import Rows
from think_compile.cache.state import (
    COUNTERS,
    EVICTED,
    LENGTH,
    OLDEST,
    POSITIONS,
    WINDOW_START,
    Span,
    State,
    Stored,
    capacity_for,
)
from think_compile.cache.store import NoDenseForm, Store
from think_compile.formats import attention, segments, sinks
from think_compile.formats.ring import advanced, ring_of, ring_positions
from think_compile.formats.side import Side


class Counters(NamedTuple):
    """Counters of a growing store: row of the first live token, row of the first whole token, number of live tokens."""

    oldest: int
    window_start: int
    length: int


@dataclass(eq=False)
class Packed(Store):
    """The keys or the values of a layer, in the form of their side of the format.

    Attributes:
        of: "keys" or "values".
        side: how they are stored.
        rows: the parts that are appended to in place.
        own: the other parts, which only this store uses; at fixed size they include the counters, on the device.
        dtype: of the tensor that the model sees.
        counters: of a growing store; None: the store has a fixed size.
        size: of a store of fixed size: its tokens.
        written: at fixed size, the host's upper bound of the rows with tokens; None: the host does not know.
        rolling: whether position p is in row p % C.
        evicted: number of tokens of the first call that are not stored; lengths and counters count stored tokens.
    """

    of: str
    side: Side
    rows: Rows
    own: State
    dtype: torch.dtype
    counters: Counters | None = None
    size: int = 0
    written: int | None = None
    rolling: bool = False
    evicted: int = 0

    @classmethod
    def made(cls, of: str, side: Side, state: State, dtype: torch.dtype, length: int, *, fixed: bool = False) -> Packed:
        """The store of a first call's parts; ``length``: tokens of a growing cache, or a fixed size.

        ``dtype`` is the cache's dtype in the graph; under autocast the parts may have another, which then counts.
        """
        parts = side.parts(fixed=fixed)
        dtype = next((state[part.name].dtype for part in parts if part.dtype is None), dtype)
        rows = Rows({name: x for name, x in state.items() if name in side.row_parts})
        own = {name: x for name, x in state.items() if name not in side.row_parts}
        if fixed:
            return cls(of, side, rows, own, dtype, size=length)
        evicted = length - state[POSITIONS].shape[2] if side.evicts else 0
        length -= evicted
        counters = Counters(0, side.window_start(length) if side.has_ring else 0, length)
        return cls(of, side, rows, own, dtype, counters, evicted=evicted)

    @property
    def state(self) -> State:
        """All parts by name."""
        return self.rows.parts | self.own

    @property
    def kind(self) -> str:
        return f"{'growing' if self.grows else 'fixed'} {self.of}"

    @property
    def grows(self) -> bool:
        return self.counters is not None

    @property
    def length(self) -> int:
        return self.size if self.counters is None else self.counters.length

    @property
    def end(self) -> int:
        return self.size if self.counters is None else self.counters.oldest + self.counters.length

    @property
    def used(self) -> int:
        return self.end if self.counters is None or not self.side.flushes else self.counters.window_start

    @property
    def capacity(self) -> int:
        """Stored tokens for which there is room."""
        return self.size if self.counters is None else self.rows.capacity * self._group

    @property
    def _group(self) -> int:
        return self.side.codec.group

    @property
    def width(self) -> int:
        return self.side.width

    @property
    def is_lossy(self) -> bool:
        """Whether tokens outside the window lose information."""
        return self.side.is_lossy

    @property
    def window(self) -> tuple[int, ...]:
        """The number of encoded tokens and of ring rows of a growing store."""
        assert self.counters is not None
        encoded = max(0, self.counters.window_start - self.counters.oldest)
        return encoded, self._ring_rows

    @property
    def _ring_rows(self) -> int:
        return self.own["ring"].shape[2] if self.side.has_ring else 0

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.state.items()

    def stored(self) -> Stored:
        """The side at the start of a later call."""
        if not self.side.has_ring:
            return Stored(self.state, None, self.evicted)
        start = self.own[COUNTERS][WINDOW_START] if self.counters is None else self.counters.window_start
        return Stored(self.state, start, self.evicted)

    @property
    def logical_shape(self) -> tuple[int, int, int, int]:
        batch, heads, length, width = super().logical_shape
        return batch, heads, length + self.evicted, width

    def counter(self, name: str) -> int:
        """A counter of a growing store by name; the length is that of the tensor that the model sees."""
        if name == "evicted":
            return self.evicted
        value: int = getattr(self._counters, name)
        return value + self.evicted if name == "length" else value

    @property
    def selected(self) -> tuple[int, int] | None:
        """Stored tokens of the first call, and all of its tokens; None: no rule selects. May wait for the device."""
        if not self.side.evicts:
            return None
        evicted = int(self.own[EVICTED]) if EVICTED in self.own else self.evicted
        kept = self.own[POSITIONS].shape[2]
        return kept, kept + evicted

    def dense(self) -> Tensor:
        kept, first = self.selected or (0, 0)
        if kept < first:
            raise NoDenseForm(
                f"{first - kept} tokens of this cache's first call are not stored, and no number stands for them"
            )
        rows = self._dense_rows()
        if not self.side.evicts:
            return rows
        at = self.own[POSITIONS].to(torch.int64)
        at = torch.cat([at, torch.arange(at.shape[2], rows.shape[2], device=at.device).expand(*at.shape[:2], -1)], -1)
        return torch.empty_like(rows).scatter_(2, at[..., None].expand_as(rows), rows)

    def _dense_rows(self) -> Tensor:
        """[B, H, length, W]: the stored tokens, in the order of their rows."""
        if self.counters is not None:
            return attention.dense(self.side, self.stored(), self.counters.oldest, self.end, self.length).to(self.dtype)
        counters = self.own.get(COUNTERS)
        length = self.length if counters is None else counters[LENGTH]
        oldest = counters[OLDEST] if self.rolling and counters is not None else 0
        return attention.dense(self.side, self.stored(), oldest, length, self.length, rolling=self.rolling).to(
            self.dtype
        )

    def map_batch(self, f: Callable[[Tensor], Tensor]) -> Packed:
        with_batch = {part.name for part in self._parts if part.has_batch}
        own = {name: f(x) if name in with_batch else x.clone() for name, x in self.own.items()}
        return replace(self, rows=self.rows.map(f), own=own)

    def to(self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool = False) -> Packed:
        kept = {part.name for part in self._parts if part.dtype is not None}

        def moved(name: str, x: Tensor) -> Tensor:
            return x.to(device, None if name in kept else dtype, non_blocking=non_blocking, copy=True)

        rows = Rows({name: moved(name, x) for name, x in self.rows.parts.items()})
        own = {name: moved(name, x) for name, x in self.own.items()}
        return replace(self, rows=rows, own=own, dtype=self.dtype if dtype is None else dtype)

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.side.parts(fixed=not self.grows, rolling=self.rolling)

    # ------------------------------------------------------------------------------------------ of fixed size

    @property
    def is_full(self) -> bool:
        """Whether all rows hold tokens; waits for the device."""
        if COUNTERS not in self.own:
            return False
        evicted = self.own[EVICTED][0] if EVICTED in self.own else 0
        return bool(self.own[COUNTERS][LENGTH] + evicted == self.size)

    def clear(self) -> None:
        """Drop all tokens; the next call writes from position 0 and chooses again, like a first call."""
        chosen = {part.name for part in self._parts if not (part.is_rows or part.replaced)}
        for name, tensor in self.state.items():
            if name not in chosen:
                tensor.zero_()
        self.written = 0
        self._stop_rolling()

    def roll(self) -> None:
        """Become a rolling buffer."""
        if not self.rolling:
            if COUNTERS not in self.own:
                at = torch.tensor([self.length, self.length, 0], device=self.device)
                self.own = {**self.own, COUNTERS: at}
            self.rolling = True

    def unroll(self) -> None:
        """Put each token back into the row of its position, for calls that write at positions."""
        if not self.rolling:
            return
        counters = self.own[COUNTERS]
        order = (counters[OLDEST] + torch.arange(self.length, device=self.device)) % self.length
        for rows in self.rows.parts.values():
            rows.copy_(rows.index_select(2, order))
        if self.side.has_ring:
            ring = self.own["ring"]
            at = (counters[OLDEST] + torch.arange(self._ring_rows, device=self.device)) % self._ring_rows
            ring.copy_(ring.index_select(2, at))
        counters.copy_((counters - counters[OLDEST]).clamp(min=0))
        self._stop_rolling()

    def _stop_rolling(self) -> None:
        """Drop the counters that only a rolling buffer needs: the parts of a store are those of its side."""
        self.rolling = False
        if not self.side.has_ring:
            self.own = {name: x for name, x in self.own.items() if name != COUNTERS}

    # ---------------------------------------------------------------------------------------------- growing

    def crop(self, length: int) -> Packed:
        """The first ``length`` tokens, sharing the rows; tokens that have left the window stay encoded."""
        counters, length = self._counters, length - self.evicted
        if self.side.evicts and length < self.own[POSITIONS].shape[2]:
            raise NoDenseForm(
                f"a crop to {length + self.evicted} tokens cuts the first call, of which "
                f"{self.own[POSITIONS].shape[2]} tokens are stored, not all of them the first ones"
            )
        end = counters.oldest + length
        if end >= counters.window_start:
            return replace(self, counters=counters._replace(length=length))
        if not self.side.flushes:
            return replace(self, counters=counters._replace(length=length, window_start=end))
        start = end // self.side.window_group * self.side.window_group
        own = {**self.own, "ring": self._ring_of_encoded(start, end)}
        return replace(self, own=own, counters=counters._replace(length=length, window_start=start))

    def _ring_of_encoded(self, start: int, end: int) -> Tensor:
        """A ring with the decoded rows of positions ``start`` to ``end``, the first ones of a group."""
        ring, at = self.own["ring"].clone(), torch.arange(start, end, device=self.device)
        if start < end:
            ring[:, :, at % ring.shape[2]] = segments.decoded_at(self.side, self.stored(), at).to(ring.dtype)
        return ring

    def tail(self, length: int) -> Packed:
        """The last ``length`` tokens, sharing the rows unless far too many are unused."""
        if self.side.evicts:
            raise NoDenseForm(f"the last {length} tokens of a cache without some of its tokens cannot be told")
        oldest, start = self.end - length, self._counters.window_start
        kept = replace(
            self, counters=Counters(oldest, start if self.side.window_group > 1 else max(start, oldest), length)
        )
        has_outgrown = kept.capacity > 2 * self.side.capacity_for(length)  # most rows hold dropped tokens
        return kept.moved(self.side.capacity_for(length)) if has_outgrown else kept

    def moved(self, capacity: int) -> Packed:
        """The same tokens in the first rows of new buffers; whole groups move, so some dropped tokens may stay."""
        oldest, window_start, length = self._counters
        group = self.side.window_group
        dropped = oldest if group == 1 else min(oldest // group * group, window_start if self.side.has_ring else oldest)
        own, counters = self.own, Counters(oldest - dropped, window_start - dropped, length)
        records = -(-(self.end - dropped) // self._group)
        rows = self.rows.copy(dropped // self._group, records, max(records, -(-capacity // self._group)))
        if self.side.has_ring and dropped:
            own = {**own, "ring": own["ring"].roll(-dropped, 2)}  # token in row p: ring row p % R
        if sinks.BEGIN in own and dropped:
            own = {**own, sinks.BEGIN: own[sinks.BEGIN] - dropped}
        return replace(self, rows=rows, own=own, counters=counters)

    def from_zero(self, capacity: int) -> Packed:
        """The same tokens, in buffers where the first one has position 0."""
        moved = self.moved(capacity)
        if not moved._counters.oldest:
            return moved
        return moved._whole(capacity) if self.side.flushes else moved._shifted(capacity)

    def _shifted(self, capacity: int) -> Packed:
        """The tokens moved by a number that is no multiple of the window's group."""
        ungrouped = replace(self, side=replace(self.side, window_group=1))
        return replace(ungrouped.moved(capacity), side=self.side)

    def _whole(self, capacity: int) -> Packed:
        """The tokens as they are read now, in a large ring: their groups have new borders."""
        dense, length = self.dense(), self.length
        empty = self.rows.copy(0, 0, -(-capacity // self._group))
        own = {**self.own, "ring": ring_of(dense, length, capacity_for(length))}
        own[sinks.BEGIN] = own[sinks.BEGIN] - self._counters.oldest
        return replace(self, rows=empty, own=own, counters=Counters(0, 0, length))

    def reserve(self, n_new: int) -> Packed:
        """This store, or one with the same tokens and room for ``n_new`` more in its rows and ring."""
        settled = self.settled()
        capacity = settled._capacity_of_copy(n_new)
        room = settled if capacity is None else settled.moved(capacity)
        if self.side.encodes_later and not self.side.flushes:
            return room
        return room._with_ring(room._ring_with_room(n_new))

    def _capacity_of_copy(self, n_new: int) -> int | None:
        """Capacity of a larger or private copy for ``n_new`` more tokens; None: this store's rows have room."""
        group = self.side.window_group
        fits = -(-(self.end + n_new) // group) * group < self.capacity  # room stays: a slice of all would compile again
        if fits and self.rows.free_above(self.used, self):
            return None
        return self.capacity if fits and not self._counters.oldest else self.side.capacity_for(self.length + n_new)

    def settled(self) -> Packed:
        """This store, or one with its window moved on: :meth:`append` leaves that to the next operation."""
        if not (self.side.has_ring and self.side.encodes_later):
            return self
        start = max(self._counters.window_start, self.side.window_start(self.end))
        return self._with_window(start)

    def _with_window(self, start: int) -> Packed:
        """The store with its window's start moved on to ``start``, and a ring of the usual size."""
        before, rows = self._counters.window_start, self.side.ring_rows(0)
        if self.side.flushes and start > before:
            room = self if self.rows.free_above(before, self) else self.moved(self.capacity)
            begin = room._counters.window_start  # another position, if dropped tokens did not move
            room.side.flushed(room.state, begin, begin + start - before)
            return room._with_ring(room._ring_of(rows), window_start=begin + start - before)
        if self._ring_rows != rows:
            return self._with_ring(self._ring_of(rows), window_start=start)
        return self if start == before else self._with_ring(self.own["ring"], window_start=start)

    def _with_ring(self, ring: Tensor | None, **counters: int) -> Packed:
        if ring is None:
            return self
        return replace(self, own={**self.own, "ring": ring}, counters=self._counters._replace(**counters))

    def _ring_of(self, rows: int) -> Tensor:
        """The latest tokens, in a ring of ``rows`` rows."""
        positions = ring_positions(self.end, rows, self.device).clamp(min=0)
        return self.own["ring"].index_select(2, positions % self._ring_rows)

    def _ring_with_room(self, n_new: int) -> Tensor | None:
        """A larger ring with room for all whole rows and ``n_new`` more; None: there is no ring, or it has room."""
        if not self.side.has_ring:
            return None
        needed = self.end + n_new - self._counters.window_start
        # rows encoded on arrival: a full ring counts as a window, and would drop its oldest token
        room = self._ring_rows if self.side.flushes else self._ring_rows - 1
        if needed <= room:
            return None
        return self._ring_of(capacity_for(needed))

    def appended(self, replaced: State, n_new: int) -> Packed:
        """The store after a call that wrote ``n_new`` rows in place and made ``replaced``, its new tensors."""
        own, counters = self.own | replaced, self._counters
        store = replace(self, own=own, counters=counters._replace(length=counters.length + n_new))
        if not self.side.has_ring:
            return store
        whole = self.side.whole_tokens(own["ring"].shape[2])
        start = max(counters.window_start, self.side.window_start(store.end, whole))
        if self.side.flushes and self.side.encodes_later:
            return store._with_window(start)
        return replace(store, counters=store._counters._replace(window_start=start))

    def append(self, new: Tensor) -> Packed:
        """The store with ``new`` [B, H, N, W] after its tokens, outside of any graph.

        The window does not move yet: the caller reads the result next. As in an attention inside a graph, all tokens
        that had whole rows are still to have them.
        """
        n_new = new.shape[2]
        room = self.reserve(n_new)
        room.side.write_rows(new, room.state, Span(room.end, room._counters.oldest, room.length + n_new))
        ring = room._ring_with_room(n_new) if self.side.has_ring else None
        if self.side.has_ring:
            ring = advanced(room.own["ring"] if ring is None else ring, new, room.end)
        if self.side.sinks:
            first = sinks.written(room.own[sinks.SINKS], room.own[sinks.BEGIN], new, room.end)
            room = replace(room, own={**room.own, sinks.SINKS: first})
        return room._with_ring(ring)._longer(n_new)

    def _longer(self, n_new: int) -> Packed:
        return replace(self, counters=self._counters._replace(length=self.length + n_new))

    @property
    def _counters(self) -> Counters:
        assert self.counters is not None
        return self.counters
