"""Pass 3: walk an attention's keys and values back to a tensor, and prove it to be their cache; else refuse by name.

A cache tensor is *joined* from its past and the call's new rows: by ``cat`` along the tokens (growing) or by a
write at positions (fixed). A cache is *confirmed* when the joined tensor leaves the graph, returned or written back.
Its name and its owner do not matter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from think_compile.cache.canonical import HEAD, TOKEN, token_axis
from think_compile.passes import layout
from think_compile.passes.find.attention import Attention
from think_compile.passes.find.region import Region
from think_compile.passes.normalize import Normalized
from think_compile.passes.observe import observed
from think_compile.passes.prove import readers
from think_compile.passes.prove.cache_outputs import fills_buffer, outputs_holding
from think_compile.passes.prove.decoded import decoded_caches
from think_compile.passes.prove.join import Join, computed_alike, join_of
from think_compile.passes.prove.operand import before_suffix, extent_read, laid_out, root_of
from think_compile.passes.prove.roles import (
    key_axes,
    query_layout,
    to_product_order,
    usable_masks,
    value_axes,
)
from think_compile.passes.prove.sequence import is_cross_attention, tokens_of
from think_compile.passes.prove.site import CachedAttention, CacheSite, CacheTensor, DecodedCache
from think_compile.passes.prove.window import agree, check_window, window_of
from think_compile.passes.refusal import Reason, Refused, where

aten = torch.ops.aten


@dataclass
class Findings:
    """The findings of the pass.

    Keys and values of ``pending`` attentions enter the graph whole, as the queries do, and do not leave the graph. The
    call is a first call if a later call joins these very tensors. Such attentions are left as they are, and listed in
    ``refused`` too.
    """

    cached: list[CachedAttention] = field(default_factory=list)
    decoded: list[DecodedCache] = field(default_factory=list)
    pending: list[CachedAttention] = field(default_factory=list)
    refused: list[tuple[Attention, Refused]] = field(default_factory=list)

    @property
    def sites(self) -> list[CacheSite]:
        """All caches to be stored."""
        return [*self.cached, *self.decoded]

    def refuse(self, wanted: Callable[[CacheSite], bool], why: Refused) -> None:
        """Move the proven caches for which ``wanted`` holds to ``refused``."""
        moved = [site.attention for site in self.sites if wanted(site)]
        self.cached = [site for site in self.cached if site.attention not in moved]
        self.decoded = [site for site in self.decoded if site.attention not in moved]
        self.refused += [(attention, why) for attention in moved]


def find_caches(
    normalized: Normalized, sites: Sequence[Attention], larger_than: int | None = None, *, decode: bool = False
) -> Findings:
    """Prove or refuse the cache of each attention site.

    Bounded caches are accepted if their window is larger than ``larger_than`` tokens (None: never). ``decode``: whether
    reads may get decoded tensors.
    """
    findings = Findings()
    with observed("kv_cache", normalized.graph_module.graph) as count:
        for site in sites:
            try:
                found = _prove(normalized, site, sites)
                check_window(found.window, larger_than)
                if not found.keys.outputs:
                    findings.pending.append(found)
                    raise _whole(normalized, found.keys.root)
                findings.cached.append(found)
            except Refused as refused:
                findings.refused.append((site, _named(normalized, site, refused)))
            except layout.NotLayout as why:
                findings.refused.append((site, Refused(Reason.UNKNOWN_LAYOUT, str(why))))
        _refuse_cross_attention(normalized, findings)
        _settle_readings(findings)
        readers.refuse_half_read(findings.cached, findings.refused)
        if decode:
            stored = [*findings.cached, *findings.pending]
            findings.decoded, findings.refused = decoded_caches(normalized, findings.refused, stored)
        count.matches = len(findings.sites)
    return findings


def _named(normalized: Normalized, site: Attention, refused: Refused) -> Refused:
    """Refuse with the more telling ``LATENT`` if the keys are projected from a cached tensor."""
    may_be = refused.reason in (Reason.CHANNEL_MIXING, Reason.NOT_CACHED)
    is_latent = may_be and readers.made_of_cache(normalized, site.k, projected=True)
    return Refused(Reason.LATENT, refused.detail) if is_latent else refused


def _refuse_cross_attention(normalized: Normalized, findings: Findings) -> None:
    """Refuse attentions without a past if their keys do not depend on all tokens of their queries."""
    tokens = tokens_of(normalized.graph_module.graph)
    for c in (*findings.cached, *findings.pending):
        if c.past is None and is_cross_attention(c.attention.q, c.attention.k, tokens):
            why = Refused(Reason.CROSS_ATTENTION, where(c.attention.node))
            findings.cached = [other for other in findings.cached if other is not c]
            findings.pending = [other for other in findings.pending if other is not c]
            findings.refused = [r for r in findings.refused if r[0] is not c.attention] + [(c.attention, why)]


def _settle_readings(findings: Findings) -> None:
    """Keep one reading per softmax: the proven one, else one refusal. Several proven readings are ambiguous."""
    n_proven = Counter(_softmax_of(c.attention) for c in findings.cached)
    del n_proven[None]
    ambiguous = [c for c in findings.cached if n_proven[_softmax_of(c.attention)] > 1]
    findings.cached = [c for c in findings.cached if c not in ambiguous]
    refused = [(c.attention, Refused(Reason.AMBIGUOUS, where(c.attention.node))) for c in ambiguous]
    settled = {_softmax_of(c.attention) for c in findings.cached}
    candidates, findings.refused = refused + findings.refused, []
    for site, why in candidates:
        softmax = _softmax_of(site)
        if softmax is None or softmax not in settled:
            findings.refused.append((site, why))
        settled.add(softmax)


def _softmax_of(site: Attention) -> Node | None:
    return None if site.region is None else site.region.softmax


_OF_VALUES = {
    Reason.NOT_CACHED: Reason.VALUES_NOT_CACHED,
    Reason.TRANSFORMED: Reason.VALUES_TRANSFORMED,
    Reason.CHANNEL_MIXING: Reason.VALUES_TRANSFORMED,
}


def _prove(normalized: Normalized, site: Attention, sites: Sequence[Attention]) -> CachedAttention:
    if site.dropout:
        raise Refused(Reason.DROPOUT, f"p = {site.dropout}")
    if site.unsupported:
        raise Refused(Reason.OPTION, f"{site.unsupported} at {where(site.operation)}")
    q, k = site.q.meta["val"], site.k.meta["val"]
    if not (q.is_floating_point() and k.is_floating_point()):
        raise Refused(Reason.NOT_FLOATING, f"{q.dtype}, {k.dtype}")
    if site.region is None and q.dim() != 4:
        raise Refused(Reason.UNKNOWN_LAYOUT, f"queries have {q.dim()} axes")
    keys = _keys(normalized, site, sites)
    try:
        values = _cache_tensor(normalized, sites, site, site.v, _arranger(site, value_axes))
    except Refused as refused:
        if not keys.outputs:
            raise _whole(normalized, keys.root) from None
        raise Refused(_OF_VALUES.get(refused.reason, refused.reason), refused.detail) from None
    queries = None if site.region is None else query_layout(site.region, keys.new_tokens)
    if site.region is not None and not usable_masks(site.region) and to_product_order(site.region.axes) is None:
        raise Refused(Reason.UNKNOWN_LAYOUT, f"probabilities whose axes are moved at {where(site.node)}")
    found = CachedAttention(site, (keys, values), queries)
    alike = not values.outputs and keys.window is None and layout.equal_size(keys.new_tokens, found.query_tokens)
    if not keys.outputs and not alike:
        raise _whole(normalized, keys.root)
    _check_pair(found)
    return found


def _whole(normalized: Normalized, root: Node) -> Refused:
    return Refused(Reason.NO_JOIN_SEEN, f"input {normalized.sources[normalized.placeholders.index(root)] or root.name}")


def _keys(normalized: Normalized, site: Attention, sites: Sequence[Attention]) -> CacheTensor:
    """The key cache. The model may multiply the cached keys by one number before the attention."""
    arrange = _arranger(site, key_axes)
    try:
        return _cache_tensor(normalized, sites, site, site.k, arrange)
    except Refused as refused:
        if layout.scaled_input(layout.walk_back(site.k)[0]) is None:
            raise
        try:
            found = _cache_tensor(normalized, sites, site, site.k, arrange, scaled=True)
        except Refused:
            raise refused from None
        if not found.outputs:
            raise
        return found


def _arranger(
    site: Attention, arrange: Callable[[Region, layout.Axes], layout.Axes]
) -> Callable[[layout.Axes], layout.Axes]:
    """A function from an operand's axes to these axes in the order [B, H, S, D]."""
    region = site.region
    if region is not None:
        return lambda axes: arrange(region, axes)
    return lambda axes: [axes[site.layout.index((axis,))] for axis in range(4)]


