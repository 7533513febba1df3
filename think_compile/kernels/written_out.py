"""Attention written out as separate operations: the layout of its operands and logits.

Only the product with the keys is replaced; the graph keeps the model's operations between the two products. Shapes as
in :mod:`think_compile.cache.state`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def canonical_queries(q: Tensor, order: tuple[int, ...], k: Tensor) -> Tensor:
    """[B, Hq, N, D]: query operand ``q``, permuted by ``order``, for keys ``k`` [B, H, S, D]."""
    q = q.permute(order)
    return q.reshape(k.shape[0], -1, *q.shape[-2:])


def allowed_pairs(mask: Tensor, kind: str) -> Tensor:
    """Bool, true where a query may attend; ``kind``: the mask is added ("add"), or true means "allow" or "block"."""
    if kind == "add":
        return mask > torch.finfo(mask.dtype).min / 2
    return mask if kind == "allow" else ~mask


def canonical_pairs(
    allowed: Tensor, at: Tensor, back: tuple[int, ...], logits: Tensor, order: tuple[int, ...], k: Tensor
) -> Tensor:
    """[B, Hq, N, S]: ``allowed``, broadcast to the shape of ``at``.

    ``at`` permuted by ``back`` is ``logits`` up to views. ``order`` permutes the logits to batch and head axes, N, S;
    ``k`` [B, H, S, D].
    """
    pairs = allowed.expand(at.shape).permute(back).reshape(logits.shape).permute(order)
    return pairs.reshape(k.shape[0], -1, *pairs.shape[-2:])


def nonzero_pairs(probabilities: Tensor) -> Tensor:
    """Bool, true where a query attended; for an attention with an unrecognised mask."""
    return probabilities != 0


def as_product(
    logits: Tensor,
    q: Tensor,
    order: tuple[int, ...],
    layout: tuple[int, ...],
    alpha: float,
    bias: Tensor | None,
    beta: float,
    dtype: torch.dtype,
) -> Tensor:
    """Logits [B, Hq, N, S] in the form of the model's own product: axes, dtype, ``alpha * logits + beta * bias``.

    ``q`` is the product's query operand, ``order`` as in :func:`canonical_queries`; ``layout`` permutes the model's
    logits to batch and head axes, N, S.
    """
    back = sorted(range(len(layout)), key=lambda i: layout[i])
    sizes = q.permute(order).shape[:-1]
    out = logits.reshape(*sizes, logits.shape[-1]).permute(back)
    out = out if isinstance(alpha, int) and alpha == 1 else out * alpha
    out = out if bias is None else out + bias * beta
    return out.to(dtype)
