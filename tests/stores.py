"""Stores as first calls leave them, for tests of stores and handles."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from think_compile.cache.packed import Packed
from think_compile.cache.state import Call, Prompt
from think_compile.formats.base import CacheFormat, Side
from think_compile.formats.think import Channels
from think_compile.formats.whole import Whole

HEADS, DIM, KEEP = 2, 8, 4


def format_of(recent: int, encodes_later: bool = True) -> CacheFormat:
    """Half of 8 channels."""
    return CacheFormat(Side(Channels(KEEP, 4), DIM, recent, encodes_later), Side(Whole(), DIM))


def first_call(form: CacheFormat, q, k, v, size: int | None = None) -> tuple[Packed, Packed]:
    """The stores of keys and values; ``size``: rows of a cache of fixed size, None: it grows."""
    length = k.shape[2]
    if size is None:
        states = form.first_call(Call(q, k, v), Prompt())
    else:
        k, v = (F.pad(x, (0, 0, 0, size - length)) for x in (k, v))
        states = form.first_call(Call(q, k, v), Prompt(0, capacity=size))
    keys, values = (
        Packed.made(of, form.side(of), state, k.dtype, length if size is None else size, fixed=size is not None)
        for of, state in zip(("keys", "values"), states, strict=True)
    )
    return keys, values


def drawn(batch: int, length: int, query_heads: int = HEADS):
    """Random (q, k, v)."""
    q = torch.randn(batch, query_heads, length, DIM)
    return q, torch.randn(batch, HEADS, length, DIM), torch.randn(batch, HEADS, length, DIM)
