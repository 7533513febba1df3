"""Device code for rows stored unchanged; rings and a call's own rows are also of this kind."""

from __future__ import annotations

import triton
import triton.language as tl

from think_compile.kernels.codecs import SIZES, DeviceCodec, row_sizes


@triton.jit
def columns(part0: tl.constexpr, part1: tl.constexpr):
    """Column numbers of a row read in two parts, each a power of two."""
    return tl.arange(0, part0), part0 + tl.arange(0, part1)


@triton.jit
def read_queries(q_row, real, i0, i1, ok0, ok1):
    """Columns ``i0`` and ``i1`` of the queries, the two operands of :func:`whole_scores`."""
    q0 = tl.load(q_row + i0[None, :], mask=real[:, None] & ok0[None, :], other=0.0)
    return q0, tl.load(q_row + i1[None, :], mask=real[:, None] & ok1[None, :], other=0.0)


@triton.jit
def doubled(x):
    """``x`` [M, N] with M rows of zeros below, if it is too small for a tile of a tensor core."""
    if x.shape[0] < 16:
        both = tl.where((tl.arange(0, 2) == 0)[:, None, None], x[None], tl.zeros_like(x)[None])
        x = tl.reshape(both, (2 * x.shape[0], x.shape[1]))
    return x


@triton.jit
def halved(x, rows: tl.constexpr):
    """The first ``rows`` rows of ``x``: the product of :func:`doubled`."""
    if x.shape[0] > rows:
        both = tl.reshape(x, (2, rows, x.shape[1]))
        x = tl.sum(tl.where((tl.arange(0, 2) == 0)[:, None, None], both, 0.0), 0)
    return x


@triton.jit
def whole_locate(rows, bh, capacity, width: tl.constexpr, part0: tl.constexpr, part1: tl.constexpr):
    """The rows of one KV head."""
    return rows + bh * capacity * width


@triton.jit
def whole_prepare(q_row, index, real, rows, width: tl.constexpr, part0: tl.constexpr, part1: tl.constexpr):
    """All columns of the queries."""
    c0, c1 = columns(part0, part1)
    return read_queries(q_row, real, c0, c1, c0 < width, c1 < width)


@triton.jit
def whole_scores(q0, q1, base, at, end, rows, ok, scale, width: tl.constexpr, part0: tl.constexpr, part1: tl.constexpr):
    """Products [M, N] of queries with key rows ``rows`` of ``width`` columns at ``base``, times ``scale``."""
    c0, c1 = columns(part0, part1)
    row = base + rows.to(tl.int64)[:, None] * width
    k0 = tl.load(row + c0[None, :], mask=ok[:, None] & (c0 < width)[None, :], other=0.0)
    s = tl.dot(doubled(q0), tl.trans(k0), input_precision="ieee")
    if part0 < width:
        k1 = tl.load(row + c1[None, :], mask=ok[:, None] & (c1 < width)[None, :], other=0.0)
        s += tl.dot(doubled(q1), tl.trans(k1), input_precision="ieee")
    return halved(s, q0.shape[0]) * scale


@triton.jit
def whole_zero(block_m: tl.constexpr, width: tl.constexpr, part0: tl.constexpr, part1: tl.constexpr):
    """Empty accumulators."""
    return tl.zeros([block_m, part0], tl.float32), tl.zeros([block_m, part1], tl.float32)


@triton.jit
def whole_mix(
    o0, o1, shrink, p, base, at, end, rows, ok, width: tl.constexpr, part0: tl.constexpr, part1: tl.constexpr
):
    """The accumulators times ``shrink``, plus ``p`` times the value rows ``rows`` of ``width`` columns at ``base``."""
    c0, c1 = columns(part0, part1)
    row = base + rows.to(tl.int64)[:, None] * width
    v0 = tl.load(row + c0[None, :], mask=ok[:, None] & (c0 < width)[None, :], other=0.0)
    o0 = o0 * shrink[:, None] + halved(tl.dot(doubled(p.to(v0.dtype)), v0, input_precision="ieee"), p.shape[0])
    if part0 < width:
        v1 = tl.load(row + c1[None, :], mask=ok[:, None] & (c1 < width)[None, :], other=0.0)
        o1 = o1 * shrink[:, None] + halved(tl.dot(doubled(p.to(v1.dtype)), v1, input_precision="ieee"), p.shape[0])
    return o0, o1


@triton.jit
def whole_finish(o0, o1, total, at, real, rows, width: tl.constexpr, part0: tl.constexpr, part1: tl.constexpr):
    """Write the accumulators, divided by ``total``, to rows at ``at``."""
    c0, c1 = columns(part0, part1)
    tl.store(at[:, None] + c0[None, :], o0 / total[:, None], mask=real[:, None] & (c0 < width)[None, :])
    if part0 < width:
        tl.store(at[:, None] + c1[None, :], o1 / total[:, None], mask=real[:, None] & (c1 < width)[None, :])


@triton.jit
def whole_store(new, rows, start, capacity, width: tl.constexpr, block: tl.constexpr):
    """Copy one new row; beyond the end nothing changes."""
    column = tl.arange(0, block)
    room = tl.where(start < capacity, width, 0)
    value = tl.load(new + column, mask=column < width, other=0.0)
    tl.store(rows + start * width + column, value.to(rows.dtype.element_ty), mask=column < room)


WHOLE = DeviceCodec(
    name="whole",
    parts=("rows",),
    queries=("q0", "q1"),
    accumulators=("o0", "o1"),
    functions={
        "locate": whole_locate,
        "prepare": whole_prepare,
        "scores": whole_scores,
        "zero": whole_zero,
        "mix": whole_mix,
        "finish": whole_finish,
        "store": whole_store,
    },
    size_names=SIZES,
    sizes=row_sizes,
)
