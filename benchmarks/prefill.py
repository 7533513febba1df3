"""Milliseconds until the first token of a long prompt: the wrapped model and the plain one, both compiled."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import StaticCache

from benchmarks import models
from benchmarks.decode import formats_of, name_of, release
from think_compile import H2O, KVCrush, SnapKV, ThinkConfig, restore, think_compile

RUNS, WARM = 5, 2
CONFIGS: tuple[ThinkConfig | None, ...] = (  # None: the plain model
    None,
    ThinkConfig(0.0),
    ThinkConfig(0.5),
    ThinkConfig(keys={4: 0.5}, values=4),
    ThinkConfig(keys={8: 0.25, 4: 0.75}, values=4),
)

RULES: tuple[ThinkConfig, ...] = (
    ThinkConfig(0.0),
    *(ThinkConfig(tokens=rule(0.25)) for rule in (SnapKV, KVCrush, H2O)),
)


@torch.no_grad()
def run(
    batch: int = 1, context: int = 32768, layers: int = 32, configs: Sequence[ThinkConfig | None] = CONFIGS
) -> Iterator[dict[str, Any]]:
    """The check, then a row for each way."""
    model = models.llama(layers)
    yield {"check": "error over the plain model's in bf16", "ratio": check(model)}
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device="cuda")
    for config in configs:
        release()
        torch.cuda.reset_peak_memory_stats()
        if config is None:
            model.compile()
        else:
            think_compile(model, **formats_of(config))
        ms = [_ms(model, ids) for _ in range(WARM + RUNS)][WARM:]
        if config is None:
            model._compiled_call_impl = None
        else:
            restore(model)
        way = "torch.compile" if config is None else f"think_compile, {name_of(config)}"
        peak = torch.cuda.max_memory_allocated() / 2**30
        told = {"ms": round(statistics.median(ms), 1), "peak_gib": round(peak, 2)}
        yield {"way": way, "batch": batch, "context": context, **told}


@torch.no_grad()
def check(model: Any, tokens: int = 4096) -> float:
    """The wrapped model's error in the first logits, bf16, in units of the plain one's; raises if it exceeds rounding.

    With all layers, against the same weights in fp32, to tell rounding from other errors.
    """
    torch._dynamo.reset()
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    want = _first_logits(copy.deepcopy(model).float(), ids)
    natural = (_first_logits(model, ids) - want).abs().max().item()
    error = (_first_logits(think_compile(model, 0.5), ids) - want).abs().max().item()
    restore(model)
    if not error < 3 * natural:
        raise RuntimeError(f"the logits are off by {error:.2e}, the plain model's by {natural:.2e}: nothing is timed")
    return round(error / natural, 2)


def _first_logits(model: Any, ids: Any) -> Any:
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + models.SPARE)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **{models.CACHE: cache}).logits.float()


def _ms(model: Any, ids: Any) -> float:
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + models.SPARE)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **{models.CACHE: cache})
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3
