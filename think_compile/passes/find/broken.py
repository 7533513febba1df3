"""Partly recognised attention: cut in two by a graph break, or with heads or tokens mixed within.

Such a layer cannot be rewritten, but is still reported by name.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from think_compile.passes.find.attention import module_path
from think_compile.passes.find.product import product_of
from think_compile.passes.find.region import DROPOUTS, SOFTMAXES
from think_compile.passes.layout import walk_back
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.join import JOINS
from think_compile.passes.prove.readers import made_of
from think_compile.passes.refusal import Reason
from think_compile.passes.walks import is_floating


def broken_attention(normalized: Normalized) -> list[tuple[Node, Reason]]:
    """The recognised part of such attentions, one per layer: the softmax, or the product with cached keys."""
    products = [product for node in normalized.graph_module.graph.nodes if (product := product_of(node)) is not None]
    kept = {walk_back(output)[0] for output in normalized.outputs if isinstance(output, Node)}
    found: dict[Any, tuple[Node, Reason]] = {}
    followed: set[Node | None] = set()  # products with the values; their products with the keys are reported
    for product in products:
        if product.node in followed:
            continue
        for operand, other in ((product.left, product.right), (product.right, product.left)):
            softmax, (root, _) = _softmax_of(operand), walk_back(operand, scaled=True)
            if softmax is not None and _comes_from_outside(softmax.args[0]):
                found.setdefault(module_path(softmax) or softmax, (softmax, Reason.GRAPH_BREAK))
            elif root.target in JOINS and root in kept and all(node.target not in SOFTMAXES for node in made_of(other)):
                followed.add(following := _next_step(product.node))
                reason = Reason.GRAPH_BREAK if following is None else Reason.UNKNOWN_ATTENTION
                found.setdefault(module_path(product.node) or product.node, (product.node, reason))
    return list(found.values())


def _next_step(node: Node) -> Node | None:
    """A softmax or product of two tensors among the descendants of ``node``, or None."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user.target in SOFTMAXES or product_of(user) is not None:
                return user
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return None


def _softmax_of(node: Node) -> Node | None:
    """The softmax of the probabilities ``node``, dropout aside, or None."""
    node, _ = walk_back(node)
    if node.target in DROPOUTS:
        node, _ = walk_back(node.args[0])
    return node if node.target in SOFTMAXES else None


def _comes_from_outside(logits: Node) -> bool:
    made = list(made_of(logits))
    inputs = [node.meta["val"] for node in made if node.op == "placeholder" and is_floating(node)]
    return any(x.dim() > 2 for x in inputs) and all(product_of(node) is None for node in made)
