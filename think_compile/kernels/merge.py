"""The second kernel of an attention: it merges the shares of the first.

One sequence has few rows and many shares, so each program merges ``COLUMNS`` columns of a row, a chunk of shares at a
time: the shares of a row would not fit a program's registers.
"""

import triton
import triton.language as tl

COLUMNS = 32  # of a program


@triton.jit
def merged_part(
    OUT, MOST, TOTAL, RESULT, bh, part, n_rows,
    DV: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge some columns of a row, weighted by the shares' softmax sums; a row that attended to nothing is zero.

    ``part``: number of the row, times the parts of a row, plus the number of the part.
    """
    PARTS: tl.constexpr = (DV + COLUMNS - 1) // COLUMNS
    CHUNK: tl.constexpr = BLOCK_S if BLOCK_S < 64 else 64
    row, column = part // PARTS, part % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    split, first = tl.arange(0, BLOCK_S), bh * SPLITS * n_rows + row
    most = tl.max(tl.load(MOST + first + split * n_rows, mask=split < SPLITS, other=float("-inf")), 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    total, result = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK, COLUMNS], tl.float32)
    for begin in tl.static_range(0, SPLITS, CHUNK):
        share = begin + tl.arange(0, CHUNK)
        at, real = first + share * n_rows, share < SPLITS
        weight = tl.load(TOTAL + at, mask=real, other=0.0)
        weight *= tl.exp2(tl.load(MOST + at, mask=real, other=float("-inf")) - most)
        x = tl.load(OUT + at[:, None] * DV + column[None, :], mask=real[:, None] & (column < DV)[None, :], other=0.0)
        total, result = total + weight, result + x * weight[:, None]
    total, result = tl.sum(total, 0), tl.sum(result, 0)
    result = result / tl.where(total > 0, total, 1.0)
    tl.store(RESULT + (bh * n_rows + row) * DV + column, result.to(RESULT.dtype.element_ty), mask=column < DV)


@triton.jit
def merge_shares(
    OUT, MOST, TOTAL, RESULT, n_rows,
    DV: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge some columns of one row of one KV head."""
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    merged_part(OUT, MOST, TOTAL, RESULT, bh, part, n_rows, DV, COLUMNS, SPLITS, BLOCK_S)
