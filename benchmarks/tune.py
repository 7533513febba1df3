"""Writes think_compile/kernels/launches.json: launches of the decode kernel for the shapes measured here.

Each shape is timed with a grid of tiles, warps, stages and shares. The fastest launch becomes a row of the table;
:func:`think_compile.kernels.launch.launch_for` takes the nearest row. Run it on the table's device.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.measure import captured_ms, copies_for, device_name, versions, write_groups
from think_compile import ThinkConfig
from think_compile.cache.state import Call, Span, Stored
from think_compile.formats.think import CHANNEL
from think_compile.kernels.calls import PAIRS
from think_compile.kernels.launch import TABLE, Launch, query_tile

RECENT = ThinkConfig.recent
PAIR = "channels", "whole"  # of codecs to measure
KERNELS = PAIRS[PAIR]


@dataclass(frozen=True)
class Shape:
    """A later call: ``batch`` sequences of ``tokens`` tokens; the other fields are the layer's."""

    batch: int
    tokens: int
    query_heads: int = 32
    heads: int = 8
    d: int = 128
    kept: int = 64
    dv: int = 128
    queries: int = 1
    mask: str = "none"
    dtype: torch.dtype = torch.bfloat16

    @property
    def rows(self) -> int:
        """Query rows of a KV head."""
        return self.query_heads // self.heads * self.queries

    @property
    def n_bytes(self) -> int:
        """Bytes of keys and values read by one call."""
        return self.batch * self.heads * self.tokens * (self.kept + self.dv) * self.dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        return self.batch * self.heads * self.tokens * (self.d + self.dv) * self.dtype.itemsize


Arguments = tuple[Call, Stored, Stored, Span]


def arguments(shape: Shape, device: str = "cuda", spare: int = 64) -> Arguments:
    """Fresh random arguments of :meth:`PairKernels.attend`, the lengths on the device."""
    b, h, s = shape.batch, shape.heads, shape.tokens
    make = functools.partial(torch.randn, dtype=shape.dtype)
    with torch.device(device):
        q = make(b, shape.query_heads, shape.queries, shape.d)
        k, v = (make(b, h, shape.queries, width) for width in (shape.d, shape.dv))
        channels = torch.rand(b, h, shape.d).topk(shape.kept).indices.sort().values.to(CHANNEL)
        rows, ring = make(b, h, s + spare, shape.kept), make(b, h, RECENT + 1, shape.d)
        values = make(b, h, s + spare, shape.dv)
        start, window_start = torch.tensor(s - shape.queries), torch.tensor(s - shape.queries - RECENT)
        mask = None
        if shape.mask != "none":
            mask = (torch.arange(s + spare) < s).expand(b, 1, shape.queries, -1)
            if shape.mask == "float":
                mask = torch.zeros(mask.shape, dtype=shape.dtype).masked_fill(~mask, torch.finfo(shape.dtype).min)
    keys = Stored({"rows": rows, "channels": channels, "ring": ring}, window_start)
    return Call(q, k, v, mask, shape.d**-0.5), keys, Stored({"rows": values}), Span(start, 0, s + spare)


# Fixed caches, which CUDA graphs replay, come with a mask; growing ones mostly without.
SHAPES = [
    *(Shape(b, s, mask="bool") for b, s in ((1, 1024), (1, 8192), (1, 32768), (1, 131072))),
    *(Shape(b, s, mask="bool") for b, s in ((8, 1024), (8, 8192), (8, 32768), (16, 32768))),
    *(Shape(b, s, heads=32) for b, s in ((1, 8192), (4, 16384))),
    *(Shape(b, s, kept=128, mask="bool") for b, s in ((1, 8192), (1, 131072), (8, 32768))),  # ratio 0
    *(Shape(b, s, kept=80) for b, s in ((1, 32768), (8, 8192), (8, 32768))),
    *(Shape(b, s, kept=32) for b, s in ((1, 32768), (8, 8192))),
    *(Shape(b, s, query_heads=16, heads=8, d=256, kept=128, dv=256) for b, s in ((1, 32768), (8, 8192))),
    *(Shape(b, s, query_heads=28, heads=4) for b, s in ((1, 32768), (8, 8192))),
    Shape(8, 8192, query_heads=28, heads=4, d=256, kept=128, dv=256, mask="float"),
    *(Shape(b, s, query_heads=9, heads=3, d=64, kept=32, dv=64) for b, s in ((1, 2048), (8, 8192))),
    *(Shape(b, s, queries=8) for b, s in ((1, 32768), (8, 8192))),
    *(Shape(b, s, queries=32) for b, s in ((1, 32768), (8, 8192))),
]
# If a tile has at least as many rows of keys as the program has threads, Triton converts the logits of every tile to
# the mask's layout and back. Shapes without a mask do not show this cost.
TILES = [
    (block_n, warps, stages)
    for block_n, warps, stages in itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 4))
    if block_n < 32 * warps
]
PROGRAMS = (1, 2, 3, 4)  # of one multiprocessor


