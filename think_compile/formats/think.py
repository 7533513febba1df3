"""ThinK (arXiv 2407.21018): each KV head keeps the channels with the highest query-driven energy."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from think_compile.cache.state import BATCH_SIZE, CAPACITY, HEADS, Part, State
from think_compile.formats.seen import Seen, observed_queries

CHANNEL = torch.int16  # a channel's number, as stored


@dataclass(frozen=True)
class Channels:
    """Rows of ``keep`` channels, those scored highest by the last ``observe`` queries of the first call."""

    keep: int
    observe: int

    name: ClassVar[str] = "channels"
    group: ClassVar[int] = 1
    has_window: ClassVar[bool] = True

    @property
    def kept(self) -> int:
        """Number of channels that are stored."""
        return self.keep

    def parts(self, width: int) -> tuple[Part, ...]:
        """Narrow rows, and the kept channels in ascending order."""
        rows = Part("rows", (BATCH_SIZE, HEADS, CAPACITY, self.keep))
        return rows, Part("channels", (BATCH_SIZE, HEADS, self.keep), CHANNEL)

    def choose(self, seen: Seen) -> State:
        """The kept channels, from the keys and queries of a first call."""
        score = score_channels(seen.q, seen.k, self.observe, seen.key_valid, seen.query_valid)
        return {"channels": top_channels(score, self.keep)}

    def encode(self, rows: Tensor, chosen: State) -> State:
        """[B, H, S, W] -> narrow rows [B, H, S, keep]."""
        return {"rows": narrow_rows(rows, chosen["channels"])}

    def decode(self, state: State, width: int) -> Tensor:
        """[B, H, S, W]: the narrow rows, zero in the dropped channels."""
        return wide_rows(state["rows"], state["channels"], width)

    def scores(self, queries: Tensor, state: State) -> Tensor:
        """[B, H, M, S]: products of ``queries`` [B, H, M, W] with the rows, on the kept channels only."""
        return narrow_rows(queries, state["channels"]) @ state["rows"].to(queries.dtype).mT

    def is_lossy(self, width: int) -> bool:
        """Whether numbers are dropped."""
        return self.keep < width

    def describe(self, width: int) -> str:
        """For the report."""
        return f"{self.keep} of {width} channels kept (effective ratio {1 - self.keep / width:.3g})"


def narrow_rows(x: Tensor, channels: Tensor) -> Tensor:
    """[B, H, S, T]: the ``channels`` [B, H, T] of rows ``x`` [B, H, S, W]."""
    return x.gather(3, channels[:, :, None].expand(-1, -1, x.shape[2], -1).to(torch.int64))


def wide_rows(narrow: Tensor, channels: Tensor, width: int) -> Tensor:
    """[B, H, S, width]: rows ``narrow`` [B, H, S, T] at the ``channels`` [B, H, T], zero in the others."""
    at = channels[:, :, None].expand(-1, -1, narrow.shape[2], -1).to(torch.int64)
    return narrow.new_zeros(*narrow.shape[:3], width).scatter(3, at, narrow)


def _mean_square(x: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over the tokens of x[B, *, S, D] squared, in fp32 or wider; ``weight`` [B, S] bool selects tokens."""
    square = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    if weight is None:
        return square.mean(dim=2)
    weight = weight[:, None, :, None]
    count = weight.sum(dim=2).clamp(min=1)
    return torch.where(weight, square, 0.0).sum(dim=2) / count


def score_channels(
    q: Tensor, k: Tensor, observe: int, key_valid: Tensor | None = None, query_valid: Tensor | None = None
) -> Tensor:
    """Query-driven energy of each key channel, [B, H, D] in fp32 or wider (section 3.2 of the paper).

    score[j] = mean over observed queries of the group (q[., j]^2) * mean over valid keys (k[., j]^2), which is
    ||Q_obs[:, j] K[:, j]^T||_F up to a monotone map.

    Args:
        q: [B, Hq, N, D], the queries of the call, as multiplied with the keys.
        k: [B, H, S, D], the keys.
        observe: number of last valid queries that count.
        key_valid: [B, S] bool, or None: all.
        query_valid: [B, N] bool, or None: all.
    """
    if query_valid is None:
        q, weight = q[:, :, -observe:], None
    else:
        weight = observed_queries(query_valid, observe)
    q_energy = _mean_square(q, weight).unflatten(1, (k.shape[1], -1)).mean(dim=2)
    return q_energy * _mean_square(k, key_valid)


