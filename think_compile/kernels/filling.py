"""Windows that fill a buffer of fixed size: its rows move up for new ones, as the model moves its own.

They are stored as caches of fixed size are, so that a buffer may be filled first and moved up later. Rows are counted
from the buffer's first; ``start`` is how many of them a call joins with its new tokens, from row ``first`` on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from think_compile.kernels import reference as ref
from think_compile.kernels import steps
from think_compile.kernels.attend import attend


def first_call_filling(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: steps.LayerSpec, read: int | None, kept: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`.steps.first_call_bounded`, of a buffer that the kept tokens fill: (pruned, ..., progress, values)."""
    channels = steps.choose_bounded(q, k, mask, spec, read)
    if kept is not None:
        k, v = k[:, :, -kept:], v[:, :, -kept:]
    length = k.shape[2]
    packed = ref.pack_rows(k, channels, length, spec.ring_rows(length), length)
    end = torch.full((), length, device=q.device)
    progress = torch.stack([(end - spec.recent).clamp(min=0), end])
    return (*packed, progress, v.clone(memory_format=torch.contiguous_format))


def attend_filling(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    pruned: Tensor,
    channels: Tensor,
    recent: Tensor,
    progress: Tensor,
    values: Tensor,
    start: int,
    first: int,
    scale: float | None,
    is_causal: bool,
) -> Tensor:
    """Attend to rows [first, start) of a window's buffer and to the new tokens behind them: [B, Hq, N, Dv]."""
    packed, joined = _joined_keys(k_new, pruned, channels, recent, start), joined_values(v_new, values, start, 0)
    begin = torch.as_tensor(start, device=q.device)
    extent, scale = start + k_new.shape[2], steps.default_scale(q, scale)
    return attend(q, k_new, packed, joined, begin, progress[0], extent, mask, scale, is_causal, first)


def _joined_keys(k_new: Tensor, pruned: Tensor, channels: Tensor, recent: Tensor, start: int) -> ref.Packed:
    """The first ``start`` rows with the new tokens' behind them."""
    return ref.Packed(torch.cat([pruned[:, :, :start], ref.narrow_rows(k_new, channels)], 2), channels, recent)


def joined_values(v_new: Tensor, values: Tensor, start: int, first: int) -> Tensor:
    """Rows [first, start) of a window's buffer of values, with the new ones behind them."""
    return torch.cat([values[:, :, first:start], v_new], 2)


def append_filling(
    k_new: Tensor,
    v_new: Tensor,
    pruned: Tensor,
    channels: Tensor,
    recent: Tensor,
    progress: Tensor,
    values: Tensor,
    start: int,
    spec: steps.LayerSpec,
) -> None:
    """Move a window's buffer up, so that ``start`` rows and the new ones end where it ends. To be run last."""
    capacity, end = pruned.shape[2], start + k_new.shape[2]
    gone, whole = end - capacity, spec.whole_tokens(recent.shape[2])
    rows = _joined_keys(k_new, pruned, channels, recent, start).pruned[:, :, -capacity:]
    kept_values = joined_values(v_new, values, start, 0)[:, :, -capacity:]
    ring = ref.advance_ring(recent, k_new, start).roll(-gone, 2)  # the token in row p: ring row p % R
    floor = (progress[0].clamp(max=start).clamp(min=end - whole) - gone).clamp(min=0)
    pruned.copy_(rows)
    values.copy_(kept_values)
    recent.copy_(ring)
    progress.copy_(torch.stack([floor, torch.full_like(floor, capacity)]))


def logits_filling(
    q: Tensor,
    k_new: Tensor,
    pruned: Tensor,
    channels: Tensor,
    recent: Tensor,
    progress: Tensor,
    start: int,
    first: int,
) -> Tensor:
    """Q K^T, unscaled, over rows [first, start) of a window's buffer and the N new tokens: [B, Hq, N, columns]."""
    packed = _joined_keys(k_new, pruned, channels, recent, start)
    begin, extent = torch.as_tensor(start, device=q.device), start + k_new.shape[2]
    return ref.pruned_logits(q, k_new, packed, begin, torch.minimum(progress[0], begin), extent, first)
