"""How the decode kernels are launched: for each pair of codecs a table of measured shapes, of which the nearest counts.

``python -m benchmarks.tune`` writes the table, launches.json, for the device that it runs on; the file says how the one
that is committed came about. Other devices take the same launches, made to fit and with as many programs for each of
their multiprocessors: right, if not the fastest.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).parent / "launches.json"
SMALLEST_SHARE = 64  # rows; taken to be the fewest that are worth a program of their own, not measured
FILLED = 0.86  # of the shared memory that a program may have, by the estimate here, which leaves out small things
LONG = 16384  # rows that a cache is taken to have whose length is not known while its graph is made


class Launch(NamedTuple):
    """Rows of queries and of keys a tile, warps, pipeline stages, shares of a head's rows."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    splits: int


class Device(NamedTuple):
    """Bytes of shared memory that one program may take, and multiprocessors."""

    shared_bytes: int
    processors: int


H100 = Device(232_448, 132)


@functools.cache
def device_of(device: torch.device) -> Device:
    """What a GPU has; anything else, which interprets, passes for an H100."""
    if device.type != "cuda":
        return H100
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", None) or found.shared_memory_per_block  # AMD has one kind
    return Device(shared, found.multi_processor_count)


def query_tile(rows: int) -> int:
    """Rows of queries a program takes, of the ``rows`` that read one KV head: a power of two, 16 to 64."""
    return min(64, max(16, 1 << (rows - 1).bit_length()))


@functools.cache
def table(pair: str) -> tuple[dict[str, Any], ...]:
    """The measured shapes of a pair of codecs, "channels+whole" for example.

    Each has rows (of queries that read one KV head), bytes (of a token's encoded value and key), blocks (KV heads of
    all sequences, times tiles of query rows), tokens, and the launch without its block_m.
    """
    return tuple(_measured()["pairs"][pair])


@functools.cache
def _measured() -> dict[str, Any]:
    """What the file holds: the shapes, and how many processors the device has that they are of."""
    found: dict[str, Any] = json.loads(TABLE.read_text())
    return found


def launch_for(pair: str, shape: tuple[int, int, int, int], extent: int, device: Device = H100) -> Launch:
    """How to launch for a shape: the table's launch for the nearest, with as many programs in all, for this device.

    Args:
        pair: the codecs of keys and values.
        shape: (query rows of each KV head, bytes of a token's encoded key and value, bytes of them with a whole key, KV
            heads of all sequences).
        extent: how many tokens there are.
    """
    rows, narrow, whole, heads = shape
    block_m = query_tile(rows)
    blocks, extent = max(1, heads * -(-rows // block_m)), max(1, extent)

    def distance(row: dict[str, Any]) -> float:  # weights by judgement: a tile of another size fits least
        total = math.log2(row["blocks"] * row["tokens"] / (blocks * extent))
        tile = 4 * abs(math.log2(query_tile(row["rows"]) / block_m)) + abs(math.log2(row["rows"] / rows)) / 4
        shape = 2 * abs(math.log2(row["bytes"] / narrow)) + abs(math.log2(row["blocks"] / blocks))
        return tile + shape + abs(total)

    nearest = min(table(pair), key=distance)
    block_n, warps, stages, splits = nearest["launch"]
    if (nearest["blocks"], nearest["tokens"], _measured()["processors"]) != (blocks, extent, device.processors):
        programs = splits * nearest["blocks"] * device.processors / _measured()["processors"]
        splits = max(1, min(round(programs / blocks), extent // SMALLEST_SHARE))
    return _fitting(Launch(block_m, block_n, warps, stages, splits), whole, FILLED * device.shared_bytes)


def _fitting(launch: Launch, whole: int, room: float) -> Launch:
    """The launch with no more stages, and then rows a tile, than ``room`` bytes of shared memory hold."""
    while (launch.block_n * (launch.stages - 1) + launch.block_m) * whole > room:
        if launch.stages > 2:
            launch = launch._replace(stages=launch.stages - 1)
        elif max(launch.block_m, launch.block_n) > 16:
            larger = "block_n" if launch.block_n >= launch.block_m else "block_m"
            launch = launch._replace(**{larger: getattr(launch, larger) // 2})
        else:
            break
    return launch
