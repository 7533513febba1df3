"""How far a later call would write into a cache of fixed size, asked when it may be too far.

On a GPU a write behind the end of a buffer is found too late, if at all. How many tokens a cache holds is known to the
device only; the runtime counts the tokens that calls bring, and asks the model's own positions when the count leaves
no room. (A call that leaves rows out is not foreseen: to find it, each would have to wait for the device.)

A full cache that is written from an earlier row again is rewound, if the rows behind are no longer read; otherwise it
is written in a circle, and its rows do not stand in the order of their tokens.

Part of pass 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from think_compile.kernels import answers
from think_compile.passes.layout import same_size, value_of
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.kv_cache import CachedAttention
from think_compile.passes.rewrite.question import question

_Writes = tuple[Any, Any, Any]


def find_starts(normalized: Normalized, sites: Sequence[CachedAttention]) -> GraphModule | None:
    """A graph of the caller's inputs that tells two things of a call; None: they are not known.

    The highest row at which it begins to write, and whether it reads rows behind those that it writes. (Of an attention
    that is written out the second is not known, and taken for no.)
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

    return asked(list(hiding)) or asked([])  # masks that cost too much are not looked at


def _writes(site: CachedAttention, read: Any) -> _Writes:
    """What tells the rows that an attention reads, and those that its call writes: the first, and how many."""
    return read, site.keys.join.start, site.query_tokens


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
