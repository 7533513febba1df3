"""The readers of a cache: only attentions may read it, and all of them are rewritten together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from think_compile.passes.find.attention import Attention
from think_compile.passes.find.region import SOFTMAXES
from think_compile.passes.layout import layout_input, same_size, scaled_input, value_of, walk_back
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.window import agree
from think_compile.passes.refusal import Reason, Refused, where
from think_compile.passes.walks import ancestors

if TYPE_CHECKING:
    from think_compile.passes.prove.site import CachedAttention

aten = torch.ops.aten
_LOOKS_AT_SHAPE = {
    aten.sym_size.int,
    aten._assert_tensor_metadata.default,
    aten.new_zeros.default,
    aten.new_empty.default,
    aten.zeros_like.default,
    aten.empty_like.default,
}


def _readers(node: Node) -> Iterator[tuple[Node, Node]]:
    """Pairs (reader, tensor read), through layout operations; readers of only shape or dtype are left out."""
    for user in node.users:
        if user.target in _LOOKS_AT_SHAPE or (user.target is aten.type_as.default and user.args[0] is not node):
            continue
        if layout_input(user) is node or scaled_input(user) is node:
            yield from _readers(user)
        else:
            yield user, node


def _uses(root: Node) -> Iterator[tuple[Node, Node]]:
    """The readers of a cache, also through one slice, except the graph's output."""
    for reader, read in _readers(root):
        uses = _readers(reader) if reader.target is aten.slice.Tensor else [(reader, read)]
        yield from (use for use in uses if use[0].op != "output")


def other_reader(root: Node, sites: Sequence[Attention]) -> Node | None:
    """A reader of a cache other than the attentions ``sites``, or None."""
    others = (reader for reader, read in _uses(root) if not any(site.reads_keys(reader, read) for site in sites))
    return next(others, None)


def check_past_readers(past: Node, root: Node) -> None:
    """Refuse a past with another reader than the join ``root``."""
    for reader, read in _readers(past):
        is_base = reader.target is aten.slice_scatter.default and reader.args[0] is read
        is_overwritten = reader.target is aten.copy.default and reader.args[0] is read
        if reader is root or is_base or is_overwritten:
            continue
        if reader.target is aten.slice.Tensor:
            check_past_readers(reader, root)
            continue
        raise Refused(Reason.PAST_ESCAPES, where(reader))


PROJECTIONS = {
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    torch.nn.functional.linear,  # with weights of a tensor subclass
    torch.matmul,
}
ATTENDS = {aten.scaled_dot_product_attention.default, *SOFTMAXES}


def made_of(node: Node, *, projected: bool = False) -> Iterator[Node]:
    """``node`` and its ancestors, back to attentions and projections; ``projected``: also through projections."""

    def sources(node: Node) -> list[Node]:
        if node.op != "call_function" or node.target in ATTENDS or (node.target in PROJECTIONS and not projected):
            return []
        return node.all_input_nodes[:1] if node.target in PROJECTIONS else node.all_input_nodes

    return ancestors(node, sources=sources)


def comes_from_outside(q: Node) -> bool:
    """Whether queries are projected in another graph, as when a graph break precedes the attention.

    Keys entering the graph whole beside such queries belong to the same call. Queries projected in this graph may
    attend to an encoder's keys.
    """
    return all(node.target not in PROJECTIONS for node in made_of(q))


def reads_any(site: Attention, inputs: set[Node]) -> bool:
    """Whether the keys or values of an attention depend on one of ``inputs``."""
    return any(source in inputs for operand in (site.k, site.v) for source in made_of(operand))


def made_of_cache(normalized: Normalized, node: Node, *, projected: bool = False) -> bool:
    """Whether ``node`` depends on a tensor that leaves the graph: a cache that is changed before its reading.

    Tensors of fewer than three axes (positions, masks) are no caches. ``projected``: also through projections.
    """
    kept = [walk_back(output) for output in normalized.outputs if isinstance(output, Node)]
    outputs = {output for source, chain in kept for output in (source, *chain)} - {node}
    made = (source for source in made_of(node, projected=projected) if source in outputs)
    values = (source.meta.get("val") for source in made)
    return any(isinstance(value, torch.Tensor) and value.dim() > 2 for value in values)


def refuse_half_read(cached: list[CachedAttention], refused: list[tuple[Attention, Refused]]) -> None:
    """Move attentions to ``refused`` if not all readers of their cache can be rewritten together."""
    while bad := [site for site in cached if not _fits_all(site, cached, refused)]:
        for site in bad:
            cached.remove(site)
            refused.append((site.attention, Refused(Reason.SHARED, where(site.keys.root))))


def _fits_all(
    site: CachedAttention, cached: Sequence[CachedAttention], refused: Sequence[tuple[Attention, Refused]]
) -> bool:
    roots = {site.keys.root, site.values.root}
    uses = [use for root in roots for use in _uses(root)]
    if len(roots) == 1 or any(attention.reads_keys(*use) for attention, _ in refused for use in uses):
        return False
    others = [other for other in cached if roots & {other.keys.root, other.values.root}]
    return all(_alike(site, other) for other in others)


def _alike(a: CachedAttention, b: CachedAttention) -> bool:
    """Whether two attentions read one cache in the same way, under the same mask."""
    extents = value_of(a.keys.extent), value_of(b.keys.extent)
    same_tokens = same_size(*extents) and agree(a.window, b.window)
    return a is b or (_reading(a) == _reading(b) and same_tokens)


def _reading(site: CachedAttention) -> tuple[Any, ...]:
    attention, region = site.attention, site.attention.region
    masks: Any = (attention.mask, attention.is_causal, attention.causal_to_end)
    if region is not None:
        masks = tuple(masking.mask for masking in region.masks)
    return *((t.root, t.layout, t.interleaved) for t in (site.keys, site.values)), masks, region is None
