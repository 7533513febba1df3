"""The full module path of an attention, even if the trace began inside a module.

After a graph break the trace knows a module only by its path from the break: "attention" in every block. The parameters
of the queries tell the block; if they do not, the module whose code is compiled does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch.fx import Node

from think_compile.passes.find.attention import Attention
from think_compile.passes.walks import ancestors


def told_apart(sites: Sequence[Attention]) -> list[Attention]:
    """The sites under unique names: "path", "path#2", ... for the attentions of one module."""
    places: dict[str, list[Node]] = {}
    named = []
    for site in sites:
        place = site.node if site.region is None else site.region.softmax  # several readings of one attention
        known = places.setdefault(site.path, [])
        if place not in known:
            known.append(place)
        nth = known.index(place) + 1
        named.append(site if nth == 1 else replace(site, path=f"{site.path}#{nth}"))
    return named


def full_path(path: str, node: Node, parameters: Mapping[Node, str]) -> str:
    """The path in the model of the trace's ``path``, told by the nearest parameter among ``node``'s ancestors.

    ``parameters``: the names of the parameters among the graph's inputs.
    """
    name = next((parameters[source] for source in ancestors(node) if source in parameters), None)
    if name is None or name.startswith(f"{path}." if path else "."):
        return path
    at = f".{name}".rfind(f".{path}.")
    if path and at >= 0:
        return name[: at + len(path)]
    return name.rsplit(".", 2)[0] if name.count(".") > 1 else path
