"""Written-out attention: a product, a softmax over one of its axes, and a product with a sum over this axis.

Operations between them are accepted and left alone. Only masks are examined, since scoring leaves padding out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from think_compile.passes import layout
from think_compile.passes.find.product import Product, product_of
from think_compile.passes.walks import is_floating

aten = torch.ops.aten
Order = tuple[tuple[tuple[int, int], ...], ...]  # for each axis its factors (axis, part), outermost first
MASKED_BELOW = -1e3  # a fill of at most this hides a position


@dataclass(frozen=True)
class Masking:
    """A mask and the masked logits.

    Attributes:
        mask: broadcast to the shape of ``at``.
        kind: "add" (float, added), "allow" or "block" (bool).
        at: the masked logits.
        axes: the axes of ``at``, as axes of the product or parts of them.
    """

    mask: Node
    kind: str
    at: Node
    axes: Order


@dataclass(frozen=True)
class Region:
    """A written-out attention.

    Attributes:
        softmax: the softmax.
        logits: the product of queries (left) and keys (right).
        token_axis: the softmax's axis of the logits: the keys' tokens.
        output: the product of probabilities (left) and values (right).
        masks: the maskings of the logits, in order.
        axes: the axes of the probabilities in ``output``, as axes of ``logits`` or parts of them.
        dropout: probability.
    """

    softmax: Node
    logits: Product
    token_axis: int
    output: Product
    masks: tuple[Masking, ...]
    axes: Order
    dropout: float


@dataclass(frozen=True)
class _Step:
    """A tensor made from the product, and its axes."""

    node: Node
    axes: layout.Axes
    masks: tuple[Masking, ...] = ()
    softmax: Node | None = None
    token_axis: int | None = None  # the softmax's axis of the product
    dropout: float = 0.0

    def axis_of(self, dim: int) -> int | None:
        """The axis of the product at axis ``dim``; None: several axes, or a part of one."""
        atoms = [atom for atom in self.axes[dim % len(self.axes)] if atom.axis is not None]
        return atoms[0].axis if len(atoms) == 1 and not atoms[0].part else None

    @property
    def order(self) -> Order:
        return tuple(tuple((a.axis, a.part) for a in atoms if a.axis is not None) for atoms in self.axes)


def find_regions(graph: Graph) -> list[Region]:
    """All regions, in graph order."""
    products = [product for node in graph.nodes if (product := product_of(node)) is not None]
    return [region for product in products for region in _regions_from(product)]


def _regions_from(product: Product) -> Iterator[Region]:
    """Follow a product through a softmax to the products with a sum over the softmax's axis."""
    shape = product.node.meta["val"].shape
    todo, seen = [_Step(product.node, layout.source_axes(shape))], {product.node}
    while todo:
        step = todo.pop()
        for user in step.node.users:
            if step.softmax is not None and (output := _output(user, step)) is not None:
                yield from _region(product, step, output)
            elif user not in seen and (after := _after(user, step)) is not None:
                seen.add(user)
                todo.append(after)


def _region(product: Product, step: _Step, output: Product) -> Iterator[Region]:
    assert step.softmax is not None and step.token_axis is not None
    oriented = _oriented(product, step.token_axis)
    # queries and keys share batch and heads; a router and its input share no axis
    if oriented is not None and any(None not in axes for axes in oriented.out):
        yield Region(step.softmax, oriented, step.token_axis, output, step.masks, step.order, step.dropout)


def _oriented(product: Product, token_axis: int) -> Product | None:
    """The product with the keys on the right: only they have the softmax's axis. None if both or neither have it."""
    left, right = product.out[token_axis]
    if (left is None) == (right is None):
        return None
    return product if left is None else product.flipped()


def _output(user: Node, step: _Step) -> Product | None:
    """The product of the probabilities (left) with the values, over the tokens."""
    product = product_of(user)
    for candidate in (product, product.flipped()) if product is not None else ():
        if candidate.left is step.node and candidate.right is not step.node:
            return candidate if step.axis_of(candidate.contracted[0]) == step.token_axis else None
    return None


# ------------------------------------------------------------------------------------------------ one operation


def _after(user: Node, step: _Step) -> _Step | None:
    """The step after ``user``, or None if ``user`` is not part of the region."""
    if user.op != "call_function" or not isinstance(user.meta.get("val"), torch.Tensor):
        return None
    if user.target in SOFTMAXES:
        return _after_softmax(user, step, user.args[1])
    if user.target is aten.div.Tensor and user.args[0] is step.node and _is_sum_of(user.args[1], step.node):
        return _after_softmax(user, step, _dims(user.args[1])[0])
    if user.target is aten.exp.default and (dim := _less_its_logsumexp(step.node)) is not None:
        return _after_softmax(user, step, dim)
    if layout.layout_input(user) is step.node:
        return _moved(user, step)
    if user.target in (aten.cat.default, aten.slice.Tensor):
        return _lengthened(user, step)
    return _pointwise(user, step)


