"""Bit plans (KIVI, arXiv 2402.02750, and ThinK x KIVI): each channel gets the bits of its tier.

The first call orders the channels of each KV head by their query-driven score and deals them to the tiers, from the
most bits down. Channels beyond the last tier are dropped. Codes are asymmetric: code = (x - zero) / scale. Keys have a
scale and a zero per channel and group of tokens, values per token and block of at most 64 channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from think_compile.cache.state import BATCH_SIZE, CAPACITY, HEADS, Part, State
from think_compile.formats.codes import Block, blocks_of, packed, runs_of, unpacked
from think_compile.formats.seen import Seen
from think_compile.formats.think import (
    CHANNEL,
    dealt_channels,
    narrow_rows,
    score_channels,
    score_values,
    wide_rows,
)

WHOLE_BITS = 16  # of a channel in the model's own dtype
_LARGEST = 65504.0  # of fp16
_HALF_STEP = 2.0**-11  # at least half of the distance between two numbers of fp16, relative to them


@dataclass(frozen=True)
class _Bits(ABC):
    """Rows of which each channel has the bits of its tier.

    Attributes:
        tiers: (bits, number of channels), from the most bits down; 16 bits are the model's own dtype.
        observe: number of latest queries of the first call that score the channels.
        group: number of tokens encoded together.
    """

    tiers: tuple[tuple[int, int], ...]
    observe: int
    group: int = 128

    has_window: ClassVar[bool] = True
    tokens_last: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    def whole(self) -> int:
        """Number of channels in the model's dtype: the first ones in the order of the plan."""
        return sum(count for bits, count in self.tiers if bits == WHOLE_BITS)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of codes."""
        return blocks_of(tuple(tier for tier in self.tiers if tier[0] != WHOLE_BITS))

    @property
    def coded(self) -> int:
        """Number of channels with codes."""
        return sum(block.width for block in self.blocks)

    @property
    def kept(self) -> int:
        """Number of channels that are stored."""
        return self.whole + self.coded

    def parts(self, width: int) -> tuple[Part, ...]:
        """Codes of a group of tokens, their scales and zeros, rows of 16-bit channels, and the channels' order."""
        records = (BATCH_SIZE, HEADS, CAPACITY)
        parts = [
            Part("codes", (*records, sum(block.size(self.group) for block in self.blocks)), torch.uint8),
            Part("ranges", (*records, *self._ranges_shape()), torch.float16),
            Part("rows", (*records, self.group, self.whole)),
        ]
        if not self._keeps_order(width):
            parts.append(Part("channels", (BATCH_SIZE, HEADS, width), CHANNEL))
        return tuple(part for part in parts if 0 not in part.shape)

    @abstractmethod
    def _ranges_shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def _score(self, seen: Seen) -> Tensor: ...

    def choose(self, seen: Seen) -> State:
        """All channels in the order of the plan: ascending within a tier, the dropped ones last."""
        width = self._rows_of(seen).shape[3]
        if self._keeps_order(width):
            return {}
        counts = tuple(count for _, count in self.tiers)
        return {"channels": dealt_channels(self._score(seen), counts, width)}

    def _keeps_order(self, width: int) -> bool:
        """Whether one tier has all channels: then they keep their order, and no row is gathered."""
        return len(self.tiers) == 1 and self.kept == width

    @abstractmethod
    def _rows_of(self, seen: Seen) -> Tensor: ...

    def encode(self, rows: Tensor, chosen: State) -> State:
        """Rows [B, H, S, W] -> records [B, H, S / group, ...]."""
        groups = rows.unflatten(2, (-1, self.group))

        def taken(first: int, count: int) -> Tensor:
            if self._keeps_order(rows.shape[3]):
                return groups[..., first : first + count]
            channels = chosen["channels"][:, :, None, None, first : first + count].to(torch.int64)
            return groups.gather(4, channels.expand(*groups.shape[:4], -1))

        state: State = {}
        if self.whole:
            state["rows"] = taken(0, self.whole)
        codes, scales = [], []
        for block in self.blocks:
            x = taken(self.whole + block.first, block.width)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            scale, zero = _range(x, self._axis, block.levels)
            step = torch.where(scale > 0, scale, 1).to(x.dtype)
            code = ((x - zero.to(x.dtype)) / step).round().clamp(0, block.levels)
            codes.append(packed(code, block.bits, tokens_last=self.tokens_last))
            scales.append(torch.stack([scale.squeeze(self._axis), zero.squeeze(self._axis)], -2))
        if codes:
            state |= {"codes": torch.cat(codes, -1), "ranges": self._joined(scales)}
        return state

    def decode(self, state: State, width: int) -> Tensor:
        """[B, H, S, W]: the rows, zero in the dropped channels."""
        narrow = self._narrow(state)
        if self._keeps_order(width):
            return narrow
        return wide_rows(narrow, state["channels"][..., : self.kept], width)

    def scores(self, queries: Tensor, state: State) -> Tensor:
        """[B, H, M, S]: products of ``queries`` [B, H, M, W] with the rows, on the stored channels only."""
        narrow = self._narrow(state)
        if not self._keeps_order(queries.shape[3]):
            queries = narrow_rows(queries, state["channels"][..., : self.kept])
        return queries @ narrow.to(queries.dtype).mT

    def _narrow(self, state: State) -> Tensor:
        """[B, H, S, kept]: the decoded rows in the order of the plan."""
        parts = [state["rows"]] if self.whole else []
        at = 0
        for index, count in runs_of(self.blocks):
            block = self.blocks[index]
            size = block.size(self.group)
            stored = state["codes"][..., at : at + count * size].unflatten(-1, (count, size))
            at += count * size
            code = unpacked(stored, block, self.group, tokens_last=self.tokens_last)  # [B, H, records, count, group, w]
            scale, zero = self._scale_and_zero(state["ranges"].float(), index, count)
            parts.append((code * scale + zero).transpose(-3, -2).flatten(-2))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).flatten(2, 3)

    @property
    @abstractmethod
    def _axis(self) -> int: ...

    @abstractmethod
    def _joined(self, scales: list[Tensor]) -> Tensor: ...

    @abstractmethod
    def _scale_and_zero(self, scales: Tensor, index: int, count: int) -> tuple[Tensor, Tensor]:
        """Of ``count`` blocks of one width from ``index`` on, to broadcast to [B, H, records, count, group, width]."""

    def mean_bits(self, width: int) -> float:
        """Bits per number of a row of ``width`` numbers, with scales and zeros."""
        codes = sum(block.size(self.group) for block in self.blocks) * 8
        scales = 16
        for size in self._ranges_shape():
            scales *= size
        return self.whole / width * WHOLE_BITS + (codes + scales) / (self.group * width)

    def is_lossy(self, width: int) -> bool:
        """Whether decoded rows differ from the original rows: unless all channels are in the model's dtype."""
        return self.whole < width

    def describe(self, width: int) -> str:
        """For the report."""
        tiers = ", ".join(f"{count} of {bits} bits" for bits, count in self.tiers)
        dropped = f", {width - self.kept} dropped" if self.kept < width else ""
        groups = f"; groups of {self.group} tokens" if self.group > 1 else ""
        return f"channels: {tiers}{dropped} ({self.mean_bits(width):.3g} bits a number{groups})"


