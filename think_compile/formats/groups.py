"""Groups of tokens that are encoded together, when they leave the window."""

from __future__ import annotations

import torch
from torch import Tensor

from think_compile.cache.state import Length, State
from think_compile.formats.ring import ring_positions


def counted(rows: Tensor, size: int, low: Tensor, end: Length, first: Length = 0) -> Tensor:
    """[B, H, size, W]: rows from position ``first`` on; each that does not count is a copy of the nearest that does.

    ``rows`` [B, H, S, W]; rows at positions ``low`` [B] to ``end`` count. Sinks, padding on the left and rows after the
    tokens then have no effect on the minimum and the maximum of their group.
    """
    positions = first + torch.arange(size, device=rows.device)
    nearest = torch.minimum(torch.maximum(positions, low[:, None]), torch.as_tensor(end - 1, device=rows.device))
    at = (nearest - first).clamp(min=0, max=rows.shape[2] - 1)
    return rows.gather(2, at[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))


def rows_from(base: Tensor, size: int, ring: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """[B, H, size, W]: the rows at positions from ``base`` on, in the ring below ``start`` and new from there on."""
    positions = base + torch.arange(size, device=ring.device)
    older = ring.index_select(2, positions % ring.shape[2])
    newer = new.index_select(2, (positions - start).clamp(min=0, max=new.shape[2] - 1)).to(ring.dtype)
    return torch.where((positions < start)[:, None], older, newer)


def restored(ring: Tensor, decoded: Tensor, base: Tensor, end: Tensor, start: Tensor) -> Tensor:
    """The ring before ``start``, with the ``decoded`` rows [B, H, group, W] at positions ``base`` to ``end``."""
    positions = ring_positions(start, ring.shape[2], ring.device)
    taken = decoded.index_select(2, (positions - base).clamp(min=0, max=decoded.shape[2] - 1))
    return torch.where(((positions >= base) & (positions < end))[:, None], taken, ring)


def overwrite(state: State, encoded: State, first: Tensor, count: Tensor) -> None:
    """Write ``count`` of the encoded records to those from ``first`` on, in place."""
    for name, records in encoded.items():
        old = state[name]
        n = torch.sym_min(records.shape[2], old.shape[2])  # none is written twice
        records = records[:, :, :n]
        at = (first + torch.arange(n, device=old.device)) % old.shape[2]
        written = (torch.arange(n, device=old.device) < count).view(-1, *[1] * (old.dim() - 3))
        old.index_copy_(2, at, torch.where(written, records.to(old.dtype), old.index_select(2, at)))
