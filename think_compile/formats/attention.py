"""Attention over stored rows in plain PyTorch: the specification, and the fallback if no kernel fits.

A later call reads the segments of :mod:`.segments`. Softmax does not depend on order, so no rows are moved: the mask's
columns are gathered at the segments' positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from think_compile.cache.state import Call, Length, Span, Stored
from think_compile.formats import sinks
from think_compile.formats.segments import Reading, Segment, body_of, decoded_at, reading, rows_of
from think_compile.formats.side import Side
from think_compile.kernels.calls import kernels_for, scale_of

# A call of up to this many new tokens multiplies with the stored rows. A longer call is bound by arithmetic, not by
# reading the cache, and uses stock attention over decoded rows.
MAX_NARROW_QUERIES = 16

__all__ = ["decoded", "dense", "in_order", "kernels_for", "logits_in_order", "narrow"]


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(side: Side, q: Tensor, k: Tensor, keys: Stored, read: Reading) -> list[Tensor]:
    """Products of the queries with the keys of each segment, [B, Hq, N, M] in fp32 or wider."""
    grouped = wide(q).unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, H, G*N, D]
    products = [side.codec.scores(grouped, body_of(side, keys, read))]
    products += [grouped @ wide(rows_of(side, keys, k, segment, read)).mT for segment in read.segments[1:]]
    return [x.unflatten(2, (-1, q.shape[2])).flatten(1, 2) for x in products]


def _masked(logits: Tensor, call: Call, segment: Segment, read: Reading) -> Tensor:
    """The logits with the model's mask, gathered at the positions; -inf for rows that do not count."""
    columns, counts = segment.positions - read.span.oldest, segment.counts
    if call.causal:
        counts = counts & (columns <= torch.arange(call.q.shape[2], device=columns.device)[:, None])
    mask = call.mask_by_query_head
    if mask is not None:
        if segment.name == "body" and not read.span.rolling:
            mask = _widened(mask, read.span.oldest - read.first, segment.size)
        else:
            mask = _columns_of(mask, columns)
        if mask.dtype == torch.bool:
            counts = counts & mask
        else:
            logits = logits + mask
    return logits.masked_fill(~counts, float("-inf"))


def _widened(mask: Tensor, left: Any, size: int) -> Tensor:
    """The mask with ``left`` more columns before and others after, ``size`` in all; rows there do not count."""
    if mask.shape[-1] == 1 or (isinstance(left, int) and left == 0 and mask.shape[-1] == size):
        return mask
    return F.pad(mask, (left, size - left - mask.shape[-1]))


def _columns_of(mask: Tensor, columns: Tensor) -> Tensor:
    """The mask's ``columns``, [M] or [B, 1, 1, M]; columns outside the mask give some column."""
    if mask.shape[-1] == 1:
        return mask
    columns = columns.clamp(min=0, max=mask.shape[-1] - 1)
    if columns.dim() == 1:
        return mask.index_select(-1, columns)
    # compared, not gathered: Inductor's C++ fails on a gather along an axis of dynamic size
    mask = mask[(None,) * (4 - mask.dim())][..., None, :]
    wanted = columns[..., None] == torch.arange(mask.shape[-1], device=mask.device)
    return (mask & wanted).any(-1) if mask.dtype == torch.bool else torch.where(wanted, mask, 0).sum(-1)


