"""Milliseconds of a decode step of a model that caches latents: stored in codes and decoded by each read, and dense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import models
from benchmarks.decode import Setting, check, compiled_static, measured, release, wrapped
from think_compile import ThinkConfig

PLANS = tuple(ThinkConfig(keys=bits, values=bits, decode=True) for bits in (4, 8))


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """The check, then a row for each way; ``of_dense_bytes``: of the cache."""
    yield {"check": "error over the plain model's in bf16", "ratio": check(PLANS[0])}
    release()
    model = models.latent()
    for config in (None, *PLANS):
        release()
        row = measured(compiled_static if config is None else wrapped(config), model, setting)
        yield row | ({} if config is None else {"of_dense_bytes": round(_share(model, setting, config), 3)})


def _share(model: Any, setting: Setting, config: ThinkConfig) -> float:
    """Bytes of one sequence's cache, of the dense ones."""
    stored = models.past_bytes(models.stored_past(model, 1, setting.context, config))
    return stored / models.cache_bytes(model.config, 1, setting.context + models.SPARE)
