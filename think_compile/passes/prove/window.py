"""Bounded caches: how many of the latest tokens a layer joins, reads and keeps.

All three are suffixes along the tokens: slices to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from think_compile.passes import layout
from think_compile.passes.refusal import Reason, Refused, where

aten = torch.ops.aten


@dataclass(frozen=True)
class Suffix:
    """The last ``size`` tokens (None: all in this call), kept by the slice ``cut``; never more than ``bound``."""

    size: Any
    bound: int | None
    cut: Node


@dataclass(frozen=True)
class Window:
    """The latest tokens, as joined, read and kept by a layer.

    Attributes:
        joined: number of the past's last tokens to be joined with the call's; None: all.
        read: number of the last joined tokens to be read by the attention; None: all.
        kept: number of the last joined tokens to leave the graph; None: all.
        bound: upper bound of the past tokens of a later call; None: the graph does not tell.
        cut: a slice that bounds the cache.
    """

    joined: Any
    read: Any
    kept: Any
    bound: int | None
    cut: Node

    @property
    def sizes(self) -> tuple[Any, Any, Any]:
        return self.joined, self.read, self.kept


def window_of(joined: Suffix | None, read: Suffix | None, kept: Suffix | None) -> Window | None:
    """The window of these suffixes; None if there are none."""
    found = [suffix for suffix in (joined, read, kept) if suffix is not None]
    if not found:
        return None
    bounds = [suffix.bound for suffix in found if suffix.bound is not None]
    n_joined, n_read, n_kept = (None if suffix is None else suffix.size for suffix in (joined, read, kept))
    return Window(n_joined, n_read, n_kept, min(bounds, default=None), found[-1].cut)


def agree(a: Window | None, b: Window | None) -> bool:
    """Whether two windows have equal sizes."""
    if a is None or b is None:
        return a is b
    pairs = zip(a.sizes, b.sizes, strict=True)
    return all(x is y if x is None or y is None else layout.equal_size(x, y) for x, y in pairs)


def is_suffix(node: Node) -> bool:
    """Whether ``node`` is a slice to the end of an axis."""
    return node.target is aten.slice.Tensor and layout.runs_to_end(node)


def is_prefix(node: Node) -> bool:
    """Whether ``node`` is a slice from the first element of an axis."""
    return node.target is aten.slice.Tensor and layout.runs_from_zero(node)


def suffix_along(node: Node, before: Sequence[Node], source: Node, axis: int) -> Suffix | None:
    """The suffix of ``source``'s ``axis`` kept by slice ``node`` after chain ``before``; None: another slice."""
    if not is_suffix(node):
        return None
    dim, start, _, _ = layout.slice_bounds(node)
    sliced = layout.follow(before, layout.source_axes(source.meta["val"].shape))[dim]
    if [(atom.axis, atom.part) for atom in sliced] != [(axis, 0)]:
        return None
    size, start = node.meta["val"].shape[dim], layout.value_of(start)
    bound = size if isinstance(size, int) else None
    if isinstance(start, int) and start < 0:  # the bound holds even while there are fewer tokens
        bound = -start
    return Suffix(None if layout.same_size(size, node.args[0].meta["val"].shape[dim]) else size, bound, node)


def check_window(window: Window | None, larger_than: int | None) -> None:
    """Refuse a window that is known to hold at most ``larger_than`` tokens (None: any window)."""
    if window is None:
        return
    if larger_than is None:
        raise Refused(Reason.SLIDING, where(window.cut))
    if window.bound is not None and window.bound <= larger_than:
        raise Refused(Reason.WINDOW_TOO_SMALL, f"{window.bound} of the past, {larger_than} stay whole")
