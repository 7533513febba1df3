"""The probability mass of each key over all queries of a prompt, for H2O: two passes, and no [N, S] tensor.

The first kernel gives the log of each query's softmax sum, as attention kernels do. The second has a tile of keys, runs
over the queries that see it, and adds up the probabilities. Logits are in base 2. Tiles without masked logits have a
loop of their own: almost all tiles of a long prompt are such.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from think_compile.kernels.launch import Device, device_of
from think_compile.kernels.shares import device_of_launch

_LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """Queries and keys of a tile, and options of the launch. ``registers``: at most so many a thread; 0: any."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """For the launch."""
        return {
            **{"BLOCK_M": self.queries, "BLOCK_N": self.keys, "num_warps": self.warps, "num_stages": self.stages},
            **({"maxnreg": self.registers} if self.registers else {}),
        }


# the best of those tried on an H200, for 128 channels of 16 bits
OF_QUERIES = Tile(128, 128, 8, 2, 128)  # so two programs share a processor
OF_KEYS = Tile(64, 128, 4, 3)


def fitted(tile: Tile, row_bytes: int, device: Device) -> Tile:
    """The tile, or a smaller one that fits a device's shared memory: one block of rows, and others loaded ahead."""
    if torch.version.hip is not None or row_bytes > 256:
        tile = tile._replace(registers=0)
    while max(tile.queries, tile.keys) * row_bytes * (tile.stages + 1) > device.shared_bytes and tile.queries > 16:
        tile = tile._replace(queries=max(16, tile.queries // 2), keys=max(16, tile.keys // 2), registers=0)
    return tile


@triton.jit
def _tile(X, row, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [M, BLOCK_D] of X [rows, D]; zero where not ``there``; None: all are."""
    d = tl.arange(0, BLOCK_D)
    at = X + row[:, None] * D + d[None, :]
    if there is not None:
        x = tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        x = tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _more(most, total, s, scale):
    """The running maximum of the logits and the sum of their powers, with those of further keys."""
    new = tl.maximum(most, tl.max(s, 1) * scale)
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp2(most - safe) + tl.sum(tl.exp2(s * scale - safe[:, None]), 1)


@triton.jit
def sum_queries(
    Q, K, KEY_VALID, QUERY_VALID, SPANS, START, LSE, SUMS, n_new, size, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The base-2 log of the softmax sum of a tile of queries of one head; infinite where nothing counts.

    From LSE, its natural logarithm, if that is known: not NaN.
    """
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
    if LSE is not None:
        lse = tl.load(LSE + head * n_new + query, mask=query < n_new, other=0.0)
        if tl.max((lse != lse).to(tl.int32), 0) == 0:
            first, last, begin, end = 0, 0, 0, 0  # no tiles
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
        k = _tile(keys, at + column, None, D, BLOCK_D)
        most, total = _more(most, total, tl.dot(q, tl.trans(k), input_precision="ieee"), scale)
    sums = most + tl.log2(total)
    if LSE is not None:
        lse = tl.load(LSE + head * n_new + query, mask=query < n_new, other=0.0)
        sums = tl.where(lse == lse, lse * 1.4426950408889634, sums)
    counts = sums > float("-inf")
    if QUERY_VALID is not None:
        counts = counts & (tl.load(QUERY_VALID + batch * n_new + query, mask=query < n_new, other=0) != 0)
    tl.store(SUMS + head * n_new + query, tl.where(counts, sums, float("inf")), mask=query < n_new)


@triton.jit
def sum_keys(
    Q, K, KEY_VALID, START, SUMS, MASS, n_new, size, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The probability of a tile of keys of one KV head, summed over the queries, mean over the query heads."""
    head, tile = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_N
    before, query, key = tile - tl.load(START).to(tl.int32), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    counts = tile + key < size
    k = tl.trans(_tile(K + head * size * D, tile + key, counts, D, BLOCK_D))
    if KEY_VALID is not None:
        counts = counts & (tl.load(KEY_VALID + head // HEADS * size + tile + key, mask=counts, other=0) != 0)
    mass = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = tl.minimum(tl.maximum(before, 0), n_new)  # earlier queries see no key of the tile
    whole = tl.minimum(tl.maximum(before + BLOCK_N - 1, 0), n_new)  # from here on they see each
    whole = first + tl.cdiv(whole - first, BLOCK_M) * BLOCK_M
    last = tl.where(tl.max(counts.to(tl.int32), 0) > 0, n_new, 0)
    for of_group in range(GROUP):
        rows = (head * GROUP + of_group) * n_new
        for at in range(first, tl.minimum(whole, last), BLOCK_M):
            q = _tile(Q + rows * D, at + query, at + query < n_new, D, BLOCK_D)
            sums = tl.load(SUMS + rows + at + query, mask=at + query < n_new, other=float("inf"))
            s = tl.dot(q, k, input_precision="ieee") * scale
            s = tl.where(key[None, :] <= (query + at - before)[:, None], s, float("-inf"))
            mass += tl.exp2(s - sums[:, None])
        for at in range(whole, last, BLOCK_M):
            q = _tile(Q + rows * D, at + query, at + query < n_new, D, BLOCK_D)
            sums = tl.load(SUMS + rows + at + query, mask=at + query < n_new, other=float("inf"))
            mass += tl.exp2(tl.dot(q, k, input_precision="ieee") * scale - sums[:, None])
    tl.store(MASS + head * size + tile + key, tl.where(counts, tl.sum(mass, 0) / GROUP, 0.0), mask=tile + key < size)


def key_mass(
    q: Tensor, k: Tensor, start: Tensor, valid: list[Tensor], scale: float, lse: Tensor | None = None
) -> Tensor:
    """[B, H, S] fp32: as :func:`think_compile.formats.tokens.h2o.attention_mass`.

    ``start``: 0-d int64, the row of the first query. ``scale``: positive.
    """
    (batch, heads, size, d), (query_heads, n_new) = k.shape, q.shape[1:3]
    q, k, key_valid, query_valid, spans = q.contiguous(), k.contiguous(), None, None, None
    if valid:
        key_valid, query_valid = (x.contiguous() for x in valid)
        spans = _spans(key_valid)
    lse = None if lse is None else lse.contiguous()
    sums = q.new_empty(batch, query_heads, n_new, dtype=torch.float32)
    mass = q.new_empty(batch, heads, size, dtype=torch.float32)
    sizes = {"GROUP": query_heads // heads, "HEADS": heads, "D": d, "BLOCK_D": max(16, triton.next_power_of_2(d))}
    row_bytes, device = sizes["BLOCK_D"] * q.element_size(), device_of(q.device)
    of_queries, of_keys = (fitted(tile, row_bytes, device) for tile in (OF_QUERIES, OF_KEYS))
    given = (n_new, size, scale * _LOG2E)
    with device_of_launch(q):
        tiles = (triton.cdiv(n_new, of_queries.queries), batch * query_heads)
        masks = key_valid, query_valid, spans, start
        sum_queries[tiles](q, k, *masks, lse, sums, *given, **sizes, **of_queries.options())
        tiles = (triton.cdiv(size, of_keys.keys), batch * heads)
        sum_keys[tiles](q, k, key_valid, start, sums, mass, *given, **sizes, **of_keys.options())
    return mass


def _spans(valid: Tensor) -> Tensor:
    """[B, 2]: each sequence's first valid key, and the end of the valid keys; both the first if there are gaps."""
    counts = valid.to(torch.int32)
    first, after = counts.argmax(1), counts.shape[1] - counts.flip(1).argmax(1)
    return torch.stack([first, torch.where(after - first == counts.sum(1), after, first)], 1)
