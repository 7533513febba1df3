"""Device code for rows of chosen channels: gathers the queries, reads the rows as stored."""

from __future__ import annotations

import triton
import triton.language as tl

from think_compile.kernels.codecs import SIZES, DeviceCodec, row_sizes
from think_compile.kernels.whole import columns, read_queries, whole_scores


@triton.jit
def channels_locate(rows, channels, bh, capacity, width: tl.constexpr, part0: tl.constexpr, part1: tl.constexpr):
    """The rows and the channels of one KV head."""
    return rows + bh * capacity * width, channels + bh * width


@triton.jit
def channels_prepare(q_row, index, real, rows, channels, width: tl.constexpr, part0: tl.constexpr, part1: tl.constexpr):
    """The kept channels of the queries."""
    c0, c1 = columns(part0, part1)
    i0 = tl.load(channels + c0, mask=c0 < width, other=0).to(tl.int32)
    i1 = tl.load(channels + c1, mask=c1 < width, other=0).to(tl.int32)
    return read_queries(q_row, real, i0, i1, c0 < width, c1 < width)


@triton.jit
def channels_scores(
    q0, q1, rows, channels, at, end, row, ok, scale, width: tl.constexpr, part0: tl.constexpr, part1: tl.constexpr
):  # fmt: skip
    """Products [M, N] of the gathered queries with narrow rows, times ``scale``."""
    return whole_scores(q0, q1, rows, at, end, row, ok, scale, width, part0, part1)


@triton.jit
def energy(q, k, channel, real, GROUP: tl.constexpr, D: tl.constexpr):
    """mean(q^2) k^2 of a channel, over the queries of a group; NaN ranks highest."""
    total = tl.load(q + channel, mask=real, other=0.0).to(tl.float32)
    total = total * total
    for g in range(1, GROUP):
        x = tl.load(q + g * D + channel, mask=real, other=0.0).to(tl.float32)
        total += x * x
    y = tl.load(k + channel, mask=real, other=0.0).to(tl.float32)
    energy = total / GROUP * (y * y)
    return tl.where(energy == energy, energy, float("inf"))


@triton.jit
def channels_choose(
    q, k, rows, channels, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """The channels with the most energy, by counting, as in :func:`think_compile.formats.think.top_channels`."""
    channel = tl.arange(0, BLOCK)
    real = channel < D
    mine = energy(q, k, channel, real, GROUP, D)
    ahead = tl.zeros([BLOCK], tl.int32)
    for other in range(D):
        theirs = energy(q, k, other, True, GROUP, D)
        ahead += ((theirs > mine) | ((theirs == mine) & (other < channel))).to(tl.int32)
    kept = real & (ahead < WIDTH)
    slot = tl.cumsum(kept.to(tl.int32), 0) - 1
    for t in range(WIDTH):  # an address that depends on loaded data would be taken for a write to that tensor
        tl.store(channels + t, tl.sum(tl.where(kept & (slot == t), channel, 0), 0).to(channels.dtype.element_ty))


@triton.jit
def channels_store(k, rows, channels, start, capacity, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store the kept channels of one new row ``k``; beyond the end nothing changes."""
    t = tl.arange(0, BLOCK)
    index = tl.load(channels + t, mask=t < WIDTH, other=0).to(tl.int32)
    narrow = tl.load(k + index, mask=t < WIDTH, other=0.0)
    room = tl.where(start < capacity, WIDTH, 0)
    tl.store(rows + start * WIDTH + t, narrow.to(rows.dtype.element_ty), mask=t < room)


@triton.jit
def channels_restore(
    ring, rows, channels, base, start, ring_rows,
    D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bring the rows at positions ``base`` to ``start`` back into a ring; dropped channels are zero."""
    token, column = base + tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK)[None, :]
    wanted, at = token < start, ring + (token % ring_rows) * D
    tl.store(at + column, tl.zeros([TOKENS, BLOCK], ring.dtype.element_ty), mask=wanted & (column < D))
    tl.debug_barrier()  # other threads write the kept channels
    kept = wanted & (column < WIDTH)
    x = tl.load(rows + token.to(tl.int64) * WIDTH + column, mask=kept, other=0.0)
    index = tl.load(channels + column, mask=column < WIDTH, other=0).to(tl.int32)
    tl.store(at + index, x.to(ring.dtype.element_ty), mask=kept)


CHANNELS = DeviceCodec(
    name="channels",
    parts=("rows", "channels"),
    queries=("q0", "q1"),
    accumulators=(),
    functions={
        "locate": channels_locate,
        "prepare": channels_prepare,
        "scores": channels_scores,
        "choose": channels_choose,
        "store": channels_store,
    },
    size_names=SIZES,
    sizes=row_sizes,
)
