"""Milliseconds of a decode step through the real wrapped model, beside today's alternatives.

A step takes the token chosen by the step before, on the device. ``ms`` is the time per step in a long run, as in a
streaming server; ``ms_synchronized`` is the time per step in a loop that waits for each token, as ``generate`` does.
"""

from __future__ import annotations

import copy
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks import models
from benchmarks.measure import read_bandwidth
from think_compile import ThinkConfig, report, restore, think_compile

RUNS, STEPS, SLOW_MS = 5, 20, 40


@dataclass(frozen=True)
class Setting:
    """``batch`` sequences that hold ``context`` tokens each."""

    batch: int
    context: int


SETTINGS = tuple(Setting(b, s) for b, s in ((1, 1024), (1, 8192), (1, 32768), (1, 131072), (8, 8192), (8, 32768)))


@dataclass
class Row:
    """One way of decoding in one setting."""

    way: str
    batch: int
    context: int
    ms: float
    ms_synchronized: float
    tokens_per_s: float
    first_step_s: float
    peak_gib: float


def timed(way: str, setting: Setting, model: Any, cache: Any) -> Row:
    """Time the decode steps of a model on a cache."""
    torch.cuda.reset_peak_memory_stats()
    tokens = torch.zeros(setting.batch, 1, dtype=torch.long, device="cuda")
    begin = time.perf_counter()
    tokens = models.step(model, tokens, cache)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    for _ in range(5):
        tokens = models.step(model, tokens, cache)
    once = _run(model, tokens, cache, synchronize=False)
    ms = statistics.median(_run(model, tokens, cache, synchronize=False) for _ in range(RUNS if once < SLOW_MS else 1))
    waiting = _run(model, tokens, cache, synchronize=True)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return Row(way, setting.batch, setting.context, *_rounded(ms, waiting, setting.batch / ms * 1e3, first, peak))


def _rounded(*numbers: float) -> list[float]:
    return [round(x, 3) for x in numbers]


def _run(model: Any, tokens: Any, cache: Any, *, synchronize: bool) -> float:
    """Milliseconds per step, the mean of a run."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(STEPS):
        tokens = models.step(model, tokens, cache)
        if synchronize:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / STEPS * 1e3


THINK = ThinkConfig(0.5)


@functools.cache
@torch.no_grad()
def check(config: ThinkConfig, tokens: int = 2048, steps: int = 4) -> float:
    """The wrapped model's error in bf16, in units of the plain one's; raises if it exceeds rounding."""
    torch._dynamo.reset()
    plain = (models.latent if config.decode else models.llama)(2, vocabulary=4096)
    exact = copy.deepcopy(plain).float()
    ours = think_compile(copy.deepcopy(plain), **formats_of(config))
    cache = models.stored_past(ours, 2, tokens, config)
    worst = 0.0
    for i in range(steps):
        ids = torch.full((2, 1), 7 + i, device="cuda")
        pasts = models.densified(cache, plain), models.densified(cache, exact)
        logits = [_logits(m, ids, past) for m, past in zip((plain, exact, ours), (*pasts, cache), strict=True)]
        natural, error = ((logits[j] - logits[1]).abs().max().item() for j in (0, 2))
        worst = max(worst, error / natural)
    if not worst < 3:
        raise RuntimeError(f"the wrapped model's error is {worst:.1f} times the plain one's: nothing is timed")
    return round(worst, 2)


def _logits(model: Any, ids: Any, cache: Any) -> Any:
    return model(input_ids=ids, use_cache=True, **{models.CACHE: cache}).logits.float()


STORED = ("ratio", "keys", "values", "group", "sinks", "recent", "tokens", "decode")


def formats_of(config: ThinkConfig) -> dict[str, Any]:
    """The options of a configuration that say how caches are stored."""
    return {name: getattr(config, name) for name in STORED}


def name_of(config: ThinkConfig) -> str:
    """The configuration in the rows: the ratio or the plans, and the tokens."""
    if config.tokens is not None:
        return f"{name_of(replace(config, tokens=None))}, tokens {config.tokens}"
    if config.keys is None and config.values is None:
        return f"ratio {config.ratio}"
    keys = f"ratio {config.ratio}" if config.keys is None else f"keys {config.keys}"
    return keys if config.values is None else f"{keys}, values {config.values}"


Way = Callable[[Any, Setting], Row]


def wrapped(config: ThinkConfig, **inductor_options: Any) -> Way:
    """The wrapped model, replayed from CUDA graphs."""

    def way(model: Any, setting: Setting) -> Row:
        check(replace(config, tokens=None))  # the tokens are checked by the tests: there is no dense cache to compare
        release()
        think_compile(model, **formats_of(config), **inductor_options)
        try:
            cache = models.stored_past(model, setting.batch, setting.context, config)
            chosen = [f"{name}={value}" for name, value in inductor_options.items()]
            name = ", ".join(["think_compile", name_of(config), *chosen])
            row = timed(name, setting, model, cache)
            assert not report(model).refused
            return row
        finally:
            restore(model)

    return way


def eager_growing(model: Any, setting: Setting) -> Row:
    """Hugging Face's default: a growing cache, nothing compiled."""
    return timed("HF DynamicCache, eager", setting, model, models.growing_past(model, setting.batch, setting.context))


