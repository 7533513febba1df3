"""The specification in plain PyTorch: scoring, packing, appending and attending to pruned keys.

Everything here is traced by the lowering, so it holds only ATen calls. Shapes, throughout:

    B batch, Hq query heads, H key/value heads, G = Hq // H, D key channels, Dv value channels,
    T kept channels, S tokens, N new tokens of a call, C capacity in rows, R rows of the ring.

Token positions count from 0. ``start`` is the position of a call's first new token. ``floor`` is the lowest
position that still has a whole key: the ring holds positions [floor, start), position p in row p % R.
``first`` is the lowest position that a call reads: that of a bounded cache moves on, else it is 0.
Lengths are ints (symbolic while compiling) for growing caches and 0-d int64 tensors for fixed ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Length = int | Tensor


class Packed(NamedTuple):
    """What a first call leaves of a layer's keys."""

    pruned: Tensor  # [B, H, C, T]
    channels: Tensor  # [B, H, T] int64, ascending
    recent: Tensor  # [B, H, R, D]


# ---------------------------------------------------------------------------------------------- validity


def _as_4d(mask: Tensor) -> Tensor:
    return mask[(None,) * (4 - mask.dim())]


def valid_keys(mask: Tensor, batch: int, extent: int) -> Tensor:
    """[B, extent] bool: whether some query may attend to the key.

    ``mask`` broadcasts to [B, Hq, N, S]; bool: true attends; float: added, a key counts when its bias is above
    half its dtype's minimum.
    """
    mask = _as_4d(mask)
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    attended = allowed.to(torch.int32).amax(dim=(1, 2)) > 0  # not any(): Inductor's C++ fails on some bool reductions
    return attended.expand(batch, extent if attended.shape[-1] == 1 else -1)


def observed_queries(query_valid: Tensor, observe: int) -> Tensor:
    """[B, N] bool: the last ``observe`` valid queries of each sequence; ``query_valid`` [B, N]."""
    later_valid = query_valid.flip(1).to(torch.int64).cumsum(1).flip(1)
    return query_valid & (later_valid <= observe)


# ----------------------------------------------------------------------------------------------- scoring


