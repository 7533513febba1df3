"""How the decode kernel is launched: a table of measured shapes, of which the nearest one counts.

The table, launches.json, is written by ``python -m benchmarks.tune`` on the device that it names. Elsewhere the
same launches are right, if not the fastest.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).parent / "launches.json"
SMALLEST_SHARE = 64  # rows; smaller ones cost more to merge than they save
LONG = 16384  # rows that a cache is taken to have whose length is not known while its graph is made


class Launch(NamedTuple):
    """Rows of queries and of keys a tile, warps, pipeline stages, shares of a head's rows."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    splits: int


def query_tile(rows: int) -> int:
    """Rows of queries a program takes, of the ``rows`` that read one KV head: a power of two, 16 to 64."""
    return min(64, max(16, 1 << (rows - 1).bit_length()))


@functools.cache
def table() -> tuple[dict[str, Any], ...]:
    """The measured shapes: block_m, width (T + Dv), heads (of all sequences), tokens, and the launch."""
    return tuple(json.loads(TABLE.read_text())["rows"])


def launch_for(rows: int, width: int, heads: int, extent: int) -> Launch:
    """How to launch for ``rows`` query rows of each of ``heads`` KV heads (of all sequences).

    ``width`` is what is read of a token, T + Dv; ``extent`` how many rows there are. The table's launch for the
    nearest shape, with as many programs in all.
    """
    block_m = query_tile(rows)
    heads, extent, width = (max(1, x) for x in (heads * -(-rows // block_m), extent, width))

    def distance(row: dict[str, Any]) -> float:
        far = abs(math.log2(row["block_m"] / block_m)) * 4 + abs(math.log2(row["width"] / width)) * 2
        return (
            far + abs(math.log2(row["heads"] * row["tokens"] / (heads * extent))) + abs(math.log2(row["heads"] / heads))
        )

    nearest = min(table(), key=distance)
    block_n, warps, stages, splits = nearest["launch"]
    if (nearest["heads"], nearest["tokens"]) != (heads, extent):
        splits = max(1, min(round(splits * nearest["heads"] / heads), extent // SMALLEST_SHARE))
    return Launch(block_m, block_n, warps, stages, splits)
