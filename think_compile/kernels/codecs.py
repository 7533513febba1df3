"""What a codec brings to the kernel templates: its tensors, its device functions, and the sizes that these take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SIZES = ("WIDTH", "PART0", "PART1")


@dataclass(frozen=True)
class DeviceCodec:
    """The device code of a codec.

    Attributes:
        name: the codec's.
        parts: the tensors that a kernel takes, by their names in a state.
        queries: names for what ``prepare`` returns, an operand for the products and what belongs to it.
        accumulators: names for what ``zero``, ``mix`` and the loop carry.
        functions: by the names in the templates. For keys ``locate``, ``prepare``, ``scores``; for values ``locate``,
            ``zero``, ``mix``, ``finish``; to store a token ``choose`` (where something is chosen) and ``store``.
        sizes: the constants WIDTH, PART0, PART1 of a row of so many stored numbers.
    """

    name: str
    parts: tuple[str, ...]
    queries: tuple[str, ...]
    accumulators: tuple[str, ...]
    functions: Mapping[str, Any] = field(hash=False)
    sizes: Callable[[int], tuple[int, int, int]]

    def pointers(self, prefix: str) -> tuple[str, ...]:
        """Names of the tensors in a kernel."""
        return tuple(f"{prefix}_{part.upper()}" for part in self.parts)


def sizes_of(prefix: str) -> tuple[str, ...]:
    """Names of the sizes in a kernel."""
    return tuple(f"{prefix}_{size}" for size in SIZES)


def parts_of(width: int) -> tuple[int, int, int]:
    """A row's width, and two powers of two, of 16 at least, that hold it: 80 is 64 + 16."""
    most = max(16, 2 ** (width.bit_length() - 1))
    return width, most, max(16, 2 ** max(0, width - most - 1).bit_length())
