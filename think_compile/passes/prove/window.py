"""Bounded caches: how many of the latest tokens a layer joins, reads and keeps.

Part of pass 3. All of them are suffixes along the tokens: a slice from somewhere to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from think_compile.passes import layout as lay
from think_compile.passes.refusal import Reason, Refused, where

aten = lay.aten


@dataclass(frozen=True)
class Suffix:
    """The last ``size`` tokens (None: all in this call), never more than ``bound``, that the slice ``cut`` leaves."""

    size: Any
    bound: int | None
    cut: Node


@dataclass(frozen=True)
class Window:
    """What a layer does with a cache that it does not keep, or read, as a whole.

    Attributes:
        joined: how many of the past's last tokens are joined with the call's; None: all.
        read: how many of the last joined tokens the attention reads; None: all.
        kept: how many of the last joined tokens leave the graph; None: all.
        bound: most tokens of the past that a later call can read, as far as the graph tells.
        cut: a slice that bounds it.
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
    """The window that these suffixes make; None: there are none."""
    found = [suffix for suffix in (joined, read, kept) if suffix is not None]
    if not found:
        return None
    bounds = [suffix.bound for suffix in found if suffix.bound is not None]
    n_joined, n_read, n_kept = (None if suffix is None else suffix.size for suffix in (joined, read, kept))
    return Window(n_joined, n_read, n_kept, min(bounds, default=None), found[-1].cut)


def agree(a: Window | None, b: Window | None) -> bool:
    """Whether two windows are cut alike."""
    if a is None or b is None:
        return a is b
    pairs = zip(a.sizes, b.sizes, strict=True)
    return all(x is y if x is None or y is None else lay.equal_size(x, y) for x, y in pairs)


def is_suffix(node: Node) -> bool:
    """Whether ``node`` is a slice to the end of an axis."""
    if node.target is not aten.slice.Tensor:
        return False
    dim, _, end, step = lay.slice_bounds(node)
    end = lay.value_of(end)
    size = node.args[0].meta["val"].shape[dim]
    return step == 1 and ((isinstance(end, int) and end >= lay.EVERYTHING) or lay.same_size(end, size))


def is_prefix(node: Node) -> bool:
    """Whether ``node`` is a slice from the first element of an axis."""
    if node.target is not aten.slice.Tensor:
        return False
    _, start, _, step = lay.slice_bounds(node)
    return step == 1 and lay.same_size(lay.value_of(start), 0)


def suffix_along(node: Node, before: Sequence[Node], source: Node, axis: int) -> Suffix | None:
    """What slice ``node`` leaves of ``source``'s ``axis``, from which ``before`` leads to it; None: another slice."""
    if not is_suffix(node):
        return None
    dim, start, _, _ = lay.slice_bounds(node)
    sliced = lay.follow(before, lay.source_axes(source.meta["val"].shape))[dim]
    if [(atom.axis, atom.part) for atom in sliced] != [(axis, 0)]:
        return None
    return _suffix(node, dim, lay.value_of(start))


def _suffix(node: Node, dim: int, start: object) -> Suffix:
    size = node.meta["val"].shape[dim]
    bound = size if isinstance(size, int) else None
    if isinstance(start, int) and start < 0:  # also while there are fewer tokens than that
        bound = -start
    return Suffix(None if lay.same_size(size, node.args[0].meta["val"].shape[dim]) else size, bound, node)


def check_window(window: Window | None, larger_than: int | None) -> None:
    """Raise unless there is no window, or windows of more than ``larger_than`` tokens are wanted (None: none are)."""
    if window is None:
        return
    if larger_than is None:
        raise Refused(Reason.SLIDING, where(window.cut))
    if window.bound is not None and window.bound <= larger_than:
        raise Refused(Reason.WINDOW_TOO_SMALL, f"{window.bound} of the past, {larger_than} stay whole")
