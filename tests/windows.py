"""Decoders of one layer with a bounded window of tokens, cut at each place where a model may cut it.

Each kind is a model of its own in `models`: `register(kind)` gives the name under which a `Trio` takes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import models
import torch
import torch.nn.functional as F
from models import PastDecoder, PastSession
from oracle import Slot, tuple_slots
from torch import Tensor, nn
from written_out import LAYOUTS, InOrder, Style, WrittenOut

CUTS = ("kept", "read", "past")  # the returned cache; the rows read by the attention (and returned); the joined past
BUFFER = "buffer"  # not cut: the rows of a buffer of fixed size move up
WIDTH = 16  # tokens attended to by a query, its own included


@dataclass(frozen=True)
class Kind:
    """A kind of window: where it is cut, by which slice, and by which attention it is read."""

    cut: str = "kept"
    stock: bool = True
    by: str = "negative"  # or "positive": from the first kept token on; for a buffer "roll" or "cat"
    style: Style = field(default_factory=Style)

    def __str__(self) -> str:
        return f"{self.cut}-{self.by}-{'stock' if self.stock else self.style}"

    @property
    def joined(self) -> int:
        """The most tokens of the past read by a call."""
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


class Buffered(Windowed):
    """The last `WIDTH` tokens in tensors of that size, written in place; `length` tokens came before the call."""

    def forward(self, x: Tensor, pos: Tensor, past: tuple | None, mask: Tensor, length: int):
        q, k, v = self.project(x, pos)
        new = self.laid(k), self.laid(v)
        if past is None:
            past = tuple(t.new_zeros([WIDTH if i == self.axis else n for i, n in enumerate(t.shape)]) for t in new)
        read = [self.taken(buffer, rows, length) for buffer, rows in zip(past, new, strict=True)]
        return self.attend(q, *read, mask), past

    def taken(self, buffer: Tensor, rows: Tensor, length: int) -> Tensor:
        """The rows read by the attention, after the buffer has taken the call's rows."""
        axis, n_new = self.axis, rows.shape[self.axis]
        if length + n_new <= WIDTH:
            return buffer.index_copy_(axis, torch.arange(n_new) + length, rows)
        if length >= WIDTH and n_new == 1 and self.kind.by == "roll":
            moved = buffer.roll(-1, axis)
            moved[(slice(None),) * axis + (slice(-1, None),)] = rows
            return buffer.copy_(moved)
        past = buffer.narrow(axis, 0, length) if length < WIDTH else self.last(buffer, WIDTH - 1)
        joined = torch.cat([past, rows], axis) if length else rows
        buffer.copy_(self.last(joined, WIDTH))
        return joined


class WindowDecoder(PastDecoder):
    """`forward(ids, past, mask, pos) -> (logits, past)`: the positions cannot be derived from the past."""

    def __init__(self, attention) -> None:
        super().__init__(attention, layers=1)

    def forward(self, ids: Tensor, past: tuple | None, mask: Tensor, pos: Tensor, *length: int):
        x, present = self.embed(ids), []
        for i, layer in enumerate(self.layers):
            out, kv = layer.attention(layer.before(x), pos, past[i] if past is not None else None, mask, *length)
            present.append(kv)
            x = layer.mlp(x + out)
        return self.head(self.norm(x)), tuple(present)


class WindowSession(InOrder, PastSession):
    """Passes the positions, and masks tokens outside the window and empty rows."""

    kind: Kind

    def call(self, ids: Tensor) -> Tensor:
        total = self.length + ids.shape[1]
        first = max(0, total - WIDTH) if self.kind.cut == "read" else max(0, self.length - self.kind.joined)
        mask = window_mask(self.length, total, first, self.real)
        logits, self.past = self.model(ids, self.past, mask, torch.arange(self.length, total))
        return logits


class BufferedSession(WindowSession):
    """Also passes the number of earlier tokens."""

    def call(self, ids: Tensor) -> Tensor:
        total, past = self.length + ids.shape[1], min(self.length, WIDTH - 1 if self.length >= WIDTH else WIDTH)
        mask = window_mask(self.length, total, self.length - past, self.real)
        mask = torch.nn.functional.pad(mask, (0, max(0, WIDTH - total)))  # rows that hold nothing yet
        logits, self.past = self.model(ids, self.past, mask, torch.arange(self.length, total), self.length)
        return logits


def buffered_slots(canonical: Callable[[Tensor], Tensor]) -> Callable:
    """As :func:`oracle.tuple_slots`, for buffers that are filled in place."""

    def slots(model: nn.Module, arguments: dict, output: object) -> list[Slot]:
        past = arguments.get("past") if output is None else output[1]
        length = arguments["length"][0] + (0 if output is None else arguments["ids"].shape[1])
        return [Slot(keys, canonical(keys), min(length, WIDTH), True, True) for keys, _ in past or ()]

    return slots


def window_mask(start: int, stop: int, first: int, real: Tensor | None) -> Tensor:
    """[1 or B, 1, queries, keys] of queries from `start` and keys from `first` on, true where attended."""
    query, key = torch.arange(start, stop)[:, None], torch.arange(first, stop)[None]
    mask = ((key <= query) & (key > query - WIDTH))[None, None]
    return mask if real is None else mask & real[:, None, None, first:stop].bool()


def register(kind: Kind) -> str:
    """The name of the kind's model."""
    name, layout = str(kind), LAYOUTS[kind.style.layout]
    attention, slots, session = Windowed, tuple_slots(layout.canonical, bounded=True), WindowSession
    if kind.cut == BUFFER:
        attention, slots, session = Buffered, buffered_slots(layout.canonical), BufferedSession
    models.OWN[name] = (WindowDecoder, functools.partial(attention, kind), slots)
    models.SESSIONS[name] = type("Session", (session,), {"layout": layout, "kind": kind})
    return name
