"""Find caches that can be stored although attention does not read them as they are stored: each read decodes them.

For this the join alone must be understood: everything after it sees the same tensor as before, up to what the format
loses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from think_compile.cache.canonical import BATCH, CHANNEL, HEAD, TOKEN, Layout
from think_compile.passes import layout
from think_compile.passes.find.attention import Attention
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove import readers
from think_compile.passes.prove.cache_outputs import outputs_holding
from think_compile.passes.prove.join import JOINS, WRITES, computed_alike, join_of
from think_compile.passes.prove.site import CacheSite, CacheTensor, DecodedCache
from think_compile.passes.prove.window import window_of
from think_compile.passes.refusal import READ_OTHERWISE, Reason, Refused, where
from think_compile.passes.walks import ancestors

Refusals = Sequence[tuple[Attention, Refused]]


def decoded_caches(
    normalized: Normalized, refused: Refusals, cached: Sequence[CacheSite]
) -> tuple[list[DecodedCache], list[tuple[Attention, Refused]]]:
    """Of ``refused`` attentions, those whose caches can be decoded on read, and the others.

    ``cached``: the other stored caches.
    """
    claimed = {tensor.root for site in cached for tensor in site.tensors}
    found: list[DecodedCache] = []
    others: list[tuple[Attention, Refused]] = []
    for attention, why in refused:
        tensors = _joined_tensors(normalized, attention) if why.reason in READ_OTHERWISE else ()
        if any(tensor.window is not None for tensor in tensors):
            others.append((attention, Refused(Reason.BOUNDED, where(tensors[0].root))))
        elif tensors and claimed.isdisjoint(tensor.root for tensor in tensors):
            found.append(DecodedCache(attention, tensors))
        elif why.reason in READ_OTHERWISE:
            waits = not tensors and _is_first_call(normalized, attention)
            others.append(
                (attention, Refused(Reason.AWAITS_JOIN) if waits else Refused(Reason.NOT_DECODED, why.detail))
            )
        else:
            others.append((attention, why))
    torn = [site for site in found if not all(_alike(site, other) for other in found)]
    others += [(site.attention, Refused(Reason.NOT_DECODED, where(site.tensors[0].root))) for site in torn]
    return [site for site in found if site not in torn], others


def _alike(a: DecodedCache, b: DecodedCache) -> bool:
    """Whether two attentions read the same caches, or none in common."""
    one, other = ([tensor.root for tensor in site.tensors] for site in (a, b))
    return one == other or set(one).isdisjoint(other)


def _joined_tensors(normalized: Normalized, attention: Attention) -> tuple[CacheTensor, ...]:
    """The one or two cache tensors that an attention's keys and values are made of; empty: they are not understood."""
    found = _joined(normalized, attention)
    if found is None or len(found) not in (1, 2):
        return ()
    joins = [tensor.join for tensor in found]
    begins = {(join.fixed, join.past is None) for join in joins}
    if len(begins) > 1 or (len(joins) == 2 and not computed_alike(joins[0].start, joins[1].start)):
        return ()
    if len({join.past for join in joins if join.past is not None}) not in (0, len(found)):
        return ()
    sizes = [(tensor.size(TOKEN), tensor.new_tokens) for tensor in found]
    alike = all(layout.equal_size(a, b) for one in sizes for a, b in zip(one, sizes[0], strict=True))
    return tuple(found) if alike else ()


def _joined(normalized: Normalized, attention: Attention) -> list[CacheTensor] | None:
    """The cache tensors before an attention, in the same order in each graph; None: one is not understood.

    Those of the keys come first, of these the widest: a latent before the rotated part.
    """
    found: dict[Node, CacheTensor] = {}
    kept, unknown = _kept(normalized), []

    def sources(node: Node) -> list[Node]:
        if node.op != "call_function" or node.target in readers.ATTENDS or node in found:
            return []
        tensor = _tensor(normalized, node) if node.target in JOINS else None
        if tensor is not None:
            found[node] = tensor
            return []
        if node.target in JOINS and node in kept:
            unknown.append(node)
        return node.all_input_nodes[:1] if node.target in readers.PROJECTIONS else node.all_input_nodes

    def walk(operand: Node) -> list[CacheTensor]:
        before = len(found)
        for _ in ancestors(operand, sources=sources):
            pass
        return list(found.values())[before:]

    of_keys = sorted(walk(attention.k), key=lambda tensor: -int(tensor.size(CHANNEL)))
    of_values = walk(attention.v)
    return None if unknown else [*of_keys, *of_values]


def _kept(normalized: Normalized) -> set[Node]:
    """The tensors that leave the graph, whole or a slice of them."""
    sources = {layout.walk_back(output)[0] for output in normalized.outputs if isinstance(output, Node)}
    cut = [source.args[0] for source in sources if source.target is torch.ops.aten.slice.Tensor]
    return sources | {layout.walk_back(node)[0] for node in cut}


def _tensor(normalized: Normalized, root: Node) -> CacheTensor | None:
    """The cache tensor joined by ``root``; None: it is none, or is not understood."""
    shape, axes = root.meta["val"].shape, _layout_of(root)
    if axes is None or not root.meta["val"].is_floating_point():
        return None
    known = dict(zip((axis for (axis,) in axes), shape, strict=True))
    canonical = tuple(known.get(axis, 1) for axis in (BATCH, HEAD, TOKEN, CHANNEL))
    try:
        join = join_of(normalized, root, axes)
        outputs, kept, _ = outputs_holding(normalized, root, axes, canonical)
        if join.past is not None:
            readers.check_past_readers(normalized.placeholders[join.past], root)
    except (Refused, layout.NotLayout):
        return None
    if join.new is None or not outputs or join.past_prefix is not None:
        return None
    window = window_of(join.past_suffix, None, kept)
    found = CacheTensor(root, axes, canonical, join, outputs, canonical[TOKEN], (), False, window, read_elsewhere=True)
    return None if layout.is_unknown(found.new_tokens) else found


def _layout_of(root: Node) -> Layout | None:
    """The axes of a join, told by where it joins: batch first, channels last, tokens between, and heads if any."""
    rank, axis = root.meta["val"].dim(), _token_axis(root)
    if rank == 3 and axis == 1:
        return (BATCH,), (TOKEN,), (CHANNEL,)
    if rank == 4 and axis in (1, 2):
        return ((BATCH,), (TOKEN,), (HEAD,), (CHANNEL,)) if axis == 1 else ((BATCH,), (HEAD,), (TOKEN,), (CHANNEL,))
    return None


def _token_axis(root: Node) -> int | None:
    rank = root.meta["val"].dim()
    if root.target in WRITES:
        write = WRITES[root.target](root)
        return None if write is None else write.dim % rank
    return int(layout.arguments_of(root)["dim"]) % rank


def _is_first_call(normalized: Normalized, attention: Attention) -> bool:
    """Whether the keys, made of a tensor that leaves the graph, are as many as the queries: there is no past."""
    product = None if attention.region is None else attention.region.logits.node
    if product is not None:
        rows, columns = product.meta["val"].shape[-2:]
    else:
        at = attention.layout.index((TOKEN,))
        rows, columns = (x.meta["val"].shape[at] for x in (attention.q, attention.k))
    return layout.equal_size(rows, columns) and any(
        readers.made_of_cache(normalized, operand, projected=True) for operand in (attention.k, attention.v)
    )
