"""One side of a format, its keys or its values: a codec for the rows, and the window of rows that stay whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from think_compile.cache.state import (
    BATCH_SIZE,
    COUNTERS,
    COUNTERS_PART,
    GROWTH_ROWS,
    HEADS,
    RING,
    WINDOW_START,
    Length,
    Part,
    Span,
    State,
    Stored,
)
from think_compile.formats.ring import advanced, ring_of
from think_compile.formats.seen import Seen


class Codec(Protocol):
    """How rows are stored: one file of :mod:`think_compile.formats`.

    Attributes:
        name: the name of the codec's device code, if any.
        group: number of tokens encoded together.
        has_window: whether the latest rows are also stored whole, in a ring.
    """

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> int: ...

    @property
    def has_window(self) -> bool: ...

    def parts(self, width: int) -> tuple[Part, ...]:
        """The tensors for rows of ``width`` channels, and those of a choice that holds for all rows of a sequence."""

    def choose(self, seen: Seen) -> State:
        """A first call's choice for all rows of a sequence."""

    def encode(self, rows: Tensor, chosen: State) -> State:
        """The stored form of ``rows`` [B, H, S, W]."""

    def decode(self, state: State, width: int) -> Tensor:
        """[B, H, S, W], the rows decoded from ``state``, in any floating-point dtype."""

    def scores(self, queries: Tensor, state: State) -> Tensor:
        """[B, H, M, S], products of ``queries`` [B, H, M, W] with the rows."""

    def is_lossy(self, width: int) -> bool:
        """Whether decoded rows differ from the original rows."""

    def describe(self, width: int) -> str:
        """A phrase for the report."""


