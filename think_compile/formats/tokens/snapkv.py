"""SnapKV (arXiv 2404.14469): the tokens that the last queries of the prompt attend to, and these queries' own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from think_compile.formats.seen import Seen
from think_compile.formats.tokens.rule import Budget, attention_of_last, highest


def pooled_attention(seen: Seen, observe: int, pool: int) -> Tensor:
    """[B, H, S]: each key's probability, the largest of ``pool`` neighbours; infinite for the observed queries' own."""
    score, own = attention_of_last(seen, observe)
    # a window over the keys alone: the observed queries' own positions stay anyway
    outside = torch.where(own[:, None], 0, score)
    score = F.max_pool1d(outside.flatten(0, 1)[:, None], pool, 1, pool // 2)[:, 0].unflatten(0, score.shape[:2])
    return torch.where(own[:, None], float("inf"), score)


@dataclass(frozen=True)
class SnapKV(Budget):
    """Keep the tokens with the highest probability under the prompt's last queries (section 3.2 of the paper).

    The probability is the mean over the observed queries and the query heads of a KV head, then the largest among
    ``pool`` neighbouring positions: so a token stays with its context.

    Attributes:
        budget: tokens of the prompt that each KV head stores, a count or a share; the observed queries' own included.
        observe: number of last queries that score; their own tokens always stay.
        pool: width of the pooling over positions, odd.
    """

    observe: int = 32
    pool: int = 7

    def __post_init__(self) -> None:
        for name, least in (("observe", 1), ("pool", 1)):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int) or given < least:
                raise ValueError(f"{type(self).__name__}: {name} must be an int >= {least}, got {given!r}.")
        if self.pool % 2 == 0:
            raise ValueError(f"{type(self).__name__}: pool must be odd, got {self.pool}.")
        super().__post_init__()

    @property
    def least(self) -> int:
        """The observed queries' own tokens."""
        return self.observe

    def positions(self, seen: Seen) -> Tensor:
        """[B, H, K]: the rows of the tokens that stay."""
        score = pooled_attention(seen, self.observe, self.pool)
        return highest(score, seen.key_valid, self.count(seen.tokens))
