"""Rewrite equivalent cache writes and attention calls into the forms read by the later passes.

A write by select_scatter, scatter or where becomes a slice_scatter or an index_copy. An assignment to positions gets
rows with all axes. A roll with new rows at the end becomes a cat. An attention without a head axis gets one. Each new
form is known to compute the same; other operations stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from think_compile.passes import layout

aten = torch.ops.aten
Rule = Callable[[GraphModule, Node], Node | None]


def canonicalize(graph_module: GraphModule) -> int:
    """Rewrite in place; returns the number of rewritten operations."""
    count = 0
    for node in list(graph_module.graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is None:
            continue
        with graph_module.graph.inserting_before(node):
            new = rule(graph_module, node)
        if new is not None:
            node.replace_all_uses_with(new)
            graph_module.graph.erase_node(node)
            count += 1
    if count:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
    return count


def _call(graph_module: GraphModule, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new call with a fake value, and with the module stack and stack trace of ``like``."""
    node = graph_module.graph.call_function(target, args, kwargs)
    node.meta = {name: value for name, value in like.meta.items() if name in ("nn_module_stack", "stack_trace")}
    values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    return node


def _same_shape(a: Node, b: Node, but: int | None = None) -> bool:
    """Whether two tensors have the same shape, except for axis ``but``."""
    x, y = a.meta["val"].shape, b.meta["val"].shape
    return len(x) == len(y) and all(
        i == but or layout.same_size(m, n) for i, (m, n) in enumerate(zip(x, y, strict=True))
    )


def _select_scatter(graph_module: GraphModule, node: Node) -> Node | None:
    """``base[..., i, ...] = row``: a slice_scatter of one row."""
    base, row, dim, index = node.args
    if isinstance(index, Node) or not isinstance(index, int):
        return None
    dim %= base.meta["val"].dim()
    size = base.meta["val"].shape[dim]
    if index < 0 and not isinstance(size, int):
        return None
    index = index + size if index < 0 else index
    rows = _call(graph_module, node, aten.unsqueeze.default, layout.uncopied(row), dim)
    return _call(graph_module, node, aten.slice_scatter.default, base, rows, dim, index, index + 1)


def _scatter(graph_module: GraphModule, node: Node) -> Node | None:
    """``base.scatter(dim, positions repeated over every other axis, rows)``."""
    base, dim, index, rows = node.args
    dim %= base.meta["val"].dim()
    positions, chain = layout.walk_back(index)
    if not (_same_shape(index, rows) and _same_shape(base, rows, but=dim)):
        return None
    n_positions = positions.meta["val"].numel()
    if layout.same_size(n_positions, 1):
        positions = _call(graph_module, node, aten.reshape.default, positions, [1])
    else:
        fills_axis = layout.same_size(n_positions, rows.meta["val"].shape[dim])
        if not fills_axis or _own_axis(positions, chain) != dim - base.meta["val"].dim():
            return None
    return _call(graph_module, node, aten.index_copy.default, base, dim, positions, rows)


def _own_axis(source: Node, chain: list[Node]) -> int | None:
    """The only axis along which a ``source`` [N] varies after views and copies, counted from the last; else None."""
    if source.meta["val"].dim() != 1:
        return None
    try:
        axes = layout.follow(chain, layout.source_axes(source.meta["val"].shape))
    except layout.NotLayout:
        return None
    own = [i for i, atoms in enumerate(axes) for atom in atoms if atom.axis is not None]  # two for a split axis
    return own[0] - len(axes) if len(own) == 1 else None


def _where(graph_module: GraphModule, node: Node) -> Node | None:
    """``where(arange == position, row, base)`` along one axis."""
    condition, row, base = node.args
    if not (_is_tensor(row) and _is_tensor(base)) or row.meta["val"].dtype != base.meta["val"].dtype:
        return None
    hit, chain = layout.walk_back(condition)
    dim = _hit_axis(hit, chain, base)
    position = None if dim is None else _position(hit)
    if dim is None or position is None or not _same_shape(base, row, but=dim):
        return None
    if not (layout.same_size(row.meta["val"].shape[dim], 1) and _same_shape(base, node)):
        return None
    if isinstance(position, int):
        return _call(graph_module, node, aten.slice_scatter.default, base, row, dim, position, position + 1)
    index = _call(graph_module, node, aten.reshape.default, position, [1])
    return _call(graph_module, node, aten.index_copy.default, base, dim, index, row)


def _is_tensor(arg: Any) -> bool:
    return isinstance(arg, Node) and isinstance(arg.meta["val"], torch.Tensor)


def _hit_axis(hit: Node, chain: list[Node], base: Node) -> int | None:
    """The axis of ``base`` covered by the comparison ``hit``, through the views ``chain``, or None."""
    axis = _own_axis(hit, chain) if hit.target in (aten.eq.Tensor, aten.eq.Scalar) else None
    if axis is None:
        return None
    shape = base.meta["val"].shape
    dim = axis + len(shape)
    return dim if dim >= 0 and layout.same_size(hit.meta["val"].shape[0], shape[dim]) else None


def _position(hit: Node) -> Node | int | None:
    """The one position of ``arange == position``: an int64 tensor, or a number >= 0; else None."""
    for columns, position in (hit.args[:2], hit.args[1::-1]):
        if not isinstance(columns, Node) or not _counts_from_zero(layout.walk_back(columns)[0]):
            continue
        if isinstance(position, int):
            return position if position >= 0 else None
        if _is_tensor(position) and position.meta["val"].dtype == torch.int64:
            return position if layout.same_size(position.meta["val"].numel(), 1) else None
    return None


