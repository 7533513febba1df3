"""The full module path of an attention, also where the trace began inside a module.

Part of pass 2. Behind a graph break the trace knows a module only by its path from there, "attention" in every
block; the parameters that make the queries tell which one it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from torch.fx import Node

from think_compile.passes.attention import Attention


def with_full_path(site: Attention, parameters: Mapping[Node, str]) -> Attention:
    """``site`` with the path that it has in the model; ``parameters`` names the graph's inputs that are such."""
    return replace(site, path=full_path(site.path, site.q, parameters))


def full_path(path: str, node: Node, parameters: Mapping[Node, str]) -> str:
    """The path in the model of what the trace calls ``path``, told by the parameter that made ``node``."""
    name = _nearest_parameter(node, parameters)
    if name is None or name.startswith(f"{path}." if path else "."):
        return path
    at = f".{name}".rfind(f".{path}.")
    if path and at >= 0:
        return name[: at + len(path)]
    return name.rsplit(".", 2)[0] if name.count(".") > 1 else path


def _nearest_parameter(node: Node, parameters: Mapping[Node, str]) -> str | None:
    """The first parameter met on the way back from ``node``, nearer ones first."""
    queue, seen = deque([node]), {node}
    while queue:
        node = queue.popleft()
        if node in parameters:
            return parameters[node]
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return None
