"""A step of one token on a cache of fixed size: one kernel stores its key.

In ATen, appending takes five kernels per layer and step. A restart (start == 0) chooses the channels again; since the
device decides that, ATen code would pay for it on every step. One kernel with a branch does not. Where one attention
reads the cache, :func:`decode_step` stores key and value in the kernel that merges its shares.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from think_compile.cache.state import COUNTERS, Call, Span, Stored
from think_compile.kernels.decode import (
    bounds,
    device_of_launch,
    four_axes,
    launch_of,
    launch_shares,
    scale_of,
    traced,
)
from think_compile.kernels.decode_kernel import merged_row
from think_compile.kernels.launch import Launch


@triton.jit
def _energy(q, k, channel, real, GROUP: tl.constexpr, D: tl.constexpr):
    """mean(q^2) k^2 of a channel, over the queries of a group; what is no number counts most."""
    total = tl.load(q + channel, mask=real, other=0.0).to(tl.float32)
    total = total * total
    for g in range(1, GROUP):
        x = tl.load(q + g * D + channel, mask=real, other=0.0).to(tl.float32)
        total += x * x
    y = tl.load(k + channel, mask=real, other=0.0).to(tl.float32)
    energy = total / GROUP * (y * y)
    return tl.where(energy == energy, energy, float("inf"))


@triton.jit
def _choose(q, k, channels, GROUP: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """The T channels of most energy, by counting, as :func:`think_compile.formats.think.top_channels`."""
    channel = tl.arange(0, BLOCK)
    real = channel < D
    mine = _energy(q, k, channel, real, GROUP, D)
    ahead = tl.zeros([BLOCK], tl.int32)
    for other in range(D):
        theirs = _energy(q, k, other, True, GROUP, D)
        ahead += ((theirs > mine) | ((theirs == mine) & (other < channel))).to(tl.int32)
    kept = real & (ahead < T)
    slot = tl.cumsum(kept.to(tl.int32), 0) - 1
    for t in range(T):  # an address that depended on what was loaded would pass for a write to that
        tl.store(channels + t, tl.sum(tl.where(kept & (slot == t), channel, 0), 0).to(tl.int64))


@triton.jit
def _store_key(
    Q, K, PRUNED, CHANNELS, RECENT, PROGRESS, START, row, window, whole, capacity, ring_rows,
    GROUP: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Of one KV head of one sequence; that of the first also moves the window. Behind the end nothing changes."""
    start = tl.load(START)
    k, channels = K + row * D, CHANNELS + row * T
    if start == 0:
        _choose(Q + row * GROUP * D, k, channels, GROUP, D, T, BLOCK_D)
        tl.debug_barrier()  # what other threads of the program stored is read below
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    narrow = tl.load(k + tl.load(channels + t, mask=t < T, other=0), mask=t < T, other=0.0)
    room, ring_room = tl.where(start < capacity, T, 0), tl.where(start < capacity, D, 0)
    tl.store(PRUNED + (row * capacity + start) * T + t, narrow.to(PRUNED.dtype.element_ty), mask=t < room)
    key, at = tl.load(k + d, mask=d < D, other=0.0), RECENT + (row * ring_rows + start % ring_rows) * D + d
    tl.store(at, key.to(RECENT.dtype.element_ty), mask=d < ring_room)
    if (row == 0) & (start < capacity):
        kept_whole = tl.where(start == 0, window, whole)  # from 0: a first call
        floor = tl.maximum(tl.minimum(tl.load(PROGRESS), start), start + 1 - kept_whole)
        tl.store(PROGRESS, floor)
        tl.store(PROGRESS + 1, start + 1)


