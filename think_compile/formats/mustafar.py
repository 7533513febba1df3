"""Mustafar (arXiv 2505.22913): each row keeps its numbers of largest magnitude, whichever channels these are.

A bitmap tells the channels. Every row keeps as many numbers, so stored rows are rectangular. In 8 bits, numbers are
codes from -127 to 127 with a scale for each row; the dropped ones stay exactly zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from think_compile.cache.state import BATCH_SIZE, CAPACITY, HEADS, Part, State
from think_compile.formats.bits import half_above
from think_compile.formats.seen import Seen
from think_compile.formats.side import FormatError
from think_compile.kernels.calls import MAX_WIDTH

LEAST = 8  # numbers of a row that must stay
BITS = (16, 8)
_LARGEST_CODE = 127


@dataclass(frozen=True)
class Mustafar:
    """Rows without their ``ratio`` of smallest magnitudes, for each token alone.

    Attributes:
        ratio: share of a row's numbers to drop, in [0, 1).
        bits: of a kept number: 16 stands for the model's dtype; 8.
        multiple: the number of kept ones is rounded up to a multiple of this; 1 is exactly the paper.
    """

    ratio: float
    bits: int = 16
    multiple: int = 8

    name: ClassVar[str] = "mustafar"
    group: ClassVar[int] = 1
    has_window: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)):
            raise TypeError(f"Mustafar: ratio must be a number in [0, 1), got {self.ratio!r}.")
        if math.isnan(self.ratio) or not 0 <= self.ratio < 1:
            raise ValueError(f"Mustafar: ratio must be in [0, 1), the share of numbers to drop; got {self.ratio}.")
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise ValueError(f"Mustafar: bits must be 16 (the model's dtype) or 8, got {self.bits!r}.")
        if isinstance(self.multiple, bool) or not isinstance(self.multiple, int) or self.multiple < 1:
            raise ValueError(f"Mustafar: multiple must be an int >= 1, got {self.multiple!r}.")

    def __str__(self) -> str:
        numbers = [f"{self.ratio:g}", str(self.bits), str(self.multiple)]
        used = 3 if self.multiple != Mustafar.multiple else 2 if self.bits != Mustafar.bits else 1
        return ":".join(["mustafar", *numbers[:used]])

    def check(self, width: int) -> None:
        """Raise if too few of ``width`` numbers would stay.

        Raises:
            FormatError: fewer than 8 would.
        """
        left = width - int(width * self.ratio)
        if left < LEAST:
            raise FormatError(
                f"{self} leaves {left} of the {width} numbers of a head, and at least {LEAST} must stay: give a ratio "
                f"of at most {max(0, width - LEAST) / width:.3g}."
            )

    def count(self, width: int) -> int:
        """Numbers that stay of ``width``."""
        left = width - int(width * self.ratio)
        return min(width, -(-left // self.multiple) * self.multiple)

    def parts(self, width: int) -> tuple[Part, ...]:
        """The kept numbers by channel, the scales, and the bitmap: bit i of word j stands for channel 32 j + i."""
        rows = (BATCH_SIZE, HEADS, CAPACITY)
        numbers = Part("nonzeros", (*rows, self.count(width)), None if self.bits == 16 else torch.int8)
        parts = numbers, Part("bitmap", (*rows, -(-width // 32)), torch.int32)
        return parts if self.bits == 16 else (*parts, Part("row_scales", (*rows, 1), torch.float16))

    def choose(self, seen: Seen) -> State:
        """Nothing: each row is pruned by itself."""
        return {}

    def encode(self, rows: Tensor, chosen: State) -> State:
        """[B, H, S, W] -> the parts. Ties go to the lower channel; NaN counts as largest."""
        names = "nonzeros", "bitmap", "row_scales"
        return dict(zip(names, largest_numbers(rows, self.count(rows.shape[3]), self.bits), strict=False))

    def decode(self, state: State, width: int) -> Tensor:
        """[B, H, S, W]: the rows, zero where numbers were dropped."""
        numbers, stays = state["nonzeros"], _unpacked(state["bitmap"], width)
        if self.bits == 8:
            numbers = numbers.float() * state["row_scales"].float()
        rank = (stays.cumsum(-1, dtype=torch.int32) - 1).clamp(min=0)
        return torch.where(stays, numbers.gather(3, rank.to(torch.int64)), 0)

    def scores(self, queries: Tensor, state: State) -> Tensor:
        """[B, H, M, S]: products of ``queries`` [B, H, M, W] with the rows."""
        return queries @ self.decode(state, queries.shape[3]).to(queries.dtype).mT

    def mean_bits(self, width: int) -> float:
        """Bits per number of a row of ``width`` numbers, with bitmap and scale."""
        return (self.count(width) * self.bits + 32 * -(-width // 32) + (0 if self.bits == 16 else 16)) / width

    def is_lossy(self, width: int) -> bool:
        """Whether decoded rows differ from the original rows."""
        return self.bits == 8 or self.count(width) < width

    def describe(self, width: int) -> str:
        """For the report."""
        how = "" if self.bits == 16 else " in 8 bits"
        return f"{self.count(width)} of {width} numbers of each token{how} ({self.mean_bits(width):.3g} bits a number)"


@torch.library.custom_op("think_compile::largest_numbers", mutates_args=())
def largest_numbers(rows: Tensor, count: int, bits: int) -> list[Tensor]:
    """The ``count`` largest numbers of each row [..., W], the bitmap of their channels, and scales if ``bits`` is 8."""
    if rows.is_cuda and has_triton() and rows.dtype != torch.float64 and rows.shape[-1] <= MAX_WIDTH:
        from think_compile.kernels import mustafar

        return mustafar.largest_numbers(rows, count, bits)
    stays = largest(rows, count)
    place = stays.cumsum(-1, dtype=torch.int32) - 1
    at = torch.where(stays, place, count).to(torch.int64)  # the dropped ones go to a last, extra column
    numbers = rows.new_zeros(*rows.shape[:-1], count + 1).scatter(-1, at, rows)[..., :count].contiguous()
    if bits == 16:
        return [numbers, _packed(stays)]
    wide = numbers.to(torch.promote_types(rows.dtype, torch.float32))
    scale = half_above(wide.abs().amax(-1, keepdim=True), _LARGEST_CODE)
    codes = (wide / torch.where(scale > 0, scale, 1).to(wide.dtype)).round().nan_to_num(0)
    return [codes.clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8), _packed(stays), scale]


@largest_numbers.register_fake
def _(rows: Tensor, count: int, bits: int) -> list[Tensor]:
    numbers = rows.new_empty(*rows.shape[:-1], count, dtype=torch.int8 if bits == 8 else rows.dtype)
    bitmap = rows.new_empty(*rows.shape[:-1], -(-rows.shape[-1] // 32), dtype=torch.int32)
    return [numbers, bitmap] + ([rows.new_empty(*rows.shape[:-1], 1, dtype=torch.float16)] if bits == 8 else [])


def largest(rows: Tensor, count: int) -> Tensor:
    """Bool, as ``rows`` [..., W]: the ``count`` numbers of largest magnitude; ties: lower channels; NaN is largest."""
    magnitude = torch.where(rows.isnan(), float("inf"), rows.abs())
    least = magnitude.topk(count, -1).values[..., -1:]
    above, equal = magnitude > least, magnitude == least
    room = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def _packed(stays: Tensor) -> Tensor:
    """[..., W / 32] int32, from bits [..., W]."""
    whole = torch.nn.functional.pad(stays, (0, -stays.shape[-1] % 32))
    bit = torch.arange(32, dtype=torch.int32, device=stays.device)
    return (whole.unflatten(-1, (-1, 32)).to(torch.int32) << bit).sum(-1, dtype=torch.int32)


def _unpacked(bitmap: Tensor, width: int) -> Tensor:
    """Bool [..., width]."""
    bit = torch.arange(32, dtype=torch.int32, device=bitmap.device)
    return ((bitmap[..., None] >> bit) & 1).flatten(-2)[..., :width] != 0
