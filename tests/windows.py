"""Decoders of one layer that keep a bounded window of tokens, cut at each place where a model may cut it.

Each kind is a model of its own in `models`: `register(kind)` gives the name under which a `Trio` takes it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import models
import torch
import torch.nn.functional as F
from models import PastDecoder, PastSession
from oracle import tuple_slots
from torch import Tensor
from written_out import LAYOUTS, InOrder, Style, WrittenOut

CUTS = ("kept", "read", "past")  # what is returned; what the attention reads (and is returned); the past that is joined
WIDTH = 16  # tokens that a query attends to, its own included


@dataclass(frozen=True)
class Kind:
    """How a window is kept: where it is cut, by which slice, and what attention reads it."""

    cut: str = "kept"
    stock: bool = True
    by: str = "negative"  # or "positive": from the first token that stays on
    style: Style = field(default_factory=Style)

    def __str__(self) -> str:
        return f"{self.cut}-{self.by}-{'stock' if self.stock else self.style}"

    @property
    def joined(self) -> int:
        """Most tokens of the past that a call still reads."""
        return WIDTH if self.cut == "read" else WIDTH - 1


class Windowed(WrittenOut):
    """Attention over the last tokens, stock or written out."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind.style)
        self.kind, self.axis = kind, LAYOUTS[kind.style.layout].token_axis

    def last(self, x: Tensor, length: int) -> Tensor:
        start = -length if self.kind.by == "negative" else max(0, x.shape[self.axis] - length)
        return x[(slice(None),) * self.axis + (slice(start, None),)]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        if not self.kind.stock:
            return super().attend(q, keys, values, mask)
        k, v = (LAYOUTS[self.style.layout].canonical(t) for t in (keys, values))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        return self.merge(F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask))

    def forward(self, x: Tensor, pos: Tensor, past: tuple | None, mask: Tensor):
        q, k, v = self.project(x, pos)
        cache = self.laid(k), self.laid(v)
        if past is not None:
            past = [self.last(t, WIDTH - 1) if self.kind.cut == "past" else t for t in past]
            cache = tuple(torch.cat(pair, dim=self.axis) for pair in zip(past, cache, strict=True))
        kept = cache
        if self.kind.cut != "past":
            kept = tuple(self.last(t, self.kind.joined) for t in cache)
        return self.attend(q, *(kept if self.kind.cut == "read" else cache), mask), kept


class WindowDecoder(PastDecoder):
    """`forward(ids, past, mask, pos) -> (logits, past)`: the past does not tell the positions."""

    def __init__(self, attention) -> None:
        super().__init__(attention, layers=1)

    def forward(self, ids: Tensor, past: tuple | None, mask: Tensor, pos: Tensor):
        x, present = self.embed(ids), []
        for i, layer in enumerate(self.layers):
            out, kv = layer.attention(layer.before(x), pos, past[i] if past is not None else None, mask)
            present.append(kv)
            x = layer.mlp(x + out)
        return self.head(self.norm(x)), tuple(present)


class WindowSession(InOrder, PastSession):
    """Tells the positions, and masks what is out of the window or not there."""

    kind: Kind

    def call(self, ids: Tensor) -> Tensor:
        total = self.length + ids.shape[1]
        first = max(0, total - WIDTH) if self.kind.cut == "read" else max(0, self.length - self.kind.joined)
        mask = window_mask(self.length, total, first, self.real)
        logits, self.past = self.model(ids, self.past, mask, torch.arange(self.length, total))
        return logits


def window_mask(start: int, stop: int, first: int, real: Tensor | None) -> Tensor:
    """[1 or B, 1, queries, keys] of queries from `start` and keys from `first` on, true where attended."""
    query, key = torch.arange(start, stop)[:, None], torch.arange(first, stop)[None]
    mask = ((key <= query) & (key > query - WIDTH))[None, None]
    return mask if real is None else mask & real[:, None, None, first:stop].bool()


def register(kind: Kind) -> str:
    """The name of the kind's model."""
    name, layout = str(kind), LAYOUTS[kind.style.layout]
    models.OWN[name] = (WindowDecoder, functools.partial(Windowed, kind), tuple_slots(layout.canonical, bounded=True))
    models.SESSIONS[name] = type("Session", (WindowSession,), {"layout": layout, "kind": kind})
    return name
