"""The vocabulary of stored caches: the tensors of a side by name, and where a call reads and writes.

A side is the keys or the values of a layer. Shapes, throughout the package:

    B batch, Hq query heads, H KV heads, G = Hq // H, D key channels, Dv value channels, W channels of either,
    S tokens, N new tokens of a call, C capacity in rows, R rows of a ring.

Positions count the tokens of a cache from 0. ``start`` is the position of a call's first new token. ``window_start`` is
the lowest position whose row is still whole: positions [window_start, start) stand in the ring, position p in row
p % R. ``oldest`` is the lowest position that a call reads. All three are ints (symbolic while compiling) where a cache
grows, and 0-d int64 tensors where its size is fixed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Length = int | Tensor
State = dict[str, Tensor]

BATCH_SIZE, HEADS, CAPACITY, RING = "BHCR"  # letters in the shape of a part

COUNTERS = "counters"  # the part of a cache of fixed size that holds its counters
WINDOW_START, LENGTH, OLDEST = range(3)  # where each counter stands in it

GROWTH_ROWS = 16


class Part(NamedTuple):
    """One tensor of a side. Growth, copies, moves, dynamic sizes and bytes follow from this list.

    Attributes:
        name: its name in a :data:`State`.
        shape: sizes; a letter stands for the batch, the KV heads, the capacity, or a ring that may grow.
        dtype: None is the dtype of the cache.
        replaced: whether each call leaves a new tensor (a ring); rows, with the capacity in their shape, are appended
            to in place, and anything else stays as the first call left it.
    """

    name: str
    shape: tuple[str | int, ...]
    dtype: torch.dtype | None = None
    replaced: bool = False

    @property
    def is_rows(self) -> bool:
        """Whether it is appended to in place."""
        return CAPACITY in self.shape

    @property
    def has_batch(self) -> bool:
        """Whether its first axis runs over the sequences."""
        return self.shape[0] == BATCH_SIZE


COUNTERS_PART = Part(COUNTERS, (3,), torch.int64, replaced=True)


class Call(NamedTuple):
    """What an attention gets from its call, in canonical axes.

    Attributes:
        q: [B, Hq, N, D], the query heads of a KV head together.
        k, v: [B, H, N, D] and [B, H, N, Dv], the call's own rows; of a first call all rows, [B, H, S, *].
        mask: broadcasts to [B, Hq, N, columns]; bool (true attends) or added to the logits; None hides nothing.
        scale: of the logits; None is 1 / sqrt(D).
        causal: torch's ``is_causal``: query i sees columns 0 to i.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    causal: bool = False


class Prompt(NamedTuple):
    """Which rows of a first call hold tokens, and how many of them are read and stored.

    Attributes:
        start: position of the first query among the rows; None: the queries stand at the last ones, and all rows hold
            tokens.
        read: the attention reads this many of the last tokens; None: all.
        kept: this many of the last tokens are stored; None: all.
        capacity: rows of the stored cache; None: it grows.
    """

    start: Length | None = None
    read: int | None = None
    kept: int | None = None
    capacity: int | None = None


class Span(NamedTuple):
    """Where a later call reads and writes.

    Attributes:
        start: position of the first new token.
        oldest: lowest position that is read: column 0 of masks and logits.
        columns: how many positions are read, the new tokens included.
        rolling: whether position p stands in row p % C, as in a full buffer that is written in a circle.
    """

    start: Length
    oldest: Length
    columns: int
    rolling: bool = False


class Stored(NamedTuple):
    """A side as a later call finds it: its tensors, and the window's start (None: it has no ring)."""

    state: State
    window_start: Length | None = None


def capacity_for(length: int) -> int:
    """Rows to allocate for ``length`` tokens: about 1/64 of slack, so that growing stays amortised and memory small."""
    wanted = length + length // 64 + GROWTH_ROWS
    return (wanted + GROWTH_ROWS - 1) // GROWTH_ROWS * GROWTH_ROWS
