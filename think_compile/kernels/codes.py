"""Device code for rows in integer codes: attention by products with the codes as they are stored.

Two constraints shape it. A decode step is bound by the instructions around the products: so no data moves from thread
to thread between the products of keys and of values (see :func:`.products.dealt`), and a loop of up to 2,048
instructions fits the instruction cache. And Triton reads ahead only loads that lead to a product, of at least 4 bytes a
thread.
"""

# ruff: noqa: F821  specialise fills in the names of a template
# mypy: ignore-errors

import itertools

import triton
import triton.language as tl

from think_compile.kernels.codecs import CODED_PARTS, DeviceCodec
from think_compile.kernels.masks import by_part
from think_compile.kernels.products import (
    below,
    beside,
    code_step,
    crumbs,
    dealt,
    halves,
    in_block,
    joined,
    middle,
    nibbles,
    start_of,
    terms,
    undealt,
    weights,
)
from think_compile.kernels.specialise import specialised

MOST_BLOCKS = 4
GROUPS = (32, 64, 128)  # tokens in a record for which there are kernels
LEAST_TILE = 64  # tokens; smaller records stand in one tile


@triton.jit
def pair_at(pair, stride: tl.constexpr, PAIRS: tl.constexpr, RECORDS: tl.constexpr, following):
    """Where the pairs of a tile's tokens are, ``stride`` bytes apart in a record of ``PAIRS`` pairs.

    ``following``: bytes from the tile's first record to its second.
    """
    at = pair * stride
    if RECORDS > 1:
        at = pair % PAIRS * stride + pair // PAIRS * following
    return at


# ------------------------------------------------------------------------------------------------------------ keys


@triton.jit
def block_queries(row, real, bits: tl.constexpr, width: tl.constexpr, first: tl.constexpr):
    """The queries' channels of a block.

    Read 32 at a time: so a thread has 8 adjacent channels, as the product takes them.
    """
    SECOND: tl.constexpr = (width + 1) // 2 if bits == 2 else 32  # the channel in column 32 of a tile
    column = tl.arange(0, 32)
    there = column < (width if width < SECOND else SECOND)
    q = tl.load(row + first + column[None, :], mask=real[:, None] & there[None, :], other=0.0)
    if (width > 32) or (bits == 2):
        there = column < width - SECOND
        q = beside(q, tl.load(row + first + SECOND + column[None, :], mask=real[:, None] & there[None, :], other=0.0))
    return q


@triton.jit
def first_half(x):
    """The first 32 of 64 numbers."""
    x, _ = tl.split(tl.permute(tl.reshape(x, (2, 32)), (1, 0)))
    return x


@triton.jit
def block_range(ranges, bits: tl.constexpr, width: tl.constexpr):
    """The steps or the zeros of a block, in the order of the queries.

    Always loads of 64: Triton reads ahead only loads of at least 4 bytes a thread.
    """
    SECOND: tl.constexpr = (width + 1) // 2 if bits == 2 else 32  # the channel in column 32 of a tile
    channel = tl.arange(0, 64)
    x = tl.load(ranges + channel, mask=channel < (SECOND if SECOND < 32 else width), other=0.0)
    if SECOND < 32:
        other = tl.load(ranges + SECOND + channel, mask=channel < width - SECOND, other=0.0)
        x = tl.reshape(tl.permute(tl.join(first_half(x), first_half(other)), (1, 0)), (64,))
    if (bits > 2) and (width <= 32):
        x = first_half(x)
    return x


@triton.jit
def block_scaled(
    q, ranges, CODED: tl.constexpr, unit: tl.constexpr, bits: tl.constexpr, width: tl.constexpr, first: tl.constexpr
):
    """The queries times the steps of a record's channels, and times its zeros; ``unit``: bits of the first block."""
    step = block_range(ranges + first, bits, width)
    zero = block_range(ranges + CODED + first, bits, width)
    step, zero = step.to(tl.float32), zero.to(tl.float32)
    wide, zero = q.to(tl.float32), middle(step, zero, bits)
    if bits > unit:
        step = step * (1 << (bits - unit))
    if bits < unit:
        step = step * (1.0 / (1 << (unit - bits)))
    return wide * step[None, :], tl.sum(wide * zero[None, :], 1)


