"""Follow the axes of a tensor through operations that only move, split, merge or repeat axes.

An axis is a list of atoms: factors of the source's axes, in order. Repeating adds atoms without a source axis. The head
axis of repeated keys is [heads of the source, copies]; a merged [batch*head] axis is [batch, head]. One algebra serves
every layout, and no layout is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, guard_or_false, statically_known_true

aten = torch.ops.aten
Size = Any  # int or torch.SymInt
EVERYTHING = 2**62  # a slice end of at least this means "to the end"

VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}
_CUTS = {aten.slice.Tensor, aten.select.int, aten.narrow.default}
SAME = {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.type_as.default,
}
MOVES = {
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.slice.Tensor,
}
SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
LAYOUT_OPS = VIEWS | SAME | MOVES


@dataclass(frozen=True)
class Atom:
    """A factor of ``axis`` of the source (None: made by repeating); a split makes parts 2 * part + 1, 2 * part + 2."""

    size: Size
    axis: int | None
    part: int = 0


Axes = list[list[Atom]]


def place(part: int) -> tuple[int, ...]:
    """The path to a part of an axis: at each split, outer (0) or inner (1). The parts of an axis sort by path."""
    way: list[int] = []
    while part:
        way.append((part - 1) % 2)
        part = (part - 1) // 2
    return tuple(reversed(way))


class NotLayout(Exception):
    """An operation does more than move axes; the message names the operation."""


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are known to be equal (without guarding on it)."""
    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else statically_known_true(a == b)


def equal_size(a: Size, b: Size) -> bool:
    """Whether two sizes are equal in this call; an answer that was unknown becomes a guard of the caller's graph."""
    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else guard_or_false(a == b)


def is_unknown(size: Size) -> bool:
    """Whether a size is read from a tensor, and so unknown to a trace."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def source_axes(shape: Sequence[Size]) -> Axes:
    """The axes of the source itself."""
    return [[Atom(size, axis)] for axis, size in enumerate(shape)]


def layout_input(node: Node) -> Node | None:
    """The tensor whose axes ``node`` arranges, or None if ``node`` is no layout operation."""
    if node.op != "call_function":
        return None
    if node.target is aten.slice_scatter.default:  # all is overwritten: the result is the written tensor
        return node.args[1] if slice_keeps_all(node) else None
    if node.target is aten.copy.default:  # the old content is gone
        return node.args[1] if _same_kind(node.args[1], node) else None
    if node.target is aten.slice.Tensor and not slice_keeps_all(node):
        return None
    if node.target in LAYOUT_OPS:
        return node.args[0]
    return None


def rounds(node: Node) -> bool:
    """Whether a layout operation casts to a dtype that cannot hold all values of the input's dtype."""
    before, after = (x.meta["val"].dtype for x in (layout_input(node) or node, node))
    return torch.promote_types(before, after) != after


def arranged(node: Node) -> Iterator[Node]:
    """All results of layout operations and cuts of ``node``."""
    for user in node.users:
        if layout_input(user) is node or (user.target in _CUTS and user.args[0] is node):
            yield user
            yield from arranged(user)


def _same_kind(a: Node, b: Node) -> bool:
    """Whether two tensors are known to have the same shape and dtype."""
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and x.dim() == y.dim() and all(map(same_size, x.shape, y.shape))


def scaled_input(node: Node) -> Node | None:
    """The tensor multiplied or divided by one number (:func:`scale_of`) in ``node``, or None."""
    if node.op != "call_function" or node.target not in SCALES:
        return None
    tensor, number = node.args[:2]
    if node.target is aten.mul.Tensor and _is_number(tensor):
        tensor, number = number, tensor
    return tensor if isinstance(tensor, Node) and _is_number(number) and not _is_number(tensor) else None


def scale_of(node: Node) -> Any:
    """The factor or divisor of a scaling ``node``: a constant or a node."""
    return node.args[0] if node.args[1] is scaled_input(node) else node.args[1]


def _is_number(arg: Any) -> bool:
    value = value_of(arg)
    return value.dim() == 0 if isinstance(value, torch.Tensor) else isinstance(value, (int, float))