def compiled_static(model: Any, setting: Setting) -> Row:
    """Hugging Face's static cache under ``torch.compile(mode="reduce-overhead")``."""
    cache = models.fixed_past(model, setting.batch, setting.context)
    model.compile(mode="reduce-overhead")
    try:
        return timed("HF StaticCache, torch.compile", setting, model, cache)
    finally:
        model._compiled_call_impl = None


def quantized(model: Any, setting: Setting) -> Row:
    """Hugging Face's 4-bit cache: smaller, but unpacked completely in each step."""
    from transformers import QuantizedCache

    cache = QuantizedCache(backend="quanto", config=model.config)
    models.fill(cache, model, setting.batch, setting.context)
    return timed("HF QuantizedCache (quanto, 4 bits), eager", setting, model, cache)


UNTUNED = wrapped(THINK, coordinate_descent_tuning=False)  # cuBLAS then runs the products of one row
PLANS = tuple(
    ThinkConfig(keys=keys, values=values)
    for keys, values in (({4: 0.5}, 4), (4, 4), ({8: 0.25, 4: 0.75}, 4), (8, 8), ({4: 0.5, 2: 0.5}, 4))
)
OURS: tuple[Way, ...] = (*(wrapped(config) for config in (THINK, ThinkConfig(0.0), *PLANS)), UNTUNED)
BASELINES: tuple[Way, ...] = (compiled_static, eager_growing, quantized)


def floors(model: Any, setting: Setting, bandwidth: float) -> list[dict[str, Any]]:
    """The time to read weights and cache once."""
    kept = ThinkConfig(0.5).kept_channels(model.config.head_dim)
    rows = []
    for way, channels in (("bytes floor, ratio 0.5", kept), ("bytes floor, dense", None)):
        n_bytes = models.weight_bytes(model) + models.cache_bytes(
            model.config, setting.batch, setting.context, channels
        )
        rows.append({"way": way, **asdict(setting), "ms": round(n_bytes / bandwidth * 1e3, 3)})
    return rows


def run(setting: Setting, ways: tuple[Way, ...] = OURS + BASELINES) -> Iterator[dict[str, Any]]:
    """The rows, as they are measured. The first is the check."""
    yield {"check": "error over the plain model's in bf16", "ratio": check(THINK)}
    bandwidth = read_bandwidth()
    release()  # so that the weights get the same addresses as without a check
    model = models.llama()
    yield from floors(model, setting, bandwidth)
    for way in ways:
        if way is UNTUNED and setting.batch > 1:
            continue
        release()
        yield measured(way, model, setting)


def release() -> None:
    """Free what a measured way has left."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def measured(way: Way, model: Any, setting: Setting) -> dict[str, Any]:
    """The row; for today's alternatives, also the reason if they cannot run here."""
    try:
        return asdict(way(model, setting))
    except (ImportError, torch.OutOfMemoryError) as error:
        if way in OURS:
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"way": way.__name__, **asdict(setting), "not_run": what}