def _check_pair(site: CachedAttention) -> None:
    keys, values = site.keys, site.values
    if not layout.same_size(keys.size(1), values.size(1)) or keys.interleaved != values.interleaved:
        raise Refused(Reason.HEADS_DIFFER, f"{keys.size(1)} and {values.size(1)}")
    if keys.interleaved and site.attention.region is None and _groups_heads(site.attention):
        raise Refused(Reason.UNKNOWN_LAYOUT, f"heads that are repeated in turn and grouped: {where(site.attention.k)}")
    joined = [(x.join.fixed, x.join.past is None, bool(x.outputs)) for x in (keys, values)]
    if joined[0] != joined[1]:
        raise Refused(Reason.VALUES_NOT_CACHED, "they are joined in another way than the keys")
    if keys.join.fixed and not computed_alike(keys.join.start, values.join.start):
        raise Refused(Reason.VALUES_NOT_CACHED, "they are written at other positions than the keys")
    prefixes = keys.join.past_prefix, values.join.past_prefix
    alike = keys.in_rolling_buffer == values.in_rolling_buffer
    alike = alike and (prefixes == (None, None) or layout.equal_size(*prefixes))
    if not agree(keys.window, values.window) or not alike:
        raise Refused(Reason.VALUES_NOT_CACHED, "they are bounded in another way than the keys")
    for tensor in (keys, values):
        if layout.is_unknown(tensor.new_tokens):
            raise Refused(Reason.UNKNOWN_ROOT, f"how many rows it writes is read from a tensor: {where(tensor.root)}")
        if not layout.equal_size(tensor.new_tokens, site.query_tokens):
            raise Refused(Reason.CROSS_ATTENTION, f"{site.query_tokens} queries, {tensor.new_tokens} new keys")


