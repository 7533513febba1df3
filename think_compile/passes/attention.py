"""Pass 2: find the attention sites of a functional graph, by what the operation is, not by who wrote it.

A site is the stock attention operation, or a region in which attention is written out (:mod:`.region`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from think_compile.passes.observe import observed
from think_compile.passes.region import Region, find_regions

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """One attention of the graph.

    Attributes:
        node: the operation whose result is the attention output [B, Hq, N, Dv].
        q, k, v: its operands [B, Hq, N, D], [B, Hq or H, S, D], [B, Hq or H, S, Dv]; of a region, those of its two
            products, axes in any order.
        mask: bool (true attends) or float (added), broadcast to [B, Hq, N, S]; or None.
        scale: of q k^T; None is 1/sqrt(D).
        is_causal: top-left aligned causal mask.
        dropout: probability.
        path: the module it stands in, as far as the trace tells.
        region: of an attention that is written out, its parts; mask, scale and is_causal are then unset.
    """

    node: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    scale: float | Node | None
    is_causal: bool
    dropout: float
    path: str
    region: Region | None = None

    def reads_keys(self, reader: Node, read: Node) -> bool:
        """Whether ``reader`` is where this attention reads its keys or values, and ``read`` is those."""
        if self.region is None:
            return reader is self.node and read is not self.q and read is not self.mask
        products = (self.region.logits, self.region.output)
        return any(reader is p.node and read is p.right and read is not p.left for p in products)


def find_attention(graph_module: GraphModule) -> list[Attention]:
    """All attention sites, in graph order."""
    graph = graph_module.graph
    with observed("attention", graph) as count:
        nodes = graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
        sites = [_from_sdpa(node) for node in nodes] + [_from_region(region) for region in find_regions(graph)]
        sites.sort(key=_position(graph))
        count.matches = len(sites)
    return sites


def _sdpa_arguments(
    query: Node,
    key: Node,
    value: Node,
    attn_mask: Node | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: Any = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    return {
        "q": query,
        "k": key,
        "v": value,
        "mask": attn_mask,
        "scale": scale,
        "is_causal": is_causal,
        "dropout": dropout_p,
    }


_SDPA_SIGNATURE = inspect.signature(_sdpa_arguments)


def _from_sdpa(node: Node) -> Attention:
    bound = _SDPA_SIGNATURE.bind(*node.args, **node.kwargs)
    return Attention(node=node, path=module_path(node), **_sdpa_arguments(*bound.args, **bound.kwargs))


def _from_region(region: Region) -> Attention:
    return Attention(
        node=region.output.node,
        q=region.logits.left,
        k=region.logits.right,
        v=region.output.right,
        mask=None,
        scale=None,
        is_causal=False,
        dropout=region.dropout,
        path=module_path(region.logits.node),
        region=region,
    )


def _position(graph: Graph) -> Callable[[Attention], int]:
    positions = {node: i for i, node in enumerate(graph.nodes)}
    return lambda site: positions[site.node]


def module_path(node: Node) -> str:
    """The innermost module of a node as the user would write it ("model.layers.0.self_attn"), or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"\._(?:modules|buffers|parameters)\['([^']*)'\]", r".\1", path)  # how older traces spell it
    path = re.sub(r"^[LG]\['[^']*'\]\.?", "", path)
    return re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path).lstrip(".")
