"""Small graph functions around an attention: positions, causal masks, order of heads, memory layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def start_of(positions: Tensor, proven: bool) -> Tensor:
    """The first of a call's positions [N], 0-d; unless ``proven``, asserts on the device that they are consecutive."""
    if not proven and positions.shape[0] != 1:
        steps = torch.arange(positions.shape[0], device=positions.device)
        torch._assert_async((positions - steps == positions[0]).all(), "a fixed cache is written at gaps")
    return positions[0]


def laid_out(x: Tensor, order: list[int]) -> Tensor:
    """``x`` in a memory layout with the axes in ``order``, outermost first."""
    back = sorted(range(len(order)), key=lambda i: order[i])
    return x.permute(order).contiguous().permute(back)


def causal_to_end(k_new: Tensor, extent: int) -> Tensor:
    """Bool [N, extent]: the call's last query sees all ``extent`` keys, each earlier one a key less."""
    rows = torch.arange(k_new.shape[2], device=k_new.device)[:, None]
    return torch.arange(extent, device=k_new.device) <= extent - k_new.shape[2] + rows


def causal_after(k_new: Tensor, past: int) -> Tensor:
    """Bool [N, past + N], as :func:`causal_to_end`, after ``past`` tokens."""
    return causal_to_end(k_new, past + k_new.shape[2])


def device_start(start: int, x: Tensor) -> Tensor:
    """0-d int64 on the device of ``x``: a known first position as a tensor."""
    return torch.full((), start, dtype=torch.int64, device=x.device)


def joined_queries(queries: list[Tensor], heads: int) -> Tensor:
    """Join queries [B, heads * G, N, D] of attentions to the same keys into one attention with larger groups."""
    grouped = [q.unflatten(1, (heads, -1)) for q in queries]
    return torch.cat(grouped, 2).flatten(1, 2)


def heads_together(x: Tensor, heads: int) -> Tensor:
    """[B, Hq, *, *] with the query heads of a KV head adjacent, from query heads interleaved over the KV heads."""
    if x.dim() < 4 or x.shape[1] == 1:
        return x
    return x.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1, 2)


def heads_interleaved(x: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`heads_together`."""
    return x.unflatten(1, (heads, -1)).transpose(1, 2).flatten(1, 2)


def prompt_columns(mask: Tensor | None, k_new: Tensor) -> Tensor | None:
    """The columns of a first call's own rows, from a mask [..., N, S] over a cache's rows."""
    return None if mask is None else mask[..., : k_new.shape[2]]


def attend_prompt(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    grouped: bool,
) -> Tensor:
    """Stock attention to the call's own rows [B, H, N, *], with the mask's first N columns: [B, Hq, N, Dv].

    ``grouped``: pass keys and values with H heads (``enable_gqa``) instead of a copy for each query head.
    """
    if not grouped:
        copies = q.shape[1] // k_new.shape[1]
        k_new, v_new = (x.unsqueeze(2).expand(-1, -1, copies, -1, -1).flatten(1, 2) for x in (k_new, v_new))
    mask = prompt_columns(mask, k_new)
    return F.scaled_dot_product_attention(q, k_new, v_new, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)
