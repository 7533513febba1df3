"""The ring: whole rows of the latest tokens, position p in row p % R."""

from __future__ import annotations

import torch
from torch import Tensor

from think_compile.cache.state import Length


def ring_positions(length: Length, rows: int, device: torch.device) -> Tensor:
    """[rows] int64: the latest position below ``length`` in each ring row; negative for empty rows."""
    last = length - 1
    return last - (last - torch.arange(rows, device=device)) % rows


def ring_of(x: Tensor, length: Length, rows: int) -> Tensor:
    """[B, H, rows, W]: a new ring with the last tokens of ``x`` [B, H, >= length, W]; empty rows are zero."""
    positions = ring_positions(length, rows, x.device)
    taken = x.index_select(2, positions.clamp(min=0))
    return torch.where((positions >= 0)[:, None], taken, 0)


def advanced(ring: Tensor, new: Tensor, start: Length) -> Tensor:
    """The ring after rows ``new`` [B, H, N, W] at positions start, start + 1, ...: a new tensor."""
    n_new = new.shape[2]
    positions = ring_positions(start + n_new, ring.shape[2], ring.device)
    taken = new.index_select(2, (positions - start).clamp(min=0))
    return torch.where((positions >= start)[:, None], taken.to(ring.dtype), ring)
