"""First calls on a cache of fixed size, made by the graph itself: do the call's own rows suffice?

Such a cache begins empty. The attention of a first call reads all its rows and relies on a mask to hide the unwritten
ones. If the mask does so, attending to the call's own rows gives the same result, and the dense cache is never made.
This is checked before each such call, with the model's own mask and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from think_compile.cache.canonical import CANONICAL
from think_compile.kernels import answers
from think_compile.passes.layout import same_size
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.site import CachedAttention, CacheTensor
from think_compile.passes.rewrite.question import question

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


class PromptOnly:
    """The caches for which a first call's own rows may suffice, and the check before each call."""

    def __init__(self, sites: Sequence[CachedAttention], ask: Callable[..., Any]) -> None:
        self.roots = frozenset(site.keys.root for site in sites)
        self._ask = ask

    def suffice(self, args: Sequence[Any]) -> bool:
        """Whether all calls begin at the first row and see no row beyond their own; waits for the device."""
        return bool(self._ask(*args))


def find_prompt_only(normalized: Normalized, sites: Sequence[CachedAttention]) -> PromptOnly | None:
    """The caches of ``sites`` for which own rows may suffice; None: no such cache, or too costly a check."""
    refused = {site.keys.root for site in sites if not _is_eligible(site)}
    eligible = [site for site in sites if site.keys.root not in refused]
    if not eligible:
        return None
    about = [node for site in eligible for node in (site.keys.join.start, site.attention.mask)]
    asked = question(normalized, about, lambda graph, at: _all_hold(graph, at, eligible))
    return None if asked is None else PromptOnly(eligible, asked)


def passes_heads_once(site: CachedAttention) -> bool | None:
    """Whether the attention gets each KV head once, for a group of neighbouring query heads (enable_gqa).

    False: copies for the query heads, side by side. None: interleaved heads, unsupported by
    :func:`think_compile.kernels.arrange.attend_prompt`.
    """
    if site.keys.interleaved:
        return None
    return bool(site.attention.operation.kwargs.get("enable_gqa", False))


def _is_eligible(site: CachedAttention) -> bool:
    """Whether a site is a stock attention to a new cache, causal or with a mask column for each row of the cache."""
    attention = site.attention
    if not site.fixed or site.past is not None or attention.operation.target is not _SDPA:
        return False
    if attention.layout != CANONICAL or passes_heads_once(site) is None:
        return False
    if not (_is_plain(site.keys) and _is_plain(site.values)):
        return False
    same_dtype = attention.q.meta["val"].dtype == attention.k.meta["val"].dtype
    if not same_dtype or not same_size(site.keys.new_tokens, site.query_tokens):
        return False
    if attention.mask is None:
        return attention.is_causal
    *_, rows, columns = attention.mask.meta["val"].shape
    return same_size(rows, site.query_tokens) and same_size(columns, site.keys.extent)


def _is_plain(tensor: CacheTensor) -> bool:
    """Whether the attention reads the rows as they are cached, and unwritten rows are blank."""
    values = {node.meta["val"].dtype for node in (tensor.root, *tensor.chain)}
    return len(values) == 1 and not tensor.scales and tensor.join.blank


def _all_hold(graph: Graph, at: Callable[[Any], Any], sites: Sequence[CachedAttention]) -> Node:
    """One answer for all sites."""
    starts = dict.fromkeys((site.keys.join.start, site.keys.join.consecutive) for site in sites)
    masks = dict.fromkeys(site.attention.mask for site in sites if site.attention.mask is not None)
    asked = [graph.call_function(answers.begins_at_first_row, (at(start), known)) for start, known in starts]
    asked += [graph.call_function(answers.hides_other_rows, (at(mask),)) for mask in masks]
    return graph.call_function(answers.all_hold, (asked,))
