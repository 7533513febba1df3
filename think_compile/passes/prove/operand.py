"""Walk from an attention's operand back to the joined cache tensor, through views and slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from think_compile.cache.canonical import CANONICAL, Layout, token_axis
from think_compile.passes import layout
from think_compile.passes.prove.cache_layout import source_layout
from think_compile.passes.prove.join import JOINS, WRITES
from think_compile.passes.prove.window import Suffix, is_prefix, is_suffix, suffix_along
from think_compile.passes.refusal import Reason, Refused, where

aten = torch.ops.aten


def root_of(operand: Node, scaled: bool) -> tuple[Node, list[Node], Node | None]:
    """The joined tensor of an operand, the layout operations between them, and the slice that reads a prefix."""
    root, chain = layout.walk_back(operand, scaled=scaled)
    if root.target is not aten.slice.Tensor:
        return root, chain, None
    source, before = layout.walk_back(root.args[0], scaled=scaled)
    if is_prefix(root) and source.target in WRITES:
        return source, [*before, root, *chain], root
    return root, chain, None


def before_suffix(
    root: Node, chain: list[Node], arrange: Callable[[layout.Axes], layout.Axes], scaled: bool
) -> tuple[Node, list[Node], Suffix | None]:
    """If ``root`` is a slice of the last tokens: its source, the longer chain, the suffix. Else: no change, None."""
    if not is_suffix(root):
        return root, chain, None
    shape = root.meta["val"].shape
    try:
        roles = source_layout(arrange(layout.follow(chain, layout.source_axes(shape))), CANONICAL, shape)
    except (Refused, layout.NotLayout):
        return root, chain, None
    suffix = suffix_along(root, (), root.args[0], token_axis(roles))
    if suffix is None:
        return root, chain, None
    source, before = layout.walk_back(root.args[0], scaled=scaled)
    return source, [*before, root, *chain], suffix


def laid_out(
    root: Node, chain: list[Node], arrange: Callable[[layout.Axes], layout.Axes]
) -> tuple[Node, list[Node], layout.Axes, Layout]:
    """The first tensor from ``root`` on with a known layout; the rest of the chain; the axes [B, H, S, D]; the layout.

    Keys projected for all tokens at once, [B*S, H*D], have a token axis only after a view splits B*S.
    """
    shape = root.meta["val"].shape
    try:
        axes = arrange(layout.follow(chain, layout.source_axes(shape)))
        return root, chain, axes, source_layout(axes, CANONICAL, shape)
    except (Refused, layout.NotLayout):
        if root.target in JOINS or not chain:
            raise
    return laid_out(chain[0], chain[1:], arrange)


def extent_read(root: Node, axis: int, chain: list[Node], prefix: Node | None) -> Any:
    """Number of read positions: all of the joined tensor, or the end of the slice ``prefix``."""
    shape = root.meta["val"].shape
    if prefix is None:
        return shape[axis]
    dim, _, end, _ = layout.slice_bounds(prefix)
    sliced = layout.follow(chain[: chain.index(prefix)], layout.source_axes(shape))[dim]
    if [atom.axis for atom in sliced] != [axis]:
        raise Refused(Reason.UNKNOWN_LAYOUT, where(prefix))
    return end if isinstance(end, Node) else prefix.meta["val"].shape[dim]
