"""ThinK (arXiv 2407.21018): each KV head keeps the channels with the highest query-driven energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from think_compile.cache.state import BATCH_SIZE, CAPACITY, HEADS, Part, State
from think_compile.formats.seen import Seen, observed_queries


@dataclass(frozen=True)
class Channels:
    """Rows of ``keep`` channels, those scored highest by the last ``observe`` queries of the first call."""

    keep: int
    observe: int

    name: ClassVar[str] = "channels"
    group: ClassVar[int] = 1
    has_window: ClassVar[bool] = True

    def parts(self, width: int) -> tuple[Part, ...]:
        """Narrow rows, and the kept channels in ascending order."""
        rows = Part("rows", (BATCH_SIZE, HEADS, CAPACITY, self.keep))
        return rows, Part("channels", (BATCH_SIZE, HEADS, self.keep), torch.int64)

    def choose(self, seen: Seen) -> State:
        """The kept channels, from the keys and queries of a first call."""
        score = score_channels(seen.q, seen.k, self.observe, seen.key_valid, seen.query_valid)
        return {"channels": top_channels(score, self.keep)}

    def encode(self, rows: Tensor, chosen: State) -> State:
        """[B, H, S, W] -> narrow rows [B, H, S, keep]."""
        return {"rows": narrow_rows(rows, chosen["channels"])}

    def decode(self, state: State, width: int) -> Tensor:
        """[B, H, S, W]: the narrow rows, zero in the dropped channels."""
        rows, channels = state["rows"], state["channels"]
        full = rows.new_zeros(*rows.shape[:3], width)
        return full.scatter(3, channels[:, :, None].expand(-1, -1, rows.shape[2], -1), rows)

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
    return x.gather(3, channels[:, :, None].expand(-1, -1, x.shape[2], -1))


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


def top_channels(score: Tensor, keep: int) -> Tensor:
    """[B, H, keep] int64: the highest-scoring channels, ascending; ties go to the lower channel, NaN ranks first.

    Counts instead of sorting: D is small, and comparisons fuse into the scoring kernel; a sort does not.
    """
    score = torch.where(score.isnan(), float("inf"), score)
    channel = torch.arange(score.shape[-1], device=score.device)
    mine, other = score[..., :, None], score[..., None, :]
    lower = channel[None, :] < channel[:, None]
    ahead = (other > mine) | ((other == mine) & lower)
    kept = ahead.sum(-1) < keep
    slot = (kept[..., None, :] & lower).sum(-1)
    wanted = torch.arange(keep, device=score.device)[:, None]
    in_slot = kept[..., None, :] & (slot[..., None, :] == wanted)
    return torch.where(in_slot, channel, 0).sum(-1)
