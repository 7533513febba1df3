"""The timed models and caches: random weights, by default of the shape of Llama-3.1-8B, and a past written directly.

The contents of a past do not matter for time and memory, so they are random: a prefill of 8 x 32,768 tokens would take
longer than all measurements.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from think_compile import ThinkConfig
from think_compile.cache.canonical import CANONICAL
from think_compile.cache.cell import Cell
from think_compile.cache.handle import Handle, handle_for
from think_compile.cache.packed import Packed
from think_compile.cache.state import COUNTERS, EVICTED, POSITIONS, Part
from think_compile.formats.side import Side
from think_compile.formats.tokens.rule import Budget

SPARE = 256  # rows of a fixed cache after its past
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def llama(
    layers: int = 32,
    *,
    hidden: int = 4096,
    inner: int = 14336,
    vocabulary: int = 128256,
    kv_heads: int = 8,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> LlamaForCausalLM:
    """A model with random weights, by default of the shape of Llama-3.1-8B."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=kv_heads,
        head_dim=128,
        vocab_size=vocabulary,
        max_position_embeddings=2**18,
    )
    return _built(LlamaForCausalLM, config, device, dtype)


def latent(layers: int = 27, *, vocabulary: int = 102400) -> DeepseekV2ForCausalLM:
    """A model of the shape of DeepSeek-V2-Lite, which caches latents; all layers are dense, as its first."""
    config = DeepseekV2Config(
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        vocab_size=vocabulary,
        max_position_embeddings=2**18,
    )
    return _built(DeepseekV2ForCausalLM, config, "cuda", torch.bfloat16)