def narrow(call: Call, keys: Stored, values: Stored, span: Span, sides: tuple[Side, Side]) -> Tensor:
    """Attention by products with the stored rows, [B, Hq, N, Dv] in q's dtype.

    The call's values are written to their rows at once: a cropped token may have left NaN there, and 0 * NaN is NaN.
    """
    (keys_side, values_side), n_new = sides, call.q.shape[2]
    if not span.rolling:
        values_side.write_rows(call.v, values.state, span)
    read = reading([(keys_side, keys), (values_side, values)], span, n_new, call.q.device)
    logits = _logits(keys_side, wide(call.q) * scale_of(call), call.k, keys, read)
    masked = [_masked(x, call, segment, read) for x, segment in zip(logits, read.segments, strict=True)]
    probabilities = torch._safe_softmax(torch.cat(masked, -1), -1)
    grouped = probabilities.unflatten(1, (call.k.shape[1], -1)).flatten(2, 3)  # [B, H, G*N, M]
    may_hold_nan = span.rolling or any(side.flushes for side in sides)  # encoded rows that do not count
    out = None
    for p, segment in zip(grouped.split([s.size for s in read.segments], -1), read.segments, strict=True):
        rows = rows_of(values_side, values, call.v, segment, read)
        if segment.name == "body" and may_hold_nan:
            rows = rows.masked_fill(~_by_row(segment.counts), 0)
        mixed = p @ wide(rows)
        out = mixed if out is None else out + mixed
    assert out is not None
    return out.unflatten(2, (-1, n_new)).flatten(1, 2).to(call.q.dtype)


def _by_row(counts: Tensor) -> Tensor:
    """[M, 1] or [B, 1, M, 1], from [M] or [B, 1, 1, M]."""
    return counts[:, None] if counts.dim() == 1 else counts.mT


def logits_in_order(side: Side, q: Tensor, k: Tensor, keys: Stored, span: Span) -> Tensor:
    """[B, Hq, N, columns]: the products in order of position, for attention written out as separate operations."""
    read = reading([(side, keys)], span, q.shape[2], q.device)
    logits = _logits(side, q, k, keys, read)
    ordered = logits[0].new_zeros(*logits[0].shape[:-1], span.columns + 1)
    for x, segment in zip(logits, read.segments, strict=True):
        columns = torch.where(segment.counts, segment.positions - span.oldest, span.columns)  # others: an extra column
        if columns.dim() == 1:
            ordered = ordered.index_copy(-1, columns, x)
        else:
            ordered = ordered.scatter(-1, columns.expand_as(x), x)
    return ordered[..., : span.columns]


# ------------------------------------------------------------------------------------- rows in order of position


def in_order(side: Side, stored: Stored, new: Tensor | None, span: Span) -> Tensor:
    """[B, H, columns, W], by position: the side's rows, whole in the window, else decoded, and the own rows."""
    device = next(iter(stored.state.values())).device
    read = reading([(side, stored)], span, 0, device)
    if span.rolling:
        positions = span.oldest + torch.arange(span.columns, device=device)
        base = decoded_at(side, stored, positions, rolling=True)
    else:
        base = side.decoded(body_of(side, stored, read))
        if side.sinks:
            base = sinks.overlaid(
                base, read.segments[0].positions, stored.state[sinks.SINKS], stored.state[sinks.BEGIN]
            )
        skipped = span.oldest - read.first
        base = base[:, :, skipped : skipped + span.columns]
        if isinstance(span.start, Tensor) and not statically_known_true(base.shape[2] == span.columns):
            base = F.pad(base, (0, 0, 0, span.columns - base.shape[2]))  # the last rows are never encoded
    base = base.clone() if new is None else base.to(new.dtype)
    at = span.oldest + torch.arange(span.columns, device=device)
    if side.has_ring:
        assert stored.window_start is not None
        ring = stored.state["ring"]
        is_whole = (at >= stored.window_start) & (at >= span.start - ring.shape[2]) & (at < span.start)
        base = torch.where(is_whole[:, None], ring.index_select(2, at % ring.shape[2]).to(base.dtype), base)
    if new is not None:
        index = at - span.start
        is_new = (index >= 0) & (index < new.shape[2])
        base = torch.where(is_new[:, None], new.index_select(2, index.clamp(min=0, max=new.shape[2] - 1)), base)
    return base


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
        call.q,
        k,
        v,
        call.mask_by_query_head,
        0.0,
        call.causal,
        scale=scale_of(call),
        enable_gqa=call.q.shape[1] != k.shape[1],
    )
