"""Tell the batch, head, token and channel axes of a written-out attention apart.

The two products tell: keys and queries share the batch and head axes, the softmax runs along the keys' tokens, and the
channels are summed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from think_compile.passes.find.product import Product
from think_compile.passes.find.region import Masking, Order, Region
from think_compile.passes.layout import Atom, Axes, equal_size, same_size
from think_compile.passes.refusal import Reason, Refused, where


@dataclass(frozen=True)
class QueryLayout:
    """The permutations between a product's queries and logits and [B, Hq, N, D] and [B, Hq, N, S].

    Attributes:
        queries: permutation of the query operand: batch and head axes, N, D.
        logits: permutation of the logits: batch and head axes, N, S.
    """

    queries: tuple[int, ...]
    logits: tuple[int, ...]


def key_axes(region: Region, axes: Axes) -> Axes:
    """The ``axes`` of the key operand in the order [B, H, S, D]."""
    product = region.logits
    token = product.out[region.token_axis][1]
    assert token is not None
    return _arranged(product, axes, token, product.contracted[1])


def value_axes(region: Region, axes: Axes) -> Axes:
    """The ``axes`` of the value operand in the order [B, H, S, Dv]."""
    product = region.output
    own = [right for left, right in product.out if left is None]
    if len(own) != 1 or own[0] is None:
        raise Refused(Reason.UNKNOWN_LAYOUT, where(product.node))
    return _arranged(product, axes, product.contracted[1], own[0])


def _arranged(product: Product, axes: Axes, token: int, channel: int) -> Axes:
    """The right operand's axes as [B, H, S, D]; batch and heads are the axes shared with the left operand."""
    shared: list[Atom] = []
    for left, right in product.out:
        if right is not None and right not in (token, channel):
            shared += _shared_atoms(product, axes, left, right)
    own = [i for i, atom in enumerate(shared) if atom.axis is not None]
    if len(own) not in (1, 2):  # one: batch and heads merged; each row is a sequence of one head
        raise Refused(Reason.UNKNOWN_LAYOUT, f"batch and heads are not two axes at {where(product.node)}")
    batch, heads = [*shared[: own[0] + 1]], shared[own[0] + 1 :]
    return [batch, heads, axes[token], axes[channel]]


def _shared_atoms(product: Product, axes: Axes, left: int | None, right: int) -> list[Atom]:
    """The atoms of a shared axis of the operands; a broadcast axis of the keys repeats the heads."""
    if left is None:
        raise Refused(Reason.UNKNOWN_LAYOUT, f"the queries lack an axis of the keys at {where(product.node)}")
    size, wanted = product.right.meta["val"].shape[right], product.left.meta["val"].shape[left]
    if same_size(size, wanted):
        return [atom for atom in axes[right] if atom.axis is not None or not same_size(atom.size, 1)]
    if not same_size(size, 1):
        raise Refused(Reason.UNKNOWN_LAYOUT, f"queries that are broadcast at {where(product.node)}")
    return [*[atom for atom in axes[right] if atom.axis is not None], Atom(wanted, None)]


def query_layout(region: Region, n_new: Any) -> QueryLayout:
    """The layout of queries and logits; the size ``n_new`` tells the queries' token axis from a group axis."""
    product = region.logits
    rows = [i for i, (_, right) in enumerate(product.out) if right is None]
    sizes = product.node.meta["val"].shape
    tokens = rows if len(rows) == 1 else [i for i in rows if equal_size(sizes[i], n_new)]
    if len(tokens) != 1:
        raise Refused(Reason.UNKNOWN_LAYOUT, f"the queries' tokens cannot be told apart at {where(product.node)}")
    others = [i for i in range(len(product.out)) if i not in (tokens[0], region.token_axis)]
    if any(product.out[i][1] is None for i in others[:1]) or not _heads_lead(product, others):
        raise Refused(Reason.UNKNOWN_LAYOUT, f"a group of queries stands before its head at {where(product.node)}")
    queries = [product.out[i][0] for i in (*others, tokens[0])]
    assert all(axis is not None for axis in queries)
    return QueryLayout((*queries, product.contracted[0]), (*others, tokens[0], region.token_axis))


def _heads_lead(product: Product, others: Sequence[int]) -> bool:
    """Whether the queries' own axes (groups) come after all axes of the keys."""
    alone = [product.out[i][1] is None for i in others]
    return alone == sorted(alone)


def to_product_order(axes: Order) -> tuple[int, ...] | None:
    """The permutation of moved, split or merged axes back to the product's order; None if there is none."""
    if any(part > 2 for atoms in axes for _, part in atoms):
        return None  # split more than once
    order = sorted(range(len(axes)), key=lambda i: axes[i][:1] or ((-1, 0),))
    flat = [atom for i in order for atom in axes[i]]
    return tuple(order) if flat == sorted(flat) else None


def usable_masks(region: Region) -> list[Masking]:
    """The maskings that can be expressed in the product's own axes."""
    logits, token = region.logits.node.meta["val"], region.token_axis
    return [m for m in region.masks if to_product_order(m.axes) is not None and _as_many(m, logits.shape[token], token)]


def _as_many(masking: Masking, size: Any, token: int) -> bool:
    """Whether the masked logits have as many columns as the product: no sinks yet."""
    dims = [dim for dim, axes in enumerate(masking.axes) if (token, 0) in axes]
    return len(dims) == 1 and same_size(masking.at.meta["val"].shape[dims[0]], size)
