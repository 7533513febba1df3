"""Decoders with attention written out in products and a softmax, in every style of the tests.

Each style is a model of its own in `models`: `register(style)` gives the name under which a `Trio` takes it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import models
import oracle
import torch
from models import CAPACITY, BufferDecoder, BufferSession, PastDecoder, PastSession, Projections, dense
from oracle import buffer_slots, tuple_slots
from torch import Tensor

KV_HEADS = 2


@dataclass(frozen=True)
class CacheLayout:
    """Layout of a cache: the permuted axes of [B, S, H, D]; then axis `merged`, if any, is merged with the next."""

    order: tuple[int, ...]
    merged: int | None = None

    def laid(self, x: Tensor) -> Tensor:
        """[B, S, H, D] in the cache's layout."""
        x = x.permute(self.order)
        return x if self.merged is None else x.flatten(self.merged, self.merged + 1)

    def canonical(self, x: Tensor) -> Tensor:
        """A cache tensor as [B, H, S, D]."""
        if self.merged is not None:
            first = self.order[self.merged]
            x = torch.unflatten(x, self.merged, (KV_HEADS, -1) if first == 2 else (-1, KV_HEADS))
        return x.permute([self.order.index(axis) for axis in (0, 2, 1, 3)])

    @property
    def token_axis(self) -> int:
        at = self.order.index(1)
        return at if self.merged is None or at <= self.merged else at - 1


LAYOUTS = {
    "bhsd": CacheLayout((0, 2, 1, 3)),
    "bshd": CacheLayout((0, 1, 2, 3)),
    "sbhd": CacheLayout((1, 0, 2, 3)),
    "bhds": CacheLayout((0, 2, 3, 1)),
    "bs(hd)": CacheLayout((0, 1, 2, 3), 2),
    "(bh)sd": CacheLayout((0, 2, 1, 3), 0),
    "s(bh)d": CacheLayout((1, 0, 2, 3), 1),
}
PRODUCTS = ("matmul", "flipped", "bmm", "baddbmm", "einsum", "grouped matmul", "grouped einsum")
MASKS = ("add", "masked_fill", "where", "none")
SOFTMAXES = ("softmax", "less its maximum", "of fp32", "written out", "by logsumexp")
EXTRAS = (
    "plain",
    "queries scaled",
    "keys scaled",
    "keys of fp32",
    "softcap",
    "sink",
    "bias",
    "dropout of zero",
    "heads in turn",
    "bias of the values",
    "stock, bias of the values",
)
CACHES = ("growing", "fixed")
WRITES = ("index_copy", "index_put", "scatter", "where")  # to a fixed cache


@dataclass(frozen=True)
class Style:
    """A style of writing an attention."""

    layout: str = "bhsd"
    product: str = "matmul"
    mask: str = "add"
    softmax: str = "softmax"
    extra: str = "plain"
    cache: str = "growing"
    write: str = "index_copy"

    def __str__(self) -> str:
        return "-".join(vars(self).values()).replace(" ", "_")


def logits_of(style: Style, q: Tensor, k: Tensor) -> Tensor:
    """[B, Hq, N, S] from q [B, Hq, N, D] and k [B, H, S, D]."""
    batch, heads, new, dim = q.shape
    group = heads // k.shape[1]
    if style.product == "grouped matmul":
        grouped = torch.unflatten(q, 1, (-1, group)) @ k[:, :, None].transpose(-1, -2)
        return grouped.flatten(1, 2)
    if style.product == "grouped einsum":
        return torch.einsum("bhgnd,bhsd->bhgns", torch.unflatten(q, 1, (-1, group)), k).flatten(1, 2)
    k = repeated(style, k, group)
    if style.product == "einsum":
        return torch.einsum("bhnd,bhsd->bhns", q, k)
    if style.product == "flipped":
        return (k @ q.transpose(-1, -2)).transpose(-1, -2)
    if style.product == "matmul":
        return q @ k.transpose(-1, -2)
    q, k = q.reshape(batch * heads, new, dim), k.reshape(batch * heads, -1, dim).transpose(1, 2)
    if style.product == "bmm":
        return torch.bmm(q, k).view(batch, heads, new, -1)
    nothing = q.new_zeros(1, 1, 1).expand(batch * heads, new, k.shape[2])
    return torch.baddbmm(nothing, q, k, beta=0.5, alpha=2.0).view(batch, heads, new, -1) / 2