def score_values(seen: Seen, observe: int) -> Tensor:
    """Query-driven energy of each value channel, [B, H, Dv] in fp32 or wider (appendix D of the paper).

    score[j]^2 = sum over observed queries of the group of (softmax(q K^T / sqrt(D)) V[:, j])^2. A query sees the valid
    keys up to its own position.
    """
    probabilities, _, counts = observed_attention(seen, observe)
    mixed = (probabilities @ seen.v.to(probabilities.dtype)[:, :, None]).square()
    return torch.where(counts[:, None, None, :, None], mixed, 0).sum(dim=(2, 3))


def observed_attention(seen: Seen, observe: int) -> tuple[Tensor, Tensor, Tensor]:
    """The probabilities [B, H, G, n, S] of the last ``observe`` valid queries, fp32 or wider.

    Also their positions [B, n], and which of them are valid. A query sees the valid keys up to its own position.
    """
    k = seen.k.to(torch.promote_types(seen.k.dtype, torch.float32))
    q, positions, counts = last_queries(seen, min(observe, seen.q.shape[2]))
    grouped = q.to(k.dtype).unflatten(1, (k.shape[1], -1))  # [B, H, G, n, D]
    logits = grouped @ k[:, :, None].mT * (k.shape[3] ** -0.5 if seen.scale is None else seen.scale)
    at = torch.arange(k.shape[2], device=k.device) if seen.key_positions is None else seen.key_positions[:, :, None]
    visible = at <= positions[:, None, :, None]  # [B, H or 1, n, S]
    if seen.key_valid is not None:
        visible = visible & seen.key_valid[:, None, None]
    return torch._safe_softmax(logits.masked_fill(~visible[:, :, None], float("-inf")), -1), positions, counts


def last_queries(seen: Seen, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last ``count`` valid queries [B, Hq, count, D], their rows [B, count], and which of them are valid."""
    batch, _, n_new, width = seen.q.shape
    first = seen.k.shape[2] - n_new if seen.query_start is None else seen.query_start
    if seen.query_valid is None:
        at = torch.arange(n_new - count, n_new, device=seen.q.device).expand(batch, -1)
        return seen.q[:, :, -count:], first + at, torch.ones_like(at, dtype=torch.bool)
    at = observed_queries(seen.query_valid, count).to(torch.int8).sort(dim=1, stable=True).indices[:, n_new - count :]
    taken = seen.q.gather(2, at[:, None, :, None].expand(-1, seen.q.shape[1], -1, width))
    return taken, first + at, seen.query_valid.gather(1, at)


def dealt_channels(score: Tensor, counts: tuple[int, ...], size: int) -> Tensor:
    """[B, H, size]: the channels by tiers of these counts, the highest scores first; the rest at the end.

    Ascending within a tier. Ties go to the lower channel, NaN ranks first. Counts instead of sorting: D is small, and
    comparisons fuse into the scoring kernel; a sort does not.
    """
    score = torch.where(score.isnan(), float("inf"), score)
    channel = torch.arange(score.shape[-1], device=score.device)
    lower = channel[None, :] < channel[:, None]
    mine, other = score[..., :, None], score[..., None, :]
    rank = ((other > mine) | ((other == mine) & lower)).sum(-1)
    tier = torch.zeros_like(rank)
    for total in itertools.accumulate(counts):
        tier = tier + (rank >= total).to(tier.dtype)
    mine, other = tier[..., :, None], tier[..., None, :]
    slot = ((other < mine) | ((other == mine) & lower)).sum(-1)
    in_slot = slot[..., None, :] == torch.arange(size, device=score.device)[:, None]
    return torch.where(in_slot, channel, 0).sum(-1).to(CHANNEL)


def top_channels(score: Tensor, keep: int) -> Tensor:
    """[B, H, keep]: the highest-scoring channels, ascending."""
    return dealt_channels(score, (keep,), keep)
