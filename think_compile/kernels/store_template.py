"""The templates of the kernels that store a step's token in a cache of fixed size.

In ATen, storing takes five kernels per layer and step. A restart (start == 0) makes a first call's choice again. Since
only the device knows of a restart, ATen code would pay for the choice on every step. One kernel with a branch does not.

:mod:`.specialise` replaces the same names in capitals as in :mod:`.attend_template`.
"""

# ruff: noqa: F821  specialise fills in the names of a template
# mypy: ignore-errors

import triton.language as tl

from think_compile.kernels.merge import merged_row


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
    DV: tl.constexpr, BLOCK_V: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge a row of one KV head's queries, or, after those, store the head's new key and value."""
    bh, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if row < GROUP:
        merged_row(OUT, MOST, TOTAL, RESULT, bh, row, GROUP, DV, BLOCK_V, SPLITS, BLOCK_S)
    else:
        start = tl.load(START)
        VALUES = values_locate(VALUES, bh, capacity, DV, 0, 0)
        values_store(V + bh * DV, VALUES, start, capacity, DV, BLOCK_V)
        store_key(
            Q, K, KEYS, RING, COUNTERS, START, bh, window, whole, capacity, ring_rows,
            GROUP, D, K_WIDTH, BLOCK_D, BLOCK_K,
        )  # fmt: skip
