"""Where the time of a decode step goes: the device's kernels, and the host's work before them."""

from __future__ import annotations

import cProfile
import pstats
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import models
from benchmarks.decode import THINK, Setting, formats_of
from think_compile import ThinkConfig, think_compile

STEPS, LINES = 20, 25
_LEADING = re.compile(r".*/site-packages/|" + re.escape(f"{Path(__file__).parents[1]}/"))  # of installed packages


def run(setting: Setting, config: ThinkConfig = THINK, layers: int = 32) -> Iterator[dict[str, Any]]:
    """Rows of the device's kernels, then of the host's functions, each the most expensive first, for one step."""
    model = think_compile(models.llama(layers), **formats_of(config))
    cache = models.stored_past(model, setting.batch, setting.context, config)
    tokens = torch.zeros(setting.batch, 1, dtype=torch.long, device="cuda")
    for _ in range(5):
        tokens = models.step(model, tokens, cache)
    yield {"host_ms_until_the_call_returns": round(statistics.median(_host_ms(model, tokens, cache)), 3)}
    yield from device_rows(model, tokens, cache)
    yield from host_rows(model, tokens, cache)


def _host_ms(model: Any, tokens: Any, cache: Any) -> Iterator[float]:
    for _ in range(STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        models.step(model, tokens, cache)
        yield (time.perf_counter() - begin) * 1e3


def device_rows(model: Any, tokens: Any, cache: Any) -> Iterator[dict[str, Any]]:
    """Kernels: launches and time of each per step."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            models.step(model, tokens, cache)
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.device_time_total)
    total = sum(event.device_time_total for event in events)
    yield {"kernel": "all", "count": sum(e.count for e in events) / STEPS, "ms": round(total / STEPS / 1e3, 3)}
    for event in events[:LINES]:
        ms = round(event.device_time_total / STEPS / 1e3, 4)
        yield {"kernel": event.key[:110], "count": event.count / STEPS, "ms": ms}


def host_rows(model: Any, tokens: Any, cache: Any) -> Iterator[dict[str, Any]]:
    """Functions of the host: time of their own in a step (cProfile adds some to each)."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(STEPS):
        models.step(model, tokens, cache)
    profiler.disable()
    torch.cuda.synchronize()
    found = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    for (path, line, name), (_, calls, own, inclusive, _) in sorted(found.items(), key=lambda kv: -kv[1][2])[:LINES]:
        row = {"host": f"{_LEADING.sub('', path)}:{line}({name})", "calls": calls / STEPS}
        yield row | {"own_ms": round(own / STEPS * 1e3, 4), "inclusive_ms": round(inclusive / STEPS * 1e3, 4)}
