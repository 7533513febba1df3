"""Device functions for products of signed bytes: two terms of each number, codes as bytes, parts of a tile.

Nothing is widened. A tile of a tensor core has 16 rows, and a group has up to 8 query heads. So each query, scaled by
the channels' steps, becomes two rows of bytes: ``high = round(127 x / max|x|)`` and the rest, 254 times larger. One
product of bytes gives both, with an error below that of bf16. The softmax's weights meet the values' codes likewise.

Rounding and conversions use numbers around 1.5 * 2^23: there an fp32 number's low bits are the integer itself. The
conversion instructions of a GPU run at a quarter of the rate of additions. Codes of few bits are read as the high bits
of a byte, minus 128: so all tiers have steps of one magnitude, and one scale for a query loses nothing.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def low_bytes(x, ASM: tl.constexpr):
    """The integers -127 to 127 in numbers x around 1.5 * 2^23, as int8.

    Not by a truncation of the bits: ptxas takes that for a conversion to an unsigned byte, and clips what is negative.
    """
    if ASM:
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 t, u; prmt.b32 t, $1, $2, 0x0040; prmt.b32 u, $3, $4, 0x0040; prmt.b32 $0, t, u, 0x5410; }",
            "=r,r,r,r,r", [x], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        x = (x - MAGIC).to(tl.int8)
    return x


@triton.jit
def terms(x, factor, ASM: tl.constexpr):
    """The high and the low bytes, [M, N] int8, of ``x`` times ``factor``, which is at most 127."""
    if ASM:  # three fused operations: 255 MAGIC - 254 high is an integer in 24 bits
        high = tl.fma(x, tl.broadcast_to(factor, x.shape), MAGIC)
        rest = tl.fma(high, -254.0, 255 * MAGIC)
        low = tl.fma(x, tl.broadcast_to(254.0 * factor, x.shape), rest)
    else:
        high = x * factor + MAGIC
        low = (x * factor - (high - MAGIC)) * 254.0 + MAGIC
    return low_bytes(high, ASM), low_bytes(low, ASM)


@triton.jit
def start_of(rows: tl.constexpr, columns: tl.constexpr):
    """The accumulator of an empty product."""
    return tl.full([rows, columns], MAGIC_BITS, tl.int32)


@triton.jit
def joined(product):
    """[M, N] fp32: the sum of the high and the low rows of a product [2M, N]."""
    rows: tl.constexpr = product.shape[0] // 2
    pairs = tl.reshape(product.to(tl.float32, bitcast=True), (2, rows, product.shape[1]))
    high, low = tl.split(tl.permute(pairs, (1, 2, 0)))
    return (high - MAGIC) + (low - MAGIC) * (1.0 / 254.0)


@triton.jit
def beside(x, y):
    """[M, 2N]: two matrices [M, N]."""
    return tl.reshape(tl.permute(tl.join(x, y), (0, 2, 1)), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def halves(x):
    """Two matrices [M, N]: the left and the right half of ``x`` [M, 2N]."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def dealt(column):
    """The row of a record's codes that stands in a column of the product.

    A thread has columns 2 i, 2 i + 1, 8 + 2 i, ... of a product, and takes columns 8 i to 8 i + 7 of a factor. Dealt
    rows make these the same: the softmax's weights become a factor without an exchange among threads.
    """
    return (column & ~31) | (((column >> 1) & 3) << 3) | (((column >> 3) & 3) << 1) | (column & 1)


@triton.jit
def undealt(s):
    """The columns of a product [M, N] with dealt rows, in order."""
    rows: tl.constexpr = s.shape[0]
    groups: tl.constexpr = s.shape[1] // 32
    return tl.reshape(tl.permute(tl.reshape(s, (rows, groups, 4, 4, 2)), (0, 1, 3, 2, 4)), (rows, 32 * groups))


@triton.jit
def only(x, part: tl.constexpr, parts: tl.constexpr, ASM: tl.constexpr):
    """[M, N] bytes: the rows of one part, and zeros; rows are (part, query)."""
    if parts > 1:
        row = tl.arange(0, x.shape[0]) // (x.shape[0] // parts)
        kept = tl.broadcast_to(tl.where(row == part, -1, 0).to(tl.int8)[:, None], x.shape)
        if ASM:
            x = tl.inline_asm_elementwise(
                "and.b32 $0, $1, $2;", "=r,r,r", [x, kept], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            x = x & kept
    return x


@triton.jit
def below(high, low, part: tl.constexpr, parts: tl.constexpr, ASM: tl.constexpr):
    """[2M, N]: high rows of a part, then its low rows."""
    both = tl.join(only(high, part, parts, ASM), only(low, part, parts, ASM))
    return tl.reshape(tl.permute(both, (2, 0, 1)), (2 * high.shape[0], high.shape[1]))


@triton.jit
def weights(x, factor, parts: tl.constexpr, ASM: tl.constexpr):
    """[2M, parts N]: the terms of ``x`` [M, N], each part's in its own columns."""
    high, low = terms(x, factor, ASM)
    both = below(high, low, 0, parts, ASM)
    if parts > 1:
        both = beside(both, below(high, low, 1, parts, ASM))
    return both


@triton.jit
def nibbles(x, ASM: tl.constexpr):
    """The low and the high four bits of bytes, each as 16 code - 128."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 t; shl.b32 t, $2, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A;
            lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A; }""",
            "=&r,=&r,r", [x], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = signed((x & 0x0F) << 4), signed(x & 0xF0)
    return low, high


@triton.jit
def crumbs(x, ASM: tl.constexpr):
    """Bits 0 and 1, 2 and 3, 4 and 5, 6 and 7 of bytes, each as 64 code - 128."""
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            """{ .reg .b32 t, u, v; shl.b32 t, $4, 6; shl.b32 u, $4, 4; shl.b32 v, $4, 2;
            lop3.b32 $0, t, 0xC0C0C0C0, 0x80808080, 0x6A; lop3.b32 $1, u, 0xC0C0C0C0, 0x80808080, 0x6A;
            lop3.b32 $2, v, 0xC0C0C0C0, 0x80808080, 0x6A; lop3.b32 $3, $4, 0xC0C0C0C0, 0x80808080, 0x6A; }""",
            "=&r,=&r,=&r,=&r,r", [x], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        a, b = signed((x & 3) << 6), signed((x & 12) << 4)
        c, d = signed((x & 48) << 2), signed(x & 0xC0)
    return a, b, c, d


@triton.jit
def signed(x):
    """Bytes minus 128."""
    return (x ^ 128).to(tl.int8, bitcast=True)


@triton.jit
def in_block(columns: tl.constexpr, bits: tl.constexpr, width: tl.constexpr):
    """The channel of a block in each column of a tile, and which columns have one."""
    SECOND: tl.constexpr = (width + 1) // 2 if bits == 2 else 32  # the channel in column 32
    column = tl.arange(0, columns)
    channel = tl.where(column < 32, column, SECOND + column - 32)
    return channel, (channel < width) & ((column >= 32) | (column < SECOND))


@triton.jit
def middle(step, zero, bits: tl.constexpr):
    """The number whose code counts as 0 in the products."""
    return zero + (1 << (bits - 1)) * step


@triton.jit
def code_step(most, bits: tl.constexpr):
    """The step of products of codes with numbers that are at most ``most``."""
    return most * (1.0 / (127 << (8 - bits)))