def walk_back(node: Node, stop: Node | None = None, *, scaled: bool = False) -> tuple[Node, list[Node]]:
    """The tensor from which layout operations make ``node``, and these operations in execution order.

    Stops at ``stop``. ``scaled``: also through multiplications and divisions by one number.
    """
    chain: list[Node] = []
    while node is not stop:
        source = layout_input(node) or (scaled_input(node) if scaled else None)
        if source is None:
            break
        chain.append(node)
        node = source
    return node, chain[::-1]


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments of a call of an operator by name, in the order of its schema, with its defaults."""
    schema = list(enumerate(node.target._schema.arguments))
    return {a.name: node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value) for i, a in schema}


def slice_bounds(node: Node) -> tuple[int, Any, Any, Any]:
    """(dim, start, end, step) of a slice or slice_scatter node."""
    dim, start, end, step = (arguments_of(node)[name] for name in ("dim", "start", "end", "step"))
    return dim, 0 if start is None else start, EVERYTHING if end is None else end, step


def value_of(arg: Any) -> Any:
    """The fake value of a node, or the constant itself."""
    return arg.meta["val"] if isinstance(arg, Node) else arg


def slice_keeps_all(node: Node) -> bool:
    """Whether a slice keeps its whole axis."""
    return runs_from_zero(node) and runs_to_end(node)


def runs_from_zero(node: Node) -> bool:
    """Whether a slice takes an axis from its first element, without a step."""
    _, start, _, step = slice_bounds(node)
    return step == 1 and same_size(value_of(start), 0)


def runs_to_end(node: Node) -> bool:
    """Whether a slice takes an axis up to its last element, without a step."""
    dim, _, end, step = slice_bounds(node)
    end = value_of(end)
    is_everything = isinstance(end, int) and end >= EVERYTHING
    return step == 1 and (is_everything or same_size(end, node.args[0].meta["val"].shape[dim]))


def uncopied(rows: Node) -> Node:
    """The rows of a write, before their copy into a slice of the target."""
    return layout_input(rows) or rows if rows.target is aten.copy.default else rows


def indexed_axis(node: Node) -> tuple[int, Node] | None:
    """The only indexed axis of an index_put, and its index; None: several axes."""
    given = [(dim, index) for dim, index in enumerate(node.args[1]) if index is not None]
    return given[0] if len(given) == 1 else None


def apply(node: Node, axes: Axes) -> Axes:
    """The axes after ``node``, a layout operation on a tensor with ``axes``."""
    target = node.target
    if target in SAME or target in SCALES or target in (aten.slice_scatter.default, aten.copy.default):
        return axes
    if target in VIEWS:
        return _regroup(axes, node.meta["val"].shape)
    if target is aten.permute.default:
        return [axes[d] for d in node.args[1]]
    if target is aten.transpose.int:
        a, b = node.args[1:3]
        swapped = list(axes)
        swapped[a], swapped[b] = axes[b], axes[a]
        return swapped
    if target is aten.unsqueeze.default:
        at = node.args[1] % (len(axes) + 1)
        return [*axes[:at], [Atom(1, None)], *axes[at:]]
    if target is aten.squeeze.dim:
        return _squeezed(axes, node.args[1])
    if target is aten.slice.Tensor:
        return axes if slice_keeps_all(node) else _prefix(node, axes)
    return _repeated(node, axes)


def follow(chain: Sequence[Node], axes: Axes) -> Axes:
    """The axes at the end of a chain of layout operations."""
    for node in chain:
        axes = apply(node, axes)
    return axes


def _prefix(node: Node, axes: Axes) -> Axes:
    """The axes after a slice of the first part of one whole axis."""
    dim = slice_bounds(node)[0] % len(axes)
    if len(axes[dim]) != 1 or axes[dim][0].part:
        raise NotLayout("a slice of a merged axis")
    shorter = Atom(node.meta["val"].shape[dim], axes[dim][0].axis)
    return [*axes[:dim], [shorter], *axes[dim + 1 :]]


def _squeezed(axes: Axes, dim: int) -> Axes:
    dim %= len(axes)
    if not all(same_size(atom.size, 1) for atom in axes[dim]):
        return axes
    return [*axes[:dim], *axes[dim + 1 :]]


def _repeated(node: Node, axes: Axes) -> Axes:
    if node.target is aten.expand.default:
        return _expanded(axes, node.meta["val"].shape)
    if node.target is aten.repeat.default:
        times = node.args[1]
        padded: Axes = [[] for _ in range(len(times) - len(axes))] + axes
        return [atoms if n == 1 else [Atom(n, None), *atoms] for n, atoms in zip(times, padded, strict=True)]
    repeats, dim = (arguments_of(node)[name] for name in ("repeats", "dim"))
    if dim is None or not isinstance(repeats, int):
        raise NotLayout("repeat_interleave flattens")
    return [[*atoms, Atom(repeats, None)] if i == dim % len(axes) else atoms for i, atoms in enumerate(axes)]


def _expanded(axes: Axes, shape: Sequence[Size]) -> Axes:
    padded: Axes = [[Atom(1, None)] for _ in range(len(shape) - len(axes))] + axes
    out = []
    for atoms, size in zip(padded, shape, strict=True):
        grown = same_size(_product(atoms), 1) and not same_size(size, 1)
        out.append([*atoms, Atom(size, None)] if grown else atoms)
    return out


def _product(atoms: Sequence[Atom]) -> Size:
    return math.prod(atom.size for atom in atoms)


def _regroup(axes: Axes, shape: Sequence[Size]) -> Axes:
    """The axes after a view: the same atoms in the same order, regrouped; an atom across two axes is split."""
    flat = [atom for atoms in axes for atom in atoms]
    out: Axes = []
    for size in shape:
        taken, flat = _take(flat, size)
        out.append(taken)
    if any(not same_size(atom.size, 1) for atom in flat):
        raise NotLayout("a view whose axes cannot be followed")
    if out and flat:
        out[-1] = [*out[-1], *flat]
    return out


def _take(flat: list[Atom], size: Size) -> tuple[list[Atom], list[Atom]]:
    """The leading atoms whose sizes multiply to ``size``, and the rest."""
    if same_size(size, 1):
        is_one = bool(flat) and same_size(flat[0].size, 1)
        return (flat[:1], flat[1:]) if is_one else ([Atom(1, None)], flat)
    taken: list[Atom] = []
    while flat and not same_size(_product(taken), size):
        head, done = flat[0], _product(taken)
        if not _must_split(head, done, size):
            taken, flat = [*taken, head], flat[1:]
            continue
        outer = Atom(size // done, head.axis, head.part * 2 + 1)
        inner = Atom(head.size // outer.size, head.axis, head.part * 2 + 2)
        taken, flat = [*taken, outer], [inner, *flat[1:]]
    if not same_size(_product(taken), size):
        raise NotLayout("a view whose axes cannot be followed")
    return taken, flat


def _must_split(atom: Atom, done: Size, size: Size) -> bool:
    """Whether an atom exceeds an axis of ``size`` filled up to ``done``; raises if no split fits."""
    if not all(isinstance(n, int) for n in (atom.size, done, size)):
        outer = size // done
        is_whole = same_size(atom.size, outer)
        return not is_whole and same_size(outer * (atom.size // outer), atom.size) and same_size(done * outer, size)
    if done * atom.size <= size:
        return False
    if size % done or atom.size % (size // done):
        raise NotLayout("a view that cuts across axes")
    return True


def stride_order(value: torch.Tensor) -> list[int]:
    """The axes from the largest stride to the smallest: how the tensor lies in memory."""
    strides = [_hint(stride) for stride in value.stride()]
    sizes = [_hint(size) for size in value.shape]
    real = sorted((i for i in range(value.dim()) if sizes[i] != 1), key=lambda i: -strides[i])
    ones = [i for i in range(value.dim()) if sizes[i] == 1]
    for i in ones:  # the stride of an axis of size one says nothing: keep its place
        real.insert(min(i, len(real)), i)
    return real


def _hint(size: Size) -> int:
    return size if isinstance(size, int) else size.node.hint
