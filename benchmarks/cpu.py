"""Milliseconds of a decode step on a CPU: the wrapped model, compiled by Inductor, and the plain model, compiled.

The shape of SmolLM2-135M, float32, random weights; both after a real prefill of the same prompt. Before anything is
timed, steps on pruned caches are compared with the plain model's on the dense equivalents of these caches.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.models import CACHE, densified_growing
from think_compile import think_compile
from think_compile.formats import attention

STEPS = 40
DECODED = ", decoded whole in each step"


def smollm(layers: int = 30) -> LlamaForCausalLM:
    """A model of the shape of SmolLM2-135M with random weights."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def run(context: int = 4096, layers: int = 30) -> Iterator[dict[str, Any]]:
    """The check, then a row for each way. The ways take turns step by step, so that other load affects all alike."""
    torch.manual_seed(0)
    model = smollm(layers)
    yield {"check": "error over the plain model's in fp32", "ratio": check(model)}
    plain = copy.deepcopy(model)
    plain.compile()
    ways = {"torch.compile": plain}
    ways |= {f"think_compile, ratio {ratio}": think_compile(copy.deepcopy(model), ratio) for ratio in (0.0, 0.5)}
    ways |= {
        f"think_compile, 4 bits{how}": think_compile(copy.deepcopy(model), keys=4, values=4) for how in ("", DECODED)
    }
    ids = torch.randint(0, 49152, (1, context + STEPS + 8))
    caches = {way: DynamicCache(config=model.config) for way in ways}
    for way in ways:
        with _reading(way):
            _call(ways[way], ids[:, :context], caches[way])
    times: dict[str, list[float]] = {way: [] for way in ways}
    for at in range(context, context + STEPS + 8):
        for way in ways:
            with _reading(way):
                begin = time.perf_counter()
                _call(ways[way], ids[:, at : at + 1], caches[way])
                times[way].append((time.perf_counter() - begin) * 1e3)
    for way, ms in times.items():
        row = {"way": way, "context": context, "layers": layers, "threads": torch.get_num_threads()}
        yield row | {"ms": round(statistics.median(ms[8:]), 2), "fastest_ms": round(min(ms[8:]), 2)}


@contextmanager
def _reading(way: str) -> Iterator[None]:
    """Compile steps with stock attention over all decoded rows, if the way is to be so."""
    most = attention.MAX_NARROW_QUERIES
    attention.MAX_NARROW_QUERIES = 0 if way.endswith(DECODED) else most
    try:
        yield
    finally:
        attention.MAX_NARROW_QUERIES = most


@torch.no_grad()
def check(model: LlamaForCausalLM, tokens: int = 512, steps: int = 3) -> float:
    """The wrapped model's error in a prompt and steps, against fp64, in units of the plain one's.

    Raises:
        RuntimeError: it is more than rounding.
    """
    ours, exact = think_compile(copy.deepcopy(model), 0.5), copy.deepcopy(model).double()
    cache = DynamicCache(config=model.config)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens + steps))
    worst = 0.0
    for part in (ids[:, :tokens], *ids[:, tokens:].split(1, 1)):
        pasts = [densified_growing(cache, m) if cache.get_seq_length() else None for m in (model, exact)]
        want, plain = _call(exact, part, pasts[1]), _call(model, part, pasts[0])
        error, natural = ((got - want).abs().max().item() for got in (_call(ours, part, cache), plain))
        worst = max(worst, error / natural)
    if not worst < 4:
        raise RuntimeError(f"the wrapped model's error is {worst:.1f} times the plain one's: nothing is timed")
    return round(worst, 2)


def _call(model: Any, ids: Any, cache: Any) -> Any:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
