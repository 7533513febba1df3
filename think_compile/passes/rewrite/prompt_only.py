"""First calls on a cache of fixed size that the graph itself makes: need more than the call's own rows be read?

Such a cache begins without a token, and a first call's attention reads all its rows, trusting a mask to hide those
that it has not written. Where that is so, attending to the call's own rows is the same, and the dense cache need never
exist. Whether it is so is asked before each such call, of the very mask and positions that the model computes.

Part of pass 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from think_compile.cache.canonical import CANONICAL, TOKEN
from think_compile.kernels import answers
from think_compile.passes.layout import same_size
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.kv_cache import CachedAttention, CacheTensor
from think_compile.passes.rewrite.question import question

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


class PromptOnly:
    """The caches of a graph that may be read by their own rows only, and the question whether they may this time."""

    def __init__(self, sites: Sequence[CachedAttention], ask: Callable[..., Any]) -> None:
        self.roots = frozenset(site.keys.root for site in sites)
        self._ask = ask

    def suffice(self, args: Sequence[Any]) -> bool:
        """Whether all calls begin at the first row and see no row beyond their own; waits for the device."""
        return bool(self._ask(*args))


def find_prompt_only(normalized: Normalized, sites: Sequence[CachedAttention]) -> PromptOnly | None:
    """The caches of ``sites`` of which own rows may suffice; None: there is none."""
    eligible = [site for site in sites if _is_eligible(site)]
    refused = {site.keys.root for site in sites if not _is_eligible(site)}
    eligible = [site for site in eligible if site.keys.root not in refused]
    if not eligible:
        return None
    about = [node for site in eligible for node in (site.keys.join.start, site.attention.mask)]
    asked = question(normalized, about, lambda graph, at: _all_hold(graph, at, eligible))
    return None if asked is None else PromptOnly(eligible, asked)


def passes_heads_once(site: CachedAttention) -> bool | None:
    """Whether the keys reach the attention with their own heads, for groups of neighbouring query heads (enable_gqa).

    False: with a copy for each query head, side by side. None: the query heads are dealt out in another way, as which
    :func:`think_compile.kernels.arrange.attend_prompt` does not attend.
    """
    if site.keys.interleaved:
        return None
    return bool(site.attention.operation.kwargs.get("enable_gqa", False))


def _is_eligible(site: CachedAttention) -> bool:
    """A stock attention to a new cache, whose mask has a column for each row of it."""
    attention = site.attention
    if not site.fixed or site.past is not None or attention.operation.target is not _SDPA:
        return False
    if attention.layout != CANONICAL or passes_heads_once(site) is None:
        return False
    if not (_is_plain(site.keys) and _is_plain(site.values)):
        return False
    if not same_size(_own(site), site.query_tokens) or attention.q.meta["val"].dtype != attention.k.meta["val"].dtype:
        return False
    if attention.mask is None:
        return attention.is_causal
    *_, rows, columns = attention.mask.meta["val"].shape
    return same_size(rows, site.query_tokens) and same_size(columns, site.keys.extent)


def _own(site: CachedAttention) -> Any:
    """How many rows the call writes."""
    new, layout = site.keys.join.new, site.keys.layout
    assert new is not None
    return new.meta["val"].shape[next(i for i, group in enumerate(layout) if TOKEN in group)]


def _is_plain(tensor: CacheTensor) -> bool:
    """Whether the rows reach the attention as they are cached, and the others hold nothing."""
    values = {node.meta["val"].dtype for node in (tensor.root, *tensor.chain)}
    return len(values) == 1 and not tensor.scales and tensor.join.blank


def _all_hold(graph: Graph, at: Callable[[Any], Any], sites: Sequence[CachedAttention]) -> Node:
    """The answer for all sites at once."""
    starts = dict.fromkeys((site.keys.join.start, site.keys.join.consecutive) for site in sites)
    masks = dict.fromkeys(site.attention.mask for site in sites if site.attention.mask is not None)
    asked = [graph.call_function(answers.begins_at_first_row, (at(start), known)) for start, known in starts]
    asked += [graph.call_function(answers.hides_other_rows, (at(mask),)) for mask in masks]
    return graph.call_function(answers.all_hold, (asked,))
