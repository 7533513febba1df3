"""Attention that a graph break cuts in two: its logits leave the graph, or come into it from another one.

Part of pass 2. Such a layer cannot be rewritten, and is to be named all the same.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from think_compile.passes import layout as lay
from think_compile.passes.join import JOINS
from think_compile.passes.normalize import Normalized
from think_compile.passes.product import product_of
from think_compile.passes.readers import made_of
from think_compile.passes.region import DROPOUTS, SOFTMAXES


def broken_attention(normalized: Normalized) -> list[Node]:
    """What the graph holds of such attentions: the softmax, or the product with keys that are cached."""
    products = [product for node in normalized.graph_module.graph.nodes if (product := product_of(node)) is not None]
    kept = {lay.walk_back(output)[0] for output in normalized.outputs if isinstance(output, Node)}
    found = []
    for product in products:
        for operand in (product.left, product.right):
            softmax, (root, _) = _softmax_behind(operand), lay.walk_back(operand, scaled=True)
            if softmax is not None and _comes_from_outside(softmax.args[0]):
                found.append(softmax)
            elif root.target in JOINS and root in kept:
                found.append(product.node)
    return list(dict.fromkeys(found))


def _softmax_behind(node: Node) -> Node | None:
    """The softmax whose probabilities ``node`` holds, dropout aside."""
    node, _ = lay.walk_back(node)
    if node.target in DROPOUTS:
        node, _ = lay.walk_back(node.args[0])
    return node if node.target in SOFTMAXES else None


def _comes_from_outside(logits: Node) -> bool:
    made = [logits, *made_of(logits)]
    inputs = [node.meta["val"] for node in made if node.op == "placeholder"]
    outside = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 2]
    return bool(outside) and all(product_of(node) is None for node in made)
