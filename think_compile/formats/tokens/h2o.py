"""H2O (arXiv 2306.14048): the heavy hitters, the tokens that all queries of the prompt attend to most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from think_compile.formats.seen import Seen
from think_compile.formats.tokens.rule import Budget, highest
from think_compile.kernels.calls import MAX_WIDTH

BLOCK_NUMBERS = 2**20  # logits of a block of queries: they fit a processor's cache, and later keys are not computed


@torch.library.custom_op("think_compile::attention_mass", mutates_args=())
def attention_mass(
    q: Tensor, k: Tensor, rows: Tensor, valid: list[Tensor], scale: float, lse: Tensor | None = None
) -> Tensor:
    """[B, H, S] fp32 or wider: the probability that each key gets, summed over the queries, mean over a group's heads.

    A query sees the valid keys up to its own row. In blocks of queries, or by two Triton kernels: no [N, S] tensor.

    Args:
        q: [B, Hq, N, D].
        k: [B, H, S, D].
        rows: [N] int64, the rows of the queries, one after the other.
        valid: bool, of the keys [B, S] and of the queries [B, N]; empty: all are.
        scale: of the logits.
        lse: [B, Hq, N], the log-sum-exp of each query's logits; computed if None or NaN.
    """
    if q.is_cuda and has_triton() and q.dtype == k.dtype != torch.float64 and q.shape[3] <= MAX_WIDTH and scale > 0:
        from think_compile.kernels.mass import key_mass

        return key_mass(q, k, rows[0], valid, scale, lse)
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    (batch, heads, size, _), n_new, group = k.shape, q.shape[2], q.shape[1] // k.shape[1]
    mass = k.new_zeros(batch, heads, size)
    start = int(rows[0]) if n_new else 0  # waits for a device without the kernels
    if lse is not None and bool(lse.isnan().any()):
        lse = None
    block = max(16, BLOCK_NUMBERS // (batch * heads * group * size))
    for begin in range(0, n_new, block):
        at = slice(begin, begin + block)
        last = min(size, start + begin + block)  # later keys are not seen
        grouped = q[:, :, at].to(k.dtype).unflatten(1, (heads, group))
        logits = grouped @ k[:, :, None, :last].mT * scale
        visible = (torch.arange(last, device=q.device) <= rows[at, None])[None]  # [1 or B, n, last]
        if valid:
            visible = visible & valid[0][:, None, :last]
        logits = logits.masked_fill(~visible[:, None, None], float("-inf"))
        if lse is None:
            probabilities = torch._safe_softmax(logits, -1)
        else:
            probabilities = (logits - lse[:, :, at].to(k.dtype).unflatten(1, (heads, group))[..., None]).exp()
        if valid:
            probabilities = torch.where(valid[1][:, None, None, at, None], probabilities, 0)
        mass[:, :, :last] += probabilities.mean(2).sum(2)
    return mass


@attention_mass.register_fake
def _(q: Tensor, k: Tensor, rows: Tensor, valid: list[Tensor], scale: float, lse: Tensor | None = None) -> Tensor:
    return k.new_empty(k.shape[:3], dtype=torch.promote_types(k.dtype, torch.float32))


@dataclass(frozen=True)
class H2O(Budget):
    """Keep the tokens with the highest probability, mean over the queries of the prompt that could see the token.

    The paper sums over the queries, which prefers early tokens: more queries see them.

    Attributes:
        budget: tokens of the prompt that each KV head stores, a count or a share.
    """

    wants_lse = True

    def positions(self, seen: Seen) -> Tensor:
        """[B, H, K]: the rows of the tokens that stay."""
        n_new, size = seen.q.shape[2], seen.k.shape[2]
        first = size - n_new if seen.query_start is None else seen.query_start
        scale = seen.k.shape[3] ** -0.5 if seen.scale is None else float(seen.scale)
        valid = [] if seen.key_valid is None or seen.query_valid is None else [seen.key_valid, seen.query_valid]
        queries = first + torch.arange(n_new, device=seen.q.device)
        mass = attention_mass(seen.q, seen.k, queries, valid, scale, seen.lse)
        rows = torch.arange(size, device=mass.device)
        counted = torch.ones(1, n_new, device=mass.device) if seen.query_valid is None else seen.query_valid
        later = counted.to(mass.dtype).flip(1).cumsum(1).flip(1)  # valid queries from each on
        counts = later.gather(1, (rows - first).clamp(min=0, max=n_new - 1).expand(later.shape[0], -1))
        score = mass / counts.clamp(min=1)[:, None]
        return highest(score, seen.key_valid, self.count(seen.tokens))
