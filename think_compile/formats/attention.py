"""Attention over stored rows in plain PyTorch: the specification, and the fallback if no kernel fits.

A later call reads three segments. The *body* is the encoded rows. The *tail* is the last positions before the call, as
many as a ring has; each row is whole or encoded, depending on the side's window. The call's *own* rows come last.
Softmax does not depend on order, so no rows are moved: the mask's columns are gathered at the segments' positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from think_compile.cache.state import Call, Length, Span, State, Stored
from think_compile.formats.ring import ring_positions
from think_compile.formats.side import Codec, Side
from think_compile.kernels.calls import PAIRS, PairKernels, scale_of

# A call of up to this many new tokens multiplies with the stored rows. A longer call is bound by arithmetic, not by
# reading the cache, and uses stock attention over decoded rows.
MAX_NARROW_QUERIES = 16


def kernels_for(keys: Codec, values: Codec) -> PairKernels | None:
    """The Triton kernels for a pair of codecs, or None."""
    return PAIRS.get((keys.name, values.name))


# ---------------------------------------------------------------------------------------------------- segments


class Places(NamedTuple):
    """The positions of the segments' rows.

    Attributes:
        positions: [M] int64, of the body, then the tail, then the own rows.
        counts: [M] bool, true where a row is read: tokens, and rows after the tokens, which the mask hides.
        sizes: number of rows in each segment.
    """

    positions: Tensor
    counts: Tensor
    sizes: tuple[int, int, int]


class Tail(NamedTuple):
    """The positions before a call that may have whole rows.

    Attributes:
        size: number of them, the rows of the largest ring.
        begin: below this position all rows of all sides are encoded.
        is_whole: whether each ring holds all rows from there on: so if only one side has a ring.
    """

    size: int
    begin: Length
    is_whole: bool


def _tail(sides: Sequence[tuple[Side, Stored]], start: Length) -> Tail:
    rings = [(stored.state["ring"].shape[2], stored.window_start) for side, stored in sides if side.has_ring]
    if len(rings) != 1:
        size = max((rows for rows, _ in rings), default=0)
        return Tail(size, start - size, is_whole=False)
    size, begin = rings[0]
    assert begin is not None
    return Tail(size, torch.minimum(begin, torch.as_tensor(start)) if isinstance(begin, Tensor) else begin, True)


def _places(span: Span, capacity: int, tail: Tail, n_new: int, device: torch.device) -> Places:
    """The segments of a call."""
    if span.rolling:
        body = ring_positions(span.start, capacity, device)
        body_counts = (body >= span.oldest) & (body < tail.begin)
    else:
        body = span.oldest + torch.arange(span.columns, device=device)
        body_counts = (body < tail.begin) | (body >= span.start + n_new)
    after = span.start - tail.size + torch.arange(tail.size + n_new, device=device)
    after_counts = (after >= tail.begin) & (after >= span.oldest)
    sizes = body.shape[0], tail.size, n_new
    return Places(torch.cat([body, after]), torch.cat([body_counts, after_counts]), sizes)


def _rows_at(side: Side, state: State, index: Tensor | slice) -> State:
    """The state, with only the rows at ``index``."""
    rows = {part.name for part in side.codec.parts(side.width) if part.is_rows}
    if isinstance(index, slice):
        return {name: x[:, :, index] if name in rows else x for name, x in state.items()}
    return {name: x.index_select(2, index) if name in rows else x for name, x in state.items()}


def _body(side: Side, stored: Stored, span: Span) -> State:
    if span.rolling:
        return stored.state
    return _rows_at(side, stored.state, slice(span.oldest, span.oldest + span.columns))


def _tail_rows(side: Side, stored: Stored, positions: Tensor, span: Span, tail: Tail) -> Tensor:
    """[B, H, tail, W]: the rows at ``positions``, whole inside the window, decoded outside."""
    if side.has_ring and tail.is_whole:
        ring = stored.state["ring"]
        return torch.where((positions >= tail.begin)[:, None], ring.index_select(2, positions % ring.shape[2]), 0)
    at = positions % side.capacity(stored.state) if span.rolling else positions.clamp(min=0)
    encoded = side.decoded(_rows_at(side, stored.state, at))
    if not side.has_ring:
        return encoded
    assert stored.window_start is not None
    ring = stored.state["ring"]
    in_window = (positions >= stored.window_start)[:, None]
    return torch.where(in_window, ring.index_select(2, positions % ring.shape[2]), encoded)


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(side: Side, q: Tensor, k: Tensor, keys: Stored, span: Span, tail: Tail) -> tuple[Tensor, Places]:
    """[B, Hq, N, M], products with the rows of all segments; and where these stand."""
    heads, n_new = k.shape[1], q.shape[2]
    places = _places(span, side.capacity(keys.state), tail, n_new, q.device)
    grouped = wide(q).unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, G*N, D]
    products = [side.codec.scores(grouped, _body(side, keys, span))]
    if tail.size:
        positions = places.positions.split(places.sizes)[1]
        products.append(grouped @ wide(_tail_rows(side, keys, positions, span, tail)).mT)
    products.append(grouped @ wide(k).mT)
    return torch.cat(products, -1).unflatten(2, (-1, n_new)).flatten(1, 2), places


def _masked(logits: Tensor, call: Call, span: Span, places: Places) -> Tensor:
    """The logits with the model's mask, gathered at the positions; -inf for rows that do not count."""
    columns, counts = places.positions - span.oldest, places.counts
    if call.causal:
        counts = counts & (columns <= torch.arange(call.q.shape[2], device=columns.device)[:, None])
    if call.mask is not None:
        mask = call.mask
        if mask.shape[-1] != 1:
            mask = mask.index_select(-1, columns.clamp(min=0, max=mask.shape[-1] - 1))
        if mask.dtype == torch.bool:
            counts = counts & mask
        else:
            logits = logits + mask
    return logits.masked_fill_(~counts, float("-inf"))


