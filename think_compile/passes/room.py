"""How far a later call would write into a cache of fixed size, asked when it may be too far.

On a GPU a write behind the end of a buffer is found too late, if at all. How many tokens a cache holds is known to the
device only; the runtime counts the tokens that calls bring, and asks the model's own positions when the count leaves
no room. (A call that leaves rows out is not foreseen: to find it, each would have to wait for the device.)

A full cache that is written from its first row again is begun anew, if its other rows are no longer read; otherwise it
is a ring, whose rows do not stand in the order of their tokens.

Part of pass 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from think_compile.kernels import steps
from think_compile.passes.kv_cache import CachedAttention
from think_compile.passes.layout import same_size, value_of
from think_compile.passes.normalize import Normalized
from think_compile.passes.question import question


def find_starts(normalized: Normalized, sites: Sequence[CachedAttention]) -> GraphModule | None:
    """A graph of the caller's inputs that tells two things of a call; None: they are not known.

    The highest row at which it begins to write, and whether it reads rows behind those that it would write from the
    first row on. (Of an attention that is written out the second is not known, and taken for no.)
    """
    fixed = [site for site in sites if site.fixed and site.past is not None]
    starts = list(dict.fromkeys(site.keys.join.start for site in fixed))
    if not starts:
        return None
    masks = dict.fromkeys((site.attention.mask, site.query_tokens) for site in fixed if _has_column_for_each(site))
    unmasked = any(_reads_all(site) for site in fixed)

    def asked(about: list[tuple[Any, Any]]) -> GraphModule | None:
        def ask(graph: Any, at: Any) -> Any:
            start = graph.call_function(steps.highest_start, ([at(start) for start in starts],))
            seen = [graph.call_function(steps.sees_other_rows, (at(mask), n)) for mask, n in about]
            return start, graph.call_function(steps.any_holds, ([unmasked, *seen],))

        return question(normalized, [*starts, *(mask for mask, _ in about)], ask)

    return asked(list(masks)) or asked([])  # of masks that cost too much the second is not known


def _has_column_for_each(site: CachedAttention) -> bool:
    """Whether a stock attention, of a known number of queries, has a mask with a column for each row that it reads."""
    mask = site.attention.mask
    if site.attention.region is not None or mask is None or not isinstance(site.query_tokens, int):
        return False
    return same_size(mask.meta["val"].shape[-1], _extent(site))


def _reads_all(site: CachedAttention) -> bool:
    """Whether a stock attention is known to read rows behind its own, hiding none."""
    attention = site.attention
    if attention.region is not None or attention.mask is not None or attention.is_causal or attention.causal_to_end:
        return False
    own, read = site.query_tokens, _extent(site)
    return isinstance(own, int) and isinstance(read, int) and read > own


def _extent(site: CachedAttention) -> Any:
    return value_of(site.keys.extent)
