"""A step of one token on a fixed cache: its key goes into the store, in one kernel.

Written in ATen operations it is five kernels a layer, each of which a captured decode pays for; and a cache that is
written from its first row again, whose channels are chosen anew, would cost every step what it costs the one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from think_compile.kernels.decode import device_of_launch, traced


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
    """The T channels of most energy, by counting, as :func:`.reference.top_channels`."""
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
def _append(
    Q, K, PRUNED, CHANNELS, RECENT, PROGRESS, START, window, whole, capacity, ring_rows,
    GROUP: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence; the first program also moves the window."""
    row, start = tl.program_id(0).to(tl.int64), tl.load(START)
    k, channels = K + row * D, CHANNELS + row * T
    if start == 0:
        _choose(Q + row * GROUP * D, k, channels, GROUP, D, T, BLOCK_D)
        tl.debug_barrier()  # what other threads of the program stored is read below
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    narrow = tl.load(k + tl.load(channels + t, mask=t < T, other=0), mask=t < T, other=0.0)
    room = tl.where(start < capacity, T, 0)  # behind the end: nowhere
    tl.store(PRUNED + (row * capacity + start) * T + t, narrow.to(PRUNED.dtype.element_ty), mask=t < room)
    key = tl.load(k + d, mask=d < D, other=0.0)
    tl.store(RECENT + (row * ring_rows + start % ring_rows) * D + d, key.to(RECENT.dtype.element_ty), mask=d < D)
    if row == 0:
        kept_whole = tl.where(start == 0, window, whole)  # from 0: a first call
        floor = tl.maximum(tl.minimum(tl.load(PROGRESS), start), start + 1 - kept_whole)
        tl.store(PROGRESS, floor)
        tl.store(PROGRESS + 1, start + 1)


@triton_op("think_compile::append_token", mutates_args={"pruned", "channels", "recent", "progress"})
def append_token(
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
    """Write a key [B, H, 1, D] at position ``start`` (0-d, int64) into the pruned rows and the ring, and count it.

    Where ``start`` is 0 the channels are first chosen anew, by this token's q [B, Hq, 1, D] and key. ``window`` and
    ``whole`` are how many tokens keep whole keys behind a first call and behind later ones.
    """
    (batch, query_heads, _, d), heads, kept = q.shape, k_new.shape[1], channels.shape[-1]
    with device_of_launch(q):
        traced(_append)[(batch * heads,)](
            q.contiguous(), k_new.contiguous(), pruned, channels, recent, progress, start,
            window, whole, pruned.shape[2], recent.shape[2],
            GROUP=query_heads // heads, D=d, T=kept,
            BLOCK_D=triton.next_power_of_2(d), BLOCK_T=triton.next_power_of_2(kept),
        )  # fmt: skip