def repeated(style: Style, x: Tensor, group: int) -> Tensor:
    """[B, H, S, D] for every query head: copies of a head adjacent, or interleaved with the others."""
    return x.repeat(1, group, 1, 1) if style.extra == "heads in turn" else x.repeat_interleave(group, 1)


def written(style: Style, cache: Tensor, axis: int, pos: Tensor, new: Tensor) -> Tensor:
    """`cache` with the rows `new` written in place at positions `pos` of `axis`; `where` writes single tokens only."""
    shape = [-1 if i == axis else 1 for i in range(new.dim())]
    if style.write == "scatter":
        return cache.scatter_(axis, pos.view(shape).expand(new.shape), new)
    if style.write == "index_put":
        cache[(slice(None),) * axis + (pos,)] = new
        return cache
    if style.write == "where" and len(pos) == 1:
        return cache.copy_(torch.where((torch.arange(cache.shape[axis]) == pos).view(shape), new, cache))
    return cache.index_copy_(axis, pos, new)


def masked(style: Style, logits: Tensor, mask: Tensor) -> Tensor:
    """`mask` is true where attended."""
    lowest = torch.finfo(logits.dtype).min
    if style.mask == "add":
        return logits + torch.zeros_like(mask, dtype=logits.dtype).masked_fill(~mask, lowest)
    if style.mask == "masked_fill":
        return logits.masked_fill(~mask, -1e9)
    return torch.where(mask, logits, lowest) if style.mask == "where" else logits


def probabilities_of(style: Style, logits: Tensor) -> Tensor:
    if style.softmax == "softmax":
        return logits.softmax(-1)
    if style.softmax == "of fp32":
        return torch.nn.functional.softmax(logits, dim=-1, dtype=torch.promote_types(torch.float32, logits.dtype))
    if style.softmax == "by logsumexp":
        return (logits - logits.logsumexp(-1, keepdim=True)).exp()
    logits = logits - logits.max(-1, keepdim=True).values
    if style.softmax == "less its maximum":
        return logits.softmax(-1)
    exponential = logits.exp()
    return exponential / exponential.sum(-1, keepdim=True)


def bias_of(values: Tensor) -> Tensor:
    """[B, Hq, 1, S]: the values may have another reader besides the attention."""
    return (
        torch.unflatten(values.transpose(1, 2).flatten(2), -1, values.shape[1::2]).mean(-1).transpose(1, 2)[:, :, None]
    )


def stock(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    bias = bias_of(v).masked_fill(~mask, torch.finfo(v.dtype).min)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)


