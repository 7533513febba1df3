"""The second kernel of an attention: it merges the shares of the first."""

import triton
import triton.language as tl


@triton.jit
def merged_row(
    OUT, MOST, TOTAL, RESULT, bh, row, n_rows,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge the shares of one row, weighted by their softmax sums; a row that attended to nothing is zero."""
    split, column = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    at, real = (bh * SPLITS + split) * n_rows + row, split < SPLITS
    m = tl.load(MOST + at, mask=real, other=float("-inf"))
    most = tl.max(m, 0)
    weight = tl.load(TOTAL + at, mask=real, other=0.0) * tl.exp2(m - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(weight, 0)
    weight = weight / tl.where(total > 0, total, 1.0)
    parts = tl.load(OUT + at[:, None] * DV + column[None, :], mask=real[:, None] & (column < DV)[None, :], other=0.0)
    result = tl.sum(parts * weight[:, None], 0)
    tl.store(RESULT + (bh * n_rows + row) * DV + column, result.to(RESULT.dtype.element_ty), mask=column < DV)


@triton.jit
def merge_shares(
    OUT, MOST, TOTAL, RESULT, n_rows,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge one row of one KV head."""
    bh, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    merged_row(OUT, MOST, TOTAL, RESULT, bh, row, n_rows, DV, BLOCK_V, SPLITS, BLOCK_S)
