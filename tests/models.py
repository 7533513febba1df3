"""Tiny models with random weights for the tests, and sessions that drive each of them the same way.

`HUGGING_FACE` has transformers architectures; `OWN` has decoders written here in plain PyTorch, one for each kind of
cache. The random weights make attention peaked and channels uneven: pruning then has a visible effect, and no two
channel scores are nearly equal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
import transformers
from oracle import CACHE, buffer_slots, hf_slots, tuple_slots
from torch import Tensor, nn

VOCAB = 96
CAPACITY = 80  # tokens of the fixed caches

# ------------------------------------------------------------------ weights

SHARP = ("q_proj", "k_proj", "qkv_proj", "query_key_value", "c_attn", "wq", "wk")


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter anew, queries and keys with a larger gain and uneven channels."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter.device)
        if id(parameter) in embeddings:
            parameter.copy_(noise)
        elif parameter.dim() >= 2:
            parameter.copy_(_projection(name, noise, generator))
        else:
            parameter.copy_(0.1 * noise if "bias" in name else parameter + 0.2 * noise)
    return model.eval()


def _projection(name: str, noise: Tensor, generator: torch.Generator) -> Tensor:
    transposed = ".c_" in name  # GPT-2's Conv1D keeps [in, out]
    fan_in = noise.shape[-2] if transposed else noise.shape[-1]
    noise = noise / math.sqrt(fan_in)
    if not any(part in name for part in SHARP):
        return noise
    uneven = (
        (0.5 * torch.randn(noise.shape[1 if transposed else 0], generator=generator, device="cpu"))
        .exp()
        .to(noise.device)
    )
    return 1.6 * noise * (uneven if transposed else uneven.view(-1, *[1] * (noise.dim() - 1)))


# ------------------------------------------------------------------ transformers architectures

COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 128}
OPT = {"hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 2, "num_hidden_layers": 2}
FALCON = {"hidden_size": 128, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
NEOX = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2}
GEMMA = {"head_dim": 32, "num_key_value_heads": 1, "sliding_window": 24}
IN_TURN = ["sliding_attention", "full_attention"]

# name -> (class, configuration, layers whose cache is a sliding window)
HUGGING_FACE: dict[str, tuple[str, dict, int]] = {
    "llama": ("Llama", {**SIZES, "head_dim": 32}, 0),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 32}, 0),
    "gemma3": (
        "Gemma3",
        {**SIZES, **GEMMA, "layer_types": IN_TURN},
        1,
    ),
    "gemma3_deep": ("Gemma3", {**SIZES, **GEMMA, "layer_types": IN_TURN * 2, "num_hidden_layers": 4}, 2),
    "gpt2": ("GPT2", GPT2, 0),
    "opt": ("OPT", {**OPT, "word_embed_proj_dim": 64, "max_position_embeddings": 128}, 0),
    "falcon": ("Falcon", {**FALCON, "multi_query": True, "new_decoder_architecture": False}, 0),
    "falcon_new": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, 0),
    "phi3": ("Phi3", {**SIZES, "hidden_size": 128, "sliding_window": None}, 0),
    "olmo2": ("Olmo2", {**SIZES, "hidden_size": 128}, 0),
    "mixtral": (
        "Mixtral",
        {**SIZES, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        0,
    ),
    "starcoder2": ("Starcoder2", {**SIZES, "hidden_size": 128, "sliding_window": None}, 0),
    "gpt_neox": ("GPTNeoX", NEOX, 0),
}
CLASSES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
}


def hugging_face(name: str, seed: int = 0, **overrides: object) -> nn.Module:
    """A tiny transformers model that never stops early and does not compile itself."""
    stem, arguments, _ = HUGGING_FACE[name]
    config_class, model_class = CLASSES.get(stem, (f"{stem}Config", f"{stem}ForCausalLM"))
    config = getattr(transformers, config_class)(**COMMON, **{**arguments, **overrides})
    model = randomize(getattr(transformers, model_class)(config), seed)
    model.generation_config.eos_token_id = None
    model.generation_config.disable_compile = True
    return model


# ------------------------------------------------------------------ our own decoders


def rope(x: Tensor, pos: Tensor) -> Tensor:
    """Rotates [B, S, H, D] by the positions [S]."""
    half = x.shape[-1] // 2
    speed = 100.0 ** (-torch.arange(half, device=x.device) / half)
    angle = (pos[:, None] * speed)[None, :, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Projections(nn.Module):
    """Shared by the attentions below: projections, rotation, and attention over given keys."""

    def __init__(self, hidden: int = 64, heads: int = 4, kv_heads: int = 2, dim: int = 32) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.wq = nn.Linear(hidden, heads * dim, bias=False)
        self.wk = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.wv = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.wo = nn.Linear(heads * dim, hidden, bias=False)

    def project(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as [B, S, H, D]."""
        q = torch.unflatten(self.wq(x), -1, (self.heads, self.dim))
        k = torch.unflatten(self.wk(x), -1, (self.kv_heads, self.dim))
        v = torch.unflatten(self.wv(x), -1, (self.kv_heads, self.dim))
        return rope(q, pos), rope(k, pos), v

    def merge(self, out: Tensor) -> Tensor:
        return self.wo(out.transpose(1, 2).flatten(2))


