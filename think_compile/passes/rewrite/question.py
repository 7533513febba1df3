"""Small graphs, from a part of the model's graph, that answer a question about a call before the call runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.readers import PROJECTIONS
from think_compile.passes.walks import ancestors

aten = torch.ops.aten
MAX_NODES = 300  # of a mask's computation, which then runs twice
_COSTLY = {
    *PROJECTIONS,
    aten.baddbmm.default,
    aten.einsum.default,
    aten.embedding.default,
    aten.convolution.default,
    aten.scaled_dot_product_attention.default,
}


def question(
    normalized: Normalized, about: Sequence[Any], ask: Callable[[Graph, Callable[[Any], Any]], Node]
) -> GraphModule | None:
    """A graph that computes the nodes ``about`` from the caller's inputs, and an answer; None: too costly.

    ``ask`` adds the answer to the graph, given a function from nodes of the caller's graph to their copies.
    """
    nodes = set(islice(ancestors(*(node for node in about if isinstance(node, Node))), MAX_NODES + 1))
    if len(nodes) > MAX_NODES or any(node.target in _COSTLY for node in nodes):
        return None
    graph, copies = Graph(), dict[Any, Any]()
    for node in normalized.graph_module.graph.nodes:
        if node.op == "placeholder" or node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(ask(graph, lambda node: copies.get(node, node)))
    return GraphModule(normalized.graph_module, graph)