def launches(shape: Shape, tiles: Any = TILES) -> list[Launch]:
    """The launches to try for a shape."""
    block_m = query_tile(shape.rows)
    blocks = shape.batch * shape.heads * -(-shape.rows // block_m)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    wanted = {max(1, round(processors * n / blocks)) for n in PROGRAMS} | {1, 2, 4, 8, 16, 32, 64}
    most = max(1, min(128, 8 * processors // blocks, shape.tokens // 64))
    shares = sorted(n for n in wanted if n <= most)
    return [Launch(block_m, n, w, s, k) for n, w, s in tiles for k in shares]


def _compile(job: tuple[Shape, Launch]) -> str | None:
    """Compiles in a process of its own; returns the error, if any: the launch may not fit the device."""
    shape, launch = job
    try:
        KERNELS.attend(*arguments(variant(shape)), launch)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def fitting_tiles(shapes: list[Shape], processes: int = 12) -> dict[Shape, list[tuple[int, int, int]]]:
    """Compiles every variant into Triton's cache, in parallel; returns the working tiles of each shape."""
    jobs = [(shape, Launch(query_tile(shape.rows), *tile, 2)) for shape in shapes for tile in TILES]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        errors = pool.map(_compile, jobs, chunksize=1)
    fitting: dict[Shape, list[tuple[int, int, int]]] = {shape: [] for shape in shapes}
    for (shape, launch), error in zip(jobs, errors, strict=True):
        if error is None:
            fitting[shape].append((launch.block_n, launch.warps, launch.stages))
    return fitting


def timings(shape: Shape, tiles: Any, repeats: int = 7) -> list[tuple[float, Launch]]:
    """(milliseconds, launch), the fastest first."""
    inputs = [arguments(shape) for _ in range(copies_for(shape.n_bytes))]
    found = []
    for launch in launches(shape, tiles):
        calls = [functools.partial(KERNELS.attend, *given, launch) for given in inputs]
        found.append((captured_ms(calls, repeats), launch))
    return sorted(found, key=lambda pair: pair[0])


def variant(shape: Shape) -> Shape:
    """The shape with the same compiled kernels."""
    return replace(shape, batch=1, tokens=512)


def tune(shapes: list[Shape] = SHAPES) -> list[dict[str, Any]]:
    """The rows of the table, printed as they come."""
    fitting = fitting_tiles(sorted({variant(shape) for shape in shapes}, key=str))
    rows = []
    for shape in shapes:
        (ms, best), *others = timings(shape, fitting[variant(shape)])
        row = {
            "rows": shape.rows,
            "bytes": (shape.kept + shape.dv) * shape.dtype.itemsize,
            "blocks": shape.batch * shape.heads * -(-shape.rows // best.block_m),
            "tokens": shape.tokens,
            "mask": shape.mask,
            "launch": list(best[1:5]),
            "us": round(ms * 1e3, 1),
            "tb_s": round(shape.n_bytes / ms / 1e9, 2),
        }
        rows.append(row)
        print(shape, row, "then", [(round(t * 1e3, 1), list(launch)) for t, launch in others[:4]], flush=True)
    return rows


def main() -> None:
    """Tune, and write the table."""
    rows = tune()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    head = {"device": device_name("cuda"), "processors": processors, "versions": versions()}
    write_groups(TABLE, head, {"+".join(PAIR): rows})


if __name__ == "__main__":
    main()
