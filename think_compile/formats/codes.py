"""Integer codes in bytes: how a group of tokens of a few channels lies in memory.

Codes of two adjacent tokens share a byte (4 bits), lie in two planes (8 bits), or share a byte with those of a channel
in the block's second half (2 bits). So a kernel unpacks even and odd tokens apart, for every number of bits, and moves
nothing between threads. 8-bit codes are stored as signed numbers, code - 128, for products of signed integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (8, 4, 2)  # bits of a code
MOST_CHANNELS = 64  # of a block


class Block(NamedTuple):
    """Adjacent channels of one tier, encoded together.

    Attributes:
        bits: of a code.
        first: the first channel, in the order of the plan.
        width: number of channels, at most 64.
    """

    bits: int
    first: int
    width: int

    @property
    def levels(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1

    def size(self, group: int) -> int:
        """Bytes of the codes of ``group`` tokens."""
        return group * self.width if self.bits == 8 else group // 2 * -(-self.width * self.bits // 4)


def blocks_of(tiers: tuple[tuple[int, int], ...]) -> tuple[Block, ...]:
    """The blocks of (bits, channels) tiers of codes, in order."""
    blocks, first = [], 0
    for bits, count in tiers:
        for at in range(0, count, MOST_CHANNELS):
            blocks.append(Block(bits, first + at, min(MOST_CHANNELS, count - at)))
        first += count
    return tuple(blocks)


def packed(codes: Tensor, bits: int, *, tokens_last: bool = False) -> Tensor:
    """[..., bytes] uint8, from ``codes`` [..., tokens, channels]; ``tokens_last``: transposed, as values are stored."""
    codes = codes.to(torch.uint8)
    even, odd = codes[..., 0::2, :], codes[..., 1::2, :]
    if tokens_last:
        even, odd = even.mT, odd.mT
    if bits == 8:
        return (torch.stack([even, odd], -3) ^ 128).flatten(-3)
    pairs = even | (odd << bits)
    if bits == 2:
        pairs = pairs.mT if tokens_last else pairs
        half = -(-pairs.shape[-1] // 2)
        pairs = pairs[..., :half] | (F.pad(pairs[..., half:], (0, pairs.shape[-1] % 2)) << 4)
        pairs = pairs.mT if tokens_last else pairs
    return pairs.flatten(-2)


def unpacked(stored: Tensor, block: Block, group: int, *, tokens_last: bool = False) -> Tensor:
    """[..., tokens, channels]: the codes in fp32, from bytes [..., :]; the inverse of :func:`packed`."""
    half = -(-block.width // 2)
    channels = block.width if block.bits != 2 else half
    shape = (channels, group // 2) if tokens_last else (group // 2, channels)
    if block.bits == 8:
        even, odd = (stored.unflatten(-1, (2, *shape)) ^ 128).unbind(-3)
    else:
        pairs = stored.unflatten(-1, shape)
        if block.bits == 2:
            pairs = pairs.mT if tokens_last else pairs
            pairs = torch.cat([pairs & 15, pairs >> 4], -1)[..., : block.width]
            pairs = pairs.mT if tokens_last else pairs
        even, odd = pairs & block.levels, pairs >> block.bits
    if tokens_last:
        even, odd = even.mT, odd.mT
    return torch.stack([even, odd], -2).flatten(-3, -2).float()