class TuplePast(Projections):
    """[B, H, S, D], joined by `cat`, handed from call to call; KV heads repeated."""

    def forward(self, x: Tensor, pos: Tensor, past: tuple | None, mask: Tensor) -> tuple[Tensor, tuple]:
        q, k, v = (t.transpose(1, 2) for t in self.project(x, pos))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        group = self.heads // self.kv_heads
        keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return self.merge(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)), (k, v)


class SequenceMajorPast(Projections):
    """[B, S, H, D], joined by `cat` on axis 1, transposed for the attention; KV heads expanded."""

    def forward(self, x: Tensor, pos: Tensor, past: tuple | None, mask: Tensor) -> tuple[Tensor, tuple]:
        q, k, v = self.project(x, pos)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        keys, values = (self._expand(t).transpose(1, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask)
        return self.merge(out), (k, v)

    def _expand(self, x: Tensor) -> Tensor:
        batch, length, heads, dim = x.shape
        group = self.heads // self.kv_heads
        return x[:, :, :, None].expand(batch, length, heads, group, dim).reshape(batch, length, -1, dim)


class BufferCache(Projections):
    """Keys and values in module buffers; `shape` is theirs."""

    shape: Callable

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("cache_k", torch.zeros(self.shape(rows)), persistent=False)
        self.register_buffer("cache_v", torch.zeros(self.shape(rows)), persistent=False)


class IndexPutCache(BufferCache):
    """[B, H, capacity, D], written by `cache[:, :, pos] = k`; native grouped-query attention."""

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows, self.kv_heads, CAPACITY, self.dim)

    def forward(self, x: Tensor, pos: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.project(x, pos))
        self.cache_k[:, :, pos] = k
        self.cache_v[:, :, pos] = v
        out = F.scaled_dot_product_attention(q, self.cache_k, self.cache_v, attn_mask=mask, enable_gqa=True)
        return self.merge(out)


class IndexCopyCache(IndexPutCache):
    """[B, H, capacity, D], written by `index_copy_`; KV heads repeated."""

    def forward(self, x: Tensor, pos: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.project(x, pos))
        group = self.heads // self.kv_heads
        keys = self.cache_k.index_copy_(2, pos, k).repeat_interleave(group, dim=1)
        values = self.cache_v.index_copy_(2, pos, v).repeat_interleave(group, dim=1)
        return self.merge(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask))


class SliceCache(BufferCache):
    """[B, capacity, H, D], written and read by slices from a Python int on, as in the first LLaMA release."""

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows, CAPACITY, self.kv_heads, self.dim)

    def forward(self, x: Tensor, start_pos: int, mask: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.project(x, torch.arange(start_pos, start_pos + length, device=x.device))
        self.cache_k[:batch, start_pos : start_pos + length] = k
        self.cache_v[:batch, start_pos : start_pos + length] = v
        keys = self.cache_k[:batch, : start_pos + length]
        values = self.cache_v[:batch, : start_pos + length]
        group = self.heads // self.kv_heads
        keys, values = (t.repeat_interleave(group, dim=2).transpose(1, 2) for t in (keys, values))
        return self.merge(F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask))


