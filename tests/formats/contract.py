"""The formats of the contract suite, and a simulation of each stored cache.

An entry of FORMATS is a format for keys and values of 8 channels. To have a format tested, add a line.
"""

from __future__ import annotations

import torch
from torch import Tensor
from toys import Scaled

from think_compile.cache.packed import Packed
from think_compile.cache.state import Call, Prompt, State
from think_compile.formats.base import CacheFormat, Side
from think_compile.formats.bits import KeyBits, ValueBits
from think_compile.formats.mustafar import Mustafar
from think_compile.formats.think import Channels
from think_compile.formats.whole import Whole

B, HQ, H, D = 2, 4, 2, 8
WHOLE = Side(Whole(), D)


def _side(codec: type, tiers: tuple[tuple[int, int], ...], recent: int, **options: object) -> Side:
    """A side of codes in groups of 4 tokens."""
    return Side(codec(tiers, 4, group=4), D, recent, **options)


FORMATS = {
    "ThinK": CacheFormat(Side(Channels(4, 4), D, 3), WHOLE),
    "ThinK, no window": CacheFormat(Side(Channels(4, 4), D, 0), WHOLE),
    "ThinK, all channels": CacheFormat(Side(Channels(D, 4), D, 3), WHOLE),
    "ThinK, later tokens whole": CacheFormat(Side(Channels(4, 4), D, 3, encodes_later=False), WHOLE),
    "whole": CacheFormat(WHOLE, WHOLE),
    "integers": CacheFormat(Side(Scaled(), D, 3), Side(Scaled(), D, 3)),
    "whole keys, integers": CacheFormat(WHOLE, Side(Scaled(), D, 5)),
    "bits": CacheFormat(_side(KeyBits, ((4, 8),), 3), _side(ValueBits, ((4, 8),), 3)),
    "mixed bits": CacheFormat(_side(KeyBits, ((8, 3), (2, 4)), 2), _side(ValueBits, ((8, 4), (4, 4)), 2)),
    "all bits": CacheFormat(
        _side(KeyBits, ((16, 2), (8, 2), (4, 1), (2, 2)), 0), _side(ValueBits, ((16, 1), (2, 6)), 0)
    ),
    "bits, sinks": CacheFormat(_side(KeyBits, ((8, 4), (4, 4)), 3, sinks=2), _side(ValueBits, ((4, 8),), 3, sinks=2)),
    "bits, later tokens whole": CacheFormat(
        _side(KeyBits, ((4, 8),), 3, sinks=1, encodes_later=False),
        _side(ValueBits, ((8, 8),), 3, sinks=1, encodes_later=False),
    ),
    "ThinK x bits": CacheFormat(
        Side(Channels(4, 4), D, 3, window_group=4, sinks=2), _side(ValueBits, ((4, 8),), 3, sinks=2)
    ),
    "bits, whole values": CacheFormat(_side(KeyBits, ((4, 4),), 3, sinks=2), Side(Whole(), D, 3, window_group=4)),
    "whole keys, bits": CacheFormat(Side(Whole(), D, 3, window_group=4), _side(ValueBits, ((8, 8),), 3, sinks=2)),
    "ThinK, pruned values": CacheFormat(Side(Channels(4, 4), D, 3), Side(ValueBits(((16, 4),), 4, group=1), D, 3)),
    "Mustafar": CacheFormat(Side(Mustafar(0.5, multiple=1), D, 3), Side(Mustafar(0.6, multiple=1), D, 3)),
    "Mustafar, 8 bits": CacheFormat(Side(Mustafar(0.5, 8, 1), D, 3), Side(Mustafar(0.3, 8, 1), D, 3)),
    "Mustafar, all numbers": CacheFormat(Side(Mustafar(0.0), D, 3), Side(Mustafar(0.0), D, 3)),
    "Mustafar, two windows": CacheFormat(Side(Mustafar(0.5, multiple=1), D, 3), Side(Mustafar(0.5, 8, 1), D, 0)),
    "Mustafar keys, later tokens whole": CacheFormat(Side(Mustafar(0.5, 16, 1), D, 3, encodes_later=False), WHOLE),
    "ThinK, Mustafar values": CacheFormat(Side(Channels(4, 4), D, 3), Side(Mustafar(0.5, multiple=1), D, 3)),
    "Mustafar keys, bits": CacheFormat(
        Side(Mustafar(0.5, multiple=1), D, 3, window_group=4, sinks=2), _side(ValueBits, ((4, 8),), 3, sinks=2)
    ),
    "bits, two windows": CacheFormat(_side(KeyBits, ((4, 8),), 6), _side(ValueBits, ((4, 8),), 2)),
    "ThinK x integers, two windows": CacheFormat(Side(Channels(4, 4), D, 6), Side(Scaled(), D, 2)),
}


