"""How a cache tensor leaves the graph: which outputs hold it, how many of its tokens, and in which buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from think_compile.cache.canonical import Layout, token_axis
from think_compile.passes.layout import equal_size, follow, source_axes, walk_back
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.cache_layout import derived_layout
from think_compile.passes.prove.join import Join
from think_compile.passes.prove.window import Suffix, Window, agree, suffix_along, window_of
from think_compile.passes.refusal import Reason, Refused, where

aten = torch.ops.aten


def outputs_holding(
    normalized: Normalized, root: Node, layout: Layout, shape: tuple[Any, ...]
) -> tuple[dict[int, Layout], Suffix | None, dict[int, Node]]:
    """The outputs that hold ``root`` or its last tokens, with their layouts; the kept tokens; each output's buffer."""
    held, kept = {}, []
    buffers: dict[int, Node] = {}
    for index, output in enumerate(normalized.outputs):
        chain, cut = _way_to(root, output) if isinstance(output, Node) else (None, None)
        if chain is None:
            continue
        if output.meta["val"].dtype != root.meta["val"].dtype:
            raise Refused(Reason.UNKNOWN_ROOT, f"it is kept as {output.meta['val'].dtype}, and read otherwise")
        filled = [node.args[0] for node in chain if node.target is aten.copy.default]
        if filled:
            buffers[index] = filled[-1]
        moved = follow(chain, source_axes(root.meta["val"].shape))
        held[index] = derived_layout(moved, layout, shape)
        kept.append(None if cut is None else _kept(root, chain, cut, token_axis(layout)))
    if not all(agree(window_of(None, None, kept[0]), window_of(None, None, other)) for other in kept):
        raise Refused(Reason.UNKNOWN_WINDOW, f"it leaves in several lengths: {where(root)}")
    return held, kept[0] if kept else None, buffers


def _way_to(root: Node, output: Node) -> tuple[list[Node] | None, Node | None]:
    """The layout operations from ``root`` to ``output`` (None: no such path), and the slice among them (None: none)."""
    source, chain = walk_back(output, stop=root)
    if source is root:
        return chain, None
    if source.target is not aten.slice.Tensor:
        return None, None
    first, before = walk_back(source.args[0], stop=root)
    return ([*before, source, *chain], source) if first is root else (None, None)


def _kept(root: Node, chain: list[Node], cut: Node, axis: int) -> Suffix:
    suffix = suffix_along(cut, chain[: chain.index(cut)], root, axis)
    if suffix is None:
        raise Refused(Reason.UNKNOWN_WINDOW, where(cut))
    return suffix


def fills_buffer(
    normalized: Normalized,
    join: Join,
    window: Window,
    root: Node,
    layout: Layout,
    outputs: dict[int, Layout],
    buffers: dict[int, Node],
) -> bool:
    """Whether the kept tokens fill a whole buffer: the past's own, or in a first call any buffer of equal size."""
    kept = root.meta["val"].shape[token_axis(layout)] if window.kept is None else window.kept
    for output, buffer in buffers.items():
        own = normalized.written[output] if output < len(normalized.written) else None
        if join.past is not None and own != join.past:
            return False
        if not equal_size(buffer.meta["val"].shape[token_axis(outputs[output])], kept):
            return False
    return bool(buffers)