def _range(x: Tensor, axis: int, levels: int) -> tuple[Tensor, Tensor]:
    """(scale, zero) in fp16 along ``axis`` of ``x``, with zero <= min and zero + levels * scale >= max.

    Both are rounded outwards before the codes are computed. So a channel whose mean is far from zero gets a larger step
    instead of clipped numbers.
    """
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    zero = -half_above(-low, 1)
    return half_above(high - zero.to(x.dtype), levels), zero


def half_above(x: Tensor, times: int) -> Tensor:
    """The least number of fp16 that is not below ``x / times``; finite numbers that are too large become the largest.

    The comparison is exact, so that it does not matter how a device rounds quotients.
    """
    x = torch.where(x.isinf(), x, x.clamp(-_LARGEST * times, _LARGEST * times))
    nearest = (x / times).half().to(x.dtype)
    return torch.where(nearest * times < x, nearest + nearest.abs() * (1.01 * _HALF_STEP), nearest).half()


@dataclass(frozen=True)
class KeyBits(_Bits):
    """Keys by a bit plan: a scale and a zero per channel and group of tokens."""

    name: ClassVar[str] = "key_bits"
    _axis: ClassVar[int] = -2

    def _ranges_shape(self) -> tuple[int, ...]:
        return 2, self.coded

    def _rows_of(self, seen: Seen) -> Tensor:
        return seen.k

    def _score(self, seen: Seen) -> Tensor:
        return score_channels(seen.q, seen.k, self.observe, seen.key_valid, seen.query_valid)

    def _joined(self, scales: list[Tensor]) -> Tensor:
        return torch.cat(scales, -1)

    def _scale_and_zero(self, scales: Tensor, index: int, count: int) -> tuple[Tensor, Tensor]:
        first, width = self.blocks[index].first, self.blocks[index].width
        scale, zero = scales[..., first : first + count * width].unflatten(-1, (count, 1, width)).unbind(3)
        return scale, zero


@dataclass(frozen=True)
class ValueBits(_Bits):
    """Values by a bit plan: a scale and a zero per token and block of at most 64 channels."""

    name: ClassVar[str] = "value_bits"
    tokens_last: ClassVar[bool] = True
    _axis: ClassVar[int] = -1

    def _ranges_shape(self) -> tuple[int, ...]:
        return len(self.blocks), 2, self.group

    def _rows_of(self, seen: Seen) -> Tensor:
        return seen.v

    def _score(self, seen: Seen) -> Tensor:
        return score_values(seen, self.observe)

    def _joined(self, scales: list[Tensor]) -> Tensor:
        return torch.stack(scales, -3)

    def _scale_and_zero(self, scales: Tensor, index: int, count: int) -> tuple[Tensor, Tensor]:
        scale, zero = scales[..., index : index + count, :, :, None].unbind(4)
        return scale, zero