def _mean_square(x: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over the tokens of x[B, *, S, D] squared, in fp32 at least; ``weight`` [B, S] bool picks them."""
    square = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    if weight is None:
        return square.mean(dim=2)
    weight = weight[:, None, :, None]
    count = weight.sum(dim=2).clamp(min=1)
    return torch.where(weight, square, 0.0).sum(dim=2) / count


def score_channels(
    q: Tensor, k: Tensor, observe: int, key_valid: Tensor | None = None, query_valid: Tensor | None = None
) -> Tensor:
    """Query-driven energy of each key channel, [B, H, D] fp32 (ThinK, arXiv 2407.21018, section 3.2).

    score[j] = mean over observed queries of the group (q[., j]^2) * mean over valid keys (k[., j]^2), which is
    ||Q_obs[:, j] K[:, j]^T||_F up to a monotone map.

    Args:
        q: [B, Hq, N, D], the queries of the call, as they meet the keys.
        k: [B, H, S, D], the keys.
        observe: how many of the last valid queries count.
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
    """[B, H, keep] int64: the channels of highest score, ascending; ties go to the lower channel, NaN is highest.

    By counting instead of sorting: D is small, and comparisons fuse into the scoring kernel where a sort cannot.
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


# -------------------------------------------------------------------------------------------------- rows


def narrow_rows(k: Tensor, channels: Tensor) -> Tensor:
    """[B, H, S, T]: the kept ``channels`` [B, H, T] of keys ``k`` [B, H, S, D]."""
    return k.gather(3, channels[:, :, None].expand(-1, -1, k.shape[2], -1))


def ring_positions(length: Length, rows: int, device: torch.device) -> Tensor:
    """[rows] int64: the latest position below ``length`` in each ring row; negative where there is none yet."""
    last = length - 1
    return last - (last - torch.arange(rows, device=device)) % rows


def ring_of(k: Tensor, length: Length, rows: int) -> Tensor:
    """[B, H, rows, D]: a fresh ring holding the last tokens of ``k`` [B, H, >= length, D]; empty rows are zero."""
    positions = ring_positions(length, rows, k.device)
    taken = k.index_select(2, positions.clamp(min=0))
    return torch.where((positions >= 0)[:, None], taken, 0)


def advance_ring(recent: Tensor, k_new: Tensor, start: Length) -> Tensor:
    """The ring after ``k_new`` [B, H, N, D] at positions start, start + 1, ...: a new tensor like ``recent``."""
    n_new = k_new.shape[2]
    positions = ring_positions(start + n_new, recent.shape[2], recent.device)
    taken = k_new.index_select(2, (positions - start).clamp(min=0))
    return torch.where((positions >= start)[:, None], taken.to(recent.dtype), recent)


def _overlay(base: Tensor, ring: Tensor, new: Tensor, first: int, floor: Length, start: Length) -> Tensor:
    """``base`` [..., S], positions from ``first`` on, with the columns of ring [..., R] and new tokens [..., N] in it.

    Only the last R + N positions can be others than ``base``'s; those that are not go to a column that is cut off.
    """
    size, rows, n_new = base.shape[-1], ring.shape[-1], new.shape[-1]
    positions = start - rows + torch.arange(rows + n_new, device=base.device)
    tail = torch.cat([ring.index_select(-1, positions[:rows] % rows), new], -1)
    columns = torch.where((positions >= floor) & (positions >= first), positions - first, size)
    return F.pad(base, (0, 1)).index_copy(-1, columns, tail.to(base.dtype))[..., :size]


def zero_filled(pruned: Tensor, channels: Tensor, head_dim: int) -> Tensor:
    """[B, H, S, D]: the narrow rows with zeros in the dropped channels."""
    full = pruned.new_zeros(*pruned.shape[:3], head_dim)
    index = channels[:, :, None].expand(-1, -1, pruned.shape[2], -1)
    return full.scatter(3, index, pruned)


def dense_keys(packed: Packed, floor: Length, length: Length, extent: int, first: int = 0) -> Tensor:
    """[B, H, extent - first, D]: the keys as the next call will see them, dropped channels zero (as in the oracle)."""
    base = zero_filled(packed.pruned[:, :, first:extent], packed.channels, packed.recent.shape[-1])
    columns = torch.arange(first, extent, device=base.device)
    in_ring = (columns >= floor) & (columns < length)
    ring = packed.recent.index_select(2, columns % packed.recent.shape[2])
    return torch.where(in_ring[:, None], ring, base)


# --------------------------------------------------------------------------------------- a layer's first call


def pack_keys(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    length: Length,
    query_start: Length,
    *,
    keep: int,
    observe: int,
    ring_rows: int,
    capacity: int,
) -> Packed:
    """Prune the keys a first call leaves.

    Args:
        q: [B, Hq, N, D], the call's queries, at positions query_start, query_start + 1, ...
        k: [B, H, S, D], all keys in position order; rows from ``length`` on hold no token.
        mask: as in :func:`valid_keys`, or None.
        keep, ring_rows, capacity: T, R and C of the result (C >= S; rows from S on are zero).
    """
    channels = choose_channels(q, k, mask, length, query_start, keep=keep, observe=observe)
    return pack_rows(k, channels, length, ring_rows, capacity)


def choose_channels(
    q: Tensor, k: Tensor, mask: Tensor | None, length: Length, query_start: Length, *, keep: int, observe: int
) -> Tensor:
    """[B, H, keep]: the channels that a first call keeps; arguments as in :func:`pack_keys`."""
    key_valid = query_valid = None
    if mask is not None or isinstance(length, Tensor):
        key_valid, query_valid = _validity(mask, k, length, query_start, q.shape[2])
    return top_channels(score_channels(q, k, observe, key_valid, query_valid), keep)


def pack_rows(k: Tensor, channels: Tensor, length: Length, ring_rows: int, capacity: int) -> Packed:
    """Keys [B, H, S, D], of which ``length`` hold tokens, as stored: narrow in ``capacity`` rows, the latest whole."""
    pruned = F.pad(narrow_rows(k, channels), (0, 0, 0, capacity - k.shape[2]))
    return Packed(pruned, channels, ring_of(k, length, ring_rows))


def _widened(allowed: Tensor, columns: Tensor) -> Tensor:
    """[B, len(columns)]: ``allowed`` [B, E], False from E on."""
    extent = allowed.shape[1]
    return allowed.index_select(1, columns.clamp(max=extent - 1)) & (columns < extent)


def _validity(mask: Tensor | None, k: Tensor, length: Length, query_start: Length, n_new: int) -> tuple[Tensor, Tensor]:
    columns = torch.arange(k.shape[2], device=k.device)
    key_valid = (columns < length).expand(k.shape[0], -1)
    if mask is not None:  # of a cache read by prefix the mask has fewer columns; the rest hold no token
        allowed = valid_keys(mask, k.shape[0], k.shape[2])
        key_valid = key_valid & _widened(allowed, columns)
    positions = query_start + torch.arange(n_new, device=k.device)
    return key_valid, key_valid.index_select(1, positions)


# ---------------------------------------------------------------------------------------- every later call


def rescore_restarted(
    q: Tensor, k_new: Tensor, mask: Tensor | None, channels: Tensor, start: Tensor, extent: int, observe: int
) -> Tensor:
    """Kept channels of a fixed cache: chosen anew when the call writes from position 0, else as they were.

    A cache of fixed size is reused by writing from its beginning again; its past is then empty, and the call is a
    first call. Decided on the device, so that nothing waits for it.
    """
    n_new = k_new.shape[2]
    valid = None
    if mask is not None and n_new != 1:  # one token, were it padding, leaves nothing to choose by
        positions = start + torch.arange(n_new, device=q.device)
        valid = valid_keys(mask, q.shape[0], extent).index_select(1, positions)
    fresh = top_channels(score_channels(q, k_new, observe, valid, valid), channels.shape[-1])
    return torch.where(start == 0, fresh, channels)


def append_rows(buffer: Tensor, rows: Tensor, start: Length) -> None:
    """Write ``rows`` [B, H, N, *] into ``buffer`` [B, H, C, *] at positions start, start + 1, ..., in place."""
    index = start + torch.arange(rows.shape[2], device=buffer.device)
    buffer.index_copy_(2, index, rows.to(buffer.dtype))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pruned_logits(
    q: Tensor, k_new: Tensor, packed: Packed, start: Length, floor: Length, extent: int, first: int = 0
) -> Tensor:
    """Logits q K^T, unscaled, over positions [first, extent) in order: [B, Hq, N, extent - first], fp32 at least.

    Kept channels against the narrow keys, all channels against the ring and the new keys.
    """
    heads = packed.pruned.shape[1]
    grouped = _wide(q).unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, G*N, D]
    narrow = narrow_rows(grouped, packed.channels) @ _wide(packed.pruned[:, :, first:extent]).mT
    ring = grouped @ _wide(packed.recent).mT
    new = grouped @ _wide(k_new).mT
    logits = _overlay(narrow, ring, new, first, floor, start)
    return logits.unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def pruned_attention(
    q: Tensor,
    k_new: Tensor,
    packed: Packed,
    values: Tensor,
    start: Length,
    floor: Length,
    extent: int,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    first: int = 0,
) -> Tensor:
    """Attention of a few new tokens over pruned keys, [B, Hq, N, Dv] in q's dtype.

    Args:
        q: [B, Hq, N, D]. k_new: [B, H, N, D], the call's own keys.
        packed: the past keys; its narrow rows already hold the new tokens.
        values: [B, H, C, Dv], the new tokens' rows written.
        mask, is_causal: the model's own, over positions [first, extent) (is_causal is top-left aligned, as torch's).
        scale: the model's own, that of the full D.
    """
    logits = pruned_logits(q, k_new, packed, start, floor, extent, first) * scale
    if is_causal:
        mask = torch.ones(q.shape[2], extent - first, dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        logits = logits + mask
    probabilities = torch._safe_softmax(logits, -1)
    heads = values.shape[1]
    grouped = probabilities.unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, G*N, S]
    out = grouped @ _wide(values[:, :, first:extent])
    return out.unflatten(2, (-1, q.shape[2])).flatten(1, 2).to(q.dtype)


def dense_attention(
    q: Tensor,
    k_new: Tensor,
    packed: Packed,
    values: Tensor,
    start: Length,
    floor: Length,
    extent: int,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    first: int = 0,
) -> Tensor:
    """As :func:`pruned_attention`, by the stock attention over zero-filled keys: for calls of many tokens."""
    base = zero_filled(packed.pruned[:, :, first:extent], packed.channels, q.shape[-1])
    k = _overlay(base.mT, packed.recent.mT, k_new.mT, first, floor, start).mT
    k, v = k.to(q.dtype), values[:, :, first:extent].to(q.dtype)
    group = q.shape[1] // k.shape[1]
    if group > 1 and mask is not None:  # the fused kernels take a mask or grouped heads, not both
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
