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
    name = _nearest_parameter(site.q, parameters)
    if name is None or name.startswith(f"{site.path}." if site.path else "."):
        return site
    at = f".{name}".rfind(f".{site.path}.")
    if site.path and at >= 0:
        return replace(site, path=name[: at + len(site.path)])
    return replace(site, path=name.rsplit(".", 2)[0] if name.count(".") > 1 else site.path)


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