class Simulated:
    """One side, by the rules: the rows as a later call reads them, and where the whole ones begin."""

    def __init__(self, side: Side, state: State, rows: Tensor) -> None:
        """After a first call with ``rows`` [B, H, S, W]."""
        names = [part.name for part in side.parts(fixed=False) if not (part.is_rows or part.replaced)]
        self.side, self.chosen = side, {name: state[name] for name in names}
        self.rows, self.window_start, self.begin = rows, 0, 0
        if side.has_ring:
            self.move(side.window_start(rows.shape[2]))

    def dense(self) -> Tensor:
        """What a later call sees."""
        return self.rows

    def move(self, start: int) -> None:
        """The window begins at ``start`` from now on: older rows are encoded, sinks stay."""
        before, self.window_start = self.window_start, max(self.window_start, start)
        if not self.side.has_ring or start <= before:
            return
        rows, sinks = self.rows[:, :, before:start].clone(), self.begin + self.side.sinks
        for position in range(before, min(sinks, start)):  # as if it were the first token that counts
            rows[:, :, position - before] = self.rows[:, :, min(sinks, start - 1)]
        decoded = self.side.codec.decode(self.side.codec.encode(rows, self.chosen) | self.chosen, D)
        self.rows = self.rows.clone()
        self.rows[:, :, max(before, min(sinks, start)) : start] = decoded[:, :, max(0, min(sinks, start) - before) :]

    def append(self, new: Tensor, *, moves: bool = True) -> None:
        """Rows of a later call; ``moves``: the window moves on after it."""
        self.rows = torch.cat([self.rows, new], 2)
        if moves:
            self.settle()

    def settle(self) -> None:
        if self.side.encodes_later:
            self.move(self.side.window_start(self.rows.shape[2]))

    def crop(self, length: int) -> None:
        """Whole groups are encoded: the rest of a group is whole again, with the numbers that are left of it."""
        self.rows, group = self.rows[:, :, :length], self.side.window_group if self.side.flushes else 1
        if length < self.window_start:
            self.window_start = length // group * group

    def last(self, length: int) -> None:
        gone = self.rows.shape[2] - length
        self.rows, self.begin = self.rows[:, :, gone:], self.begin - gone
        has_new_groups = self.side.flushes and gone % self.side.window_group
        self.window_start = 0 if has_new_groups else max(0, self.window_start - gone)

    def pick(self, order: Tensor) -> None:
        self.rows, self.chosen = self.rows[order], {name: x[order] for name, x in self.chosen.items()}


def draw(n: int, batch: int = B, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) of ``n`` tokens."""
    q, k, v = (torch.randn(batch, heads, n, D, dtype=dtype) for heads in (HQ, H, H))
    return q, k, v


def begun(form: CacheFormat, length: int, size: int | None = None, dtype: torch.dtype = torch.float64):
    """(store, simulation) of keys and of values after a first call; ``size``: rows of a cache of fixed size."""
    q, k, v = draw(length, dtype=dtype)
    states = form.first_call(Call(q, k, v), Prompt(capacity=size))
    made = []
    for of, state, rows in zip(("keys", "values"), states, (k, v), strict=True):
        side = form.side(of)
        store = Packed.made(of, side, state, dtype, length if size is None else size, fixed=size is not None)
        made.append((store, Simulated(side, state, rows)))
    return made
