"""The templates of the kernels that store a step's token in a cache of fixed size.

In ATen, storing takes five kernels per layer and step. A restart (start == 0) makes a first call's choice again. Since
only the device knows of a restart, ATen code would pay for the choice on every step. One kernel with a branch does not.

:mod:`.specialise` replaces the same names in capitals as in :mod:`.attend_template`.
"""

# ruff: noqa: F821  specialise fills in the names of a template
# mypy: ignore-errors

import triton
import triton.language as tl

from think_compile.kernels.channels import channels_choose, channels_restore, channels_store
from think_compile.kernels.encode import deal
from think_compile.kernels.merge import merged_part
from think_compile.kernels.mustafar import mustafar_locate, mustafar_store
from think_compile.kernels.whole import whole_store


def store_key(
    Q, K, KEYS, RING, COUNTERS, START, bh, window, whole, capacity, ring_rows,
    GROUP: tl.constexpr, D: tl.constexpr, K_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the key of one KV head of one sequence; the first updates the counters. Beyond the end nothing changes."""
    start = tl.load(START)
    k = K + bh * D
    KEYS = keys_locate(KEYS, bh, capacity, K_WIDTH, 0, 0)
    if start == 0:
        keys_choose(Q + bh * GROUP * D, k, KEYS, GROUP, D, K_WIDTH, BLOCK_D)
        tl.debug_barrier()  # data stored by other threads of the program is read below
    keys_store(k, KEYS, start, capacity, K_WIDTH, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    ring_room = tl.where(start < capacity, D, 0)
    key, at = tl.load(k + d, mask=d < D, other=0.0), RING + (bh * ring_rows + start % ring_rows) * D + d
    tl.store(at, key.to(RING.dtype.element_ty), mask=d < ring_room)
    if (bh == 0) & (start < capacity):
        kept_whole = tl.where(start == 0, window, whole)  # from 0: a first call
        tl.store(COUNTERS, tl.maximum(tl.minimum(tl.load(COUNTERS), start), start + 1 - kept_whole))
        tl.store(COUNTERS + 1, start + 1)


def append_key(
    Q, K, KEYS, RING, COUNTERS, START, window, whole, capacity, ring_rows,
    GROUP: tl.constexpr, D: tl.constexpr, K_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the key of one KV head of one sequence."""
    bh = tl.program_id(0).to(tl.int64)
    store_key(
        Q, K, KEYS, RING, COUNTERS, START, bh, window, whole, capacity, ring_rows,
        GROUP, D, K_WIDTH, BLOCK_D, BLOCK_K,
    )  # fmt: skip


def finish_step(
    OUT, MOST, TOTAL, RESULT, Q, K, V, KEYS, RING, COUNTERS, VALUES, START,
    window, whole, capacity, ring_rows,
    GROUP: tl.constexpr, D: tl.constexpr, K_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge a part of a row of one KV head's queries, or, after those, store the head's new key and value."""
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part < GROUP * ((DV + COLUMNS - 1) // COLUMNS):
        merged_part(OUT, MOST, TOTAL, RESULT, bh, part, GROUP, DV, COLUMNS, SPLITS, BLOCK_S)
    else:
        start = tl.load(START)
        VALUES = values_locate(VALUES, bh, capacity, DV, 0, 0)
        values_store(V + bh * DV, VALUES, start, capacity, DV, BLOCK_V)
        store_key(
            Q, K, KEYS, RING, COUNTERS, START, bh, window, whole, capacity, ring_rows,
            GROUP, D, K_WIDTH, BLOCK_D, BLOCK_K,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- beside codes


@triton.jit
def window_after(base, start, window, whole, TOKENS: tl.constexpr):
    """Where the window begins after a token at ``start``; before, at ``base``. From 0 on it is a first call's."""
    kept_whole = tl.where(start == 0, window, whole)
    return tl.maximum(base, (start + 1 - kept_whole) // TOKENS * TOKENS)


@triton.jit
def store_in_window(
    new, ring, SINK_ROWS, FIRST_TOKEN, COUNTERS, start, end, first_token, bh, heads, ring_rows,
    SINKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a whole row in the ring, and among the sinks if it is one; then the counters."""
    column = tl.arange(0, BLOCK)
    value = tl.load(new + column, mask=column < WIDTH, other=0.0).to(ring.dtype.element_ty)
    tl.store(ring + (start % ring_rows) * WIDTH + column, value, mask=column < WIDTH)
    if SINKS > 0:
        sink = start - first_token
        room = tl.where((sink >= 0) & (sink < SINKS), WIDTH, 0)
        tl.store(SINK_ROWS + (bh * SINKS + sink) * WIDTH + column, value, mask=column < room)
    if bh == 0:
        tl.store(COUNTERS, end.to(tl.int64))
        tl.store(COUNTERS + 1, (start + 1).to(tl.int64))
    if FIRST_TOKEN is not None and (start == 0) & (bh % heads == 0):
        tl.store(FIRST_TOKEN + bh // heads, tl.zeros([], tl.int64))


@triton.jit
def restore_sinks(
    ring, SINK_ROWS, first_token, base, start, bh, ring_rows,
    SINKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bring the sinks at positions ``base`` to ``start`` back into the ring."""
    tl.debug_barrier()  # other threads may have written these rows
    column = tl.arange(0, BLOCK)
    if SINKS > 0:
        for sink in range(SINKS):
            at = first_token + sink
            row = tl.load(SINK_ROWS + (bh * SINKS + sink) * WIDTH + column, mask=column < WIDTH, other=0.0)
            room = tl.where((at >= base) & (at < start), WIDTH, 0)
            tl.store(ring + (at % ring_rows) * WIDTH + column, row, mask=column < room)


def store_side(
    Q, NEW, SIDE, RING, SINK_ROWS, FIRST_TOKEN, COUNTERS, start, before, bh, heads, window, whole, capacity, ring_rows,
    GROUP: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, RECORD: tl.constexpr, SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the token of one KV head in a side of codes; ``before``: where the window began."""
    new, ring = NEW + bh * WIDTH, RING + bh * ring_rows * WIDTH
    LOCATED = side_locate(SIDE, bh, capacity, SIZES)
    first_token = 0
    if start > 0:
        first_token = tl.load(FIRST_TOKEN + bh // heads).to(tl.int32)
    elif END0 > 0:
        score = side_score(Q + bh * GROUP * WIDTH, new, tl.arange(0, BLOCK), GROUP, WIDTH)
        deal(score, channels, END0, END1, END2, WIDTH, BLOCK)
    base = tl.minimum(before, start // TOKENS * TOKENS)
    token = base + tl.arange(0, TOKENS)
    if start < before:  # rewound into a group: it is whole again
        side_restore(ring, token % ring_rows, token < start, LOCATED, base // TOKENS, SIZES)
        restore_sinks(ring, SINK_ROWS, first_token, base, start, bh, ring_rows, SINKS, WIDTH, BLOCK)
    end = window_after(base, start, window, whole, TOKENS)
    store_in_window(
        new, ring, SINK_ROWS, FIRST_TOKEN, COUNTERS, start, end, first_token, bh, heads, ring_rows, SINKS, WIDTH, BLOCK
    )
    if (end > base) & (base // TOKENS < capacity):
        tl.debug_barrier()  # data stored by other threads of the program is read below
        counted = tl.minimum(tl.maximum(token, first_token + SINKS), start)  # others are as the nearest that counts
        row = tl.minimum(tl.maximum(counted, base), base + TOKENS - 1)
        side_flush(ring, row % ring_rows, LOCATED, base // TOKENS, SIZES)


def store_channels_side(
    Q, NEW, rows, channels, RING, SINK_ROWS, FIRST_TOKEN, COUNTERS, start, before, bh, heads, window, whole, capacity,
    ring_rows, GROUP: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, RECORD: tl.constexpr, SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As :func:`store_side`, for rows of chosen channels, which are stored on arrival."""
    new, ring = NEW + bh * D, RING + bh * ring_rows * D
    rows, channels = rows + bh * capacity * WIDTH, channels + bh * WIDTH
    first_token = 0
    if start > 0:
        if FIRST_TOKEN is not None:  # there is none without sinks
            first_token = tl.load(FIRST_TOKEN + bh // heads).to(tl.int32)
    else:
        channels_choose(Q + bh * GROUP * D, new, rows, channels, GROUP, D, WIDTH, BLOCK)
        tl.debug_barrier()  # the choice is read below
    channels_store(new, rows, channels, start, capacity, WIDTH, BLOCK)
    base = tl.minimum(before, start // RECORD * RECORD)
    if start < before:
        channels_restore(ring, rows, channels, base, start, ring_rows, D, RECORD, WIDTH, BLOCK)
        restore_sinks(ring, SINK_ROWS, first_token, base, start, bh, ring_rows, SINKS, D, BLOCK)
    end = window_after(base, start, window, whole, RECORD)
    store_in_window(
        new, ring, SINK_ROWS, FIRST_TOKEN, COUNTERS, start, end, first_token, bh, heads, ring_rows, SINKS, D, BLOCK
    )


def store_mustafar_side(
    Q, NEW, nonzeros, bitmap, row_scales, RING, SINK_ROWS, FIRST_TOKEN, COUNTERS, start, before, bh, heads, window,
    whole, capacity, ring_rows, GROUP: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, RECORD: tl.constexpr,
    SIZES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As :func:`store_side`, for rows of the largest numbers, which are stored on arrival, one by one."""
    new, ring = NEW + bh * WIDTH, RING + bh * ring_rows * WIDTH
    nonzeros, bitmap, row_scales = mustafar_locate(
        nonzeros, bitmap, row_scales, bh, capacity, KEPT, WORDS, WIDTH, TILE, ASM
    )
    first_token = 0
    if FIRST_TOKEN is not None:  # there is none without sinks
        first_token = tl.load(FIRST_TOKEN + bh // heads, mask=start > 0, other=0).to(tl.int32)
    mustafar_store(new, nonzeros, bitmap, row_scales, start, capacity, KEPT, WORDS, WIDTH, TILE)
    end = window_after(tl.minimum(before, start), start, window, whole, RECORD)
    store_in_window(
        new, ring, SINK_ROWS, FIRST_TOKEN, COUNTERS, start, end, first_token, bh, heads, ring_rows, SINKS, WIDTH, BLOCK
    )


def store_whole_side(
    Q, NEW, rows, RING, SINK_ROWS, FIRST_TOKEN, COUNTERS, start, before, bh, heads, window, whole, capacity, ring_rows,
    GROUP: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, RECORD: tl.constexpr, SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As :func:`store_side`, for whole rows."""
    whole_store(NEW + bh * WIDTH, rows + bh * capacity * WIDTH, start, capacity, WIDTH, BLOCK)


def finish_coded_step(
    OUT, MOST, TOTAL, RESULT, Q, K, V, KEYS, K_RING, K_SINKS, K_FIRST, K_COUNTERS,
    VALUES, V_RING, V_SINKS, V_FIRST, V_COUNTERS, START, BEFORE,
    heads, window, whole, extent, key_capacity, value_capacity, ring_rows,
    GROUP: tl.constexpr, SINKS: tl.constexpr, RECORD: tl.constexpr, D: tl.constexpr, K_SIZES: tl.constexpr,
    V_SIZES: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge a part of a row of one KV head's queries, or, after those, store the head's new key, or its value."""
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    PARTS: tl.constexpr = GROUP * ((DV + COLUMNS - 1) // COLUMNS)
    if part < PARTS:
        merged_part(OUT, MOST, TOTAL, RESULT, bh, part, GROUP, DV, COLUMNS, SPLITS, BLOCK_S)
    else:
        start, before = tl.load(START).to(tl.int32), tl.load(BEFORE).to(tl.int32)
        if start < extent:
            if part == PARTS:
                keys_side(
                    Q, K, KEYS, K_RING, K_SINKS, K_FIRST, K_COUNTERS, start, before, bh, heads, window, whole,
                    key_capacity, ring_rows, GROUP, SINKS, D, RECORD, K_SIZES, BLOCK_D,
                )  # fmt: skip
            else:
                values_side(
                    Q, V, VALUES, V_RING, V_SINKS, V_FIRST, V_COUNTERS, start, before, bh, heads, window, whole,
                    value_capacity, ring_rows, GROUP, SINKS, DV, RECORD, V_SIZES, BLOCK_V,
                )  # fmt: skip
