"""Device code that stores rows in integer codes: a group on leaving the window, and back after a rewind.

The same numbers as :mod:`think_compile.formats.bits` in PyTorch operations. One program has all tokens of a group and
the channels of one block at a time.
"""

# ruff: noqa: F821  specialise fills in the names of a template
# mypy: ignore-errors

import triton
import triton.language as tl

from think_compile.kernels.channels import energy
from think_compile.kernels.codecs import CODED_PARTS
from think_compile.kernels.codes import SIZES
from think_compile.kernels.products import MAGIC, halves, in_block
from think_compile.kernels.specialise import specialised


@triton.jit
def half_above(x, times: tl.constexpr):
    """The least number of fp16 not below ``x / times``; finite numbers that are too large become the largest."""
    most: tl.constexpr = 65504.0 * times
    finite = tl.where(x > most, most, tl.where(x < -most, -most, x))
    x = tl.where((x == float("inf")) | (x == float("-inf")), x, finite)
    nearest = (x / times).to(tl.float16).to(tl.float32)
    above = nearest + tl.abs(nearest) * (1.01 * 2.0**-11)
    return tl.where(nearest * times < x, above, nearest).to(tl.float16)


@triton.jit
def range_of(x, there, axis: tl.constexpr, bits: tl.constexpr):
    """The scale and the zero, fp16, along an axis of ``x``; NaN if a number is NaN."""
    is_nan = tl.max((there & (x != x)).to(tl.int32), axis) > 0
    low = tl.min(tl.where(there, x, float("inf")), axis)
    high = tl.max(tl.where(there, x, float("-inf")), axis)
    low, high = tl.where(is_nan, float("nan"), low), tl.where(is_nan, float("nan"), high)
    zero = -half_above(-low, 1)
    return half_above(high - zero.to(tl.float32), (1 << bits) - 1), zero


@triton.jit
def code_of(x, scale, zero, there, bits: tl.constexpr):
    """The codes of ``x``, int32; ``scale`` and ``zero`` broadcast to it."""
    scale, zero = scale.to(tl.float32), zero.to(tl.float32)
    step = tl.broadcast_to(tl.where(scale > 0, scale, 1.0), x.shape)
    code = (tl.div_rn(x - zero, step) + MAGIC) - MAGIC  # rounded to even
    code = tl.minimum(tl.maximum(code, 0.0), (1 << bits) - 1)
    return tl.where(there, code, 0.0).to(tl.int32)


@triton.jit
def store_byte(at, byte, real, bits: tl.constexpr):
    """Store a byte; of 8 bits as a signed number."""
    tl.store(at, (byte ^ 128 if bits == 8 else byte).to(tl.uint8), mask=real)


@triton.jit
def store_codes(code, codes, TOKENS: tl.constexpr, ACROSS: tl.constexpr, bits: tl.constexpr, width: tl.constexpr):
    """Store codes [TOKENS, 64] as :func:`think_compile.formats.codes.packed` lays them out.

    ``ACROSS``: a byte's neighbours are tokens, as in values; else channels.
    """
    PAIRS: tl.constexpr = TOKENS // 2
    HALF: tl.constexpr = (width + 1) // 2
    even, odd = tl.split(tl.permute(tl.reshape(code, (PAIRS, 2, 64)), (0, 2, 1)))
    pair, column = tl.arange(0, PAIRS)[:, None], tl.arange(0, 64)[None, :]
    if bits == 2:
        low, high = halves(even | (odd << 2))
        column = tl.arange(0, 32)[None, :]
        at = codes + (column * PAIRS + pair if ACROSS else pair * HALF + column)
        store_byte(at, low | (high << 4), (column < HALF) & (pair >= 0), bits)
    else:
        at = codes + (column * PAIRS + pair if ACROSS else pair * width + column)
        real = (column < width) & (pair >= 0)
        if bits == 8:
            store_byte(at, even, real, bits)
            store_byte(at + PAIRS * width, odd, real, bits)
        else:
            store_byte(at, even | (odd << 4), real, bits)


