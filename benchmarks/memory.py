"""Memory of decode steps: the peak at one batch, the largest batch that fits beside the weights, and its tokens/s.

Two shapes: Llama-3.1-8B with long contexts, and Llama-2-7B (multi-head attention) with the workload of KIVI's and
ThinK's papers, a prompt of 160 tokens and an output of 338.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import models
from benchmarks.decode import THINK, check, formats_of, name_of, release
from think_compile import ThinkConfig, restore, think_compile

STEPS, HEADROOM = 8, 3 * 2**30


@dataclass(frozen=True)
class Workload:
    """A model's shape, the tokens of each sequence, and how its caches are stored; None: Hugging Face's own cache.

    ``spare``: rows of a cache after the context.
    """

    model: str
    context: int
    configs: tuple[ThinkConfig | None, ...]
    spare: int = models.SPARE


def _plans(*plans: tuple[Any, Any], **options: Any) -> tuple[ThinkConfig, ...]:
    return tuple(ThinkConfig(keys=keys, values=values, **options) for keys, values in plans)


SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {},
    "Llama-2-7B": {"inner": 11008, "vocabulary": 32000, "kv_heads": 32},
}
WHOLE = (None, ThinkConfig(0.0))
THINK_KIVI: tuple[Any, Any] = ({2: 0.6}, 2)
LARGEST = tuple((f"mustafar:{numbers}", f"mustafar:{numbers}") for numbers in ("0.7", "0.7:8"))
WORKLOADS = (
    Workload("Llama-3.1-8B", 32768, WHOLE + _plans(({4: 0.5}, 4), (4, 4), ({4: 0.6}, 4), (2, 2), THINK_KIVI, *LARGEST)),
    Workload(
        "Llama-2-7B",
        498 - STEPS,
        (
            None,
            *_plans(THINK_KIVI, group=32, recent=0, sinks=0),
            *_plans(THINK_KIVI, group=64, recent=0),
            *_plans(THINK_KIVI, (2, 2), ({4: 0.6}, 4), (4, 4), group=64, recent=16),
            ThinkConfig(0.0),
        ),
        STEPS,
    ),
)


def run(workloads: Sequence[Workload] = WORKLOADS, layers: int = 32) -> Iterator[dict[str, Any]]:
    """The check of ``decode``, then a row for each workload and way of storing: the largest batch."""
    yield {"check": "error over the plain model's in bf16", "ratio": check(THINK)}
    for workload in workloads:
        release()
        model = models.llama(layers, **SHAPES[workload.model])
        common = None  # the batch that also fits without compression
        for config in workload.configs:
            batch, row = _largest(model, workload, config)
            common = batch if config is None else common
            assert common is not None
            equal = row if batch == common else _steps(model, common, workload, config) if batch > common else {}
            name = "HF StaticCache, torch.compile" if config is None else f"think_compile, {name_of(config)}"
            window = {} if config is None else {of: getattr(config, of) for of in ("recent", "group", "sinks")}
            yield {
                **{"model": workload.model, "context": workload.context, "way": name, **window, "batch": batch, **row},
                **{"at_batch": common, "peak_gib_at_batch": equal.get("peak_gib")},
            }
        del model


def _largest(model: Any, workload: Workload, config: ThinkConfig | None) -> tuple[int, dict[str, float]]:
    """The largest batch that decodes, and its row."""
    release()
    free = torch.cuda.mem_get_info()[0] - HEADROOM
    batch = int(free // _bytes_of_one(model, workload, config))
    while batch:
        try:
            return batch, _steps(model, batch, workload, config)
        except torch.OutOfMemoryError:
            batch -= max(1, batch // 50)  # the step itself takes memory as well
    raise RuntimeError(f"one sequence of {workload.context} tokens does not fit")


def _bytes_of_one(model: Any, workload: Workload, config: ThinkConfig | None) -> int:
    if config is None:
        return models.cache_bytes(model.config, 1, workload.context + workload.spare)
    return models.past_bytes(models.stored_past(model, 1, workload.context, config, workload.spare))


@torch.no_grad()
def _steps(model: Any, batch: int, workload: Workload, config: ThinkConfig | None) -> dict[str, float]:
    release()
    if config is None:
        cache = models.fixed_past(model, batch, workload.context, workload.spare)
        model.compile(mode="reduce-overhead")
    else:
        cache = models.stored_past(model, batch, workload.context, config, workload.spare)
        think_compile(model, **formats_of(config))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tokens, times = torch.zeros(batch, 1, dtype=torch.long, device="cuda"), []
    try:
        for _ in range(STEPS):
            begin = time.perf_counter()
            tokens = models.step(model, tokens, cache)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    finally:
        if config is None:
            model._compiled_call_impl = None
        else:
            restore(model)
    peak, ms = torch.cuda.max_memory_allocated(), statistics.median(times[STEPS // 2 :]) * 1e3
    return {
        **{"weights_and_cache_gib": round(before / 2**30, 2), "peak_gib": round(peak / 2**30, 2)},
        **{"ms": round(ms, 2), "tokens_per_s": round(batch / ms * 1e3, 1)},
    }
