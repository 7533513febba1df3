"""Timing, and the rows of results.

Device work is timed as replays of a captured CUDA graph, so that launches cost as much as in a captured decode. The
replays read several copies of the inputs, which together exceed the device's cache.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
CACHE_BYTES = 128 * 2**20  # the inputs of a timed run exceed this together: an H100 caches 50 MiB


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def device_name(device: torch.device | str) -> str:
    """The device's name in the results."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def save(name: str, rows: Sequence[dict[str, Any]], device: torch.device | str, folder: Path = RESULTS) -> Path:
    """Write the rows of one benchmark, with the device and versions."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    head = {
        "benchmark": name,
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "versions": versions(),
    }
    write_rows(path, head, rows)
    return path


def write_rows(path: Path, head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """A JSON object of ``head`` and "rows", one a line."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n')


def write_groups(path: Path, head: dict[str, Any], groups: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """A JSON object of ``head`` and "pairs", whose rows stand one a line."""
    lines = {name: ",\n".join("  " + json.dumps(row) for row in rows) for name, rows in groups.items()}
    pairs = ", ".join(f"{json.dumps(name)}: [\n{text}\n]" for name, text in lines.items())
    path.write_text(json.dumps(head)[:-1] + f', "pairs": {{{pairs}}}}}\n')


def load(path: Path) -> dict[str, Any]:
    """The rows written by :func:`save`."""
    return json.loads(path.read_text())


def copies_for(n_bytes: int) -> int:
    """The number of copies of inputs of ``n_bytes`` to read in turn, so that none is still in the cache."""
    return max(1, min(64, -(-CACHE_BYTES // max(1, n_bytes)) + 1)) if n_bytes < CACHE_BYTES else 1


def captured_ms(calls: Sequence[Callable[[], Any]], repeats: int = 30, at_least_ms: float = 1.0) -> float:
    """Median milliseconds of one of ``calls``, all captured into one CUDA graph, one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs may still be being made
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    once = _replays([*calls], 3)
    rounds = max(1, round(at_least_ms / max(once, 1e-3)))
    return _replays([*calls] * rounds, repeats) / (len(calls) * rounds)


def _replays(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = [event_ms(graph.replay) for _ in range(repeats)]
    return statistics.median(times)


def event_ms(call: Callable[[], Any]) -> float:
    """Milliseconds that the device is busy with one call, launches included."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def read_bandwidth(device: torch.device | str = "cuda", n_bytes: int = 2**31) -> float:
    """Bytes per second read by a reduction over a large buffer: an upper bound for any attention."""
    rows = torch.empty(n_bytes // 2, dtype=torch.bfloat16, device=device).normal_().view(-1, 2**20)
    return n_bytes / captured_ms([lambda: rows.amax(1)]) * 1e3
