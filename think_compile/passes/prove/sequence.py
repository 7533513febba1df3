"""Whether the queries and keys of an attention come from one sequence of tokens.

If an encoder and a decoder get equally many tokens, sizes do not tell cross-attention from self-attention. The embedded
tokens of queries and keys do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from think_compile.passes.layout import walk_back

aten = torch.ops.aten


def tokens_of(graph: Graph) -> dict[Node, frozenset[Node]]:
    """For each node, the embedded tokens (inputs of embeddings) among its ancestors."""
    found: dict[Node, frozenset[Node]] = {}
    for node in graph.nodes:
        tokens = _embedded(node)
        own = frozenset() if tokens is None else frozenset([walk_back(tokens)[0]])
        found[node] = own.union(*(found[source] for source in node.all_input_nodes))
    return found


def _embedded(node: Node) -> Any:
    if node.target is aten.embedding.default:
        return node.args[1]
    if node.target is torch.nn.functional.embedding:  # with weights of a tensor subclass
        return node.args[0] if node.args else node.kwargs["input"]
    return None


def is_cross_attention(q: Node, k: Node, tokens: dict[Node, frozenset[Node]]) -> bool:
    """Whether the queries depend on tokens that the keys do not depend on."""
    return not tokens[q] <= tokens[k]