SOFTMAXES = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
DROPOUTS = {aten.dropout.default, aten.native_dropout.default}


def _after_softmax(user: Node, step: _Step, dim: int) -> _Step | None:
    axis = step.axis_of(dim)
    if axis is None or step.softmax is not None:
        return None
    return replace(step, node=user, softmax=user, token_axis=axis)


def _dims(reduction: Node) -> list[int]:
    dims = reduction.args[1] if len(reduction.args) > 1 else []
    return [dims] if isinstance(dims, int) else list(dims)


def _is_sum_of(node: Any, summed: Node) -> bool:
    """Whether ``node`` is the sum along one axis of ``summed``, an exponential: a written-out softmax."""
    if not isinstance(node, Node):
        return False
    node, _ = layout.walk_back(node)
    if node.target is not aten.sum.dim_IntList or len(_dims(node)) != 1:
        return False
    source, _ = layout.walk_back(node.args[0])
    exponential, _ = layout.walk_back(summed)
    return source is exponential and exponential.target is aten.exp.default


def _less_its_logsumexp(node: Node) -> int | None:
    """The axis of the logsumexp in ``x - logsumexp(x)``, or None: another way to write a softmax."""
    if node.target is not aten.sub.Tensor or not isinstance(node.args[1], Node):
        return None
    total, _ = layout.walk_back(node.args[1])
    if total.target is not aten.logsumexp.default or len(_dims(total)) != 1:
        return None
    return _dims(total)[0] if layout.walk_back(total.args[0])[0] is layout.walk_back(node.args[0])[0] else None


def _moved(user: Node, step: _Step) -> _Step | None:
    try:
        axes = layout.apply(user, step.axes)
    except layout.NotLayout:
        return None
    return replace(step, node=user, axes=axes)


def _lengthened(user: Node, step: _Step) -> _Step | None:
    """A cat with more columns (attention sinks), or a slice of columns: the axis keeps its meaning."""
    is_cat, dim = user.target is aten.cat.default, layout.arguments_of(user)["dim"]
    columns_match = user.args[0][0] is step.node if is_cat else layout.value_of(layout.slice_bounds(user)[1]) == 0
    is_last = dim % len(step.axes) == len(step.axes) - 1
    return replace(step, node=user) if columns_match and is_last and step.axis_of(dim) is not None else None


def _pointwise(user: Node, step: _Step) -> _Step | None:
    """A pointwise operation, possibly with other, broadcast tensors."""
    is_dropout = user.target in DROPOUTS
    if not (is_dropout or _name(user) in _CHOICES or torch.Tag.pointwise in getattr(user.target, "tags", ())):
        return None
    rank, own = user.meta["val"].dim(), len(step.axes)
    axes: layout.Axes = [[layout.Atom(1, None)] for _ in range(rank - own)] + step.axes
    p, is_on = user.args[1:3] if is_dropout else (0.0, False)
    after = replace(step, node=user, axes=axes, dropout=step.dropout + (float(p) if is_on else 0.0))
    if step.softmax is not None:
        return after
    return replace(after, masks=(*step.masks, *_maskings(user, step.node, after.order)))


_CHOICES = ("aten::where", "aten::masked_fill")  # not tagged as pointwise in all their forms


def _name(node: Node) -> str:
    return node.target.name().split(".")[0] if isinstance(node.target, torch._ops.OpOverload) else ""


def _maskings(user: Node, logits: Node, axes: Order) -> Iterator[Masking]:
    if user.target is aten.add.Tensor:
        for other in user.args:
            if isinstance(other, Node) and other is not logits and is_floating(other):
                yield Masking(other, "add", user, axes)
    if _name(user) == "aten::masked_fill" and _hides(user.args[2]):
        yield Masking(user.args[1], "block", user, axes)
    if _name(user) == "aten::where" and len(user.args) == 3:
        condition, chosen, other = user.args
        if chosen is logits and _hides(other):
            yield Masking(condition, "allow", user, axes)
        elif other is logits and _hides(chosen):
            yield Masking(condition, "block", user, axes)


def _hides(fill: Any) -> bool:
    """Whether the value that replaces masked logits is known to be very small."""
    if isinstance(fill, Node):
        fill, _ = layout.walk_back(fill)
        makers = (aten.full.default, aten.scalar_tensor.default, aten.full_like.default)
        fill = fill.args[0 if fill.target is aten.scalar_tensor.default else 1] if fill.target in makers else 0
    return isinstance(fill, (int, float)) and fill <= MASKED_BELOW