@dataclass(frozen=True)
class Side:
    """How the keys or the values of a layer are stored.

    Attributes:
        codec: the form of the rows.
        width: channels of a row in the model.
        recent: number of latest tokens whose rows stay whole between calls, if the codec is lossy.
        encodes_later: whether tokens of later calls lose their whole rows on leaving the window; if not, the ring
            grows.
    """

    codec: Codec
    width: int
    recent: int = 0
    encodes_later: bool = True

    @property
    def is_lossy(self) -> bool:
        """Whether tokens lose information on leaving the window."""
        return self.codec.is_lossy(self.width)

    @property
    def has_ring(self) -> bool:
        """Whether the latest rows are stored whole, besides their encoded form."""
        return self.codec.has_window

    def parts(self, *, fixed: bool, rolling: bool = False) -> tuple[Part, ...]:
        """All stored tensors; ``fixed``: of a cache of fixed size; ``rolling``: of a rolling buffer."""
        parts = self.codec.parts(self.width)
        if self.has_ring:
            rows = self.ring_rows(0) if self.encodes_later else RING
            parts += (Part("ring", (BATCH_SIZE, HEADS, rows, self.width), replaced=True),)
        return (*parts, COUNTERS_PART) if fixed and (self.has_ring or rolling) else parts

    def capacity(self, state: State) -> int:
        """Rows of the parts that are appended to."""
        return next(state[part.name].shape[2] for part in self.codec.parts(self.width) if part.is_rows)

    def decoded(self, state: State) -> Tensor:
        """[B, H, S, W]: the decoded rows, in the ring's dtype if there is a ring."""
        rows = self.codec.decode(state, self.width)
        return rows.to(state["ring"].dtype) if self.has_ring else rows

    def ring_rows(self, room: int) -> int:
        """Rows of a new ring: the window and one group; plus ``room`` if later tokens stay whole."""
        return self.recent + self.codec.group + (0 if self.encodes_later else room)

    def whole_tokens(self, ring_rows: int) -> int:
        """How many of the latest tokens have whole rows after a later call."""
        return self.recent if self.encodes_later else ring_rows - self.codec.group

    def windows(self, state: State) -> tuple[int, int]:
        """How many of the latest tokens have whole rows after a first call, and after a later one."""
        return self.recent, self.whole_tokens(state["ring"].shape[2])

    def window_start(self, length: int, whole: int | None = None) -> int:
        """The lowest position with a whole row, if the last ``whole`` of ``length`` tokens stay whole."""
        whole = self.recent if whole is None else whole
        return max(0, (length - whole) // self.codec.group * self.codec.group)

    @property
    def window_rule(self) -> tuple[int, int, bool]:
        """The settings that the window's start depends on, besides the history."""
        return self.codec.group, self.recent, self.encodes_later

    # ------------------------------------------------------------------------------------------- first calls

    def pack(self, rows: Tensor, chosen: State, length: Length, capacity: int, *, fixed: bool) -> State:
        """The stored form of rows [B, H, S, W], of which ``length`` hold tokens."""
        spare = capacity - rows.shape[2]
        state = {name: _padded(x, spare) for name, x in self.codec.encode(rows, chosen).items()} | chosen
        if not self.has_ring:
            return state
        state["ring"] = ring_of(rows, length, self.ring_rows(capacity if fixed else GROWTH_ROWS))
        if fixed:
            end = torch.as_tensor(length, device=rows.device)
            state[COUNTERS] = torch.stack([self._window_start(end, self.recent), end, torch.zeros_like(end)])
        return state

    def _window_start(self, length: Tensor, whole: int) -> Tensor:
        start = length - whole
        if self.codec.group > 1:
            start = start // self.codec.group * self.codec.group
        return start.clamp(min=0)

    # ------------------------------------------------------------------------------------------- later calls

    def append(self, new: Tensor, fresh: State, stored: Stored, span: Span) -> State:
        """Store rows ``new`` [B, H, N, W] from the span's start on; returns the tensors that replace older ones.

        Runs after the attention of the call. ``fresh``: a new choice, which replaces the first call's if a cache of
        fixed size is restarted (start 0).
        """
        state = stored.state
        for name, chosen in fresh.items():
            assert isinstance(span.start, Tensor)
            state[name].copy_(torch.where(span.start == 0, chosen, state[name]))
        self.write_rows(new, state, span)
        replaced = {"ring": advanced(state["ring"], new, span.start)} if self.has_ring else {}
        if not isinstance(span.start, Tensor):
            return replaced
        for name, x in replaced.items():
            state[name].copy_(x)
        if COUNTERS in state:
            state[COUNTERS].copy_(self._counters(new.shape[2], state, span))
        return {}

    def write_rows(self, new: Tensor, state: State, span: Span) -> None:
        """Write the encoded rows ``new`` [B, H, N, W] in place, but no ring or counters."""
        for name, rows in self.codec.encode(new, state).items():
            append_rows(state[name], rows, span)

    def _counters(self, n_new: int, state: State, span: Span) -> Tensor:
        """The counters of a cache of fixed size after ``n_new`` more tokens."""
        start = span.start
        assert isinstance(start, Tensor)
        end, capacity = start + n_new, self.capacity(state)
        oldest = (end - capacity).clamp(min=0) if span.rolling else torch.zeros_like(end)
        if not self.has_ring:
            return torch.stack([end, end, oldest])
        whole = self.whole_tokens(state["ring"].shape[2])
        now = self._window_start(end, whole)
        if not self.encodes_later:  # a restart is a first call, which always leaves a window
            now = torch.where(start == 0, self._window_start(end, self.recent), now)
        return torch.stack([torch.maximum(torch.minimum(state[COUNTERS][WINDOW_START], start), now), end, oldest])


def _padded(x: Tensor, spare: int) -> Tensor:
    """A copy of ``x`` [B, H, S, *] with ``spare`` more rows, zero."""
    return F.pad(x, (0, 0, 0, spare)) if spare else x.clone(memory_format=torch.contiguous_format)


def append_rows(buffer: Tensor, rows: Tensor, span: Span) -> None:
    """Write ``rows`` [B, H, N, *] into ``buffer`` [B, H, C, *] from the span's start on, in place."""
    assert rows.dtype == buffer.dtype or (rows.is_floating_point() and buffer.is_floating_point())
    n_new, capacity = rows.shape[2], buffer.shape[2]
    if span.rolling:
        rows = rows[:, :, -capacity:]
        last = span.start + n_new - rows.shape[2] + torch.arange(rows.shape[2], device=buffer.device)
        buffer.index_copy_(2, last % capacity, rows.to(buffer.dtype))
        return
    buffer.index_copy_(2, span.start + torch.arange(n_new, device=buffer.device), rows.to(buffer.dtype))
