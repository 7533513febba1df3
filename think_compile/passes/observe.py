"""Logging for every pass: one line with matches and milliseconds, and graph dumps on DEBUG."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.fx

log = logging.getLogger("think_compile.passes")


class Count:
    """The report of a pass."""

    matches = 0
    graph: torch.fx.Graph | None = None


@contextmanager
def observed(name: str, graph: torch.fx.Graph | None) -> Iterator[Count]:
    """Log the pass's line on exit. The pass sets ``matches`` and, for a new graph, ``graph``."""
    count = Count()
    dump = log.isEnabledFor(logging.DEBUG)
    if dump and graph is not None:
        log.debug("%s, before:\n%s", name, graph)
    began = time.perf_counter()
    yield count
    log.info("%s: %d matches, %.1f ms", name, count.matches, (time.perf_counter() - began) * 1e3)
    after = count.graph or graph
    if dump and after is not None:
        log.debug("%s, after:\n%s", name, after)
