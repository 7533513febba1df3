"""A codec's part of the kernel templates: its tensors, its device functions, and their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

SIZES = ("WIDTH", "PART0", "PART1")
CODED_PARTS = ("codes", "ranges", "channels")  # the stored tensors of a side of codes
PRUNED_PARTS = ("nonzeros", "bitmap", "row_scales")  # of a side of the largest numbers


@dataclass(frozen=True)
class DeviceCodec:
    """The device code of a codec.

    Attributes:
        name: of the codec.
        parts: names, in a state, of the tensors that a kernel takes.
        queries: names of the values that ``prepare`` returns: the operand of the products and its companions.
        accumulators: names of the values that ``zero``, ``mix`` and the loop carry.
        functions: by their names in the templates. For keys ``locate``, ``prepare``, ``scores``; for values ``locate``,
            ``zero``, ``mix``, ``finish``; to store a token ``choose`` (if the codec chooses) and ``store``.
        size_names: names of the constants of the functions.
        sizes: their values, from the codec, its first part, the channels of a row in the model, whether PTX may stand
            in the kernel, and the parts of a record that stand below one another in a tile.
    """

    name: str
    parts: tuple[str, ...]
    queries: tuple[str, ...]
    accumulators: tuple[str, ...]
    functions: Mapping[str, Any] = field(hash=False)
    size_names: tuple[str, ...]
    sizes: Callable[[Any, Tensor, int, bool, int], tuple[int, ...]]

    def pointers(self, prefix: str) -> tuple[str, ...]:
        """Names of the tensors in a kernel."""
        return tuple(f"{prefix}_{part.upper()}" for part in self.parts)

    def constants(self, prefix: str) -> tuple[str, ...]:
        """Names of the sizes in a kernel."""
        return tuple(f"{prefix}_{size}" for size in self.size_names)


def parts_of(width: int) -> tuple[int, int, int]:
    """A row's width, and two powers of two, each at least 16, that cover it: 80 is 64 + 16."""
    most = max(16, 2 ** (width.bit_length() - 1))
    return width, most, max(16, 2 ** max(0, width - most - 1).bit_length())


def row_sizes(codec: Any, rows: Tensor, width: int, asm: bool, parts: int) -> tuple[int, int, int]:
    """WIDTH, PART0 and PART1 of rows of numbers."""
    return parts_of(rows.shape[-1])
