"""Terms of stored caches: the tensors of a side by name, and the positions that a call reads and writes.

A side is the keys or the values of a layer. Shapes, throughout the package:

    B batch, Hq query heads, H KV heads, G = Hq // H, D key channels, Dv value channels, W channels of either,
    K stored tokens of a first call,
    S tokens, N new tokens of a call, C capacity in rows, R rows of a ring.

Positions count the tokens of a cache from 0. ``start`` is the position of a call's first new token. ``window_start`` is
the lowest position with a whole row: the ring holds positions [window_start, start), position p in row p % R.
``oldest`` is the lowest position that a call reads. For a growing cache all three are ints (symbolic while compiling).
For a cache of fixed size they are 0-d int64 tensors, but ``oldest`` is the number 0 unless the buffer is rolling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Length = int | Tensor
State = dict[str, Tensor]

BATCH_SIZE, HEADS, CAPACITY, RING, KEPT = "BHCRK"  # letters in a part's shape

POSITIONS = "positions"  # the part with the positions of a first call's stored tokens
EVICTED = "evicted"  # the part with the number of its other tokens, of a cache of fixed size
COUNTERS = "counters"  # the part with the counters of a cache of fixed size
WINDOW_START, LENGTH, OLDEST = range(3)  # index of each counter in it

GROWTH_ROWS = 16


class Part(NamedTuple):
    """One tensor of a side. Growth, copies, moves, dynamic sizes and bytes follow from a side's list of parts.

    Attributes:
        name: its name in a :data:`State`.
        shape: sizes; a letter stands for the batch, the KV heads, the capacity, a ring that may grow, or the stored
            tokens of a first call. The capacity counts records: rows, or groups of tokens that are encoded together.
        dtype: None: the dtype of the cache.
        replaced: whether each call makes a new tensor (a ring). Parts with the capacity in their shape are rows, which
            are appended to in place. All other parts stay as the first call made them.
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
    """The inputs of an attention from its call, in canonical axes.

    Attributes:
        q: [B, Hq, N, D]; the query heads of a KV head are adjacent.
        k, v: [B, H, N, D] and [B, H, N, Dv], the call's own rows; in a first call all rows, [B, H, S, *].
        mask: broadcasts to [B, Hq, N, columns], or [B, H, N, columns] for the query heads of a KV head; bool (true
            attends) or added to the logits; None hides nothing.
        scale: of the logits; None is 1 / sqrt(D).
        causal: torch's ``is_causal``: query i sees columns 0 to i.
        lse: [B, Hq, N], the log-sum-exp of each query's logits in a first call, if the format wants it and the model's
            attention gives it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    causal: bool = False
    lse: Tensor | None = None

    @property
    def mask_by_query_head(self) -> Tensor | None:
        """The mask, with an axis for the query heads if it has one for the KV heads."""
        heads, query_heads, mask = self.k.shape[1], self.q.shape[1], self.mask
        if mask is None or mask.dim() < 3 or mask.shape[-3] in (1, query_heads):
            return mask
        return mask.repeat_interleave(query_heads // heads, -3)


class Prompt(NamedTuple):
    """Which rows of a first call hold tokens, and how many tokens are read and stored.

    Attributes:
        start: position of the first query among the rows; None: the queries are at the last rows, and all rows hold
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
    """The positions that a later call reads and writes.

    Attributes:
        start: position of the first new token.
        oldest: lowest position read: column 0 of masks and logits.
        columns: number of positions read, with the new tokens.
        rolling: whether position p is in row p % C, as in a full rolling buffer.
    """

    start: Length
    oldest: Length
    columns: int
    rolling: bool = False


class Stored(NamedTuple):
    """A side at the start of a later call.

    Attributes:
        state: its tensors.
        window_start: None: it has no ring.
        evicted: number of tokens of the first call that are not stored, of a growing cache. A position less this is a
            row.
    """

    state: State
    window_start: Length | None = None
    evicted: Length = 0


def capacity_for(length: int) -> int:
    """Rows to allocate for ``length`` tokens: about 1/64 more, for amortised growth in little memory."""
    wanted = length + length // 64 + GROWTH_ROWS
    return (wanted + GROWTH_ROWS - 1) // GROWTH_ROWS * GROWTH_ROWS
