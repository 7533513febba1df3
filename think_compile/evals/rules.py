"""Rules for scoring each key channel, in fp32, from the attention of a layer's first call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """A layer's first call, before a choice of channels.

    Attributes:
        q: queries [B, Hq, N, D], after position embedding; of the last N tokens.
        k: keys [B, Hkv, S, D].
        valid: [B, S], true for keys visible to some query.
        layer: its number.
    """

    q: Tensor
    k: Tensor
    valid: Tensor
    layer: int


@dataclass(frozen=True)
class Observed:
    """The input of a rule.

    Attributes:
        q: queries [B, Hq, N, D].
        k: keys [B, Hkv, S, D].
        queries: [B, N], true for observed queries.
        keys: [B, S], true for keys to be scored.
        valid: [B, S], true for keys visible to some query.
        seed: of random rules; differs between layers.
    """

    q: Tensor
    k: Tensor
    queries: Tensor
    keys: Tensor
    valid: Tensor
    seed: int

    @property
    def groups(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.k.shape[1]


def energy(x: Tensor, chosen: Tensor) -> Tensor:
    """Mean of x^2 over the chosen positions: [B, H, S, D], [B, S] -> fp32 [B, H, D]; zero where none is chosen."""
    weights = chosen[:, None, :, None].float()
    return (x.float().square() * weights).sum(2) / weights.sum(2).clamp(min=1)


def group_mean(seen: Observed) -> Tensor:
    """think_compile and kvpress: mean query energy of the group times key energy, [B, Hkv, D].

    kvpress 0.5, presses/think_press.py; ThinK (arXiv 2407.21018), section 3.2, with one set of channels per KV head.
    """
    q = energy(seen.q, seen.queries).unflatten(1, (-1, seen.groups)).mean(2)
    return q * energy(seen.k, seen.keys)


def per_query_head(seen: Observed) -> Tensor:
    """ThinK (arXiv 2407.21018), section 3.2, as its code runs: on keys repeated to all query heads, [B, Hq, D]."""
    return energy(seen.q, seen.queries) * energy(seen.k, seen.keys).repeat_interleave(seen.groups, 1)


def magnitude(seen: Observed) -> Tensor:
    """Key energy alone, [B, Hkv, D]: the norm-based pruning in the comparisons of ThinK (arXiv 2407.21018)."""
    return energy(seen.k, seen.keys)


def attended(seen: Observed) -> Tensor:
    """Each key counts as much as the observed queries attend to it, [B, Hkv, D].

    Mean over the queries i and the heads of the group of q_ij^2 sum_s p_is k_sj^2, p being the causal attention with
    scale 1 / sqrt(D): the error of the attended logits without channel j. Not from the paper.
    """
    heads, width = seen.k.shape[1], seen.k.shape[3]
    q = seen.q.float().unflatten(1, (heads, seen.groups))  # [B, Hkv, G, N, D]
    logits = torch.einsum("bhgnd,bhsd->bhgns", q, seen.k.float()) / width**0.5
    probabilities = logits.masked_fill(~_causal(seen)[:, None, None], -torch.inf).softmax(-1)
    probabilities = probabilities * seen.keys[:, None, None, None]
    probabilities = probabilities.nan_to_num()  # of queries that attend to nothing
    weighted = probabilities @ seen.k.float().square()[:, :, None]
    scores = q.square() * weighted * seen.queries[:, None, None, :, None]
    return scores.sum((2, 3)) / (seen.groups * seen.queries.sum(1).clamp(min=1)[:, None, None])


def _causal(seen: Observed) -> Tensor:
    """[B, N, S]: the visible keys of each query; the queries are those of the last tokens."""
    count, length = seen.q.shape[2], seen.k.shape[2]
    positions = torch.arange(length, device=seen.k.device)
    return (positions <= positions[length - count :, None]) & seen.valid[:, None]


def at_random(seen: Observed) -> Tensor:
    """Uniform scores [B, Hkv, D]: the same for all sequences, and so independent of the batch."""
    batch, heads, _, width = seen.k.shape
    scores = torch.rand(heads, width, generator=torch.Generator().manual_seed(seen.seed))
    return scores.to(seen.k.device).expand(batch, -1, -1)


RULES: dict[str, Callable[[Observed], Tensor]] = {
    "simulated": group_mean,
    "kvpress": group_mean,
    "per_query_head": per_query_head,
    "magnitude": magnitude,
    "attended": attended,
    "random": at_random,
}


def best(scores: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` highest scores of the last axis; among equals the lower channel wins."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :keep], True)


def valid_keys(mask: Tensor | None, k: Tensor) -> Tensor:
    """[B, S]: keys visible to some query; ``mask`` is None, boolean or additive, [B or 1, H or 1, N, S]."""
    if mask is None:
        return torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask.flatten(1, 2).any(1).expand(k.shape[0], -1)


def last_valid(valid: Tensor, count: int) -> Tensor:
    """[B, S]: the last ``count`` valid positions of each sequence."""
    from_here = valid.flip(1).long().cumsum(1).flip(1)  # valid positions from here on
    return valid & (from_here <= count)
