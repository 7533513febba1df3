"""Token rules: a decode step on a part of a prompt's tokens, beside a step on a context of that many tokens.

And a long prompt with a short answer, to compare rules with one another.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import StaticCache

from benchmarks import models
from benchmarks.decode import Setting, check, formats_of, measured, name_of, release, wrapped
from think_compile import KVCrush, SnapKV, ThinkConfig, report, think_compile

BUDGETS = 1024, 8192
FORMS: tuple[dict[str, Any], ...] = ({"ratio": 0.0}, {"keys": {4: 0.5}, "values": 4})


def run(setting: Setting, layers: int = 32) -> Iterator[dict[str, Any]]:
    """The check, then for each form and budget the step on a short context, and on as many tokens of a long prompt.

    ``of_short``: relative to the short context. ``of_dense_bytes``: of the cache, without room for later tokens.
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
    stored = models.past_bytes(models.stored_past(model, 1, setting.context, config, 0))
    return round(stored / models.cache_bytes(model.config, 1, setting.context), 4)


def shares(tokens: int = 32768) -> Iterator[dict[str, Any]]:
    """A row for each form and budget: the bytes of a prompt's stored cache, relative to the dense one."""
    model = models.llama(1, inner=64, vocabulary=128, device="cpu")
    for form in FORMS:
        for budget in BUDGETS:
            config = ThinkConfig(**form, tokens=SnapKV(budget))
            share = _share(model, Setting(1, tokens), config)
            yield {"way": f"think_compile, {name_of(config)}", "context": tokens, "of_dense_bytes": share}


ANSWERED = tuple(ThinkConfig(0.0, tokens=rule) for rule in (SnapKV(0.25), KVCrush(0.25)))


@torch.no_grad()
def answers(prompt: int = 10_000, generated: int = 100, layers: int = 32, runs: int = 11) -> Iterator[dict[str, Any]]:
    """Milliseconds of a prompt and of ``generated`` steps after it, the ways taking turns; ``of_snapkv``: relative."""
    release()
    plain = models.llama(layers)
    ways = [_answering(plain, config, prompt, generated) for config in ANSWERED]
    for way in ways * 2:  # compile and capture
        way()
    times = zip(*([way() for way in ways] for _ in range(runs)), strict=True)
    ms = [statistics.median(each) for each in times]
    for config, each in zip(ANSWERED, ms, strict=True):
        told = {"ms": round(each, 2), "of_snapkv": round(each / ms[0], 4)}
        yield {"way": f"think_compile, {name_of(config)}", "batch": 1, "prompt": prompt, "generated": generated} | told


def _answering(plain: Any, config: ThinkConfig, prompt: int, generated: int) -> Any:
    """A function that runs a prompt and the steps, and gives the milliseconds."""
    model = copy.deepcopy(plain, {id(weight): weight for weight in plain.parameters()})
    model = think_compile(model, **formats_of(config))
    cache = StaticCache(config=model.config, max_cache_len=prompt + generated)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device="cuda")

    def answer() -> float:
        cache.reset()  # the memory stays, and with it the captured graph
        torch.cuda.synchronize()
        begin = time.perf_counter()
        tokens = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{models.CACHE: cache}).logits.argmax(-1)
        for _ in range(generated):
            tokens = models.step(model, tokens, cache)
        torch.cuda.synchronize()
        assert not report(model).refused
        return (time.perf_counter() - begin) * 1e3

    return answer