@triton.jit
def append_key(
    Q, K, PRUNED, CHANNELS, RECENT, PROGRESS, START, window, whole, capacity, ring_rows,
    GROUP: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence."""
    row = tl.program_id(0).to(tl.int64)
    _store_key(
        Q, K, PRUNED, CHANNELS, RECENT, PROGRESS, START, row, window, whole, capacity, ring_rows,
        GROUP, D, T, BLOCK_D, BLOCK_T,
    )  # fmt: skip


@triton.jit
def finish_step(
    OUT, MOST, TOTAL, RESULT, Q, K, V, PRUNED, CHANNELS, RECENT, PROGRESS, VALUES, START,
    window, whole, capacity, value_rows, ring_rows,
    GROUP: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge a row of one KV head's queries, or, behind those, store the head's new key and value."""
    bh, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if row < GROUP:
        merged_row(OUT, MOST, TOTAL, RESULT, bh, row, GROUP, DV, BLOCK_V, SPLITS, BLOCK_S)
    else:
        start, column = tl.load(START), tl.arange(0, BLOCK_V)
        room = tl.where(start < value_rows, DV, 0)
        value = tl.load(V + bh * DV + column, mask=column < DV, other=0.0)
        at = VALUES + (bh * value_rows + start) * DV + column
        tl.store(at, value.to(VALUES.dtype.element_ty), mask=column < room)
        _store_key(
            Q, K, PRUNED, CHANNELS, RECENT, PROGRESS, START, bh, window, whole, capacity, ring_rows,
            GROUP, D, T, BLOCK_D, BLOCK_T,
        )  # fmt: skip


def _sizes(q: Tensor, k_new: Tensor, channels: Tensor) -> dict[str, int]:
    """What the key's store is compiled for."""
    d, kept = q.shape[3], channels.shape[-1]
    return {
        "GROUP": q.shape[1] // k_new.shape[1],
        "D": d,
        "T": kept,
        "BLOCK_D": triton.next_power_of_2(d),
        "BLOCK_T": triton.next_power_of_2(kept),
    }


def append_token(call: Call, keys: Stored, span: Span, windows: tuple[int, int]) -> None:
    """Write a key [B, H, 1, D] at the span's start (0-d, int64) into the narrow rows and the ring, and count it.

    Where the start is 0 the channels are first chosen anew, by this token's q [B, Hq, 1, D] and key. ``windows`` tells
    how many tokens keep whole keys after a first call and after a later one.
    """
    state = keys.state
    tensors = state["rows"], state["channels"], state["ring"], state[COUNTERS]
    _append_token(call.q.contiguous(), call.k.contiguous(), *tensors, span.start, *windows)


@triton_op("think_compile::append_token", mutates_args={"pruned", "channels", "recent", "progress"})
def _append_token(
    q: Tensor,
    k_new: Tensor,
    pruned: Tensor,
    channels: Tensor,
    recent: Tensor,
    progress: Tensor,
    start: Tensor,
    window: int,
    whole: int,
) -> None:
    with device_of_launch(q):
        traced(append_key)[(k_new.shape[0] * k_new.shape[1],)](
            q, k_new, pruned, channels, recent, progress, start,
            window, whole, pruned.shape[2], recent.shape[2], **_sizes(q, k_new, channels),
        )  # fmt: skip


def decode_step(
    call: Call, keys: Stored, values: Stored, span: Span, windows: tuple[int, int], launch: Launch | None = None
) -> Tensor:
    """:func:`.decode.decode_attention` of one token on a cache of fixed size, which then holds it; [B, Hq, 1, Dv].

    As :func:`append_token` with that token's value [B, H, 1, Dv].
    """
    state, rows = keys.state, values.state["rows"]
    launch = launch or launch_of(call, keys, values, span)
    return _decode_step(
        call.q.contiguous(), call.k.contiguous(), call.v.to(rows.dtype).contiguous(),
        state["rows"], state["channels"], state["ring"], state[COUNTERS], rows, four_axes(call.mask), span.start,
        bounds(call, span)[1], scale_of(call), call.causal, *windows, list(launch),
    )  # fmt: skip


@triton_op("think_compile::decode_step", mutates_args={"pruned", "channels", "recent", "progress", "values"})
def _decode_step(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    pruned: Tensor,
    channels: Tensor,
    recent: Tensor,
    progress: Tensor,
    values: Tensor,
    mask: Tensor | None,
    start: Tensor,
    extent: int,
    scale: float,
    is_causal: bool,
    window: int,
    whole: int,
    launch: list[int],
) -> Tensor:
    result = q.new_empty((*q.shape[:3], values.shape[-1]))
    with device_of_launch(q):
        shares = launch_shares(
            q, k_new, v_new, pruned, channels, recent, values, mask, progress, 0, start, 0, 0, extent,
            False, scale, is_causal, Launch(*launch),
        )  # fmt: skip
        sizes = _sizes(q, k_new, channels) | shares.sizes()
        traced(finish_step)[(k_new.shape[0] * k_new.shape[1], sizes["GROUP"] + 1)](
            *shares, result, q, k_new, v_new, pruned, channels, recent, progress, values, start,
            window, whole, pruned.shape[2], values.shape[2], recent.shape[2], **sizes,
        )  # fmt: skip
    return result
