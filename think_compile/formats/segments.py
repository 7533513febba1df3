"""The segments that a later call reads, and their rows.

The *body* is the encoded rows. The *tail* is the last positions before the call, as many as a ring has; each row is
whole or encoded, depending on the side's window. The call's *own* rows follow, and last the *sinks* of each sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from think_compile.cache.state import Length, Span, State, Stored
from think_compile.formats import sinks
from think_compile.formats.ring import ring_positions
from think_compile.formats.side import Side

Sides = Sequence[tuple[Side, Stored]]


class Segment(NamedTuple):
    """The positions of a segment's rows.

    Attributes:
        name: "body", "tail", "own" or "sinks".
        positions: [M] int64; of the sinks [B, 1, 1, M].
        counts: bool, [M] or [B, 1, 1, M]: true where a row is read: tokens, and rows after the tokens, which the mask
            hides.
    """

    name: str
    positions: Tensor
    counts: Tensor

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.positions.shape[-1]


class Reading(NamedTuple):
    """The segments of a call.

    Attributes:
        segments: the body, the tail if a side has a ring, the own rows, the sinks if a side keeps them.
        first: position of the body's first row.
        begin: below this position all rows of all sides are encoded.
        one_window: whether each ring holds all rows from there on: so if all sides with a ring have one window.
        span: of the call.
    """

    segments: tuple[Segment, ...]
    first: Length
    begin: Length
    one_window: bool
    span: Span


def reading(sides: Sides, span: Span, n_new: int, device: torch.device) -> Reading:
    """The segments of a call of ``n_new`` tokens to ``sides``."""
    size, begin, one_window = _window(sides, span.start)
    own = span.start + torch.arange(n_new, device=device)
    first, body = _body(sides, span, begin, n_new, device)
    found = [body]
    if size:
        at = span.start - size + torch.arange(size, device=device)
        found.append(Segment("tail", at, (at >= begin) & (at >= span.oldest)))
    found.append(Segment("own", own, own >= span.oldest))
    for side, stored in sides:
        if side.sinks:
            at = sinks.positions(stored.state[sinks.BEGIN], side.sinks)[:, None, None]
            is_sink = (body.positions >= at[..., :1]) & (body.positions <= at[..., -1:])
            found[0] = body._replace(counts=body.counts & ~is_sink)
            found.append(Segment("sinks", at, (at < begin) & (at < span.start) & (at >= span.oldest)))
            break
    return Reading(tuple(found), first, begin, one_window, span)


def _window(sides: Sides, start: Length) -> tuple[int, Length, bool]:
    """Size of the tail, where it begins, and whether all rings have one window."""
    rings = [(side, stored) for side, stored in sides if side.has_ring]
    if not rings:
        return 0, start, False
    size, begin = max(stored.state["ring"].shape[2] for _, stored in rings), rings[0][1].window_start
    assert begin is not None
    if len(rings) == 2 and not _is_one_window(*rings):
        return size, start - size, False
    return size, torch.minimum(begin, torch.as_tensor(start)) if isinstance(begin, Tensor) else begin, True


def _is_one_window(one: tuple[Side, Stored], other: tuple[Side, Stored]) -> bool:
    """Whether two sides of a cache have one window. At fixed size, sides of one rule have one history."""
    begins = one[1].window_start, other[1].window_start
    if one[0].window_rule != other[0].window_rule:
        return False
    return isinstance(begins[0], Tensor) or statically_known_true(begins[0] == begins[1])


def _body(sides: Sides, span: Span, begin: Length, n_new: int, device: torch.device) -> tuple[Length, Segment]:
    """The first position of the body, and the body: whole records of the side with the larger group."""
    if span.rolling:
        at = ring_positions(span.start, min(side.encoded_room(stored.state) for side, stored in sides), device)
        return 0, Segment("body", at, (at >= span.oldest) & (at < begin))
    group = max(side.codec.group for side, _ in sides)
    end = span.oldest + span.columns
    first, last = (span.oldest, end) if group == 1 else (span.oldest // group * group, -(-end // group) * group)
    if isinstance(span.start, Tensor) and group > 1:  # the last tokens of a cache of fixed size are never encoded
        last = functools.reduce(torch.sym_min, [side.encoded_room(stored.state) for side, stored in sides], last)
    at = first + torch.arange(last - first, device=device)  # type: ignore[arg-type,operator]
    counts = (at < begin) | (at >= span.start + n_new)
    if group > 1:
        counts = counts & (at >= span.oldest) & (at < end)
    return first, Segment("body", at, counts)


# ------------------------------------------------------------------------------------------------- rows of a side


def body_of(side: Side, stored: Stored, read: Reading) -> State:
    """The state with the body's records only."""
    if read.span.rolling:
        return stored.state
    group, size = side.codec.group, read.segments[0].size
    at = slice(read.first // group, read.first // group + size // group)
    return {name: x[:, :, at] if name in side.row_parts else x for name, x in stored.state.items()}


def rows_of(side: Side, stored: Stored, own: Tensor, segment: Segment, read: Reading) -> Tensor:
    """[B, H, M, W]: the rows of a segment, decoded where they are encoded; ``own``: the call's rows."""
    if segment.name == "own":
        return own
    if segment.name == "body":
        return side.decoded(body_of(side, stored, read))
    if segment.name == "sinks":
        if side.sinks:
            return stored.state[sinks.SINKS]
        return sinks.rows_at(side.decoded(stored.state), segment.positions[:, 0, 0])
    return _tail_rows(side, stored, segment.positions, read)


def _tail_rows(side: Side, stored: Stored, positions: Tensor, read: Reading) -> Tensor:
    if side.has_ring and read.one_window:
        ring = stored.state["ring"]
        return torch.where((positions >= read.begin)[:, None], ring.index_select(2, positions % ring.shape[2]), 0)
    encoded = decoded_at(side, stored, positions, rolling=read.span.rolling)
    if not side.has_ring:
        return encoded
    assert stored.window_start is not None
    ring = stored.state["ring"]
    in_window = (positions >= stored.window_start)[:, None]
    return torch.where(in_window, ring.index_select(2, positions % ring.shape[2]), encoded)


def decoded_at(side: Side, stored: Stored, positions: Tensor, *, rolling: bool = False) -> Tensor:
    """[B, H, n, W]: the rows at successive ``positions`` [n] as encoded, sinks whole; below position 0 some row."""
    group, state = side.codec.group, stored.state
    if rolling or group == 1:
        at = positions % side.encoded_room(state) if rolling else positions.clamp(min=0)
        rows = side.decoded(side.records(state, at))
    else:
        first = (positions[0] // group).clamp(min=0)
        count = -(-positions.shape[0] // group) + 1
        at = (first + torch.arange(count, device=positions.device)).clamp(max=side.encoded_room(state) // group - 1)
        rows = side.decoded(side.records(state, at))
        rows = rows.index_select(2, (positions - first * group).clamp(min=0, max=rows.shape[2] - 1))
    return sinks.overlaid(rows, positions, state[sinks.SINKS], state[sinks.BEGIN]) if side.sinks else rows
