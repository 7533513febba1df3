"""How a cache tensor is joined from its past and the call's new rows: by ``cat``, or by a write at positions."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.utils._sympy.functions import Mod, PythonMod

from think_compile.cache.canonical import CHANNEL, Layout, token_axis
from think_compile.passes import layout as lay
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.cache_layout import source_layout
from think_compile.passes.prove.window import Suffix, is_prefix, is_suffix, suffix_along
from think_compile.passes.refusal import Reason, Refused, where

aten = torch.ops.aten


@dataclass(frozen=True)
class Join:
    """How a cache tensor is joined.

    Attributes:
        past: index of the graph input that holds the past; None: there is no past yet.
        past_layout: the layout of the past input.
        new: the call's own rows, with the axes of the joined tensor; None: the whole joined tensor is new.
        blank: fixed: there is no past, and unwritten rows are zeros or uninitialized.
        fixed: whether the rows are written into a tensor of fixed size.
        start: fixed: first position written, an int or int node, or the node of all positions [N].
        consecutive: fixed: the positions are known to be start, start + 1, ...
        past_suffix: the last tokens of the past, if only they are joined; None: all, whatever the past's length.
        past_prefix: number of the past's first rows that are joined, if the other rows are empty; None: all.
    """

    past: int | None = None
    past_layout: Layout | None = None
    new: Node | None = None
    fixed: bool = False
    start: Any = None
    consecutive: bool = True
    past_suffix: Suffix | None = None
    past_prefix: Any = None
    blank: bool = False


def join_of(normalized: Normalized, root: Node, layout: Layout) -> Join:
    """The join of ``root``, in ``layout``, along its tokens; raises :class:`Refused` if it is not understood."""
    if root.target in WRITES and (write := WRITES[root.target](root)) and CHANNEL in layout[write.dim % len(layout)]:
        raise Refused(Reason.CHANNEL_MIXING, where(root))  # keys assembled from parts, as in latent attention
    if root.target is aten.cat.default:
        return _join_of_cat(normalized, root, layout)
    if root.target in WRITES:
        return _join_of_write(normalized, root, layout)
    if root.op == "placeholder":
        name = normalized.sources[normalized.placeholders.index(root)] or root.name
        raise Refused(Reason.NO_JOIN_SEEN, f"input {name}")
    return Join()


def _join_of_cat(normalized: Normalized, root: Node, layout: Layout) -> Join:
    dim = root.args[1] if len(root.args) > 1 else root.kwargs.get("dim", 0)
    if dim % len(layout) != token_axis(layout):
        return Join()  # it builds the keys, as in rotary embeddings; it is no join with a past
    parts = [part for part in root.args[0] if not lay.same_size(part.meta["val"].numel(), 0)]
    if len(parts) == 1:
        return Join()
    past, prefix = _past_input(normalized, parts[0], layout), None
    if past is None and is_prefix(parts[0]):
        past, prefix = _past_input(normalized, parts[0].args[0], layout), parts[0].meta["val"].shape[dim]
    if len(parts) != 2 or past is None:
        raise Refused(Reason.UNKNOWN_ROOT, where(root))
    index, past_layout, suffix = past
    if prefix is not None and (suffix is not None or not _along(parts[0], dim)):
        raise Refused(Reason.UNKNOWN_ROOT, where(root))
    return Join(index, past_layout, parts[1], past_suffix=suffix, past_prefix=prefix)


def _along(cut: Node, dim: int) -> bool:
    """Whether a slice cuts axis ``dim``."""
    return lay.slice_bounds(cut)[0] == dim % cut.meta["val"].dim()


def _past_input(normalized: Normalized, node: Node, layout: Layout) -> tuple[int, Layout, Suffix | None] | None:
    """The index and layout of the input that is a join's past, and its joined suffix; ``layout`` is the join's."""
    source, chain = lay.walk_back(node)
    before: list[Node] = []
    cut = source if is_suffix(source) else None
    if cut is not None:
        source, before = lay.walk_back(cut.args[0])
        chain = [*before, cut, *chain]
    if source.op != "placeholder" or source.meta["val"].dtype != node.meta["val"].dtype:
        return None
    shape = source.meta["val"].shape
    past_layout = source_layout(lay.follow(chain, lay.source_axes(shape)), layout, shape)
    suffix = None if cut is None else suffix_along(cut, before, source, token_axis(past_layout))
    if cut is not None and suffix is None:
        return None
    return normalized.placeholders.index(source), past_layout, suffix


@dataclass(frozen=True)
class _Write:
    base: Node
    new: Node
    dim: int
    start: Any
    consecutive: bool


def _join_of_write(normalized: Normalized, root: Node, layout: Layout) -> Join:
    write = WRITES[root.target](root)
    if write is None or write.dim % len(layout) != token_axis(layout):
        raise Refused(Reason.UNKNOWN_ROOT, where(root))
    if (wrapping := _wraps(write.start)) is not None:
        raise Refused(Reason.UNKNOWN_WINDOW, where(wrapping))
    joined = {"new": write.new, "fixed": True, "start": write.start, "consecutive": write.consecutive}
    past = _past_input(normalized, write.base, layout)
    if past is not None:
        index, past_layout, suffix = past
        if suffix is not None:
            raise Refused(Reason.UNKNOWN_WINDOW, where(root))
        return Join(index, past_layout, **joined)
    source, _ = lay.walk_back(write.base)
    if source.target is aten.roll.default:
        raise Refused(Reason.UNKNOWN_WINDOW, where(source))
    if source.target not in _FRESH:
        raise Refused(Reason.UNKNOWN_ROOT, where(source))
    return Join(**joined, blank=source.target is not aten.full.default or source.args[1] == 0)


def _index_copy(node: Node) -> _Write | None:
    base, dim, index, new = node.args
    return _Write(base, new, dim, index, _is_consecutive(index))


def _index_put(node: Node) -> _Write | None:
    base, indices, new = node.args[:3]
    accumulate = node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False)
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if accumulate or len(given) != 1 or given[0][1].meta["val"].dim() != 1:
        return None
    dim, index = given[0]
    if index.meta["val"].dtype == torch.bool or new.meta["val"].dim() != base.meta["val"].dim():
        return None
    return _Write(base, new, dim, index, _is_consecutive(index))


def _slice_scatter(node: Node) -> _Write | None:
    base, new = node.args[:2]
    dim, start, _, step = lay.slice_bounds(node, first=2)
    if new.target is aten.copy.default:  # look through the copy at the written rows
        new = lay.layout_input(new) or new
    if step != 1 or new.meta["val"].dim() != base.meta["val"].dim():
        return None
    if isinstance(start, int) and start < 0:
        start = base.meta["val"].shape[dim] + start
    return _Write(base, new, dim, start, True)


WRITES = {
    aten.index_copy.default: _index_copy,
    aten.index_put.default: _index_put,
    aten.slice_scatter.default: _slice_scatter,
}
JOINS = {aten.cat.default, *WRITES}
_FRESH = {
    aten.zeros.default,
    aten.new_zeros.default,
    aten.zeros_like.default,
    aten.full.default,
    aten.empty.memory_format,
    aten.new_empty.default,
}
_REMAINDERS = {
    aten.remainder.Scalar,
    aten.remainder.Tensor,
    aten.fmod.Scalar,
    aten.fmod.Tensor,
    aten.bitwise_and.Scalar,
    aten.bitwise_and.Tensor,
    aten.__and__.Scalar,
    aten.__and__.Tensor,
    operator.mod,
}
_ARANGES = {aten.arange.default, aten.arange.start}


def _is_consecutive(index: Node) -> bool:
    """Whether an index tensor is an ``arange``, possibly plus one number, or a single position."""
    if lay.same_size(index.meta["val"].numel(), 1):
        return True
    source, chain = lay.walk_back(index)
    if any(not lay.same_size(n.meta["val"].numel(), source.meta["val"].numel()) for n in chain):
        return False  # repeated
    if any(n.target in (aten.permute.default, aten.transpose.int) for n in chain):
        return False
    if source.target in _ARANGES:
        return True
    if source.target is not aten.add.Tensor or source.kwargs.get("alpha", 1) != 1:
        return False
    tensors = [arg for arg in source.args if isinstance(arg, Node) and _is_many(arg)]
    return len(tensors) == 1 and _is_consecutive(tensors[0])


def _wraps(start: Any) -> Node | None:
    """The operation that wraps positions around at the end of a buffer (a remainder, say), or None."""
    todo, seen = [start] if isinstance(start, Node) else [], set[Node]()
    while todo:
        node = todo.pop()
        value = node.meta.get("val")
        if node in seen or (isinstance(value, torch.Tensor) and value.is_floating_point()):
            continue
        seen.add(node)
        if node.target in _REMAINDERS or (isinstance(value, torch.SymInt) and value.node.expr.has(Mod, PythonMod)):
            return node
        todo += node.all_input_nodes
    return None


def _is_many(node: Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and not lay.same_size(value.numel(), 1)


def same_positions(a: Join, b: Join) -> bool:
    """Whether two writes go to the same positions: the same number, the same node, or nodes computed alike."""
    return _alike(a.start, b.start)


def _alike(a: Any, b: Any) -> bool:
    if not (isinstance(a, Node) and isinstance(b, Node)):
        return not isinstance(a, Node) and not isinstance(b, Node) and lay.same_size(a, b)
    if a is b:
        return True
    if a.op != "call_function" or a.target is not b.target or len(a.args) != len(b.args) or a.kwargs != b.kwargs:
        return False
    return all(_alike_argument(x, y) for x, y in zip(a.args, b.args, strict=True))


def _alike_argument(x: Any, y: Any) -> bool:
    return _alike(x, y) if isinstance(x, Node) and isinstance(y, Node) else x == y
