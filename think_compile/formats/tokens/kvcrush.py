"""KVCrush (arXiv 2503.00022): important tokens, and representatives of the others.

Tokens that the heads rate alike are alike. A token's bits say in which heads it is among the more important half.
Evenly spaced picks in the order of the distance to the mean bits represent all kinds of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from think_compile.formats.seen import Seen
from think_compile.formats.tokens.rule import highest
from think_compile.formats.tokens.snapkv import SnapKV, pooled_attention


@dataclass(frozen=True)
class KVCrush(SnapKV):
    """Keep the most important tokens as SnapKV does, and representatives of the others.

    Attributes:
        budget, observe, pool: as of :class:`.snapkv.SnapKV`.
        representatives: share of the budget for tokens that represent others.
    """

    representatives: float = 0.25

    def __post_init__(self) -> None:
        given = self.representatives
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < 1:
            raise ValueError(f"{type(self).__name__}: representatives must be a share in [0, 1), got {given!r}.")
        super().__post_init__()

    def positions(self, seen: Seen) -> Tensor:
        """[B, H, K]: the rows of the tokens that stay."""
        score, valid = pooled_attention(seen, self.observe, self.pool), seen.key_valid
        count = self.count(seen.tokens)
        share = Fraction(self.representatives).limit_denominator(1000)
        important = torch.sym_max(
            torch.sym_min(self.observe, count), count - count * share.numerator // share.denominator
        )
        top = highest(score, valid, important)
        others = _others(score, top, valid)
        return torch.cat([top, _evenly(others, important, count - important, valid)], -1)


def _others(score: Tensor, top: Tensor, valid: Tensor | None) -> Tensor:
    """[B, H, S]: all rows by their distance to the mean bits; padding, then those in ``top``, come last."""
    tokens = _counted(score, valid)
    rank = highest(score, valid, score.shape[2]).argsort(-1)  # of each row
    bits = rank < tokens[:, None, None] // 2
    anchor = 2 * bits.sum(2, keepdim=True) >= tokens[:, None, None]
    distance = (bits != anchor).sum(1, keepdim=True).expand_as(score)  # of a token, over the heads
    if valid is not None:
        distance = torch.where(valid[:, None], distance, score.shape[1] + 1)
    distance = distance.scatter(2, top, score.shape[1] + 2)
    return distance.argsort(dim=-1, stable=True)


def _counted(x: Tensor, valid: Tensor | None) -> Tensor:
    """[B]: the tokens of each sequence, of rows ``x`` [B, H, S]."""
    return torch.full(x.shape[:1], x.shape[2], device=x.device) if valid is None else valid.sum(1)


def _evenly(order: Tensor, important: Any, count: Any, valid: Tensor | None) -> Tensor:
    """[B, H, count]: evenly spaced rows of ``order`` [B, H, S], of which the last ``important`` are taken already."""
    left, pick = (_counted(order, valid) - important)[:, None], torch.arange(count, device=order.device)
    at = torch.where(left > count, (2 * pick + 1) * left // torch.sym_max(2 * count, 1), pick)
    return order.gather(2, at[:, None].expand(-1, order.shape[1], -1))
