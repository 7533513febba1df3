"""Check a later call's first written row in a cache of fixed size, whenever the rows may not suffice.

On a GPU, a write beyond the end of a buffer is found too late, if at all. Only the device knows the number of tokens in
a cache. So the runtime counts the tokens of the calls. When the count leaves no room, the runtime computes the model's
own positions. (Skipped rows are not detected: for this, every call would have to wait for the device.)

A full cache, written from an earlier row again, is rewound if the rows after the written ones are no longer read.
Otherwise the cache is a rolling buffer, and its rows are not in the order of their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from think_compile.kernels import answers
from think_compile.passes.layout import same_size, value_of
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.site import CacheSite
from think_compile.passes.rewrite.question import question

_Writes = tuple[Any, Any, Any]


def find_starts(normalized: Normalized, sites: Sequence[CacheSite]) -> GraphModule | None:
    """A graph from the caller's inputs to two facts about a call; None: they are unknown.

    The highest first written row. Whether rows after the written ones are read (for a written-out attention this is
    unknown, and no is assumed).
    """
    fixed = [site for site in sites if site.fixed and site.past is not None]
    starts = list(dict.fromkeys(site.keys.join.start for site in fixed))
    if not starts:
        return None
    hiding = dict.fromkeys(_writes(site, site.attention.mask) for site in fixed if _has_column_for_each(site))
    unmasked = dict.fromkeys(_writes(site, _extent(site)) for site in fixed if _reads_all(site))

    def asked(masked: list[_Writes]) -> GraphModule | None:
        def ask(graph: Any, at: Any) -> Any:
            start = graph.call_function(answers.highest_start, ([at(start) for start in starts],))
            seen = [graph.call_function(answers.reads_later_rows, (rows, at(own), n)) for rows, own, n in unmasked]
            seen += [graph.call_function(answers.sees_later_rows, (at(mask), at(own), n)) for mask, own, n in masked]
            return start, graph.call_function(answers.any_holds, (seen,))

        return question(normalized, [*starts, *(mask for mask, _, _ in masked)], ask)

    return asked(list(hiding)) or asked([])  # without masks, if computing them costs too much


def _writes(site: CacheSite, read: Any) -> _Writes:
    """``read`` (the mask or number of the read rows); the call's first written row and number of rows."""
    return read, site.keys.join.start, site.query_tokens


def _has_column_for_each(site: CacheSite) -> bool:
    """Whether a stock attention with a known number of queries has a mask with a column for each read row."""
    mask = site.attention.mask
    if site.attention.region is not None or mask is None or not isinstance(site.query_tokens, int):
        return False
    return same_size(mask.meta["val"].shape[-1], _extent(site))


def _reads_all(site: CacheSite) -> bool:
    """Whether a stock attention without a mask is known to read rows after its call's own."""
    attention = site.attention
    if attention.region is not None or attention.mask is not None or attention.is_causal or attention.causal_to_end:
        return False
    own, read = site.query_tokens, _extent(site)
    return isinstance(own, int) and isinstance(read, int) and read > own


def _extent(site: CacheSite) -> Any:
    return value_of(site.keys.extent)
