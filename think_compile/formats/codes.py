"""Integer codes in bytes: how a group of tokens of a few channels lies in memory.

Codes of two adjacent tokens share a byte (4 bits), lie in two planes (8 bits), or share a byte with those of a channel
in the block's second half (2 bits). So a kernel unpacks even and odd tokens apart, for every number of bits, and moves
nothing between threads. 8-bit codes are stored as signed numbers, code - 128, for products of signed integers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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


def runs_of(blocks: tuple[Block, ...]) -> Iterator[tuple[int, int]]:
    """(index of the first, count) of adjacent blocks that differ in their place alone."""
    begin = 0
    for _, run in itertools.groupby(blocks, key=lambda block: (block.bits, block.width)):
        count = len(list(run))
        yield begin, count
        begin += count


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
    """[..., tokens, channels]: the codes in fp32, from bytes [..., :]; the inverse of :func:`packed`.

    Only views and elementwise operations, so that a compiler fuses all of it with what reads the rows.
    """
    channels = block.width if block.bits != 2 else -(-block.width // 2)
    planes = (2,) if block.bits == 8 else ()
    shape = (channels, group // 2) if tokens_last else (group // 2, channels)
    x = stored.unflatten(-1, (*planes, *shape))
    x = x.mT if tokens_last else x  # [..., pairs of tokens, channels]
    if block.bits == 8:
        return (x.transpose(-3, -2).flatten(-3, -2) ^ 128).float()
    shift = torch.arange(2, dtype=torch.uint8, device=x.device)[:, None] * block.bits  # of both tokens of a pair
    if block.bits == 4:
        x = (x[..., None, :] >> shift) & 15
    else:
        halves = torch.arange(2, dtype=torch.uint8, device=x.device)[:, None] * 4  # of the block's channels
        x = ((x[..., None, None, :] >> (shift[:, None] + halves)) & 3).flatten(-2)[..., : block.width]
    return x.flatten(-3, -2).float()
