"""Milliseconds of a decode step on a part of a prompt's tokens, beside a step on a context of that many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks import models
from benchmarks.decode import Setting, check, measured, release, wrapped
from think_compile import SnapKV, ThinkConfig

BUDGETS = 1024, 8192
FORMS: tuple[dict[str, Any], ...] = ({"ratio": 0.0}, {"keys": {4: 0.5}, "values": 4})


def run(setting: Setting, layers: int = 32) -> Iterator[dict[str, Any]]:
    """The check, then for each form and budget the step on a short context, and on as many tokens of a long prompt.

    ``of_short``: relative to the short context. ``of_dense_bytes``: of the cache.
    """
    yield {"check": "error over the plain model's in bf16", "ratio": check(ThinkConfig(0.0))}
    release()
    model = models.llama(layers)
    for form in FORMS:
        for budget in BUDGETS:
            whole = ThinkConfig(**form)
            release()
            short = measured(wrapped(whole), model, replace(setting, context=budget))
            yield short
            release()
            config = ThinkConfig(**form, tokens=SnapKV(budget))
            row = measured(wrapped(config), model, setting)
            told = {"of_short": round(row["ms"] / short["ms"], 3), "of_dense_bytes": _share(model, setting, config)}
            yield row | told


def _share(model: Any, setting: Setting, config: ThinkConfig) -> float:
    stored = models.past_bytes(models.stored_past(model, 1, setting.context, config))
    return round(stored / models.cache_bytes(model.config, 1, setting.context + models.SPARE), 4)