@triton.jit
def load_codes(codes, TOKENS: tl.constexpr, ACROSS: tl.constexpr, bits: tl.constexpr, width: tl.constexpr):
    """[TOKENS, 64] fp32: the codes that :func:`store_codes` stored."""
    PAIRS: tl.constexpr = TOKENS // 2
    HALF: tl.constexpr = (width + 1) // 2
    pair, column = tl.arange(0, PAIRS)[:, None], tl.arange(0, 64)[None, :]
    if bits == 2:
        column = column % 32
        at = codes + (column * PAIRS + pair if ACROSS else pair * HALF + column)
        byte = tl.load(at, mask=(column < HALF) & (pair >= 0), other=0).to(tl.int32)
        byte = byte >> (tl.arange(0, 64)[None, :] // 32 * 4)
        even, odd = byte & 3, (byte >> 2) & 3
    else:
        at = codes + (column * PAIRS + pair if ACROSS else pair * width + column)
        real = (column < width) & (pair >= 0)
        byte = tl.load(at, mask=real, other=0).to(tl.int32)
        if bits == 8:
            even, odd = byte ^ 128, tl.load(at + PAIRS * width, mask=real, other=0).to(tl.int32) ^ 128
        else:
            even, odd = byte & 15, byte >> 4
    both = tl.permute(tl.join(even, odd), (0, 2, 1))
    return tl.reshape(both, (TOKENS, 64)).to(tl.float32)


@triton.jit
def ring_block(
    ring, row, channels, IN_ORDER: tl.constexpr, WIDTH: tl.constexpr, bits: tl.constexpr, width: tl.constexpr,
    first: tl.constexpr,
):  # fmt: skip
    """Pointers [TOKENS, 64] to a block's channels in rows of a ring, and which columns have a channel."""
    channel, there = in_block(64, bits, width)
    index = first + channel
    if not IN_ORDER:
        index = tl.load(channels + index, mask=there, other=0).to(tl.int32)
    return ring + row[:, None] * WIDTH + index[None, :], there[None, :]


# ------------------------------------------------------------------------------------------------------------- keys


@triton.jit
def key_flush_block(
    ring, row, codes, ranges, channels, IN_ORDER: tl.constexpr, TOKENS: tl.constexpr, CODED: tl.constexpr,
    WIDTH: tl.constexpr, bits: tl.constexpr, width: tl.constexpr, first: tl.constexpr,
):  # fmt: skip
    """Encode a block of keys."""
    at, there = ring_block(ring, row, channels, IN_ORDER, WIDTH, bits, width, first)
    x = tl.load(at, mask=there, other=0.0).to(tl.float32)
    scale, zero = range_of(x, there, 0, bits)
    store_codes(code_of(x, scale[None, :], zero[None, :], there, bits), codes, TOKENS, False, bits, width)
    channel, real = in_block(64, bits, width)
    tl.store(ranges + first + channel, scale, mask=real)
    tl.store(ranges + CODED + first + channel, zero, mask=real)


@triton.jit
def key_restore_block(
    ring, row, wanted, codes, ranges, channels, IN_ORDER: tl.constexpr, TOKENS: tl.constexpr, CODED: tl.constexpr,
    WIDTH: tl.constexpr, bits: tl.constexpr, width: tl.constexpr, first: tl.constexpr,
):  # fmt: skip
    """Decode the ``wanted`` rows of a block of keys into a ring."""
    channel, real = in_block(64, bits, width)
    scale = tl.load(ranges + first + channel, mask=real, other=0.0).to(tl.float32)
    zero = tl.load(ranges + CODED + first + channel, mask=real, other=0.0).to(tl.float32)
    x = load_codes(codes, TOKENS, False, bits, width) * scale[None, :] + zero[None, :]
    at, there = ring_block(ring, row, channels, IN_ORDER, WIDTH, bits, width, first)
    tl.store(at, x.to(ring.dtype.element_ty), mask=there & wanted[:, None])


# ----------------------------------------------------------------------------------------------------------- values


@triton.jit
def value_flush_block(
    ring, row, codes, ranges, channels, IN_ORDER: tl.constexpr, TOKENS: tl.constexpr, CODED: tl.constexpr,
    WIDTH: tl.constexpr, bits: tl.constexpr, width: tl.constexpr, first: tl.constexpr,
):  # fmt: skip
    """Encode a block of values."""
    at, there = ring_block(ring, row, channels, IN_ORDER, WIDTH, bits, width, first)
    x = tl.load(at, mask=there, other=0.0).to(tl.float32)
    scale, zero = range_of(x, there, 1, bits)
    store_codes(code_of(x, scale[:, None], zero[:, None], there, bits), codes, TOKENS, True, bits, width)
    token = tl.arange(0, TOKENS)
    tl.store(ranges + token, scale)
    tl.store(ranges + TOKENS + token, zero)


@triton.jit
def value_restore_block(
    ring, row, wanted, codes, ranges, channels, IN_ORDER: tl.constexpr, TOKENS: tl.constexpr, CODED: tl.constexpr,
    WIDTH: tl.constexpr, bits: tl.constexpr, width: tl.constexpr, first: tl.constexpr,
):  # fmt: skip
    """Decode the ``wanted`` rows of a block of values into a ring."""
    token = tl.arange(0, TOKENS)
    scale, zero = tl.load(ranges + token).to(tl.float32), tl.load(ranges + TOKENS + token).to(tl.float32)
    x = load_codes(codes, TOKENS, True, bits, width) * scale[:, None] + zero[:, None]
    at, there = ring_block(ring, row, channels, IN_ORDER, WIDTH, bits, width, first)
    tl.store(at, x.to(ring.dtype.element_ty), mask=there & wanted[:, None])


# ----------------------------------------------------------------------------------------- all blocks, from templates


def flush(ring, row, LOCATED, record, SIZES: tl.constexpr):
    """Encode the rows ``row`` [TOKENS] of a ring to a record."""
    IN_ORDER: tl.constexpr = END0 == 0
    codes += record.to(tl.int64) * BYTES
    ranges += record.to(tl.int64) * RANGES
    flush_block(ring, row, codes, ranges, channels, IN_ORDER, TOKENS, CODED, WIDTH, BITS0, WIDTH0, FIRST0)
    if WIDTH1 > 0:
        flush_block(
            ring, row, codes + AT1, ranges + NEXT, channels, IN_ORDER, TOKENS, CODED, WIDTH, BITS1, WIDTH1, FIRST1
        )
    if WIDTH2 > 0:
        flush_block(
            ring, row, codes + AT2, ranges + 2 * NEXT, channels, IN_ORDER, TOKENS, CODED, WIDTH, BITS2, WIDTH2, FIRST2
        )
    if WIDTH3 > 0:
        flush_block(
            ring, row, codes + AT3, ranges + 3 * NEXT, channels, IN_ORDER, TOKENS, CODED, WIDTH, BITS3, WIDTH3, FIRST3
        )


def restore(ring, row, wanted, LOCATED, record, SIZES: tl.constexpr):
    """Decode the ``wanted`` [TOKENS] rows of a record to rows ``row`` of a ring; dropped channels are zero."""
    IN_ORDER: tl.constexpr = END0 == 0
    codes += record.to(tl.int64) * BYTES
    ranges += record.to(tl.int64) * RANGES
    restore_block(ring, row, wanted, codes, ranges, channels, IN_ORDER, TOKENS, CODED, WIDTH, BITS0, WIDTH0, FIRST0)
    if WIDTH1 > 0:
        restore_block(
            ring, row, wanted, codes + AT1, ranges + NEXT, channels, IN_ORDER, TOKENS, CODED, WIDTH, BITS1, WIDTH1,
            FIRST1,
        )  # fmt: skip
    if WIDTH2 > 0:
        restore_block(
            ring, row, wanted, codes + AT2, ranges + 2 * NEXT, channels, IN_ORDER, TOKENS, CODED, WIDTH, BITS2, WIDTH2,
            FIRST2,
        )  # fmt: skip
    if WIDTH3 > 0:
        restore_block(
            ring, row, wanted, codes + AT3, ranges + 3 * NEXT, channels, IN_ORDER, TOKENS, CODED, WIDTH, BITS3, WIDTH3,
            FIRST3,
        )  # fmt: skip
    for dropped in range(CODED, WIDTH):
        index = tl.load(channels + dropped).to(tl.int32)
        tl.store(ring + row * WIDTH + index, tl.zeros([TOKENS], ring.dtype.element_ty), mask=wanted)


def locate(POINTERS, bh, capacity, SIZES: tl.constexpr):
    """The codes, the ranges and the channels of one KV head."""
    at = ranges + bh * capacity * RANGES
    # channels that keep their order are not stored, and not read
    return codes + bh * capacity * BYTES, at, at if END0 == 0 else channels + bh * WIDTH


@triton.jit
def key_score(q, new, channel, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """The score of the key channels, from one token."""
    return energy(q, new, channel, channel < WIDTH, GROUP, WIDTH)


@triton.jit
def value_score(q, new, channel, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """The score of the value channels, from one token: each query attends to it alone."""
    v = tl.load(new + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)
    return tl.where(v == v, v * v, float("inf"))


@triton.jit
def deal(
    score, channels, END0: tl.constexpr, END1: tl.constexpr, END2: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """The channels by tiers, as :func:`think_compile.formats.think.dealt_channels`, from ``score`` [BLOCK]."""
    channel = tl.arange(0, BLOCK)
    real = channel < D
    mine, other = score[:, None], score[None, :]
    lower = channel[None, :] < channel[:, None]
    rank = tl.sum((real[None, :] & ((other > mine) | ((other == mine) & lower))).to(tl.int32), 1)
    tier = (rank >= END0).to(tl.int32) + (rank >= END1).to(tl.int32) + (rank >= END2).to(tl.int32)
    mine, other = tier[:, None], tier[None, :]
    slot = tl.sum((real[None, :] & ((other < mine) | ((other == mine) & lower))).to(tl.int32), 1)
    for at in range(D):  # an address that depends on loaded data would be taken for a write to that tensor
        tl.store(channels + at, tl.sum(tl.where(real & (slot == at), channel, 0), 0).to(channels.dtype.element_ty))


def writer(keys):
    """The functions that store a side, of keys or of values, by their names in the template."""
    of, ranges, following = ("key", "(2 * CODED)", "0") if keys else ("value", "(BLOCKS * 2 * TOKENS)", "(2 * TOKENS)")
    blocks = {"key": (key_flush_block, key_restore_block), "value": (value_flush_block, value_restore_block)}[of]
    groups = {"SIZES": SIZES, "RANGES": (ranges,)}
    located = {**groups, "LOCATED": CODED_PARTS, "NEXT": (following,)}
    return {
        "side_locate": specialised(locate, f"{of}_parts", {}, {**groups, "POINTERS": CODED_PARTS}),
        "side_flush": specialised(flush, f"{of}_flush", {"flush_block": blocks[0]}, located),
        "side_restore": specialised(restore, f"{of}_restore", {"restore_block": blocks[1]}, located),
        "side_score": key_score if keys else value_score,
    }
