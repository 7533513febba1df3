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
from torch.utils._triton import has_triton

from think_compile.kernels import reference as ref
from think_compile.kernels.attend import attend, kernel_takes

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


def first_call_bounded(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: LayerSpec, read: int | None, kept: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`first_call_growing`, of a cache that keeps the last ``kept`` tokens (None: all).

    The attention reads the last ``read`` (None: all), and those, kept or not, choose the channels with the queries
    whose own keys are among them.
    """
    channels = choose_bounded(q, k, mask, spec, read)
    if kept is not None:
        k, v = k[:, :, -kept:], v[:, :, -kept:]
    length = k.shape[2]
    capacity = capacity_for(length)
    packed = ref.pack_rows(k, channels, length, spec.ring_rows(GROWTH_ROWS), capacity)
    return (*packed, F.pad(v, (0, 0, 0, capacity - length)))


def choose_bounded(q: Tensor, k: Tensor, mask: Tensor | None, spec: LayerSpec, read: int | None) -> Tensor:
    """Channels by the last ``read`` tokens (None: all) of a first call, which its attention reads."""
    if read is not None:
        q, k = q[:, :, -read:], k[:, :, -read:]
    length = k.shape[2]
    return ref.choose_channels(q, k, mask, length, length - q.shape[2], keep=spec.keep, observe=spec.observe)


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


def attend_own_rows(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    grouped: bool,
) -> Tensor:
    """The stock attention to the call's own rows [B, H, N, *], of a mask the first N columns: [B, Hq, N, Dv].

    ``grouped``: the keys are passed with their H heads (``enable_gqa``), and not with a copy for each query head.
    """
    if not grouped:
        copies = q.shape[1] // k_new.shape[1]
        k_new, v_new = (x.unsqueeze(2).expand(-1, -1, copies, -1, -1).flatten(1, 2) for x in (k_new, v_new))
    mask = own_columns(mask, k_new)
    return F.scaled_dot_product_attention(q, k_new, v_new, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)


def own_columns(mask: Tensor | None, k_new: Tensor) -> Tensor | None:
    """Of a mask [..., N, S] over a cache's rows, the columns of the first call's own."""
    return None if mask is None else mask[..., : k_new.shape[2]]


def first_call_own_rows(
    q: Tensor, k_new: Tensor, v_new: Tensor, mask: Tensor | None, spec: LayerSpec, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`first_call_fixed` of caches of ``capacity`` rows that hold nothing but the call's own."""
    length = k_new.shape[2]
    mask, rows = own_columns(mask, k_new), spec.ring_rows(capacity)
    packed = ref.pack_keys(
        q, k_new, mask, length, 0, keep=spec.keep, observe=spec.observe, ring_rows=rows, capacity=capacity
    )
    end = torch.full((), length, device=q.device)
    progress = torch.stack([(end - spec.recent).clamp(min=0), end])
    return (*packed, progress, F.pad(v_new, (0, 0, 0, capacity - length)))


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


def attend_growing(
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
    first: int = 0,
    read: int | None = None,
) -> Tensor:
    """Append the new values in place and attend to past and new tokens: [B, Hq, N, Dv].

    The attention reads positions from ``first`` on, or the last ``read`` ones.
    """
    ref.append_rows(values, v_new, start)
    packed = ref.Packed(pruned, channels, recent)
    extent = start + k_new.shape[2]
    first = first if read is None else extent - read
    scale = default_scale(q, scale)
    return attend(q, k_new, packed, values, start, floor, extent, mask, scale, is_causal, first)


def append_keys_growing(k_new: Tensor, pruned: Tensor, channels: Tensor, recent: Tensor, start: int) -> Tensor:
    """Append the new keys' narrow rows in place; the new ring. To be run once the call has attended."""
    ref.append_rows(pruned, ref.narrow_rows(k_new, channels), start)
    return ref.advance_ring(recent, k_new, start)


def attend_fixed(
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
    scale: float | None,
    is_causal: bool,
) -> Tensor:
    """Write the new values into a fixed cache from ``start`` on and attend to its first ``extent`` rows."""
    start = torch.as_tensor(start, device=q.device)
    ref.append_rows(values, v_new, start)
    packed = ref.Packed(pruned, channels, recent)
    return attend(q, k_new, packed, values, start, progress[0], extent, mask, default_scale(q, scale), is_causal)


def step_fixed(
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
    scale: float | None,
    is_causal: bool,
    seen: Tensor | None,
    spec: LayerSpec,
) -> Tensor:
    """:func:`attend_fixed`, then :func:`append_keys_fixed` with the mask ``seen``: of a cache that nothing else reads.

    On a GPU a single token is stored by the kernel that merges the attention's shares.
    """
    start = torch.as_tensor(start, device=q.device)
    packed = ref.Packed(pruned, channels, recent)
    pinned = default_scale(q, scale)
    if _is_stored_by_kernel(q, k_new) and kernel_takes(q, k_new, packed, values, mask, pinned):
        from think_compile.kernels.append import decode_step

        tensors = q, k_new, v_new, *packed, progress, values
        whole = spec.whole_tokens(recent.shape[2])
        return decode_step(*tensors, start, extent, mask, pinned, is_causal, spec.recent, whole)
    out = attend_fixed(q, k_new, v_new, mask, *packed, progress, values, start, extent, scale, is_causal)
    append_keys_fixed(q, k_new, seen, *packed, progress, start, extent, spec)
    return out


def _is_stored_by_kernel(q: Tensor, k_new: Tensor) -> bool:
    """Whether Triton writes a call's keys into a fixed cache: those of a single token on a GPU."""
    return q.is_cuda and k_new.shape[2] == 1 and has_triton() and q.dtype != torch.float64


def append_keys_fixed(
    q: Tensor,
    k_new: Tensor,
    mask: Tensor | None,
    pruned: Tensor,
    channels: Tensor,
    recent: Tensor,
    progress: Tensor,
    start: Tensor | int,
    extent: int,
    spec: LayerSpec,
) -> None:
    """Write the new keys into a fixed cache from ``start`` on. To be run once the call has attended."""
    start = torch.as_tensor(start, device=q.device)
    if _is_stored_by_kernel(q, k_new):
        from think_compile.kernels.append import append_token

        whole = spec.whole_tokens(recent.shape[2])
        append_token(q, k_new, pruned, channels, recent, progress, start, spec.recent, whole)
        return
    channels.copy_(ref.rescore_restarted(q, k_new, mask, channels, start, extent, spec.observe))
    ref.append_rows(pruned, ref.narrow_rows(k_new, channels), start)
    _advance_fixed(k_new, recent, progress, start, torch.minimum(progress[0], start), spec)


def _advance_fixed(
    k_new: Tensor, recent: Tensor, progress: Tensor, start: Tensor, floor: Tensor, spec: LayerSpec
) -> None:
    """Move a fixed cache's window behind the new tokens."""
    recent.copy_(ref.advance_ring(recent, k_new, start))
    length = start + k_new.shape[2]
    whole = torch.where(start == 0, spec.recent, spec.whole_tokens(recent.shape[2]))  # from 0: a first call
    progress.copy_(torch.stack([torch.maximum(floor, length - whole), length]))


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


def causal_to_end(k_new: Tensor, extent: int) -> Tensor:
    """Bool [N, extent]: the last of the call's queries sees all ``extent`` keys, each earlier one a key less."""
    rows = torch.arange(k_new.shape[2], device=k_new.device)[:, None]
    return torch.arange(extent, device=k_new.device) <= extent - k_new.shape[2] + rows


def causal_behind(k_new: Tensor, past: int) -> Tensor:
    """Bool [N, past + N], as :func:`causal_to_end`, behind ``past`` tokens."""
    return causal_to_end(k_new, past + k_new.shape[2])


def joined_queries(queries: list[Tensor], heads: int) -> Tensor:
    """Queries [B, heads * G, N, D] of attentions that read the same keys, as those of one with larger groups."""
    grouped = [q.unflatten(1, (heads, -1)) for q in queries]
    return torch.cat(grouped, 2).flatten(1, 2)


def heads_beside(x: Tensor, heads: int) -> Tensor:
    """[B, Hq, *, *] with each KV head's copies beside it, from one in which all KV heads are repeated in turn."""
    if x.dim() < 4 or x.shape[1] == 1:
        return x
    return x.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1, 2)


def heads_in_turn(x: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`heads_beside`."""
    return x.unflatten(1, (heads, -1)).transpose(1, 2).flatten(1, 2)


def append_values(v_new: Tensor, values: Tensor, start: Tensor | int, growing: bool, first: int = 0) -> Tensor:
    """Write the new values [B, H, N, Dv] in place; [B, H, *, Dv]: those written so far from ``first``, or all rows."""
    ref.append_rows(values, v_new, start)
    return values[:, :, first : start + v_new.shape[2]] if growing else values
