"""Pass 2: find the attention sites of a functional graph, by their operations and not by their authors.

A site is torch's attention operation, flash-attn's (:mod:`.flash`), or a region of written-out attention
(:mod:`.region`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from think_compile.cache.canonical import CANONICAL, Layout
from think_compile.passes.find import flash
from think_compile.passes.find.region import Region, find_regions
from think_compile.passes.layout import arguments_of
from think_compile.passes.observe import observed

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """One attention of the graph.

    Attributes:
        node: the attention output [B, Hq, N, Dv].
        operation: the operation that computes the output; of a region its second product.
        q, k, v: its operands [B, Hq, N, D], [B, Hq or H, S, D], [B, Hq or H, S, Dv]; of a region the operands of the
            two products, axes in any order.
        mask: bool (true attends) or float (added), broadcast to [B, Hq, N, S]; or None.
        scale: of q k^T; None is 1/sqrt(D).
        is_causal: causal, with the first query aligned to the first key.
        causal_to_end: causal, with the last query aligned to the last key.
        dropout: probability.
        path: its module, as far as known from the trace.
        region: the parts of a written-out attention; mask, scale and is_causal are then unset.
        layout: how the axes of operands and result map to [B, H, tokens, channels]; of a region unset.
        unsupported: options of the operation that attention to packed keys lacks.
    """

    node: Node
    operation: Node
    q: Node
    k: Node
    v: Node
    dropout: float
    path: str
    mask: Node | None = None
    scale: float | Node | None = None
    is_causal: bool = False
    causal_to_end: bool = False
    region: Region | None = None
    layout: Layout = CANONICAL
    unsupported: str = ""

    def reads_keys(self, reader: Node, read: Node) -> bool:
        """Whether ``reader`` is an operation of this attention with ``read`` as its keys or values."""
        if self.region is None:
            return reader is self.operation and read is not self.q and read is not self.mask
        products = (self.region.logits, self.region.output)
        return any(reader is p.node and read is p.right and read is not p.left for p in products)


def find_attention(graph_module: GraphModule) -> list[Attention]:
    """All attention sites, in graph order."""
    graph = graph_module.graph
    with observed("attention", graph) as count:
        sites = [site for node in graph.nodes if (site := _from_operation(node)) is not None]
        sites += [_from_region(region) for region in find_regions(graph)]
        positions = {node: i for i, node in enumerate(graph.nodes)}
        sites.sort(key=lambda site: positions[site.node])
        count.matches = len(sites)
    return sites


def _from_operation(node: Node) -> Attention | None:
    if node.target is aten.scaled_dot_product_attention.default:
        q, k, v, mask, dropout, is_causal, scale, _ = arguments_of(node).values()
        return Attention(node, node, q, k, v, dropout, module_path(node), mask, scale, is_causal)
    if isinstance(node.target, torch._ops.OpOverload) and node.target.name() == flash.NAME:
        return Attention(path=module_path(node), **flash.fields_of(node))
    return None


def _from_region(region: Region) -> Attention:
    keys, values = region.logits, region.output
    path = module_path(keys.node)
    return Attention(values.node, values.node, keys.left, keys.right, values.right, region.dropout, path, region=region)


def module_path(node: Node) -> str:
    """The innermost module of a node in the user's spelling ("model.layers.0.self_attn"), or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = path.replace(".__dict__['_modules']", "")  # from a module with its own __getattr__
    path = re.sub(r"\._(?:modules|buffers|parameters)\['([^']*)'\]", r".\1", path)  # the spelling of older traces
    path = re.sub(r"^[LG]\['[^']*'\]\.?", "", path)
    return re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path).lstrip(".")
