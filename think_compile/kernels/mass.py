"""The probability mass of each key over all queries of a prompt, for H2O: two passes, and no [N, S] tensor.

The first kernel gives the log of each query's softmax sum, as attention kernels do. The second has a tile of keys, runs
over the queries that see it, and adds up the probabilities. Logits are in base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from think_compile.kernels.shares import device_of_launch

_LOG2E = 1.4426950408889634
QUERIES, KEYS = 128, 64  # of a tile; not tuned


@triton.jit
def _logits(x, y, scale, seen):
    """Products [M, N] of rows and columns in base 2; -inf where not ``seen``."""
    return tl.where(seen, tl.dot(x, tl.trans(y), input_precision="ieee") * scale, float("-inf"))


@triton.jit
def sum_queries(
    Q, K, KEY_VALID, START, SUMS, n_new, size, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The base-2 log of the softmax sum of a tile of queries of one head; infinite if a query sees no key."""
    head, start, d = tl.program_id(1).to(tl.int64), tl.load(START), tl.arange(0, BLOCK_D)
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = query < n_new
    q = tl.load(Q + (head * n_new + query)[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    keys, valid = K + head // GROUP * size * D, head // (GROUP * HEADS) * size
    most, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum(start + tl.minimum((tl.program_id(0) + 1) * BLOCK_M, n_new), size)
    for begin in range(0, last, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        there = key < last
        k = tl.load(keys + key[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        if KEY_VALID is not None:
            there = there & (tl.load(KEY_VALID + valid + key, mask=there, other=0) != 0)
        s = _logits(q, k, scale, there[None, :] & (key[None, :] <= start + query[:, None]))
        new = tl.maximum(most, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(most - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        most = new
    tl.store(SUMS + head * n_new + query, tl.where(total > 0, most + tl.log2(total), float("inf")), mask=real)


@triton.jit
def sum_keys(
    Q, K, KEY_VALID, QUERY_VALID, START, SUMS, MASS, n_new, size, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The probability of a tile of keys of one KV head, summed over the queries, mean over the query heads."""
    head, start, d = tl.program_id(1).to(tl.int64), tl.load(START), tl.arange(0, BLOCK_D)
    key, batch = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), head // HEADS
    there = key < size
    k = tl.load(K + (head * size + key)[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
    if KEY_VALID is not None:
        there = there & (tl.load(KEY_VALID + batch * size + key, mask=there, other=0) != 0)
    mass = tl.zeros([BLOCK_N], tl.float32)
    first = tl.maximum(tl.program_id(0) * BLOCK_N - start, 0)  # earlier queries do not see the tile
    for of_group in range(GROUP):
        rows = (head * GROUP + of_group) * n_new
        for begin in range(first, n_new, BLOCK_M):
            query = begin + tl.arange(0, BLOCK_M)
            real = query < n_new
            q = tl.load(Q + (rows + query)[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
            sums = tl.load(SUMS + rows + query, mask=real, other=float("inf"))
            if QUERY_VALID is not None:
                counts = tl.load(QUERY_VALID + batch * n_new + query, mask=real, other=0) != 0
                sums = tl.where(counts, sums, float("inf"))
            s = _logits(k, q, scale, there[:, None] & (key[:, None] <= start + query[None, :]))
            mass += tl.sum(tl.exp2(s - sums[None, :]), 1)
    tl.store(MASS + head * size + key, mass / GROUP, mask=key < size)


def key_mass(q: Tensor, k: Tensor, start: Tensor, valid: list[Tensor], scale: float) -> Tensor:
    """[B, H, S] fp32: as :func:`think_compile.formats.tokens.h2o.attention_mass`.

    ``start``: 0-d int64, the row of the first query.
    """
    (batch, heads, size, d), (query_heads, n_new) = k.shape, q.shape[1:3]
    q, k, key_valid, query_valid = q.contiguous(), k.contiguous(), None, None
    if valid:
        key_valid, query_valid = (x.contiguous() for x in valid)
    sums = q.new_empty(batch, query_heads, n_new, dtype=torch.float32)
    mass = q.new_empty(batch, heads, size, dtype=torch.float32)
    sizes = {"GROUP": query_heads // heads, "HEADS": heads, "D": d, "BLOCK_D": max(16, triton.next_power_of_2(d))}
    sizes |= {"BLOCK_M": QUERIES, "BLOCK_N": KEYS}
    given, scale = (n_new, size), scale * _LOG2E
    with device_of_launch(q):
        tiles = (triton.cdiv(n_new, QUERIES), batch * query_heads)
        sum_queries[tiles](q, k, key_valid, start, sums, *given, scale, **sizes, num_warps=4)
        tiles = (triton.cdiv(size, KEYS), batch * heads)
        sum_keys[tiles](q, k, key_valid, query_valid, start, sums, mass, *given, scale, **sizes, num_warps=4)
    return mass
