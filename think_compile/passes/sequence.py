"""Whether the queries and keys of an attention come from one sequence of tokens.

Part of pass 3. When an encoder and a decoder are given equally many tokens, the sizes do not tell cross-attention from
self-attention; the embedded tokens that the two are made of do.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from think_compile.passes.layout import walk_back

aten = torch.ops.aten


def tokens_of(graph: Graph) -> dict[Node, frozenset[Node]]:
    """For each node the tokens, as they enter embeddings, that it depends on."""
    found: dict[Node, frozenset[Node]] = {}
    for node in graph.nodes:
        is_embedding = node.target is aten.embedding.default
        own = frozenset([walk_back(node.args[1])[0]]) if is_embedding else frozenset()
        found[node] = own.union(*(found[source] for source in node.all_input_nodes))
    return found


def is_cross_attention(q: Node, k: Node, tokens: dict[Node, frozenset[Node]]) -> bool:
    """Whether the queries are made of tokens of which the keys know nothing."""
    return not tokens[q] <= tokens[k]
