"""Device code for rows of which the largest numbers are stored, with a bitmap: a tile is expanded, then multiplied.

A number's place in its row is the count of bits below its own. In 8 bits the codes are multiplied as they are, exact in
16 bits; a key's scale meets its logit, a value's scale its weight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from think_compile.kernels.codecs import PRUNED_PARTS, DeviceCodec
from think_compile.kernels.encode import half_above
from think_compile.kernels.products import MAGIC
from think_compile.kernels.shares import device_of_launch
from think_compile.kernels.whole import doubled, halved


@triton.jit
def count_ones(word, ASM: tl.constexpr):
    """The number of bits of each int32 that are set."""
    if ASM:
        word = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    else:
        word = word - ((word >> 1) & 0x55555555)
        word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
        word = (word + (word >> 4)) & 0x0F0F0F0F
        word = (word + (word >> 8) + (word >> 16) + (word >> 24)) & 63
    return word


@triton.jit
def marked(bitmap, row, ok, bit, WORDS: tl.constexpr, ASM: tl.constexpr):
    """The bitmaps' words [N, bits] of ``row`` [N] from the given ``bit`` on, and how many bits below it are set."""
    words, of_word = bitmap + row * WORDS, bit // 32
    word = tl.load(words[:, None] + of_word[None, :], mask=ok[:, None] & (of_word < WORDS)[None, :], other=0)
    place = count_ones(word & ((1 << (bit % 32)) - 1)[None, :], ASM)
    for before in tl.static_range(WORDS - 1):
        count = count_ones(tl.load(words + before, mask=ok, other=0), ASM)
        place += tl.where((of_word > before)[None, :], count[:, None], 0)
    return word >> (bit % 32)[None, :], place