class WrittenOut(Projections):
    """Attention written out in one style."""

    def __init__(self, style: Style, rows: int = 0) -> None:
        super().__init__()
        self.style = style
        if style.cache == "fixed":
            shape = (rows, CAPACITY, self.kv_heads, self.dim)
            for name in ("cache_k", "cache_v"):
                self.register_buffer(name, self.laid(torch.zeros(shape)).contiguous(), persistent=False)

    def laid(self, x: Tensor) -> Tensor:
        """[B, S, H, D] in the cache's layout."""
        return LAYOUTS[self.style.layout].laid(x)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Q [B, S, H, D]; keys and values as cached; mask true where attended."""
        style, scale = self.style, 1 / math.sqrt(self.dim)
        layout = LAYOUTS[style.layout]
        q, k, v = q.transpose(1, 2), layout.canonical(keys), layout.canonical(values)
        group = q.shape[1] // v.shape[1]
        if style.extra.startswith("stock"):
            return self.merge(stock(q, repeated(style, k, group), repeated(style, v, group), mask))
        oracle.tell(q, k, None if style.mask == "none" else mask)
        if style.extra == "heads in turn":
            q = torch.unflatten(q, 1, (-1, group)).transpose(1, 2).flatten(1, 2)
        logits = self.scaled_logits(q, k, scale)
        if style.extra == "softcap":
            logits = 30.0 * torch.tanh(logits / 30.0)
        if style.extra == "bias":
            logits = logits - 0.01 * torch.arange(k.shape[2], device=q.device).flip(0)
        if style.extra == "bias of the values":
            logits = logits + bias_of(repeated(style, v, group))
        logits = masked(style, logits, mask)
        if style.extra == "sink":
            logits = torch.cat([logits, logits.new_ones(*logits.shape[:-1], 1)], dim=-1)
        probabilities = probabilities_of(style, logits).to(v.dtype)
        if style.extra == "sink":
            probabilities = probabilities[..., :-1]
        if style.extra == "dropout of zero":
            probabilities = torch.nn.functional.dropout(probabilities, 0.0, training=True)
        out = probabilities @ repeated(style, v, group)
        if style.extra == "heads in turn":
            out = torch.unflatten(out, 1, (group, -1)).transpose(1, 2).flatten(1, 2)
        return self.merge(out)

    def scaled_logits(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        extra = self.style.extra
        if extra == "queries scaled":
            return logits_of(self.style, q * scale, k)
        if extra == "keys scaled":
            return logits_of(self.style, q, k * scale)
        if extra == "keys of fp32":
            wide = torch.promote_types(torch.float32, k.dtype)
            return logits_of(self.style, q.to(wide), k.to(wide)) * scale
        return logits_of(self.style, q, k) * scale

    def forward(self, x: Tensor, pos: Tensor, *rest: Tensor):
        q, k, v = self.project(x, pos)
        k, v = self.laid(k), self.laid(v)
        axis = LAYOUTS[self.style.layout].token_axis
        if self.style.cache == "fixed":
            keys = written(self.style, self.cache_k, axis, pos, k)
            return self.attend(q, keys, written(self.style, self.cache_v, axis, pos, v), *rest)
        past, mask = rest
        if past is not None:
            k, v = torch.cat([past[0], k], dim=axis), torch.cat([past[1], v], dim=axis)
        return self.attend(q, k, v, mask), (k, v)


class FixedDecoder(BufferDecoder):
    """One layer of these on a fixed cache."""

    def __init__(self, attention) -> None:
        super().__init__(attention, layers=1)


class GrowingDecoder(PastDecoder):
    """One layer of these on a growing cache."""

    def __init__(self, attention) -> None:
        super().__init__(attention, layers=1)

    @property
    def sequence_dim(self) -> dict:
        style = self.layers[0].attention.style
        return {WrittenOut: LAYOUTS[style.layout].token_axis}


class InOrder:
    """A session whose cache tensors hold only the conversation's rows, viewed as [B, H, S, D]."""

    layout: CacheLayout

    def stored(self) -> list[Tensor]:
        return [self.written(self.layout.canonical(dense(keys))) for keys in self.raw()]


def register(style: Style) -> str:
    """The name of the style's model."""
    name = str(style)
    layout, fixed = LAYOUTS[style.layout], style.cache == "fixed"
    base = BufferSession if fixed else PastSession
    slots = buffer_slots(layout.canonical) if fixed else tuple_slots(layout.canonical)
    models.OWN[name] = (FixedDecoder if fixed else GrowingDecoder, functools.partial(WrittenOut, style), slots)
    models.SESSIONS[name] = type("WrittenOutSession", (InOrder, base), {"layout": layout})
    return name


def every_choice() -> list[Style]:
    """Each choice once with the other defaults, for growing caches and for fixed ones."""
    growing = {"layout": LAYOUTS, "product": PRODUCTS, "mask": MASKS, "softmax": SOFTMAXES, "extra": EXTRAS}
    fixed = {"layout": LAYOUTS, "product": ["bmm", "grouped einsum"], "mask": MASKS, "write": WRITES}
    fixed["extra"] = EXTRAS[-2:]
    styles = [Style(**{field: choice}) for field, options in growing.items() for choice in options]
    styles += [Style(**{field: choice}, cache="fixed") for field, options in fixed.items() for choice in options]
    return list(dict.fromkeys(styles))
