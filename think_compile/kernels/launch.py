"""How the decode kernel is launched: a table of measured shapes, of which the nearest one counts.

``python -m benchmarks.tune`` writes the table, launches.json, for the device that it runs on; the file says how the one
that is committed came about. On other devices the same launches are right, if not the fastest.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).parent / "launches.json"
SMALLEST_SHARE = 64  # rows; taken to be the fewest that are worth a program of their own, not measured
SHARED_BYTES = 200_000  # what a program may take of the 227 KB of an H100's multiprocessor
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
    """The measured shapes.

    Each has block_m, bytes (of a token's value and narrow key), blocks (KV heads of all sequences, times tiles of query
    rows), tokens, and the launch without its block_m.
    """
    return tuple(json.loads(TABLE.read_text())["rows"])


def launch_for(rows: int, narrow: int, whole: int, heads: int, extent: int) -> Launch:
    """How to launch for ``rows`` query rows of each of ``heads`` KV heads (of all sequences).

    The table's launch for the nearest shape, with as many programs in all.

    Args:
        narrow, whole: bytes of a token's value and its narrow key, and of those with a whole key.
        extent: how many tokens there are.
    """
    block_m = query_tile(rows)
    blocks, extent = max(1, heads * -(-rows // block_m)), max(1, extent)

    def distance(row: dict[str, Any]) -> float:
        total = math.log2(row["blocks"] * row["tokens"] / (blocks * extent))
        shape = 4 * abs(math.log2(row["block_m"] / block_m)) + 2 * abs(math.log2(row["bytes"] / narrow))
        return shape + abs(total) + abs(math.log2(row["blocks"] / blocks))

    nearest = min(table(), key=distance)
    block_n, warps, stages, splits = nearest["launch"]
    if (nearest["blocks"], nearest["tokens"]) != (blocks, extent):
        splits = max(1, min(round(splits * nearest["blocks"] / blocks), extent // SMALLEST_SHARE))
    return _fitting(Launch(block_m, block_n, warps, stages, splits), whole)


def _fitting(launch: Launch, whole: int) -> Launch:
    """The launch with no more stages and rows a tile than a multiprocessor's shared memory holds."""
    while (launch.block_n * (launch.stages - 1) + launch.block_m) * whole > SHARED_BYTES and launch.block_n > 16:
        fewer = launch.stages > 2
        launch = launch._replace(stages=launch.stages - 1) if fewer else launch._replace(block_n=launch.block_n // 2)
    return launch
