"""Products of two tensors with a sum over one axis, in one form: ``matmul``, ``bmm``, ``baddbmm``, ``einsum``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten
Axis = int | None


@dataclass(frozen=True)
class Product:
    """``node = alpha * sum over the contracted axis of (left * right) + beta * bias``.

    Attributes:
        left, right: the operands.
        contracted: the summed axis of each operand.
        out: for each axis of ``node``, its axes in left and right (None: not an axis of this operand).
        alpha, bias, beta: as in the formula.
    """

    node: Node
    left: Node
    right: Node
    contracted: tuple[int, int]
    out: tuple[tuple[Axis, Axis], ...]
    alpha: Any = 1
    bias: Node | None = None
    beta: Any = 1

    def flipped(self) -> Product:
        """The same product with its operands exchanged."""
        out = tuple((right, left) for left, right in self.out)
        return replace(self, left=self.right, right=self.left, contracted=self.contracted[::-1], out=out)


def product_of(node: Node) -> Product | None:
    """``node`` as a product, or None."""
    if node.op != "call_function" or node.target not in _READERS:
        return None
    return _READERS[node.target](node)


def _rank(node: Node) -> int:
    return node.meta["val"].dim()


def _matmul(node: Node) -> Product | None:
    left, right = node.args[:2]
    n, m, rank = _rank(left), _rank(right), _rank(node)
    if min(n, m) < 2:
        return None
    batch = [(_aligned(i, rank, n), _aligned(i, rank, m)) for i in range(rank - 2)]
    out: tuple[tuple[Axis, Axis], ...] = (*batch, (n - 2, None), (None, m - 1))
    return Product(node, left, right, (n - 1, m - 2), out)


def _aligned(axis: int, rank: int, own_rank: int) -> Axis:
    """``axis`` of a broadcast result of ``rank`` axes, as an axis of an operand of ``own_rank`` axes; None: added."""
    own = axis - (rank - own_rank)
    return own if own >= 0 else None


def _baddbmm(node: Node) -> Product | None:
    bias, left, right = node.args[:3]
    out: tuple[tuple[Axis, Axis], ...] = ((0, 0), (1, None), (None, 2))
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    return Product(node, left, right, (2, 1), out, alpha, bias, beta)


def _einsum(node: Node) -> Product | None:
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])
    if len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    inputs, result = equation.split("->")
    a, b = inputs.split(",")
    summed = [c for c in a if c in b and c not in result]
    plain = all(len(set(letters)) == len(letters) for letters in (a, b, result))
    if len(summed) != 1 or not plain or set(result) != (set(a) | set(b)) - set(summed):
        return None
    out = tuple((_find(a, c), _find(b, c)) for c in result)
    return Product(node, operands[0], operands[1], (a.index(summed[0]), b.index(summed[0])), out)


def _find(letters: str, letter: str) -> Axis:
    return letters.index(letter) if letter in letters else None


_READERS = {
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.baddbmm.default: _baddbmm,
    aten.einsum.default: _einsum,
}
