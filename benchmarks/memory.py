"""The peak of decode steps in GiB, and the number of sequences that fit beside the weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import models
from benchmarks.decode import check
from think_compile import ThinkConfig, restore, think_compile

STEPS, HEADROOM = 4, 2 * 2**30


def run(context: int = 32768, layers: int = 32) -> Iterator[dict[str, Any]]:
    """The check of ``decode``, then a row for the pruned and for the plain cache of fixed size: the largest batch."""
    yield {"check": "error over the plain model's in bf16", "ratio": check()}
    gc.collect()
    torch.cuda.empty_cache()
    model, config = models.llama(layers), ThinkConfig(0.5)
    kept = config.kept_channels(model.config.head_dim)
    free, total = torch.cuda.mem_get_info()
    for way, channels in (("think_compile, ratio 0.5", kept), ("HF StaticCache, torch.compile", None)):
        torch._dynamo.reset()
        one = models.cache_bytes(model.config, 1, context + models.SPARE, channels)
        batch, peak = _largest(model, int((free - HEADROOM) // one), context, config if channels else None)
        yield {"way": way, "context": context, "batch": batch, "of_gib": round(total / 2**30, 1)} | peak


def _largest(model: Any, batch: int, context: int, config: ThinkConfig | None) -> tuple[int, dict[str, float]]:
    """The largest batch up to ``batch`` that decodes, and its peak."""
    for fewer in range(batch, 0, -1):
        try:
            return fewer, _peak(model, fewer, context, config)
        except torch.OutOfMemoryError:
            continue  # the step itself takes memory as well
    raise RuntimeError(f"one sequence of {context} tokens does not fit")


@torch.no_grad()
def _peak(model: Any, batch: int, context: int, config: ThinkConfig | None) -> dict[str, float]:
    gc.collect()
    torch.cuda.empty_cache()
    undo: Callable[[Any], Any] = restore
    if config is None:
        model.compile()
        undo = _uncompiled
        cache = models.fixed_past(model, batch, context)
    else:
        cache = models.pruned_past(think_compile(model, config.ratio), batch, context, config)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tokens = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    try:
        for _ in range(STEPS):
            tokens = models.step(model, tokens, cache)
        torch.cuda.synchronize()
    finally:
        undo(model)
    peak = torch.cuda.max_memory_allocated()
    return {"weights_and_cache_gib": round(before / 2**30, 2), "peak_gib": round(peak / 2**30, 2)}


def _uncompiled(model: Any) -> None:
    model._compiled_call_impl = None
