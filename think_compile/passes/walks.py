"""Walks over the nodes of a graph, and copies of a part of a graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor
from torch.fx import Graph, Node


def ancestors(*nodes: Node, sources: Callable[[Node], Iterable[Node]] = lambda n: n.all_input_nodes) -> Iterator[Node]:
    """``nodes`` and their ancestors, nearest first; ``sources`` chooses the inputs of a node to follow."""
    queue, seen = deque(nodes), set(nodes)
    while queue:
        node = queue.popleft()
        yield node
        fresh = [source for source in sources(node) if source not in seen]
        seen.update(fresh)
        queue.extend(fresh)


def part_of(nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> Graph:
    """A graph of copies of ``nodes``, from ``inputs`` to a tuple of ``outputs``."""
    graph, copies = Graph(), dict[Node, Node]()
    for i, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"given_{i}")
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return graph


def is_floating(node: Node) -> bool:
    """Whether a node's value is a tensor of floating point numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
