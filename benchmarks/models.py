"""The timed model and caches: the shape of Llama-3.1-8B, random weights, a past written directly.

The contents of a past do not matter for time and memory, so they are random: a prefill of 8 x 32,768 tokens would take
longer than all measurements.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from think_compile import ThinkConfig
from think_compile.cache.canonical import CANONICAL
from think_compile.cache.cell import Cell
from think_compile.cache.handle import Handle, handle_for
from think_compile.cache.packed import Packed
from think_compile.cache.state import COUNTERS

SPARE = 256  # rows of a fixed cache after its past
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def llama(
    layers: int = 32,
    *,
    hidden: int = 4096,
    inner: int = 14336,
    vocabulary: int = 128256,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> LlamaForCausalLM:
    """A model of the shape of Llama-3.1-8B with random weights."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=vocabulary,
        max_position_embeddings=2**18,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters except the embedding: a step reads a single row of it."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    return sum(p.nbytes for p in model.parameters() if p is not embedding)


def cache_bytes(config: LlamaConfig, batch: int, tokens: int, key_channels: int | None = None) -> int:
    """Bytes of a bf16 cache of that many tokens; ``key_channels``: stored channels per key (None: all)."""
    width = config.head_dim + (config.head_dim if key_channels is None else key_channels)
    return 2 * config.num_hidden_layers * batch * config.num_key_value_heads * tokens * width


def _drawn(model: LlamaForCausalLM, *shape: int) -> Tensor:
    return torch.randn(*shape, device=model.device, dtype=model.dtype)


def growing_past(model: LlamaForCausalLM, batch: int, tokens: int) -> DynamicCache:
    """A dense growing cache of ``tokens`` random tokens."""
    cache = DynamicCache(config=model.config)
    fill(cache, model, batch, tokens)
    return cache


def fill(cache: Any, model: LlamaForCausalLM, batch: int, tokens: int) -> None:
    """Put ``tokens`` random tokens into an empty growing cache of Hugging Face's."""
    config = model.config
    for i in range(config.num_hidden_layers):
        rows = [_drawn(model, batch, config.num_key_value_heads, tokens, config.head_dim) for _ in range(2)]
        cache.update(*rows, i)


def _begun(layer: Any, model: LlamaForCausalLM, batch: int, tokens: int) -> None:
    """Bring a static layer to the state after ``tokens`` written tokens, of any content."""
    row = _drawn(model, batch, model.config.num_key_value_heads, 1, model.config.head_dim)
    layer.lazy_initialization(row, row)
    layer.cumulative_length.fill_(tokens)


def fixed_past(model: LlamaForCausalLM, batch: int, tokens: int) -> StaticCache:
    """A dense cache of fixed size that holds ``tokens`` random tokens."""
    cache = StaticCache(config=model.config, max_cache_len=tokens + SPARE)
    for layer in cache.layers:
        _begun(layer, model, batch, tokens)
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def pruned_past(model: LlamaForCausalLM, batch: int, tokens: int, config: ThinkConfig) -> StaticCache:
    """The same as the wrapped model leaves it after a prompt: handles on pruned keys, layer by layer."""
    cache = StaticCache(config=model.config, max_cache_len=tokens + SPARE)
    heads, d = model.config.num_key_value_heads, model.config.head_dim
    form, capacity = config.format_for(d, d), tokens + SPARE
    window_start = form.keys.window_start(tokens)
    for layer in cache.layers:
        _begun(layer, model, batch, tokens)
        kept = config.kept_channels(d)
        channels = torch.rand(batch, heads, d, device=model.device).topk(kept).indices.sort().values
        keys = {
            "rows": _drawn(model, batch, heads, capacity, kept),
            "channels": channels,
            "ring": _drawn(model, batch, heads, form.keys.ring_rows(0), d),
            COUNTERS: torch.tensor([window_start, tokens, 0], device=model.device),
        }
        layer.keys = _handle(Packed.made("keys", form.keys, keys, model.dtype, capacity, fixed=True), tokens)
        values = {"rows": _drawn(model, batch, heads, capacity, d)}
        layer.values = _handle(Packed.made("values", form.values, values, model.dtype, capacity, fixed=True), None)
    return cache


def _handle(store: Packed, written: int | None) -> Handle:
    store.written = written
    return handle_for(Cell(store), CANONICAL)


def densified(cache: StaticCache, model: LlamaForCausalLM) -> StaticCache:
    """The dense equivalent of a pruned cache, as a plain static cache for ``model``: dropped channels are zero."""
    first = cache.layers[0]
    batch, _, capacity, _ = first.keys.shape
    plain = StaticCache(config=model.config, max_cache_len=capacity)
    for layer, pruned in zip(plain.layers, cache.layers, strict=True):
        _begun(layer, model, batch, int(pruned.cumulative_length))
        layer.keys.copy_(pruned.keys.dense())
        layer.values.copy_(pruned.values.dense())
    return plain


def densified_growing(cache: DynamicCache, model: LlamaForCausalLM) -> DynamicCache:
    """As :func:`densified`, for a growing cache."""
    plain = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        plain.update(layer.keys.dense().to(model.dtype), layer.values.dense().to(model.dtype), i)
    return plain


@torch.no_grad()
def step(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """The next tokens [B, 1] after ``tokens``, greedily; nothing waits for the device."""
    return model(input_ids=tokens, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1)
