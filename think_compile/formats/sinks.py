"""Sinks: the first tokens of each sequence, whose rows stay whole (StreamingLLM, arXiv 2309.17453).

Their keys are outliers, and most queries attend to them. Sink j of a sequence is the token at position begin + j; rows
below ``begin`` are padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from think_compile.cache.state import Length

BEGIN, SINKS = "first_token", "sinks"  # names of parts: [B] int64, and [B, H, sinks, W]


def positions(begin: Tensor, count: int) -> Tensor:
    """[B, count]: the positions of each sequence's sinks."""
    return begin[:, None] + torch.arange(count, device=begin.device)


def first_rows(rows: Tensor, begin: Tensor, count: int, length: Length) -> Tensor:
    """[B, H, count, W]: the sinks among the first ``length`` of ``rows`` [B, H, S, W]; missing ones are zero."""
    at = positions(begin, count)
    return torch.where((at < length)[:, None, :, None], rows_at(rows, at), 0)


def rows_at(rows: Tensor, at: Tensor) -> Tensor:
    """[B, H, n, W]: rows at positions ``at`` [B, n] of ``rows`` [B, H, S, W]; positions outside give some row."""
    index = at.clamp(min=0, max=rows.shape[2] - 1)[:, None, :, None]
    return rows.gather(2, index.expand(-1, rows.shape[1], -1, rows.shape[3]))


def written(sinks: Tensor, begin: Tensor, new: Tensor, start: Length) -> Tensor:
    """The sinks after rows ``new`` [B, H, N, W] at positions start, start + 1, ...: a new tensor."""
    at = positions(begin, sinks.shape[2]) - start
    is_new = ((at >= 0) & (at < new.shape[2]))[:, None, :, None]
    return torch.where(is_new, rows_at(new, at).to(sinks.dtype), sinks)


def overlaid(rows: Tensor, at: Tensor, sinks: Tensor, begin: Tensor) -> Tensor:
    """``rows`` [B, H, n, W] at positions ``at`` [n], with the sinks in their places."""
    index = at - begin[:, None]  # [B, n]
    is_sink = ((index >= 0) & (index < sinks.shape[2]))[:, None, :, None]
    return torch.where(is_sink, rows_at(sinks, index).to(rows.dtype), rows)