@triton.jit
def spread(low, high, place, marks, ASM: tl.constexpr):
    """Four bytes in an int32: the next ones of ``low`` and ``high``, from byte ``place`` % 4 on, where a bit is set.

    ``marks``: four bits; other bytes are zero. A permutation of bytes takes them at once; its selectors are counted for
    all four by multiplications.
    """
    if ASM:
        x = tl.inline_asm_elementwise(
            """{ .reg .b32 x, t, p, m, s;
            shl.b32 s, $3, 3;
            shf.r.wrap.b32 x, $1, $2, s;
            mul.lo.u32 t, $4, 0x00204081;
            and.b32 t, t, 0x01010101;
            mul.lo.u32 p, t, 0x01010100;
            mul.lo.u32 m, t, 255;
            lop3.b32 s, p, 0x04040404, m, 0xE4;
            shr.u32 p, s, 4;
            or.b32 s, s, p;
            prmt.b32 s, s, 0, 0x4420;
            prmt.b32 $0, x, 0, s; }""",
            "=r,r,r,r,r", [low, high, place, marks], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
        both, x = both >> (8 * (place % 4)).to(tl.int64), tl.zeros_like(low)
        for i in tl.static_range(4):
            byte = (both & 255).to(tl.int32)
            is_set = (marks >> i) & 1
            x |= tl.where(is_set != 0, byte << (8 * i), 0)
            both = both >> (8 * is_set).to(tl.int64)
    return x


@triton.jit
def expanded_bytes(
    nonzeros, bitmap, row, ok, KEPT: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr
):
    """:func:`expanded` for numbers of 8 bits, four channels at a time."""
    word, place = marked(bitmap, row, ok, 4 * tl.arange(0, TILE // 4), WORDS, ASM)
    marks = word & 15
    at = nonzeros.to(tl.pointer_type(tl.int32)) + (row * (KEPT // 4))[:, None] + place // 4
    low = tl.load(at, mask=marks != 0, other=0)
    high = tl.load(at + 1, mask=(marks != 0) & (place < KEPT - 4), other=0)
    x = spread(low, high, place, marks, ASM)
    a, b, c, d = x.to(tl.int8), (x >> 8).to(tl.int8), (x >> 16).to(tl.int8), (x >> 24).to(tl.int8)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (x.shape[0], TILE))


@triton.jit
def expanded(
    nonzeros, bitmap, rows, ok, KEPT: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr
):
    """[N, TILE]: ``rows`` [N] with zeros in the dropped channels, and wherever not ``ok``."""
    row = rows.to(tl.int64)
    if (nonzeros.dtype.element_ty == tl.int8) and (KEPT % 4 == 0):
        x = expanded_bytes(nonzeros, bitmap, row, ok, KEPT, WORDS, TILE, ASM)
    else:
        word, place = marked(bitmap, row, ok, tl.arange(0, TILE), WORDS, ASM)
        x = tl.load(nonzeros + (row * KEPT)[:, None] + place, mask=(word & 1) != 0, other=0)
    return x


@triton.jit
def mustafar_locate(
    nonzeros, bitmap, row_scales, bh, capacity,
    KEPT: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The numbers, the bitmaps and the scales of one KV head."""
    scales = bitmap if row_scales is None else row_scales + bh * capacity  # 16 bits: not read
    return nonzeros + bh * capacity * KEPT, bitmap + bh * capacity * WORDS, scales


@triton.jit
def mustafar_prepare(
    q_row, index, real, nonzeros, bitmap, row_scales,
    KEPT: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """All columns of the queries."""
    column = tl.arange(0, TILE)
    return tl.load(q_row + column[None, :], mask=real[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def mustafar_scores(
    q0, nonzeros, bitmap, row_scales, at, end, rows, ok, scale,
    KEPT: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Products [M, N] of the queries with ``rows``, times ``scale``."""
    k = expanded(nonzeros, bitmap, rows, ok, KEPT, WORDS, TILE, ASM)
    s = halved(tl.dot(doubled(q0), tl.trans(k.to(q0.dtype)), input_precision="ieee"), q0.shape[0]) * scale
    if nonzeros.dtype.element_ty == tl.int8:
        s *= tl.load(row_scales + rows, mask=ok, other=0.0).to(tl.float32)[None, :]
    return s


@triton.jit
def mustafar_zero(
    block_m: tl.constexpr,
    KEPT: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Empty accumulators."""
    return tl.zeros([block_m, TILE], tl.float32)


@triton.jit
def mustafar_mix(
    o0, shrink, p, nonzeros, bitmap, row_scales, at, end, rows, ok,
    KEPT: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The accumulators times ``shrink``, plus ``p`` times the value rows ``rows``."""
    v = expanded(nonzeros, bitmap, rows, ok, KEPT, WORDS, TILE, ASM)
    if nonzeros.dtype.element_ty == tl.int8:
        steps = tl.load(row_scales + rows, mask=ok, other=0.0).to(tl.float32)
        most = tl.max(steps, 0)  # of the tile: so that weights times scales are numbers of fp16
        x = (p * (steps / tl.where(most > 0, most, 1.0))[None, :]).to(tl.float16)
        mixed = halved(tl.dot(doubled(x), v.to(tl.float16)), p.shape[0]) * most
    else:
        mixed = halved(tl.dot(doubled(p.to(v.dtype)), v, input_precision="ieee"), p.shape[0])
    return o0 * shrink[:, None] + mixed


@triton.jit
def mustafar_store(
    new, nonzeros, bitmap, row_scales, start, capacity, KEPT: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Store the largest numbers of one new row; beyond the end nothing changes.

    All addresses are known beforehand: one that depends on loaded data would be taken for a write to that tensor.
    """
    column = tl.arange(0, TILE)
    real = column < WIDTH
    x = tl.load(new + column, mask=real, other=0.0).to(tl.float32)
    size = tl.where(x == x, tl.abs(x), float("inf"))
    mine, other = size[:, None], size[None, :]
    lower = (column[None, :] < column[:, None]) & (other == mine)
    stays = real & (tl.sum((real[None, :] & ((other > mine) | lower)).to(tl.int32), 1) < KEPT)
    place = tl.cumsum(stays.to(tl.int32), 0) - 1
    slot = tl.arange(0, TILE)
    kept = tl.sum(tl.where((place[None, :] == slot[:, None]) & stays[None, :], x[None, :], 0.0), 1)
    if nonzeros.dtype.element_ty == tl.int8:
        most = tl.max(tl.where(stays, size, 0.0), 0)
        most = tl.where(tl.max((stays & (x != x)).to(tl.int32), 0) > 0, float("nan"), most)
        scale = half_above(most, 127)
        tl.store(row_scales + start, scale, mask=start < capacity)
        step = tl.broadcast_to(tl.where(scale.to(tl.float32) > 0, scale.to(tl.float32), 1.0), kept.shape)
        kept = (tl.div_rn(kept, step) + MAGIC) - MAGIC  # rounded to even
        kept = tl.where(kept == kept, tl.minimum(tl.maximum(kept, -127.0), 127.0), 0.0)
    room = tl.where(start < capacity, KEPT, 0)
    tl.store(nonzeros + start * KEPT + slot, kept.to(nonzeros.dtype.element_ty), mask=slot < room)
    for word in tl.static_range(WORDS):
        bits = tl.where(stays & (column // 32 == word), 1 << (column % 32), 0)
        tl.store(bitmap + start * WORDS + word, tl.sum(bits, 0), mask=start < capacity)


@triton.jit
def store_rows(
    ROWS, NONZEROS, BITMAP, ROW_SCALES, rows, KEPT: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Store the largest numbers of a row."""
    row = tl.program_id(0).to(tl.int64)
    scales = BITMAP if ROW_SCALES is None else ROW_SCALES
    mustafar_store(ROWS + row * WIDTH, NONZEROS, BITMAP, scales, row, rows, KEPT, WORDS, WIDTH, TILE)


def largest_numbers(rows: Tensor, count: int, bits: int) -> list[Tensor]:
    """As :func:`think_compile.formats.mustafar.largest_numbers`, by a kernel."""
    rows, width = rows.contiguous(), rows.shape[-1]
    dtype = torch.int8 if bits == 8 else rows.dtype
    found = [rows.new_empty(*rows.shape[:-1], count, dtype=dtype)]
    found.append(rows.new_empty(*rows.shape[:-1], -(-width // 32), dtype=torch.int32))
    scales = rows.new_empty(*rows.shape[:-1], 1, dtype=torch.float16) if bits == 8 else None
    many = rows.numel() // width
    if many:
        with device_of_launch(rows):
            sizes = (count, -(-width // 32), width, max(32, triton.next_power_of_2(width)))
            store_rows[(many,)](rows, *found, scales, many, *sizes)
    return found if scales is None else [*found, scales]


@triton.jit
def mustafar_finish(
    o0, total, at, real, nonzeros, bitmap, row_scales,
    KEPT: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Write the accumulators, divided by ``total``, to rows at ``at``."""
    column = tl.arange(0, TILE)
    tl.store(at[:, None] + column[None, :], o0 / total[:, None], mask=real[:, None] & (column < WIDTH)[None, :])


def _sizes(codec: Any, nonzeros: Tensor, width: int, asm: bool, parts: int) -> tuple[int, ...]:
    """KEPT, WORDS, WIDTH, TILE and ASM; arguments as in :class:`.codecs.DeviceCodec`."""
    return nonzeros.shape[-1], -(-width // 32), width, max(32, triton.next_power_of_2(width)), int(asm)


MUSTAFAR = DeviceCodec(
    name="mustafar",
    parts=PRUNED_PARTS,
    queries=("q0",),
    accumulators=("o0",),
    functions={
        "locate": mustafar_locate,
        "prepare": mustafar_prepare,
        "scores": mustafar_scores,
        "zero": mustafar_zero,
        "mix": mustafar_mix,
        "finish": mustafar_finish,
    },
    size_names=("KEPT", "WORDS", "WIDTH", "TILE", "ASM"),
    sizes=_sizes,
)
