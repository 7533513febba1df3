"""Layouts: how the axes of a cache tensor map to the canonical [B, H, S, D], and conversion between the two.

A layout lists, for each axis of the tensor, the canonical axes in it, outermost first: [B, S, H, D] is
((0,), (2,), (1,), (3,)), a tensor [B, S, H*D] is ((0,), (2,), (1, 3)). Canonical axes missing from the tensor have size
one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

Layout = tuple[tuple[int, ...], ...]

BATCH, HEAD, TOKEN, CHANNEL = range(4)
AXES = (BATCH, HEAD, TOKEN, CHANNEL)
NAMES = "BHSD"
CANONICAL: Layout = ((BATCH,), (HEAD,), (TOKEN,), (CHANNEL,))


def token_axis(layout: Layout) -> int:
    """The tensor's token axis."""
    return layout.index((TOKEN,))


def describe(layout: Layout) -> str:
    """The layout as text: "BSHD", "BS(HD)"."""
    names = ("".join(NAMES[axis] for axis in axes) for axes in layout)
    return "".join(name if len(name) == 1 else f"({name})" for name in names)


def shape_of(shape: Sequence[Any], layout: Layout) -> tuple[Any, ...]:
    """The shape of a tensor in ``layout`` whose canonical shape is ``shape``."""
    return tuple(math.prod(shape[axis] for axis in axes) for axes in layout)


def to_canonical(x: Tensor, layout: Layout, heads: int, channels: int) -> Tensor:
    """A view of ``x`` as [B, heads, S, channels]."""
    known = {HEAD: heads, CHANNEL: channels}
    for dim in reversed(range(len(layout))):
        if len(layout[dim]) > 1:
            x = x.unflatten(dim, [known.get(axis, -1) for axis in layout[dim]])
        elif not layout[dim]:
            x = x.squeeze(dim)
    order = _order(layout)
    for _ in range(x.dim(), len(AXES)):
        x = x.unsqueeze(-1)
    return x if order == list(AXES) else x.permute([order.index(axis) for axis in AXES])


def from_canonical(x: Tensor, layout: Layout) -> Tensor:
    """``x`` [B, H, S, *] in ``layout``; a view if axes are only moved."""
    order = _order(layout)
    shape = shape_of(x.shape, layout)
    x = x if order == list(AXES) else x.permute(order)
    return x if all(len(axes) == 1 for axes in layout) and len(layout) == len(AXES) else x.reshape(shape)


def _order(layout: Layout) -> list[int]:
    """The canonical axes in the tensor's order; missing axes last."""
    there = [axis for axes in layout for axis in axes]
    return there + [axis for axis in AXES if axis not in there]