def _counts_from_zero(node: Node) -> bool:
    if node.target is aten.arange.start:
        return node.args[0] == 0
    return node.target is aten.arange.default


def _index_put(graph_module: GraphModule, node: Node) -> Node | None:
    return _rolled_index_put(graph_module, node) or _index_put_of_all_axes(graph_module, node)


def _index_put_of_all_axes(graph_module: GraphModule, node: Node) -> Node | None:
    """``x[:, :, positions] = rows`` of one sequence, where ``rows`` lack the axes of size one in front."""
    base, indices, rows = node.args[:3]
    indexed = layout.indexed_axis(node)
    if indexed is None or rows.meta["val"].dim() >= base.meta["val"].dim():
        return None
    dim, index = indexed
    rows = _with_axes_in_front(graph_module, node, rows, base)
    shape = rows.meta["val"].shape
    if not _same_shape(rows, base, but=dim) or not layout.same_size(shape[dim], index.meta["val"].numel()):
        return None
    return _call(graph_module, node, node.target, base, indices, rows, *node.args[3:], **node.kwargs)


def _with_axes_in_front(graph_module: GraphModule, node: Node, rows: Node, base: Node) -> Node:
    """``rows`` with as many axes as ``base``: an assignment may omit axes of size one in front."""
    while rows.meta["val"].dim() < base.meta["val"].dim():
        rows = _call(graph_module, node, aten.unsqueeze.default, rows, 0)
    return rows


def _rolled_index_put(graph_module: GraphModule, node: Node) -> Node | None:
    """``x = base.roll(-n); x[:, -n:] = rows``, with a constant index."""
    base, _, rows = node.args[:3]
    indexed = layout.indexed_axis(node)
    if base.target is not aten.roll.default or any(node.args[3:]) or node.kwargs or indexed is None:
        return None
    dim, index = indexed
    positions = _constant(graph_module, index)
    if positions is None or positions.dtype == torch.bool or positions.dim() != 1:
        return None
    size, n = base.meta["val"].shape[dim], positions.numel()
    last = torch.arange(-n, 0)
    if not (torch.equal(positions, last) or (isinstance(size, int) and torch.equal(positions, size + last))):
        return None
    return _moved_up(graph_module, node, base, dim, n, rows)


def _rolled_slice_scatter(graph_module: GraphModule, node: Node) -> Node | None:
    """As :func:`_rolled_index_put`, with a slice to the end."""
    base, rows = node.args[:2]
    dim, start, _, _ = layout.slice_bounds(node)
    size = base.meta["val"].shape[dim]
    if base.target is not aten.roll.default or not layout.runs_to_end(node) or not isinstance(start, int):
        return None
    n = -start if start < 0 else size - start if isinstance(size, int) else 0
    return _moved_up(graph_module, node, base, dim, n, layout.uncopied(rows))


def _moved_up(graph_module: GraphModule, node: Node, roll: Node, dim: int, n: int, rows: Node) -> Node | None:
    """All but the first ``n`` rows of the rolled tensor, followed by ``rows``."""
    source, shifts, dims = layout.arguments_of(roll).values()
    rank = source.meta["val"].dim()
    if n < 1 or list(shifts) != [-n] or [d % rank for d in dims] != [dim % rank]:
        return None
    rows = _with_axes_in_front(graph_module, node, rows, source)
    if not _same_shape(rows, source, but=dim % rank) or not layout.same_size(rows.meta["val"].shape[dim], n):
        return None
    if rows.meta["val"].dtype != source.meta["val"].dtype:
        return None
    kept = _call(graph_module, node, aten.slice.Tensor, source, dim, n, layout.EVERYTHING)
    return _call(graph_module, node, aten.cat.default, [kept, rows], dim)


def _constant(graph_module: GraphModule, node: Any) -> torch.Tensor | None:
    """The value of a tensor held by the graph itself, such as a constant made from numbers, or None."""
    while isinstance(node, Node) and node.target in (aten.lift_fresh_copy.default, aten.detach.default):
        node = node.args[0]
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value = getattr(graph_module, str(node.target), None)
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return None
    return value.cpu()


def _unbatched_attention(graph_module: GraphModule, node: Node) -> Node | None:
    """Attention of [X, N, D] tensors: X sequences of one head."""
    operands = [*node.args[:3]]
    if any(operand.meta["val"].dim() != 3 for operand in operands):
        return None
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    q, k, v = (_call(graph_module, node, aten.unsqueeze.default, operand, 1) for operand in operands)
    if mask is not None and mask.meta["val"].dim() == 3:
        mask = _call(graph_module, node, aten.unsqueeze.default, mask, 1)
    rest = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
    out = _call(graph_module, node, node.target, q, k, v, mask, *node.args[4:], **rest)
    return _call(graph_module, node, aten.squeeze.dim, out, 1)


_RULES: dict[Any, Rule] = {
    aten.select_scatter.default: _select_scatter,
    aten.scatter.src: _scatter,
    aten.where.self: _where,
    aten.index_put.default: _index_put,
    aten.slice_scatter.default: _rolled_slice_scatter,
    aten.scaled_dot_product_attention.default: _unbatched_attention,
}