def narrow(call: Call, keys: Stored, values: Stored, span: Span, sides: tuple[Side, Side]) -> Tensor:
    """Attention by products with the stored rows, [B, Hq, N, Dv] in q's dtype.

    The call's values are written to their rows at once: a cropped token may have left NaN there, and 0 * NaN is NaN.
    """
    (keys_side, values_side), n_new = sides, call.q.shape[2]
    if not span.rolling:
        values_side.write_rows(call.v, values.state, span)
    tail = _tail([(keys_side, keys), (values_side, values)], span.start)
    logits, places = _logits(keys_side, wide(call.q) * scale_of(call), call.k, keys, span, tail)
    probabilities = torch._safe_softmax(_masked(logits, call, span, places), -1)
    grouped = probabilities.unflatten(1, (call.k.shape[1], -1)).flatten(2, 3)  # [B, H, G*N, M]
    body, after, own = grouped.split(places.sizes, -1)
    encoded = values_side.decoded(_body(values_side, values, span))
    if span.rolling:  # rows of the past are still read where the new ones will stand
        encoded = encoded.masked_fill(~places.counts[: places.sizes[0], None], 0)
    out = body @ wide(encoded) + own @ wide(call.v)
    if tail.size:
        out = out + after @ wide(_tail_rows(values_side, values, places.positions.split(places.sizes)[1], span, tail))
    return out.unflatten(2, (-1, n_new)).flatten(1, 2).to(call.q.dtype)


def logits_in_order(side: Side, q: Tensor, k: Tensor, keys: Stored, span: Span) -> Tensor:
    """[B, Hq, N, columns]: the products in order of position, for attention written out as separate operations."""
    logits, places = _logits(side, q, k, keys, span, _tail([(side, keys)], span.start))
    columns = torch.where(places.counts, places.positions - span.oldest, span.columns)  # others: an extra column
    ordered = logits.new_zeros(*logits.shape[:-1], span.columns + 1).index_copy(-1, columns, logits)
    return ordered[..., : span.columns]


# ------------------------------------------------------------------------------------- rows in order of position


def in_order(side: Side, stored: Stored, new: Tensor | None, span: Span) -> Tensor:
    """[B, H, columns, W], by position: the side's rows, whole in the window, else decoded, and the own rows."""
    device = next(iter(stored.state.values())).device
    if span.rolling:
        at = (span.oldest + torch.arange(span.columns, device=device)) % side.capacity(stored.state)
        base = side.decoded(_rows_at(side, stored.state, at))
    else:
        base = side.decoded(_body(side, stored, span))
    base = base if new is None else base.to(new.dtype)
    later, counts, rows = [], [], []
    if side.has_ring:
        assert stored.window_start is not None
        ring = stored.state["ring"]
        positions = span.start - ring.shape[2] + torch.arange(ring.shape[2], device=device)
        later.append(positions)
        counts.append((positions >= stored.window_start) & (positions >= span.oldest))
        rows.append(ring.index_select(2, positions % ring.shape[2]).to(base.dtype))
    if new is not None:
        later.append(span.start + torch.arange(new.shape[2], device=device))
        counts.append(later[-1] >= span.oldest)
        rows.append(new)
    if not later:
        return base.clone()
    columns = torch.where(torch.cat(counts), torch.cat(later) - span.oldest, span.columns)
    return F.pad(base, (0, 0, 0, 1)).index_copy(2, columns, torch.cat(rows, 2))[:, :, : span.columns]


def dense(side: Side, stored: Stored, oldest: Length, length: Length, columns: int, *, rolling: bool = False) -> Tensor:
    """[B, H, columns, W]: positions from ``oldest`` on, as the next call sees them; ``length`` is where tokens end."""
    return in_order(side, stored, None, Span(length, oldest, columns, rolling))


def decoded(call: Call, keys: Stored, values: Stored, span: Span, sides: tuple[Side, Side]) -> Tensor:
    """As :func:`narrow`, with stock attention over decoded rows."""
    k = in_order(sides[0], keys, call.k, span).to(call.q.dtype)
    v = in_order(sides[1], values, call.v, span).to(call.q.dtype)
    group = call.q.shape[1] // k.shape[1]
    if group > 1 and call.mask is not None:  # fused kernels accept a mask or grouped heads, not both
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(
        call.q, k, v, call.mask, 0.0, call.causal, scale=scale_of(call), enable_gqa=call.q.shape[1] != k.shape[1]
    )
