"""The probability mass of each key over all queries of a prompt, for H2O: two passes, and no [N, S] tensor.

The first kernel gives the log of each query's softmax sum, as attention kernels do. The second has a tile of keys, runs
over the queries that see it, and adds up the probabilities. Logits are in base 2. Tiles without masked logits have a
loop of their own: almost all tiles of a long prompt are such.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from think_compile.kernels.launch import Device, device_of
from think_compile.kernels.shares import device_of_launch

_LOG2E = 1.4426950408889634
MOST_ROWS, WARPS, STAGES, REGISTERS = 128, 8, 2, 128  # the best of those tried on an H200


def tile_rows(row_bytes: int, device: Device) -> int:
    """Queries and keys of a tile: as many as fit in shared memory, one tile and two that are loaded ahead."""
    room = device.shared_bytes // (row_bytes * (STAGES + 1))
    return max(16, min(MOST_ROWS, 1 << room.bit_length() - 1))


def options_for(rows: int, element_bytes: int) -> dict[str, int]:
    """Options of a launch. Two programs of 16-bit tiles share a processor if neither takes too many registers."""
    capped = rows == MOST_ROWS and element_bytes == 2 and torch.version.hip is None
    return {"num_warps": WARPS, "num_stages": STAGES, **({"maxnreg": REGISTERS} if capped else {})}


@triton.jit
def _tile(X, row, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [M, BLOCK_D] of X [rows, D]; zero where not ``there``."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(X + row[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _more(most, total, s, scale):
    """The running maximum of the logits and the sum of their powers, with those of further keys."""
    new = tl.maximum(most, tl.max(s, 1) * scale)
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp2(most - safe) + tl.sum(tl.exp2(s * scale - safe[:, None]), 1)


@triton.jit
def sum_queries(
    Q, K, KEY_VALID, QUERY_VALID, SPANS, START, SUMS, n_new, size, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The base-2 log of the softmax sum of a tile of queries of one head; infinite where nothing counts."""
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the last queries see most keys: they come first
    head, start = tl.program_id(1).to(tl.int64), tl.load(START).to(tl.int32)
    batch, keys = head // (GROUP * HEADS), K + head // GROUP * size * D
    query, column = tile + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    q = _tile(Q + head * n_new * D, query, query < n_new, D, BLOCK_D)
    first, end = 0, size
    if KEY_VALID is not None:
        first, end = tl.load(SPANS + batch * 2).to(tl.int32), tl.load(SPANS + batch * 2 + 1).to(tl.int32)
    last = tl.minimum(start + tl.minimum(tile + BLOCK_M, n_new), size)
    begin = tl.cdiv(first, BLOCK_N) * BLOCK_N  # of the tiles without masked logits
    end = tl.maximum(tl.minimum(start + tile + 1, end) // BLOCK_N * BLOCK_N, begin)
    most, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    before = tl.cdiv(first, BLOCK_N) - first // BLOCK_N  # tiles
    for i in range(0, before + tl.cdiv(tl.maximum(last - end, 0), BLOCK_N)):
        at = tl.where(i < before, begin - BLOCK_N, end + (i - before) * BLOCK_N)
        k = _tile(keys, at + column, at + column < last, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if KEY_VALID is not None:
            valid = tl.load(KEY_VALID + batch * size + at + column, mask=at + column < last, other=0)
            s = tl.where(valid[None, :] != 0, s, float("-inf"))
        seen = tl.minimum(start + query + 1, last) - at
        most, total = _more(most, total, tl.where(column[None, :] < seen[:, None], s, float("-inf")), scale)
    for at in range(begin, end, BLOCK_N):
        k = _tile(keys, at + column, column < BLOCK_N, D, BLOCK_D)
        most, total = _more(most, total, tl.dot(q, tl.trans(k), input_precision="ieee"), scale)
    counts = total > 0
    if QUERY_VALID is not None:
        counts = counts & (tl.load(QUERY_VALID + batch * n_new + query, mask=query < n_new, other=0) != 0)
    tl.store(SUMS + head * n_new + query, tl.where(counts, most + tl.log2(total), float("inf")), mask=query < n_new)


@triton.jit
def sum_keys(
    Q, K, KEY_VALID, START, SUMS, MASS, n_new, size, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The probability of a tile of keys of one KV head, summed over the queries, mean over the query heads."""
    head, tile = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_N
    before, row, column = tile - tl.load(START).to(tl.int32), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    counts = tile + row < size
    k = _tile(K + head * size * D, tile + row, counts, D, BLOCK_D)
    if KEY_VALID is not None:
        counts = counts & (tl.load(KEY_VALID + head // HEADS * size + tile + row, mask=counts, other=0) != 0)
    mass = tl.zeros([BLOCK_N], tl.float32)
    first = tl.minimum(tl.maximum(before, 0), n_new)  # earlier queries see no key of the tile
    whole = tl.minimum(tl.maximum(before + BLOCK_N - 1, 0), n_new)  # from here on they see each
    whole = first + tl.cdiv(whole - first, BLOCK_M) * BLOCK_M
    last = tl.where(tl.max(counts.to(tl.int32), 0) > 0, n_new, 0)
    for of_group in range(GROUP):
        rows = (head * GROUP + of_group) * n_new
        for at in range(first, tl.minimum(whole, last), BLOCK_M):
            q = tl.trans(_tile(Q + rows * D, at + column, at + column < n_new, D, BLOCK_D))
            sums = tl.load(SUMS + rows + at + column, mask=at + column < n_new, other=float("inf"))
            s = tl.dot(k, q, input_precision="ieee") * scale
            s = tl.where(column[None, :] >= (row + before - at)[:, None], s, float("-inf"))
            mass += tl.sum(tl.exp2(s - sums[None, :]), 1)
        for at in range(whole, last, BLOCK_M):
            q = tl.trans(_tile(Q + rows * D, at + column, at + column < n_new, D, BLOCK_D))
            sums = tl.load(SUMS + rows + at + column, mask=at + column < n_new, other=float("inf"))
            mass += tl.sum(tl.exp2(tl.dot(k, q, input_precision="ieee") * scale - sums[None, :]), 1)
    tl.store(MASS + head * size + tile + row, tl.where(counts, mass / GROUP, 0.0), mask=tile + row < size)


def key_mass(q: Tensor, k: Tensor, start: Tensor, valid: list[Tensor], scale: float) -> Tensor:
    """[B, H, S] fp32: as :func:`think_compile.formats.tokens.h2o.attention_mass`.

    ``start``: 0-d int64, the row of the first query. ``scale``: positive.
    """
    (batch, heads, size, d), (query_heads, n_new) = k.shape, q.shape[1:3]
    q, k, key_valid, query_valid, spans = q.contiguous(), k.contiguous(), None, None, None
    if valid:
        key_valid, query_valid = (x.contiguous() for x in valid)
        spans = _spans(key_valid)
    sums = q.new_empty(batch, query_heads, n_new, dtype=torch.float32)
    mass = q.new_empty(batch, heads, size, dtype=torch.float32)
    sizes = {"GROUP": query_heads // heads, "HEADS": heads, "D": d, "BLOCK_D": max(16, triton.next_power_of_2(d))}
    rows = tile_rows(sizes["BLOCK_D"] * q.element_size(), device_of(q.device))
    given = (n_new, size, scale * _LOG2E)
    with device_of_launch(q):
        tiles = (triton.cdiv(n_new, rows), batch * query_heads)
        sizes |= {"BLOCK_M": rows, "BLOCK_N": rows, **options_for(rows, q.element_size())}
        sum_queries[tiles](q, k, key_valid, query_valid, spans, start, sums, *given, **sizes)
        tiles = (triton.cdiv(size, rows), batch * heads)
        sum_keys[tiles](q, k, key_valid, start, sums, mass, *given, **sizes)
    return mass


def _spans(valid: Tensor) -> Tensor:
    """[B, 2]: each sequence's first valid key, and the end of the valid keys; both the first if there are gaps."""
    counts = valid.to(torch.int32)
    first, after = counts.argmax(1), counts.shape[1] - counts.flip(1).argmax(1)
    return torch.stack([first, torch.where(after - first == counts.sum(1), after, first)], 1)
