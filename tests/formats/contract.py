"""The formats of the contract suite, and a simulation of each stored cache.

An entry of FORMATS is a format for keys and values of 8 channels. To have a format tested, add a line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from toys import Scaled

from think_compile.cache.state import Call, Prompt, State
from think_compile.cache.store import Packed
from think_compile.formats.base import CacheFormat, Side
from think_compile.formats.think import Channels
from think_compile.formats.whole import Whole

B, HQ, H, D = 2, 4, 2, 8
WHOLE = Side(Whole(), D)

FORMATS = {
    "ThinK": CacheFormat(Side(Channels(4, 4), D, 3), WHOLE),
    "ThinK, no window": CacheFormat(Side(Channels(4, 4), D, 0), WHOLE),
    "ThinK, all channels": CacheFormat(Side(Channels(D, 4), D, 3), WHOLE),
    "ThinK, later tokens whole": CacheFormat(Side(Channels(4, 4), D, 3, encodes_later=False), WHOLE),
    "whole": CacheFormat(WHOLE, WHOLE),
    "integers": CacheFormat(Side(Scaled(), D, 3), Side(Scaled(), D, 3)),
    "whole keys, integers": CacheFormat(WHOLE, Side(Scaled(), D, 5)),
    "ThinK x integers, two windows": CacheFormat(Side(Channels(4, 4), D, 6), Side(Scaled(), D, 2)),
}


@dataclass
class Simulated:
    """One side, by the rules: whole rows, and the first position that is not encoded yet."""

    side: Side
    chosen: State
    rows: Tensor  # [B, H, S, W]
    window_start: int

    @classmethod
    def after_first_call(cls, side: Side, state: State, rows: Tensor) -> Simulated:
        names = [part.name for part in side.parts(fixed=False) if not (part.is_rows or part.replaced)]
        return cls(side, {name: state[name] for name in names}, rows, side.window_start(rows.shape[2]))

    def dense(self) -> Tensor:
        """The rows that a later call sees."""
        if not self.side.has_ring:
            return self.rows
        state = self.side.codec.encode(self.rows, self.chosen) | self.chosen
        encoded = self.side.codec.decode(state, D).to(self.rows.dtype)
        return torch.where((torch.arange(self.rows.shape[2]) >= self.window_start)[:, None], self.rows, encoded)

    def append(self, new: Tensor, *, moves: bool = True) -> None:
        """Append a later call's rows. ``moves``: the window moves after it."""
        self.rows = torch.cat([self.rows, new], 2)
        if moves:
            self.settle()

    def settle(self) -> None:
        if self.side.encodes_later:
            self.window_start = max(self.window_start, self.side.window_start(self.rows.shape[2]))

    def crop(self, length: int) -> None:
        self.rows, self.window_start = self.rows[:, :, :length], min(self.window_start, length)

    def last(self, length: int) -> None:
        gone = self.rows.shape[2] - length
        self.rows, self.window_start = self.rows[:, :, gone:], max(0, self.window_start - gone)

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
        store = Packed.made(of, side, state, dtype, length if size is None else None)
        made.append((store, Simulated.after_first_call(side, state, rows)))
    return made
