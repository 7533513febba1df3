"""How far a later call would write into a cache of fixed size, asked when it may be too far.

On a GPU a write behind the end of a buffer is found too late, if at all. How many tokens a cache holds is known to the
device only; the runtime counts the tokens that calls bring, and asks the model's own positions when the count leaves
no room. (A call that leaves rows out is not foreseen: to find it, each would have to wait for the device.)

Part of pass 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from think_compile.kernels import steps
from think_compile.passes.kv_cache import CachedAttention
from think_compile.passes.normalize import Normalized
from think_compile.passes.question import question


def find_starts(normalized: Normalized, sites: Sequence[CachedAttention]) -> GraphModule | None:
    """A graph of the caller's inputs that tells the highest row at which a call begins to write; None: not known."""
    starts = list(dict.fromkeys(site.keys.join.start for site in sites if site.fixed and site.past is not None))
    if not starts:
        return None

    def ask(graph: Any, at: Any) -> Any:
        return graph.call_function(steps.highest_start, ([at(start) for start in starts],))

    return question(normalized, starts, ask)