class Block(nn.Module):
    """Attention and a small MLP, each after a norm."""

    def __init__(self, attention: nn.Module, hidden: int = 64) -> None:
        super().__init__()
        self.attention = attention
        self.before, self.between = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.up, self.down = nn.Linear(hidden, 96), nn.Linear(96, hidden)

    def mlp(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.between(x))))


class Decoder(nn.Module):
    """Embedding, blocks, head; the subclasses pass the cache along."""

    def __init__(self, attention: Callable[[], nn.Module], layers: int = 2, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, hidden)
        self.layers = nn.ModuleList(Block(attention(), hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, VOCAB, bias=False)


class PastDecoder(Decoder):
    """`forward(ids, past, mask) -> (logits, past)`."""

    sequence_dim: ClassVar = {TuplePast: 2, SequenceMajorPast: 1}

    def forward(self, ids: Tensor, past: tuple | None = None, mask: Tensor | None = None):
        x, present = self.embed(ids), []
        axis = self.sequence_dim[type(self.layers[0].attention)]
        start = past[0][0].shape[axis] if past is not None else 0
        pos = torch.arange(start, start + ids.shape[1], device=ids.device)
        for i, layer in enumerate(self.layers):
            out, kv = layer.attention(layer.before(x), pos, past[i] if past is not None else None, mask)
            present.append(kv)
            x = layer.mlp(x + out)
        return self.head(self.norm(x)), tuple(present)


class BufferDecoder(Decoder):
    """`forward(ids, pos, mask) -> logits`; pos is a tensor of positions, or the first one as an int."""

    def forward(self, ids: Tensor, pos: Tensor | int, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer.mlp(x + layer.attention(layer.before(x), pos, mask))
        return self.head(self.norm(x))


def as_it_is(x: Tensor) -> Tensor:
    """The canonical view of a [B, H, S, D] cache: the cache itself."""
    return x


def heads_first(x: Tensor) -> Tensor:
    """[B, S, H, D] as [B, H, S, D]."""
    return x.transpose(1, 2)


# name -> (decoder, attention, where the oracle finds the keys)
OWN: dict[str, tuple[type[Decoder], type[nn.Module], Callable]] = {
    "tuple_cat": (PastDecoder, TuplePast, tuple_slots(as_it_is)),
    "bshd_cat": (PastDecoder, SequenceMajorPast, tuple_slots(heads_first)),
    "buffer_index_put": (BufferDecoder, IndexPutCache, buffer_slots(as_it_is)),
    "buffer_slice": (BufferDecoder, SliceCache, buffer_slots(heads_first)),
    "buffer_index_copy": (BufferDecoder, IndexCopyCache, buffer_slots(as_it_is)),
}
WRITTEN_HERE = tuple(OWN)  # other test files register theirs at run time


def own(name: str, seed: int = 0, rows: int = 3) -> Decoder:
    """One of our decoders; module buffers hold `rows` sequences."""
    decoder, attention, _ = OWN[name]
    if issubclass(decoder, BufferDecoder):
        attention = functools.partial(attention, rows)
    return randomize(decoder(attention), seed)


# ------------------------------------------------------------------ sessions


def dense(keys: Tensor) -> Tensor:
    """A cache tensor as plain numbers: handles are asked for their dense form."""
    return keys.dense() if hasattr(keys, "dense") else keys


class Session:
    """One conversation with one model: `step(ids, real)` -> logits; `real` marks tokens that are not padding."""

    sequence_dim = 2  # of the cache tensors

    def __init__(self, model: Callable) -> None:
        self.model = model
        self.length = self.rows = 0
        self.real: Tensor | None = None

    def step(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """`real` [B, new tokens], or None if the whole conversation has no padding."""
        if real is not None:
            self.real = real if self.real is None else torch.cat([self.real, real], dim=1)
        logits = self.call(ids)
        self.rows, self.length = ids.shape[0], self.length + ids.shape[1]
        return logits

    def call(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def raw(self) -> list[Tensor]:
        """Every layer's cache tensor, as kept by the model."""
        raise NotImplementedError

    def stored(self) -> list[Tensor]:
        """Every layer's keys in the model's layout, written tokens only."""
        return [self.written(dense(keys)[: self.rows]) for keys in self.raw()]

    def written(self, keys: Tensor) -> Tensor:
        return keys.narrow(self.sequence_dim, 0, min(self.length, keys.shape[self.sequence_dim]))


class HuggingFaceSession(Session):
    """A transformers model, with its own or a given cache."""

    def __init__(self, model: Callable, cache: object | None = None) -> None:
        super().__init__(model)
        self.cache = cache

    def call(self, ids: Tensor) -> Tensor:
        output = self.model(ids, **{CACHE: self.cache}, attention_mask=self.real, use_cache=True)
        self.cache = output[CACHE]
        return output.logits

    def raw(self) -> list[Tensor]:
        return [layer.keys for layer in self.cache.layers]


class PastSession(Session):
    """Our decoders that take and return tuples."""

    past: tuple | None = None

    def call(self, ids: Tensor) -> Tensor:
        total = self.length + ids.shape[1]
        logits, self.past = self.model(ids, self.past, causal_mask(self.length, total, total, self.real))
        return logits

    def raw(self) -> list[Tensor]:
        return [keys for keys, _ in self.past]


class SequenceMajorSession(PastSession):
    """The same with [B, S, H, D] tensors."""

    sequence_dim = 1


class BufferSession(Session):
    """Our decoders with keys in buffers; positions are given as a tensor."""

    def call(self, ids: Tensor) -> Tensor:
        total = self.length + ids.shape[1]
        mask = causal_mask(self.length, total, CAPACITY, self.real)
        return self.model(ids, torch.arange(self.length, total), mask)

    def raw(self) -> list[Tensor]:
        module = getattr(self.model, "model", self.model)  # an Oracle holds its model
        return [layer.attention.cache_k for layer in module.layers]


class SliceSession(BufferSession):
    """The same, but the first position is given as an int; one-token calls have no mask unless there is padding."""

    sequence_dim = 1

    def call(self, ids: Tensor) -> Tensor:
        total = self.length + ids.shape[1]
        needed = ids.shape[1] > 1 or self.real is not None
        mask = causal_mask(self.length, total, total, self.real) if needed else None
        return self.model(ids, self.length, mask)


def causal_mask(start: int, stop: int, keys: int, real: Tensor | None) -> Tensor:
    """[1 or B, 1, queries, keys], true where attended; `real` [B, stop] marks tokens that are not padding."""
    mask = torch.arange(keys)[None, :] <= torch.arange(start, stop)[:, None]
    mask = mask[None, None]
    if real is None:
        return mask
    known = F.pad(real.bool(), (0, keys - real.shape[1]))
    return mask & known[:, None, None, :]


SESSIONS = {
    "tuple_cat": PastSession,
    "bshd_cat": SequenceMajorSession,
    "buffer_index_put": BufferSession,
    "buffer_slice": SliceSession,
    "buffer_index_copy": BufferSession,
}


def build(name: str, seed: int = 0, rows: int = 3) -> nn.Module:
    """Any model of this module by name."""
    return own(name, seed, rows) if name in OWN else hugging_face(name, seed)


def session(name: str, model: Callable) -> Session:
    """A fresh conversation with a model of that name, wrapped or not, or with an oracle of it."""
    return SESSIONS.get(name, HuggingFaceSession)(model)


def slots_of(name: str) -> Callable:
    """Where the oracle finds that model's keys."""
    return OWN[name][2] if name in OWN else hf_slots


def sliding_layers(name: str) -> int:
    return HUGGING_FACE[name][2] if name in HUGGING_FACE else 0
