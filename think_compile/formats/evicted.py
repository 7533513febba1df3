"""Caches without some tokens of their first call: positions become rows, and masks are gathered at the rows.

Row r < K holds the token at ``positions[..., r]``; after these, the token at position p is in row p - evicted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from think_compile.cache.state import EVICTED, POSITIONS, Call, Span, Stored
from think_compile.formats.side import Side


def in_rows(call: Call, keys: Stored, span: Span, side: Side) -> tuple[Call, Span]:
    """A later call as one on a cache whose positions are rows; ``side``: of the keys."""
    if POSITIONS not in keys.state:
        return call, span
    is_fixed, less = EVICTED in keys.state, keys.evicted
    if is_fixed:
        less = keys.state[EVICTED][0]
        is_later = torch.as_tensor(span.start - less >= keys.state[POSITIONS].shape[2])
        torch._assert_async(is_later, "a cache without some tokens of its first call is written before the call's end")
    columns: Any = side.room(keys.state) if is_fixed else span.columns - less
    of_rows = Span(span.start - less, 0, columns)
    has_spare = is_fixed and side.window_group > 1  # rows after the model's last one
    if call.mask is None and not call.causal and not has_spare:
        return call, of_rows
    kept = keys.state[POSITIONS].to(torch.int64)
    row = torch.arange(of_rows.columns, device=kept.device)
    # not joined: the number of later tokens may be 1, and a graph for one length would result
    positions = torch.where(row < kept.shape[2], kept.index_select(2, row.clamp(max=kept.shape[2] - 1)), row + less)
    mask = _gathered(call.mask, positions.clamp(max=span.columns - 1), call.q.shape[1])
    if call.causal or has_spare:
        last = torch.arange(call.q.shape[2], device=kept.device)[:, None] if call.causal else span.columns - 1
        mask = _joined(mask, positions[:, :, None] <= last)
    return call._replace(mask=mask, causal=False), of_rows


def _gathered(mask: Tensor | None, positions: Tensor, query_heads: int) -> Tensor | None:
    """The columns ``positions`` [B, H, M] of a mask that broadcasts to [B, Hq, N, columns], as ``Call`` has it."""
    if mask is None or mask.shape[-1] == 1:
        return mask
    mask = mask[(None,) * (4 - mask.dim())]
    batch, heads, _ = positions.shape
    group = query_heads // heads
    per_head = mask if mask.shape[1] == 1 else mask.unflatten(1, (heads, group)).flatten(2, 3)
    wide = per_head.expand(batch, heads, -1, -1)
    found = wide.gather(3, positions[:, :, None].expand(-1, -1, wide.shape[2], -1))
    return found if mask.shape[1] == 1 else found.unflatten(2, (group, -1)).flatten(1, 2)


def _joined(mask: Tensor | None, seen: Tensor) -> Tensor:
    """A mask, and what is ``seen`` [B, H, N, M]."""
    if mask is None:
        return seen
    if mask.dim() == 4 and mask.shape[1] not in (1, seen.shape[1]):
        seen = seen.repeat_interleave(mask.shape[1] // seen.shape[1], 1)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