def _built(kind: Any, config: Any, device: str, dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


class Widths(NamedTuple):
    """Of one layer's cache: heads, and channels of both tensors."""

    heads: int
    keys: int
    values: int


def widths_of(config: Any) -> Widths:
    """The sizes of a layer's cache; a latent counts as the key, the rotated part as the value."""
    if getattr(config, "kv_lora_rank", None):
        return Widths(1, config.kv_lora_rank, config.qk_rope_head_dim)
    return Widths(config.num_key_value_heads, config.head_dim, config.head_dim)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters except the embedding: a step reads a single row of it."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    return sum(p.nbytes for p in model.parameters() if p is not embedding)


def cache_bytes(config: Any, batch: int, tokens: int, key_channels: int | None = None) -> int:
    """Bytes of a bf16 cache of that many tokens; ``key_channels``: stored channels per key (None: all)."""
    heads, keys, values = widths_of(config)
    width = values + (keys if key_channels is None else key_channels)
    return 2 * config.num_hidden_layers * batch * heads * tokens * width


def _rows(model: Any, batch: int, tokens: int) -> list[Tensor]:
    """Random keys and values [B, H, tokens, *]."""
    heads, *widths = widths_of(model.config)
    shapes = [(batch, heads, tokens, width) for width in widths]
    return [torch.randn(*shape, device=model.device, dtype=model.dtype) for shape in shapes]


def growing_past(model: LlamaForCausalLM, batch: int, tokens: int) -> DynamicCache:
    """A dense growing cache of ``tokens`` random tokens."""
    cache = DynamicCache(config=model.config)
    fill(cache, model, batch, tokens)
    return cache


def fill(cache: Any, model: LlamaForCausalLM, batch: int, tokens: int) -> None:
    """Put ``tokens`` random tokens into an empty growing cache of Hugging Face's."""
    for i in range(model.config.num_hidden_layers):
        cache.update(*_rows(model, batch, tokens), i)


def _begun(layer: Any, model: Any, batch: int, tokens: int) -> None:
    """Bring a static layer to the state after ``tokens`` written tokens, of any content."""
    layer.lazy_initialization(*_rows(model, batch, 1))
    layer.cumulative_length.fill_(tokens)


def fixed_past(model: Any, batch: int, tokens: int, spare: int = SPARE) -> StaticCache:
    """A dense cache of fixed size that holds ``tokens`` random tokens."""
    cache = StaticCache(config=model.config, max_cache_len=tokens + spare)
    for layer in cache.layers:
        _begun(layer, model, batch, tokens)
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def stored_past(model: Any, batch: int, tokens: int, config: ThinkConfig, spare: int = SPARE) -> StaticCache:
    """The same as the wrapped model leaves it after a prompt: handles on stored sides, layer by layer."""
    cache = StaticCache(config=model.config, max_cache_len=tokens + spare)
    _, *widths = widths_of(model.config)
    form, capacity = config.format_for(*widths), tokens + spare
    kept = form.tokens.count(tokens) if isinstance(form.tokens, Budget) else tokens
    for layer in cache.layers:
        layer.max_cache_len = 1  # its own buffers are replaced, and may not fit
        _begun(layer, model, batch, tokens)
        layer.max_cache_len = capacity
        rows, shared = _Rows(kept, capacity - tokens + kept, tokens), dict[str, Tensor]()
        for of, written in (("keys", tokens), ("values", None)):
            side = form.side(of)
            state = {part.name: _part(part, side, model, batch, rows) for part in side.parts(fixed=True)} | shared
            shared = {name: state[name] for name in (POSITIONS, EVICTED) if name in state}
            store = Packed.made(of, side, state, model.dtype, capacity, fixed=True)
            setattr(layer, of, _handle(store, written))
    return cache


class _Rows(NamedTuple):
    """Rows with a token, all rows, and tokens of the first call."""

    written: int
    all: int
    prompt: int


def _part(part: Part, side: Side, model: Any, batch: int, rows: _Rows) -> Tensor:
    """A part of a side of random content, for a cache of fixed size."""
    (tokens, capacity, prompt), group, device = rows, side.codec.group, model.device
    records = side.encoded_for(capacity, fixed=True) // group
    heads, ring = widths_of(model.config).heads, side.ring_rows(capacity)
    letters: dict[str, int] = {"B": batch, "H": heads, "C": records, "R": ring, "K": tokens}
    shape = [letters[size] if isinstance(size, str) else size for size in part.shape]
    if part.name == COUNTERS:
        window_start = side.window_start(tokens) if side.has_ring else tokens
        return torch.tensor([window_start, tokens, 0], device=device)
    if part.name == EVICTED:
        return torch.tensor([prompt - tokens], device=device)
    if part.name == POSITIONS:
        return torch.rand(batch, heads, prompt, device=device).topk(tokens).indices.sort().values.to(part.dtype)
    if part.name == "channels":
        kept = torch.rand(*shape[:2], side.width, device=device).topk(shape[2]).indices
        return (kept.sort().values if shape[2] < side.width else kept).to(part.dtype)
    if part.name == "bitmap":  # each row has as many bits as numbers; drawn for one sequence, and repeated
        drawn = side.codec.encode(torch.rand(1, heads, capacity, side.width, device=device), {})
        return drawn["bitmap"].expand(shape).contiguous()
    if part.dtype is None or part.dtype.is_floating_point:
        scale = 1.0 if part.dtype is None else 0.01  # steps of codes
        return torch.empty(shape, device=device, dtype=part.dtype or model.dtype).normal_(std=scale).abs_()
    if part.dtype in (torch.uint8, torch.int8):
        known = torch.iinfo(part.dtype)
        return torch.randint(known.min, known.max + 1, shape, dtype=part.dtype, device=device)
    return torch.zeros(shape, dtype=part.dtype, device=device)


def past_bytes(cache: StaticCache) -> int:
    """Bytes of all tensors of a cache of :func:`stored_past`, those of both sides once."""
    stores = [getattr(layer, of).cell.store for layer in cache.layers for of in ("keys", "values")]
    return sum({x.data_ptr(): x.nbytes for store in stores for x in store.tensors()}.values())


def _handle(store: Packed, written: int | None) -> Handle:
    store.written = written
    return handle_for(Cell(store), CANONICAL)


def densified(cache: StaticCache, model: Any) -> StaticCache:
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
