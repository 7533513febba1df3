"""One layer's cache work per call, as the rewritten graph holds it: first and later calls, growing and fixed caches.

These functions put the pieces of :mod:`.reference` in order. Growing caches are appended to in place up to their
capacity (the caller has made room) and hand back a new ring, so that older handles keep theirs; fixed caches
write everything in place. Shapes as in :mod:`.reference`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from think_compile.kernels import reference as ref

GROWTH_ROWS = 16


def capacity_for(length: int) -> int:
    """Rows to allocate for ``length`` tokens: about 1/64 of slack, so that growing stays amortised and memory small."""
    wanted = length + length // 64 + GROWTH_ROWS
    return (wanted + GROWTH_ROWS - 1) // GROWTH_ROWS * GROWTH_ROWS


class LayerSpec(NamedTuple):
    """What a layer's cache work needs to know while the graph is made (a named tuple: graphs hold those as constants).

    Attributes:
        keep: kept channels, T.
        head_dim: key channels, D.
        recent: tokens whose keys stay whole between calls, W.
        observe: queries that score.
        prune_generated: whether tokens of later calls are pruned as they leave the window.
    """

    keep: int
    head_dim: int
    recent: int
    observe: int
    prune_generated: bool

    def ring_rows(self, room: int) -> int:
        """Rows of a new ring: the window and one more, or with ``prune_generated=False`` ``room`` tokens on top."""
        return self.recent + 1 + (0 if self.prune_generated else room)

    def whole_tokens(self, ring_rows: int) -> int:
        """How many of the latest tokens keep whole keys once a call is over."""
        return self.recent if self.prune_generated else ring_rows - 1


def default_scale(q: Tensor, scale: float | None) -> float:
    """The scale of the stock attention, pinned to the full D."""
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def first_call_growing(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: LayerSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Store what a first call leaves: (pruned, channels, recent, values), with capacity to grow into."""
    length = k.shape[2]
    capacity = capacity_for(length)
    packed = ref.pack_keys(
        q,
        k,
        mask,
        length,
        length - q.shape[2],
        keep=spec.keep,
        observe=spec.observe,
        ring_rows=spec.ring_rows(GROWTH_ROWS),
        capacity=capacity,
    )
    return (*packed, F.pad(v, (0, 0, 0, capacity - length)))


def first_call_fixed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, start: Tensor | int, spec: LayerSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Store what a first call leaves in a fixed cache: (pruned, channels, recent, progress, values).

    ``k``, ``v`` [B, H, C, *] are the whole buffers after the call's rows were written from ``start`` on.
    ``progress`` is [floor, length], int64.
    """
    start = torch.as_tensor(start, device=k.device)
    length = start + q.shape[2]
    packed = ref.pack_keys(
        q,
        k,
        mask,
        length,
        start,
        keep=spec.keep,
        observe=spec.observe,
        ring_rows=spec.ring_rows(k.shape[2]),
        capacity=k.shape[2],
    )
    floor = (length - spec.recent).clamp(min=0)
    return (*packed, torch.stack([floor, length]), v.clone(memory_format=torch.contiguous_format))


def later_call_growing(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    pruned: Tensor,
    channels: Tensor,
    recent: Tensor,
    values: Tensor,
    start: int,
    floor: int,
    scale: float | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Append the new tokens and attend: (attention output [B, Hq, N, Dv], the new ring)."""
    ref.append_rows(pruned, ref.narrow_rows(k_new, channels), start)
    ref.append_rows(values, v_new, start)
    packed = ref.Packed(pruned, channels, recent)
    extent = start + k_new.shape[2]
    scale = default_scale(q, scale)
    out = ref.attend(q, k_new, packed, values, start, floor, extent, mask, scale, is_causal)
    return out, ref.advance_ring(recent, k_new, start)


def later_call_fixed(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    pruned: Tensor,
    channels: Tensor,
    recent: Tensor,
    progress: Tensor,
    values: Tensor,
    start: Tensor | int,
    extent: int,
    spec: LayerSpec,
    scale: float | None,
    is_causal: bool,
) -> Tensor:
    """Write the new tokens into a fixed cache from ``start`` on and attend: [B, Hq, N, Dv]."""
    n_new = k_new.shape[2]
    start = torch.as_tensor(start, device=q.device)
    channels.copy_(ref.rescore_restarted(q, k_new, mask, channels, start, extent, spec.observe))
    ref.append_rows(pruned, ref.narrow_rows(k_new, channels), start)
    ref.append_rows(values, v_new, start)
    floor = torch.minimum(progress[0], start)
    packed = ref.Packed(pruned, channels, recent)
    scale = default_scale(q, scale)
    out = ref.attend(q, k_new, packed, values, start, floor, extent, mask, scale, is_causal)
    recent.copy_(ref.advance_ring(recent, k_new, start))
    length = start + n_new
    whole = torch.where(start == 0, spec.recent, spec.whole_tokens(recent.shape[2]))  # from 0: a first call
    floor = torch.maximum(floor, length - whole)
    progress.copy_(torch.stack([floor, length]))
    return out


def start_of(positions: Tensor, proven: bool) -> Tensor:
    """The first of a call's positions [N], 0-d; unless ``proven``, asserts on the device that they are consecutive."""
    if not proven and positions.shape[0] != 1:
        steps = torch.arange(positions.shape[0], device=positions.device)
        torch._assert_async((positions - steps == positions[0]).all(), "a fixed cache is written at gaps")
    return positions[0]


def laid_out(x: Tensor, order: list[int]) -> Tensor:
    """``x`` with its axes in memory from the outermost to the innermost as ``order`` says."""
    back = sorted(range(len(order)), key=lambda i: order[i])
    return x.permute(order).contiguous().permute(back)
