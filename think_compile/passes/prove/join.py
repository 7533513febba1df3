"""How a cache tensor is joined from its past and the call's new rows: by ``cat``, or by a write at positions."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.utils._sympy.functions import Mod, PythonMod

from think_compile.cache.canonical import CHANNEL, Layout, token_axis
from think_compile.passes import layout
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.cache_layout import source_layout
from think_compile.passes.prove.window import Suffix, is_prefix, is_suffix, suffix_along
from think_compile.passes.refusal import Reason, Refused, where
from think_compile.passes.walks import ancestors, is_floating

aten = torch.ops.aten


@dataclass(frozen=True)
class Join:
    """How a cache tensor is joined.

    Attributes:
        past: index of the past's graph input; None: there is no past yet.
        past_layout: the layout of the past input.
        new: the call's own rows, with the axes of the joined tensor; None: the whole joined tensor is new.
        blank: fixed: there is no past, and unwritten rows are zeros or uninitialized.
        fixed: whether the rows are written into a tensor of fixed size.
        start: fixed: the first written position, an int or int node, or the node of all positions [N].
        consecutive: fixed: the positions are known to be start, start + 1, ...
        past_suffix: the joined last tokens of the past; None: all, whatever the past's length.
        past_prefix: number of joined first rows of the past, if the other rows are empty; None: all.
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


def join_of(normalized: Normalized, root: Node, roles: Layout) -> Join:
    """The join of ``root`` along its tokens; ``roles`` is its layout. Raises :class:`Refused` for an unknown join."""
    if root.target in WRITES and (write := WRITES[root.target](root)) and CHANNEL in roles[write.dim % len(roles)]:
        raise Refused(Reason.CHANNEL_MIXING, where(root))  # keys assembled from parts, as in latent attention
    if root.target is aten.cat.default:
        return _join_of_cat(normalized, root, roles)
    if root.target in WRITES:
        return _join_of_write(normalized, root, roles)
    if root.op == "placeholder":
        name = normalized.sources[normalized.placeholders.index(root)] or root.name
        raise Refused(Reason.NO_JOIN_SEEN, f"input {name}")
    return Join()


def _join_of_cat(normalized: Normalized, root: Node, roles: Layout) -> Join:
    dim = layout.arguments_of(root)["dim"]
    if dim % len(roles) != token_axis(roles):
        return Join()  # not a join with a past: it builds the keys, as in rotary embeddings
    parts = [part for part in root.args[0] if not layout.same_size(part.meta["val"].numel(), 0)]
    if len(parts) == 1:
        return Join()
    past, prefix = _past_input(normalized, parts[0], roles), None
    if past is None and is_prefix(parts[0]):
        past, prefix = _past_input(normalized, parts[0].args[0], roles), parts[0].meta["val"].shape[dim]
    if len(parts) != 2 or past is None:
        raise Refused(Reason.UNKNOWN_ROOT, where(root))
    index, past_layout, suffix = past
    if prefix is not None and (suffix is not None or not _along(parts[0], dim)):
        raise Refused(Reason.UNKNOWN_ROOT, where(root))
    return Join(index, past_layout, parts[1], past_suffix=suffix, past_prefix=prefix)


def _along(cut: Node, dim: int) -> bool:
    """Whether a slice cuts axis ``dim``."""
    return layout.slice_bounds(cut)[0] == dim % cut.meta["val"].dim()


def _past_input(normalized: Normalized, node: Node, roles: Layout) -> tuple[int, Layout, Suffix | None] | None:
    """The index, layout and joined suffix of a join's past input, or None; ``roles`` is the layout of the join."""
    source, chain = layout.walk_back(node)
    before: list[Node] = []
    cut = source if is_suffix(source) else None
    if cut is not None:
        source, before = layout.walk_back(cut.args[0])
        chain = [*before, cut, *chain]
    if source.op != "placeholder" or source.meta["val"].dtype != node.meta["val"].dtype:
        return None
    shape = source.meta["val"].shape
    past_layout = source_layout(layout.follow(chain, layout.source_axes(shape)), roles, shape)
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


def _join_of_write(normalized: Normalized, root: Node, roles: Layout) -> Join:
    write = WRITES[root.target](root)
    if write is None or write.dim % len(roles) != token_axis(roles):
        raise Refused(Reason.UNKNOWN_ROOT, where(root))
    if (wrapping := _wraps(write.start)) is not None:
        raise Refused(Reason.UNKNOWN_WINDOW, where(wrapping))
    joined = {"new": write.new, "fixed": True, "start": write.start, "consecutive": write.consecutive}
    past = _past_input(normalized, write.base, roles)
    if past is not None:
        index, past_layout, suffix = past
        if suffix is not None:
            raise Refused(Reason.UNKNOWN_WINDOW, where(root))
        return Join(index, past_layout, **joined)
    source, _ = layout.walk_back(write.base)
    if source.target is aten.roll.default:
        raise Refused(Reason.UNKNOWN_WINDOW, where(source))
    if source.target not in _FRESH:
        raise Refused(Reason.UNKNOWN_ROOT, where(source))
    return Join(**joined, blank=source.target is not aten.full.default or source.args[1] == 0)


def _index_copy(node: Node) -> _Write | None:
    base, dim, index, new = node.args
    return _Write(base, new, dim, index, _is_consecutive(index))


def _index_put(node: Node) -> _Write | None:
    base, _, new = node.args[:3]
    indexed = layout.indexed_axis(node)
    if layout.arguments_of(node)["accumulate"] or indexed is None or indexed[1].meta["val"].dim() != 1:
        return None
    dim, index = indexed
    if index.meta["val"].dtype == torch.bool or new.meta["val"].dim() != base.meta["val"].dim():
        return None
    return _Write(base, new, dim, index, _is_consecutive(index))


def _slice_scatter(node: Node) -> _Write | None:
    base, new = node.args[:2]
    dim, start, _, step = layout.slice_bounds(node)
    new = layout.uncopied(new)
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
_WRAPPING = (aten.remainder, aten.fmod, aten.bitwise_and, aten.__and__)
_REMAINDERS = {operator.mod, *(overload for op in _WRAPPING for overload in (op.Scalar, op.Tensor))}
_ARANGES = {aten.arange.default, aten.arange.start}


def _is_consecutive(index: Node) -> bool:
    """Whether an index tensor is an ``arange``, possibly plus one number, or a single position."""
    if layout.same_size(index.meta["val"].numel(), 1):
        return True
    source, chain = layout.walk_back(index)
    if any(not layout.same_size(n.meta["val"].numel(), source.meta["val"].numel()) for n in chain):
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
    """The operation, such as a remainder, for wrapping positions around at the end of a buffer; or None."""

    def integers(node: Node) -> list[Node]:
        return [source for source in node.all_input_nodes if not is_floating(source)]

    for node in ancestors(start, sources=integers) if isinstance(start, Node) else ():
        value = node.meta.get("val")
        if node.target in _REMAINDERS or (isinstance(value, torch.SymInt) and value.node.expr.has(Mod, PythonMod)):
            return node
    return None


def _is_many(node: Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and not layout.same_size(value.numel(), 1)


def computed_alike(a: Any, b: Any) -> bool:
    """Whether two arguments are the same constant, the same node, or nodes of the same computation."""
    if not (isinstance(a, Node) and isinstance(b, Node)):
        return not isinstance(a, Node) and not isinstance(b, Node) and layout.same_size(a, b)
    if a is b:
        return True
    if a.op != "call_function" or a.target is not b.target or len(a.args) != len(b.args) or a.kwargs != b.kwargs:
        return False
    return all(map(computed_alike, a.args, b.args))
