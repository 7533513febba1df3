"""Milliseconds until the first token of a long prompt: the wrapped model and the plain one, both compiled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import StaticCache

from benchmarks import models
from think_compile import restore, think_compile

RUNS, WARM = 5, 2


@torch.no_grad()
def run(batch: int = 1, context: int = 32768, layers: int = 32) -> Iterator[dict[str, Any]]:
    """A row for each way; the first tokens of all are compared before anything is timed."""
    model = models.llama(layers)
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device="cuda")
    first: dict[str, Any] = {}
    for way in ("torch.compile", "think_compile, ratio 0.5"):
        torch._dynamo.reset()
        if way == "torch.compile":
            model.compile()
        else:
            think_compile(model, 0.5)
        ms = [_ms(model, ids, first, way) for _ in range(WARM + RUNS)][WARM:]
        if way == "torch.compile":
            model._compiled_call_impl = None
        else:
            restore(model)
        error = (first[way] - first["torch.compile"]).abs().max().item()
        if error > 0.05 * first["torch.compile"].abs().max().item():
            raise RuntimeError(f"{way}: the first logits are off by {error:.2e}: not timed")
        yield {"way": way, "batch": batch, "context": context, "ms": round(statistics.median(ms), 1), "error": error}


def _ms(model: Any, ids: Any, first: dict[str, Any], way: str) -> float:
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + models.SPARE)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{models.CACHE: cache})
    torch.cuda.synchronize()
    first[way] = output.logits.float()
    return (time.perf_counter() - begin) * 1e3
