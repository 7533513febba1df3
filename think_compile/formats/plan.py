"""Bit plans as users write them: ``{8: 0.25, 4: 0.75}``, ``4``, ``"8:0.25+4:0.75"`` or the name of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from think_compile.formats.bits import WHOLE_BITS, KeyBits, ValueBits
from think_compile.formats.side import Codec
from think_compile.formats.think import Channels
from think_compile.formats.whole import Whole

BITS = (16, 8, 4, 2)
# The recommended plans, by name: (keys, values). docs/accuracy.md has their measurements.
NAMED = {
    "lossless": ({8: 1.0}, {8: 1.0}),
    "balanced": ({8: 0.25, 4: 0.75}, {4: 1.0}),
    "small": ({4: 0.5, 2: 0.5}, {4: 1.0}),
}
_EXAMPLES = 'for example 4, {8: 0.25, 4: 0.75}, "8:0.25+4:0.75" or "balanced"'


@dataclass(frozen=True)
class Plan:
    """The bits of the channels of a side: tiers of (bits, share of the channels), from the most bits down.

    16 bits are the model's own dtype. Channels beyond the shares are dropped.
    """

    tiers: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, given: Any, side: str) -> Plan:
        """The plan for ``side`` ("keys" or "values") as a user gives it.

        Raises:
            TypeError, ValueError: says what was given and what is allowed.
        """
        if isinstance(given, Plan):
            return given
        shares = _shares(given, side)
        if not shares:
            raise ValueError(f"{side}={given!r} has no tier: give at least one, {_EXAMPLES}.")
        for bits, share in shares.items():
            if bits not in BITS or not isinstance(bits, int):
                raise ValueError(f"{side}={given!r}: {bits!r} bits are not known; known are {_listed(BITS)}.")
            if isinstance(share, bool) or not isinstance(share, (int, float)):
                raise TypeError(f"{side}={given!r}: a share is a number in (0, 1], got {share!r}.")
            if math.isnan(share) or not 0 < share <= 1:
                raise ValueError(f"{side}={given!r}: a share of the channels must be in (0, 1], got {share!r}.")
        if sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"{side}={given!r}: the shares add up to {sum(shares.values()):g}, and must not exceed 1.")
        return cls(tuple(sorted(((bits, float(share)) for bits, share in shares.items()), reverse=True)))

    def __str__(self) -> str:
        if self.tiers[0][1] == 1:
            return str(self.tiers[0][0])
        return "+".join(f"{bits}:{share:g}" for bits, share in self.tiers)

    @property
    def has_codes(self) -> bool:
        """Whether some channels are stored in codes."""
        return any(bits != WHOLE_BITS for bits, _ in self.tiers)

    @property
    def is_uniform(self) -> bool:
        """Whether all channels have the same number of bits."""
        return len(self.tiers) == 1 and self.tiers[0][1] == 1

    def counts(self, width: int, multiple: int) -> tuple[tuple[int, int], ...]:
        """(bits, number of channels) for rows of ``width`` channels.

        The number of kept channels and each tier's are rounded up to ``multiple``; the last tier takes the rest.
        """
        kept = sum(share for _, share in self.tiers)
        dropped = min(width - 1, int(width * (1 - kept) + 1e-6))
        left = min(width, _rounded(width - dropped, multiple))
        counts = []
        for index, (bits, share) in enumerate(self.tiers):
            is_last = index == len(self.tiers) - 1
            count = left if is_last else min(left, _rounded(math.ceil(width * share - 1e-6), multiple))
            left -= count
            if count:
                counts.append((bits, count))
        return tuple(counts)

    def codec(self, side: str, width: int, *, multiple: int, observe: int, group: int) -> Codec:
        """The codec for rows of ``width`` channels."""
        tiers = self.counts(width, multiple)
        if tiers == ((WHOLE_BITS, width),):
            return Whole()
        if not self.has_codes:
            group = 1
            if side == "keys":
                return Channels(tiers[0][1], observe)
        return (KeyBits if side == "keys" else ValueBits)(tiers, observe, group)


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _listed(items: tuple[int, ...]) -> str:
    return ", ".join(str(item) for item in items)


def _shares(given: Any, side: str) -> dict[Any, Any]:
    """The shares by number of bits, not checked yet."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, int) and not isinstance(given, bool):
        return {given: 1.0}
    if not isinstance(given, str):
        raise TypeError(f"{side} must be a bit plan, {_EXAMPLES}, or a codec; got {given!r} ({type(given).__name__}).")
    if given in NAMED:
        return dict(NAMED[given][side == "values"])
    shares: dict[Any, Any] = {}
    for tier in given.split("+"):
        bits, _, share = tier.partition(":")
        try:
            number, part = int(bits), float(share) if share else 1.0
        except ValueError:
            raise ValueError(
                f"{side}={given!r} is neither bits:share+bits:share nor one of {', '.join(NAMED)}; {_EXAMPLES}."
            ) from None
        if number in shares:
            raise ValueError(f"{side}={given!r} has two tiers of {number} bits: give one, with the sum of the shares.")
        shares[number] = part
    return shares