def _groups_heads(site: Attention) -> bool:
    """Whether neighbouring query heads of a stock attention share a head of its key operand."""
    head = site.layout.index((HEAD,))
    return not layout.same_size(site.q.meta["val"].shape[head], site.k.meta["val"].shape[head])


# --------------------------------------------------------------------------------------------- one cache tensor


def _cache_tensor(
    normalized: Normalized,
    sites: Sequence[Attention],
    site: Attention,
    operand: Node,
    arrange: Callable[[layout.Axes], layout.Axes],
    *,
    scaled: bool = False,
) -> CacheTensor:
    root, chain, prefix = root_of(operand, scaled)
    root, chain, read = before_suffix(root, chain, arrange, scaled)
    root, chain, axes, roles = laid_out(root, chain, arrange)
    shape = _canonical_shape(axes, root.meta["val"].shape[token_axis(roles)])
    interleaved = _is_interleaved(axes[HEAD], shape[HEAD], operand)
    outputs, kept, buffers = outputs_holding(normalized, root, roles, shape)
    whole = root.op == "placeholder" and readers.comes_from_outside(site.q)
    join = Join() if whole else join_of(normalized, root, roles)
    if not outputs and not whole:
        raise Refused(Reason.TRANSFORMED if readers.made_of_cache(normalized, root) else Reason.NOT_CACHED, where(root))
    if (rounding := next(filter(layout.rounds, chain), None)) is not None:
        raise Refused(Reason.TRANSFORMED, where(rounding))
    other = readers.other_reader(root, sites)
    if other is not None and operand is site.k:
        raise Refused(Reason.KEY_ESCAPES, where(other))
    if join.past is not None:
        readers.check_past_readers(normalized.placeholders[join.past], root)
    window = window_of(join.past_suffix, read, kept)
    rolls = window is not None and not join.fixed
    rolls = rolls and fills_buffer(normalized, join, window, root, roles, outputs, buffers)
    in_place = min(outputs, default=len(normalized.written)) < len(normalized.written) or bool(buffers)
    if window is not None and (join.fixed or (in_place and not rolls)):
        raise Refused(Reason.SLIDING_BUFFER, "it is written in place")
    if join.past_prefix is not None and not rolls:
        raise Refused(Reason.UNKNOWN_WINDOW, where(root))
    extent, escapes = extent_read(root, token_axis(roles), chain, prefix), other is not None
    return CacheTensor(root, roles, shape, join, outputs, extent, tuple(chain), interleaved, window, rolls, escapes)


def _canonical_shape(axes: layout.Axes, tokens: Any) -> tuple[Any, ...]:
    own = [[atom.size for atom in atoms if atom.axis is not None] for atoms in axes]
    return tuple(tokens if axis == TOKEN else math.prod(sizes) for axis, sizes in enumerate(own))


def _is_interleaved(head: list[layout.Atom], heads: Any, operand: Node) -> bool:
    """Whether the heads are repeated as a block (0 1 0 1), not each beside its copies (0 0 1 1)."""
    real = [atom for atom in head if atom.axis is not None or not layout.same_size(atom.size, 1)]
    if layout.same_size(heads, 1) or not real or real[0].axis is not None:
        return False
    if real[-1].axis is None:
        raise Refused(Reason.UNKNOWN_LAYOUT, f"heads that are repeated in turn and side by side: {where(operand)}")
    return True
