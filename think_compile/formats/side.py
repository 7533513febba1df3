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
    EVICTED,
    GROWTH_ROWS,
    HEADS,
    KEPT,
    POSITIONS,
    RING,
    WINDOW_START,
    Length,
    Part,
    Span,
    State,
    Stored,
    capacity_for,
)
from think_compile.formats import groups, sinks
from think_compile.formats.ring import advanced, ring_of
from think_compile.formats.seen import Seen


class FormatError(ValueError):
    """A codec does not take rows of some head size; raised by its ``check``."""


class Codec(Protocol):
    """How rows are stored: one file of :mod:`think_compile.formats`.

    A codec may also have ``check(width)``, which raises FormatError for rows that it does not take; ``kept``, the
    number of stored channels; and ``mean_bits(width)``, the bits per number (without: 16 in each of ``kept`` channels).

    Attributes:
        name: the name of the codec's device code, if any.
        group: number of tokens encoded together, in one record: a part with the capacity in its shape has one row for
            each record. A group is encoded when all its tokens have left the window.
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
        """The stored form of ``rows`` [B, H, S, W]; S is a multiple of the group."""

    def decode(self, state: State, width: int) -> Tensor:
        """[B, H, S, W], the rows decoded from ``state``, in any floating-point dtype."""

    def scores(self, queries: Tensor, state: State) -> Tensor:
        """[B, H, M, S]: products of ``queries`` [B, H, M, W] with the rows."""

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
        window_group: the window begins at a multiple of this, itself a multiple of the codec's group.
        sinks: number of first tokens of each sequence whose rows stay whole, if the codec is lossy.
        evicts: whether a token rule selects the tokens of a first call that are stored.
    """

    codec: Codec
    width: int
    recent: int = 0
    encodes_later: bool = True
    window_group: int = 1
    sinks: int = 0
    evicts: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "window_group", max(self.window_group, self.codec.group))
        object.__setattr__(self, "sinks", self.sinks if self.has_ring else 0)

    @property
    def is_lossy(self) -> bool:
        """Whether tokens lose information on leaving the window."""
        return self.codec.is_lossy(self.width)

    @property
    def kept(self) -> int:
        """Channels of a row that are stored outside the window."""
        return int(getattr(self.codec, "kept", self.width))

    @property
    def bits(self) -> float:
        """Bits per number of a row outside the window; 16 stand for the model's dtype."""
        of_codec = getattr(self.codec, "mean_bits", None)
        return 16 * self.kept / self.width if of_codec is None else float(of_codec(self.width))

    @property
    def has_ring(self) -> bool:
        """Whether the latest rows are stored whole, besides their encoded form."""
        return self.codec.has_window

    @property
    def flushes(self) -> bool:
        """Whether rows are encoded by whole groups, when they leave the window; else on arrival."""
        return self.codec.group > 1

    @property
    def _keeps_begin(self) -> bool:
        return self.flushes or self.sinks > 0

    def parts(self, *, fixed: bool, rolling: bool = False) -> tuple[Part, ...]:
        """All stored tensors; ``fixed``: of a cache of fixed size; ``rolling``: of a rolling buffer."""
        parts = self.codec.parts(self.width)
        if self._keeps_begin:
            parts += (Part(sinks.BEGIN, (BATCH_SIZE,), torch.int64),)
        if self.sinks:
            parts += (Part(sinks.SINKS, (BATCH_SIZE, HEADS, self.sinks, self.width), replaced=True),)
        if self.has_ring:
            rows = self.ring_rows(0) if self.encodes_later and not self.flushes else RING
            parts += (Part("ring", (BATCH_SIZE, HEADS, rows, self.width), replaced=True),)
        if self.evicts:
            parts += (Part(POSITIONS, (BATCH_SIZE, HEADS, KEPT), torch.int32),)
            parts += (Part(EVICTED, (1,), torch.int64),) if fixed else ()
        return (*parts, COUNTERS_PART) if fixed and (self.has_ring or rolling) else parts

    @property
    def row_parts(self) -> tuple[str, ...]:
        """Names of the parts that are appended to."""
        return tuple(part.name for part in self.codec.parts(self.width) if part.is_rows)

    def encoded_room(self, state: State) -> int:
        """Tokens for which the appended parts have room."""
        return state[self.row_parts[0]].shape[2] * self.codec.group

    def room(self, state: State) -> int:
        """Tokens for which a cache of fixed size has room, at most: encoded ones, and those in the window."""
        return self.encoded_room(state) + (self.recent + self.window_group - 1 if self.flushes else 0)

    def encoded_for(self, capacity: int, *, fixed: bool) -> int:
        """Tokens that the rows or records for ``capacity`` tokens hold.

        If groups are encoded on leaving the window, the last tokens of a cache of fixed size never are.
        """
        group = self.window_group
        if fixed and self.flushes:
            return torch.sym_max(group, (capacity - self.recent) // group * group)
        return -(-capacity // group) * group

    def capacity_for(self, length: int) -> int:
        """Tokens to allocate for in a growing cache of ``length`` tokens: a multiple of the group."""
        capacity, group = capacity_for(length), self.window_group
        return (-(-capacity // group) + 1) * group if group > 1 else capacity

    def decoded(self, state: State) -> Tensor:
        """[B, H, S, W]: the decoded rows, in the ring's dtype if there is a ring."""
        rows = self.codec.decode(state, self.width)
        return rows.to(state["ring"].dtype) if self.has_ring else rows

    def ring_rows(self, room: int) -> int:
        """Rows of a new ring: the window and one group; plus ``room`` if later tokens stay whole."""
        return self.recent + self.window_group + (0 if self.encodes_later else room)

    def whole_tokens(self, ring_rows: int) -> int:
        """How many of the latest tokens have whole rows after a later call."""
        return self.recent if self.encodes_later else ring_rows - self.window_group

    def windows(self, state: State) -> tuple[int, int]:
        """How many of the latest tokens have whole rows after a first call, and after a later one."""
        return self.recent, self.whole_tokens(state["ring"].shape[2])

    def window_start(self, length: int, whole: int | None = None) -> int:
        """The lowest position with a whole row, if the last ``whole`` of ``length`` tokens stay whole."""
        whole = self.recent if whole is None else whole
        return max(0, (length - whole) // self.window_group * self.window_group)

    @property
    def window_rule(self) -> tuple[int, int, bool]:
        """The settings that the window's start depends on, besides the history."""
        return self.window_group, self.recent, self.encodes_later

    # ------------------------------------------------------------------------------------------- first calls

    def choose(self, seen: Seen) -> State:
        """A first call's choice for all rows of a sequence."""
        chosen = self.codec.choose(seen)
        return chosen | ({sinks.BEGIN: seen.first_valid} if self._keeps_begin else {})

    def pack(self, rows: Tensor, chosen: State, length: Length, capacity: int, *, fixed: bool) -> State:
        """The stored form of rows [B, H, S, W], of which ``length`` hold tokens."""
        size = self.encoded_for(capacity, fixed=fixed)
        if self.flushes:
            encoded = self.codec.encode(groups.counted(rows, size, chosen[sinks.BEGIN] + self.sinks, length), chosen)
        else:
            encoded = self.codec.encode(rows, chosen)
        spare = size - rows.shape[2]
        padded = (lambda x: x.contiguous()) if self.flushes else (lambda x: _padded(x, spare))
        state = {name: padded(x) for name, x in encoded.items()} | chosen
        if self.sinks:
            state[sinks.SINKS] = sinks.first_rows(rows, chosen[sinks.BEGIN], self.sinks, length)
        if not self.has_ring:
            return state
        state["ring"] = ring_of(rows, length, self.ring_rows(capacity if fixed else GROWTH_ROWS))
        if fixed:
            end = torch.as_tensor(length, device=rows.device)
            state[COUNTERS] = torch.stack([self._window_start(end, self.recent), end, torch.zeros_like(end)])
        return state

    def _window_start(self, length: Tensor, whole: int) -> Tensor:
        start = length - whole
        if self.window_group > 1:
            start = start // self.window_group * self.window_group
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
        ring = state.get("ring")
        if isinstance(span.start, Tensor) and ring is not None and self.window_group > 1:
            ring = self._restored(state, span.start)
        if not self.flushes:
            self.write_rows(new, state, span)
        elif isinstance(span.start, Tensor):
            assert ring is not None
            self._flush(new, state, ring, span.start)
        replaced = {} if ring is None else {"ring": advanced(ring, new, span.start)}
        if self.sinks:
            replaced[sinks.SINKS] = sinks.written(state[sinks.SINKS], state[sinks.BEGIN], new, span.start)
        if not isinstance(span.start, Tensor):
            return replaced
        if COUNTERS in state:
            state[COUNTERS].copy_(self._counters(new.shape[2], state, span))
        for name, x in replaced.items():
            state[name].copy_(x)
        return {}

    def write_rows(self, new: Tensor, state: State, span: Span) -> None:
        """Write the encoded rows ``new`` [B, H, N, W] in place, but no ring or counters."""
        if not self.flushes:
            for name, rows in self.codec.encode(new, state).items():
                append_rows(state[name], rows, span)

    def flushed(self, state: State, window_start: int, new_start: int) -> None:
        """Encode the groups from ``window_start`` to ``new_start``, in place, from the ring of a growing cache."""
        ring = state["ring"]
        positions = torch.arange(window_start, new_start, device=ring.device)
        rows = ring.index_select(2, positions % ring.shape[2])
        rows = groups.counted(rows, rows.shape[2], state[sinks.BEGIN] + self.sinks, new_start, first=window_start)
        at = slice(window_start // self.codec.group, new_start // self.codec.group)
        for name, encoded in self.codec.encode(rows, state).items():
            state[name][:, :, at] = encoded

    def _window_base(self, state: State, start: Tensor) -> Tensor:
        """Where the window of a cache of fixed size begins, after a rewind to ``start`` with that token's group."""
        group = self.window_group
        return torch.minimum(state[COUNTERS][WINDOW_START], start // group * group)

    def _restored(self, state: State, start: Tensor) -> Tensor:
        """The ring of a cache of fixed size; after a rewind to the middle of a group, with the group's decoded rows."""
        base, group = self._window_base(state, start), self.codec.group
        at = base // group + torch.arange(self.window_group // group, device=base.device)
        decoded = self.decoded(self.records(state, at.clamp(max=self.encoded_room(state) // group - 1)))
        if self.sinks:
            positions = base + torch.arange(self.window_group, device=base.device)
            decoded = sinks.overlaid(decoded, positions, state[sinks.SINKS], state[sinks.BEGIN])
        return groups.restored(state["ring"], decoded, base, torch.minimum(state[COUNTERS][WINDOW_START], start), start)

    def _flush(self, new: Tensor, state: State, ring: Tensor, start: Tensor) -> None:
        """Encode the groups that leave the window of a cache of fixed size."""
        base, group, n_new = self._window_base(state, start), self.codec.group, new.shape[2]
        count = (n_new + self.window_group - 1) // self.window_group * (self.window_group // group)
        rows = groups.rows_from(base, count * group, ring, new, start)
        rows = groups.counted(rows, count * group, state[sinks.BEGIN] + self.sinks, start + n_new, first=base)
        end = self._window_start(start + n_new, self.recent)
        if not self.encodes_later:  # a restart is a first call
            end = torch.where(start == 0, end, base)
        groups.overwrite(state, self.codec.encode(rows, state), base // group, (end - base) // group)

    def records(self, state: State, at: Tensor) -> State:
        """The state with only the records ``at`` [n]."""
        return {name: x.index_select(2, at) if name in self.row_parts else x for name, x in state.items()}

    def _counters(self, n_new: int, state: State, span: Span) -> Tensor:
        """The counters of a cache of fixed size after ``n_new`` more tokens."""
        start = span.start
        assert isinstance(start, Tensor)
        end = start + n_new
        oldest = (end - self.encoded_room(state)).clamp(min=0) if span.rolling else torch.zeros_like(end)
        if not self.has_ring:
            return torch.stack([end, end, oldest])
        whole = self.whole_tokens(state["ring"].shape[2])
        now = self._window_start(end, whole)
        if not self.encodes_later:  # a restart is a first call, which always leaves a window
            now = torch.where(start == 0, self._window_start(end, self.recent), now)
        before = torch.minimum(state[COUNTERS][WINDOW_START], start)
        if self.window_group > 1:
            before = before // self.window_group * self.window_group
        return torch.stack([torch.maximum(before, now), end, oldest])


def _padded(x: Tensor, spare: int) -> Tensor:
    """A copy of ``x`` [B, H, S, ...] with ``spare`` more rows, zero."""
    return F.pad(x, (*[0] * (2 * x.dim() - 6), 0, spare)) if spare else x.clone(memory_format=torch.contiguous_format)


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