@triton.jit
def block_scores(
    even, odd, x, inverse, codes, following, TOKENS: tl.constexpr, RECORDS: tl.constexpr, PARTS: tl.constexpr,
    ASM: tl.constexpr, bits: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """The products of scaled queries with a tile's codes, added to those of even and of odd tokens; rows dealt."""
    COLUMNS: tl.constexpr = RECORDS * TOKENS // 2 // PARTS
    high, low = terms(x, inverse[:, None], ASM)
    for part in tl.static_range(PARTS):
        both = below(high, low, part, PARTS, ASM)
        pair = part * COLUMNS + dealt(tl.arange(0, COLUMNS))
        even, odd = part_scores(
            even, odd, both, codes, pair[:, None], following, TOKENS // 2, RECORDS, ASM, bits, width
        )
    return even, odd


@triton.jit
def part_scores(
    even, odd, both, codes, pair, following, PAIRS: tl.constexpr, RECORDS: tl.constexpr, ASM: tl.constexpr,
    bits: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """:func:`block_scores` for the pairs of tokens in one part."""
    TILE: tl.constexpr = 64 if width > 32 else 32
    if bits == 2:
        HALF: tl.constexpr = (width + 1) // 2  # two channels share a byte
        column = tl.arange(0, 32)
        low, high = halves(both)
        at = codes + pair_at(pair, HALF, PAIRS, RECORDS, following) + column[None, :]
        byte = tl.load(at, mask=(column < HALF)[None, :], other=0)
        a, b, c, d = crumbs(byte, ASM)
        even = tl.dot(low, tl.trans(a), even, out_dtype=tl.int32)
        even = tl.dot(high, tl.trans(c), even, out_dtype=tl.int32)
        odd = tl.dot(low, tl.trans(b), odd, out_dtype=tl.int32)
        odd = tl.dot(high, tl.trans(d), odd, out_dtype=tl.int32)
    else:
        column = tl.arange(0, TILE)
        at = codes + pair_at(pair, width, PAIRS, RECORDS, following) + column[None, :]
        if bits == 8:
            a = tl.load(at, mask=(column < width)[None, :], other=0).to(tl.int8, bitcast=True)
            b = tl.load(at + PAIRS * width, mask=(column < width)[None, :], other=0).to(tl.int8, bitcast=True)
        else:
            a, b = nibbles(tl.load(at, mask=(column < width)[None, :], other=0), ASM)
        even = tl.dot(both, tl.trans(a), even, out_dtype=tl.int32)
        odd = tl.dot(both, tl.trans(b), odd, out_dtype=tl.int32)
    return even, odd


def key_locate(KEYS, bh, capacity, SIZES: tl.constexpr):
    """The codes and the ranges of one KV head, and the queries of all heads, in the order of the plan."""
    return codes + bh * capacity * BYTES, ranges + bh * capacity * (2 * CODED), ordered


def key_prepare(q_row, index, real, KEYS, SIZES: tl.constexpr):
    """The queries' channels, block by block; not gathered here, since a thread then has single channels."""
    row = ordered + index[:, None] * CODED
    q0 = block_queries(row, real, BITS0, WIDTH0, FIRST0)
    q1, q2, q3 = q0, q0, q0
    if WIDTH1 > 0:
        q1 = block_queries(row, real, BITS1, WIDTH1, FIRST1)
    if WIDTH2 > 0:
        q2 = block_queries(row, real, BITS2, WIDTH2, FIRST2)
    if WIDTH3 > 0:
        q3 = block_queries(row, real, BITS3, WIDTH3, FIRST3)
    return q0, q1, q2, q3


def key_scores(QUERIES, KEYS, at, end, row, ok, scale, SIZES: tl.constexpr):
    """Products [M, N] of the queries with the records from position ``at`` on, times ``scale``.

    Of two records in a tile each has its own range, so the queries meet the codes of both once for each.
    """
    record = tl.cast(at // TOKENS, tl.int64)
    ranges += record * (2 * CODED)
    codes += record * BYTES
    following = tl.where(at + TOKENS < end, BYTES, 0)  # beyond the end the first record stands twice
    TILE: tl.constexpr = RECORDS * TOKENS
    for i in tl.static_range(RECORDS):
        of_record = ranges if i == 0 else ranges + tl.where(at + TOKENS < end, 2 * CODED, 0)
        x0, zero = block_scaled(q0, of_record, CODED, BITS0, BITS0, WIDTH0, FIRST0)
        most = tl.max(tl.abs(x0), 1)
        if WIDTH1 > 0:
            x1, more = block_scaled(q1, of_record, CODED, BITS0, BITS1, WIDTH1, FIRST1)
            zero, most = zero + more, tl.maximum(most, tl.max(tl.abs(x1), 1))
        if WIDTH2 > 0:
            x2, more = block_scaled(q2, of_record, CODED, BITS0, BITS2, WIDTH2, FIRST2)
            zero, most = zero + more, tl.maximum(most, tl.max(tl.abs(x2), 1))
        if WIDTH3 > 0:
            x3, more = block_scaled(q3, of_record, CODED, BITS0, BITS3, WIDTH3, FIRST3)
            zero, most = zero + more, tl.maximum(most, tl.max(tl.abs(x3), 1))
        inverse = 127.0 / tl.maximum(most, 1e-20)
        even, odd = start_of(2 * q0.shape[0], TILE // 2 // PARTS), start_of(2 * q0.shape[0], TILE // 2 // PARTS)
        even, odd = block_scores(even, odd, x0, inverse, codes, following, TOKENS, RECORDS, PARTS, ASM, BITS0, WIDTH0)
        if WIDTH1 > 0:
            even, odd = block_scores(
                even, odd, x1, inverse, codes + AT1, following, TOKENS, RECORDS, PARTS, ASM, BITS1, WIDTH1
            )
        if WIDTH2 > 0:
            even, odd = block_scores(
                even, odd, x2, inverse, codes + AT2, following, TOKENS, RECORDS, PARTS, ASM, BITS2, WIDTH2
            )
        if WIDTH3 > 0:
            even, odd = block_scores(
                even, odd, x3, inverse, codes + AT3, following, TOKENS, RECORDS, PARTS, ASM, BITS3, WIDTH3
            )
        found = tl.reshape(tl.join(undealt(joined(even)), undealt(joined(odd))), (q0.shape[0], TILE // PARTS))
        zero += most * 0.0  # NaN if a step is infinite
        found = found * code_step(most * scale, BITS0)[:, None] + (zero * scale)[:, None]
        s = found if i == 0 else tl.where((tl.arange(0, TILE) < TOKENS)[None, :], s, found)
    return s


# ---------------------------------------------------------------------------------------------------------- values


@triton.jit
def block_mix(
    o, z, shrink, p, ranges, codes, second, RANGES: tl.constexpr, BYTES: tl.constexpr, TOKENS: tl.constexpr,
    RECORDS: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr, bits: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """A block's accumulators times ``shrink``, plus the weights ``p`` [M, tokens / PARTS] times a tile's values.

    ``o`` [M, channels] holds the part of the codes, ``z`` [M] that of the zeros. ``second``: whether there is a second
    record, ``BYTES`` further, with ranges ``RANGES`` further.
    """
    COLUMNS: tl.constexpr = RECORDS * TOKENS
    # one load for both: Triton reads ahead only what a product needs
    number = tl.arange(0, 2 * COLUMNS)
    if RECORDS > 1:
        number = number // COLUMNS * TOKENS + number % TOKENS + number // TOKENS % RECORDS * tl.where(second, RANGES, 0)
    step, zero = tl.split(tl.permute(tl.reshape(tl.load(ranges + number), (2, COLUMNS)), (1, 0)))
    step = step.to(tl.float32)
    zero = middle(step, zero.to(tl.float32), bits)
    x = p * by_part(step, PARTS, COLUMNS, p.shape[0])
    most = tl.max(tl.abs(x), 1)
    PAIRS: tl.constexpr = TOKENS // 2
    even, odd = tl.split(tl.reshape(x, (x.shape[0], COLUMNS // 2 // PARTS, 2)))
    # split as the weights are: from the rows' own layout, Triton would move the weights instead
    factor = tl.broadcast_to((127.0 / tl.maximum(most, 1e-20))[:, None], x.shape)
    factor, _ = tl.split(tl.reshape(factor, (x.shape[0], COLUMNS // 2 // PARTS, 2)))
    even, odd = weights(even, factor, PARTS, ASM), weights(odd, factor, PARTS, ASM)
    TILE: tl.constexpr = 64 if width > 32 else 32
    HALF: tl.constexpr = (width + 1) // 2
    pair = pair_at(tl.arange(0, COLUMNS // 2)[None, :], 1, PAIRS, RECORDS, tl.where(second, BYTES, 0))
    if bits == 2:
        channel = tl.arange(0, 32)
        byte = tl.load(codes + channel[:, None] * PAIRS + pair, mask=(channel < HALF)[:, None], other=0)
        a, b, c, d = crumbs(byte, ASM)
        low = tl.dot(even, tl.trans(a), start_of(even.shape[0], 32), out_dtype=tl.int32)
        low = tl.dot(odd, tl.trans(b), low, out_dtype=tl.int32)
        high = tl.dot(even, tl.trans(c), start_of(even.shape[0], 32), out_dtype=tl.int32)
        high = tl.dot(odd, tl.trans(d), high, out_dtype=tl.int32)
        mixed = beside(joined(low), joined(high))
    else:
        channel = tl.arange(0, TILE)
        at = codes + channel[:, None] * PAIRS + pair
        if bits == 8:
            a = tl.load(at, mask=(channel < width)[:, None], other=0).to(tl.int8, bitcast=True)
            b = tl.load(at + width * PAIRS, mask=(channel < width)[:, None], other=0).to(tl.int8, bitcast=True)
        else:
            a, b = nibbles(tl.load(at, mask=(channel < width)[:, None], other=0), ASM)
        product = tl.dot(even, tl.trans(a), start_of(even.shape[0], TILE), out_dtype=tl.int32)
        mixed = joined(tl.dot(odd, tl.trans(b), product, out_dtype=tl.int32))
    o = o * shrink[:, None] + mixed * code_step(most, bits)[:, None]
    z += most * 0.0  # NaN if a step is infinite
    return o, z * shrink + tl.sum(p * by_part(zero, PARTS, COLUMNS, p.shape[0]), 1)


@triton.jit
def block_zero(block_m: tl.constexpr, bits: tl.constexpr, width: tl.constexpr):
    """The empty accumulators of a block."""
    TILE: tl.constexpr = 64 if (width > 32) or (bits == 2) else 32
    return tl.zeros([block_m, TILE], tl.float32), tl.zeros([block_m], tl.float32)


@triton.jit
def block_finish(
    o, z, total, at, real, channels, IN_ORDER: tl.constexpr, bits: tl.constexpr, width: tl.constexpr,
    first: tl.constexpr,
):  # fmt: skip
    """Write a block's accumulators, divided by ``total``, to their channels of the rows at ``at``.

    ``IN_ORDER``: the plan has one tier, whose channels keep their order.
    """
    channel, there = in_block(o.shape[1], bits, width)
    index = first + channel
    if not IN_ORDER:
        index = tl.load(channels + first + channel, mask=there, other=0).to(tl.int32)
    tl.store(at[:, None] + index[None, :], (o + z[:, None]) / total[:, None], mask=real[:, None] & there[None, :])


def value_locate(VALUES, bh, capacity, SIZES: tl.constexpr):
    """The codes, the ranges and the channels of one KV head."""
    at = ranges + bh * capacity * (BLOCKS * 2 * TOKENS)
    # channels that keep their order are not stored, and not read
    return codes + bh * capacity * BYTES, at, at if END0 == 0 else channels + bh * WIDTH


def value_zero(block_m: tl.constexpr, SIZES: tl.constexpr):
    """Empty accumulators."""
    o0, z0 = block_zero(block_m, BITS0, WIDTH0)
    o1, z1, o2, z2, o3, z3 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if WIDTH1 > 0:
        o1, z1 = block_zero(block_m, BITS1, WIDTH1)
    if WIDTH2 > 0:
        o2, z2 = block_zero(block_m, BITS2, WIDTH2)
    if WIDTH3 > 0:
        o3, z3 = block_zero(block_m, BITS3, WIDTH3)
    return o0, z0, o1, z1, o2, z2, o3, z3


def value_mix(ACC, shrink, p, VALUES, at, end, row, ok, SIZES: tl.constexpr):
    """The accumulators times ``shrink``, plus ``p`` times the records from position ``at`` on."""
    record = tl.cast(at // TOKENS, tl.int64)
    ranges += record * (BLOCKS * 2 * TOKENS)
    codes += record * BYTES
    second = at + TOKENS < end  # beyond the end the first record stands twice, without weight
    RANGES: tl.constexpr = BLOCKS * 2 * TOKENS
    o0, z0 = block_mix(
        o0, z0, shrink, p, ranges, codes, second, RANGES, BYTES, TOKENS, RECORDS, PARTS, ASM, BITS0, WIDTH0
    )
    if WIDTH1 > 0:
        o1, z1 = block_mix(
            o1, z1, shrink, p, ranges + 2 * TOKENS, codes + AT1, second, RANGES, BYTES, TOKENS, RECORDS, PARTS, ASM,
            BITS1, WIDTH1,
        )  # fmt: skip
    if WIDTH2 > 0:
        o2, z2 = block_mix(
            o2, z2, shrink, p, ranges + 4 * TOKENS, codes + AT2, second, RANGES, BYTES, TOKENS, RECORDS, PARTS, ASM,
            BITS2, WIDTH2,
        )  # fmt: skip
    if WIDTH3 > 0:
        o3, z3 = block_mix(
            o3, z3, shrink, p, ranges + 6 * TOKENS, codes + AT3, second, RANGES, BYTES, TOKENS, RECORDS, PARTS, ASM,
            BITS3, WIDTH3,
        )  # fmt: skip
    return o0, z0, o1, z1, o2, z2, o3, z3


def value_finish(ACC, total, at, real, VALUES, SIZES: tl.constexpr):
    """Write the accumulators, divided by ``total``, to rows at ``at``; dropped channels are zero."""
    block_finish(o0, z0, total, at, real, channels, END0 == 0, BITS0, WIDTH0, FIRST0)
    if WIDTH1 > 0:
        block_finish(o1, z1, total, at, real, channels, END0 == 0, BITS1, WIDTH1, FIRST1)
    if WIDTH2 > 0:
        block_finish(o2, z2, total, at, real, channels, END0 == 0, BITS2, WIDTH2, FIRST2)
    if WIDTH3 > 0:
        block_finish(o3, z3, total, at, real, channels, END0 == 0, BITS3, WIDTH3, FIRST3)
    for dropped in range(CODED, WIDTH):
        index = tl.load(channels + dropped).to(tl.int32)
        tl.store(at + index, z0 * 0.0, mask=real)  # NaN if a weight is


# ------------------------------------------------------------------------------------------------------------ codecs

SIZES = ("TOKENS", "RECORDS", "BYTES", "CODED", "WIDTH", "BLOCKS", "ASM", "PARTS")
SIZES += ("END0", "END1", "END2")  # channels in the first tiers, in all
SIZES += tuple(f"{name}{i}" for i in range(MOST_BLOCKS) for name in ("BITS", "WIDTH", "FIRST", "AT"))


def fits(codec) -> str:
    """Why a bit plan has no kernel; "" if it has one."""
    if codec.whole:
        return "some channels of the plan have 16 bits"
    if len(codec.blocks) > MOST_BLOCKS:
        return f"the plan has {len(codec.blocks)} blocks of channels, and kernels take {MOST_BLOCKS}"
    return "" if codec.group in GROUPS else f"groups have {codec.group} tokens, and kernels take {GROUPS}"


def sizes(codec, rows, width: int, asm: bool, parts: int) -> tuple[int, ...]:
    """The constants of a bit plan for rows of ``width`` channels; the others as in :class:`.codecs.DeviceCodec`."""
    found, at = [], 0
    for block in codec.blocks:
        found += [block.bits, block.width, block.first, at]
        at += block.size(codec.group)
    found += [0] * (4 * MOST_BLOCKS - len(found))
    records = max(1, LEAST_TILE // codec.group)  # of a tile
    plan = codec.group, records, at, codec.coded, width, len(codec.blocks)
    return *plan, int(asm), parts, *_ends(codec, width), *found


def _ends(codec, width: int) -> list[int]:
    """Channels in the first tier, in the first two, and in the first three; 0: the order of the channels is fixed."""
    ends = list(itertools.accumulate(count for _, count in codec.tiers))
    return [0, 0, 0] if ends == [width] else [*ends, width, width][:3]


_KEYS = ("codes", "ranges", "ordered")
_QUERIES = tuple(f"q{i}" for i in range(MOST_BLOCKS))
_ACCUMULATORS = tuple(f"{name}{i}" for i in range(MOST_BLOCKS) for name in "oz")


def _function(template, **groups):
    return specialised(template, template.__name__, {}, {"SIZES": SIZES, **groups})


KEY_BITS = DeviceCodec(
    name="key_bits",
    parts=_KEYS,
    queries=_QUERIES,
    accumulators=(),
    functions={
        "locate": _function(key_locate, KEYS=_KEYS),
        "prepare": _function(key_prepare, KEYS=_KEYS),
        "scores": _function(key_scores, KEYS=_KEYS, QUERIES=_QUERIES),
    },
    size_names=SIZES,
    sizes=sizes,
)
VALUE_BITS = DeviceCodec(
    name="value_bits",
    parts=CODED_PARTS,
    queries=(),
    accumulators=_ACCUMULATORS,
    functions={
        "locate": _function(value_locate, VALUES=CODED_PARTS),
        "zero": _function(value_zero),
        "mix": _function(value_mix, VALUES=CODED_PARTS, ACC=_ACCUMULATORS),
        "finish": _function(value_finish, VALUES=CODED_PARTS, ACC=_ACCUMULATORS),
    },
    size_names=SIZES,
    sizes=sizes,
)
