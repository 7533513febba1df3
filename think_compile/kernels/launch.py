"""Launch settings of the decode kernels: each pair of codecs has a table of measured shapes; the nearest is used.

``python -m benchmarks.tune`` writes the table, launches.json, for the device that it runs on; the file records how the
committed table was measured. Other devices use the same launches, fitted to their shared memory and with as many
programs per multiprocessor: correct, if not the fastest.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).parent / "launches.json"
SMALLEST_SHARE = 64  # rows; the fewest assumed to be worth a program, not measured
WHOLE_SHARE = 128  # positions with whole rows for a program, about
FILLED = 0.86  # share of a program's shared memory to use, since the estimate here omits small items
CODE_PROGRAMS = 8  # of one warp on a processor
FILLED_BY_CODES = 0.95  # share of the shared memory
WHOLE_TILE = 32  # positions with whole rows in a tile, beside codes
CODES_PER_ROW = 8  # tokens in codes that take as long as a whole row; judged from one shape
LONG = 16384  # least length that a launch assumes for a growing cache, whose length is symbolic
LEAST = 4096  # the same for a cache of fixed but symbolic size: its graph also serves larger ones


class Launch(NamedTuple):
    """Query rows and key rows per tile, warps, pipeline stages, shares of a head's encoded rows and of its whole rows.

    ``whole``: 0 takes a share for every ``WHOLE_SHARE`` whole rows.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    splits: int
    whole: int = 0

    def shares_of(self, rows: int) -> int:
        """Shares of this many whole rows."""
        return self.whole or min(self.splits, -(-rows // WHOLE_SHARE))


class Device(NamedTuple):
    """Bytes of shared memory available to one program, and number of multiprocessors."""

    shared_bytes: int
    processors: int


H100 = Device(232_448, 132)


@functools.cache
def device_of(device: torch.device) -> Device:
    """The properties of a GPU; any other device, which runs the interpreter, counts as an H100."""
    if device.type != "cuda":
        return H100
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", None) or found.shared_memory_per_block  # AMD has only this
    return Device(shared, found.multi_processor_count)


def query_tile(rows: int) -> int:
    """Query rows per program, given the ``rows`` that read one KV head: a power of two, 16 to 64."""
    return min(64, max(16, 1 << (rows - 1).bit_length()))


@functools.cache
def table(pair: str) -> tuple[dict[str, Any], ...]:
    """The measured shapes of a pair of codecs, for example "channels+whole".

    Each has rows (query rows per KV head), bytes (of a token's encoded key and value), blocks (KV heads of all
    sequences, times tiles of query rows), tokens, and the launch without its block_m.
    """
    pairs = _measured()["pairs"]
    return tuple(pairs.get(pair, pairs["channels+whole"]))  # pairs that were not measured: as the first that was


@functools.cache
def _measured() -> dict[str, Any]:
    """The content of the file: the shapes, and the number of processors of the measured device."""
    found: dict[str, Any] = json.loads(TABLE.read_text())
    return found


def launch_for(pair: str, shape: tuple[int, int, int, int], extent: int, device: Device = H100) -> Launch:
    """The launch for a shape: from the nearest measured shape, scaled to the same number of programs per processor.

    Args:
        pair: the codecs of keys and values.
        shape: (query rows of each KV head, bytes of a token's encoded key and value, bytes of a whole key and value, KV
            heads of all sequences).
        extent: number of tokens.
    """
    rows, narrow, whole, heads = shape
    block_m = query_tile(rows)
    blocks, extent = max(1, heads * -(-rows // block_m)), max(1, extent)

    def distance(row: dict[str, Any]) -> float:  # weights by judgement: another tile size counts most
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


@functools.lru_cache(maxsize=256)  # op by op, each layer of each step asks
def launch_for_codes(
    rows: int, heads: int, tokens: tuple[int, int, int], n_bytes: int, device: Device = H100
) -> Launch:
    """The launch for rows in integer codes: one warp for a tile, and as many programs as processors hold at once.

    Args:
        rows: query rows of each KV head.
        heads: KV heads of all sequences.
        tokens: in the cache, in the ring, in a tile of codes.
        n_bytes: of the keys and values of a tile.
    """
    block_m = 8 if rows <= 8 else query_tile(rows)
    extent, ring, group = tokens
    tiles, records = max(1, heads * -(-rows // block_m)), max(1, -(-(extent - ring) // group))
    resident = max(1, min(CODE_PROGRAMS, int(FILLED_BY_CODES * device.shared_bytes / max(1, n_bytes))))
    slots = resident * device.processors // tiles  # for the programs of a head

    def whole(splits: int) -> int:
        """Shares of whole rows: as long as a share in codes, or up to twice as long to start with the others."""
        wanted = -(-ring // max(WHOLE_TILE, extent // splits // CODES_PER_ROW)) if slots else 1
        return max(slots - splits, -(-wanted // 2)) if splits < slots < splits + wanted else wanted

    def records_in_turn(splits: int) -> int:
        """Records that a slot reads one after another; programs in excess start when those of whole rows have ended."""
        waits = splits + whole(splits) > slots
        return -(-records // splits) + (-(-ring * CODES_PER_ROW // (whole(splits) * group)) if waits else 0)

    splits = min(range(1, max(1, min(slots, records)) + 1), key=records_in_turn)
    return Launch(block_m, group, 1, 2, splits, whole(splits))


def _fitting(launch: Launch, whole: int, room: float) -> Launch:
    """The launch, with stages and then rows per tile reduced to fit ``room`` bytes of shared memory."""
    while (launch.block_n * (launch.stages - 1) + launch.block_m) * whole > room:
        if launch.stages > 2:
            launch = launch._replace(stages=launch.stages - 1)
        elif max(launch.block_m, launch.block_n) > 16:
            larger = "block_n" if launch.block_n >= launch.block_m else "block_m"
            launch = launch._replace(**{larger: getattr(launch, larger) // 2})
        else:
            break
    return launch
