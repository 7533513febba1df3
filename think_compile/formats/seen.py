"""The view of a call for codecs that choose: queries, rows, and which of them are padding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from think_compile.cache.state import Call, Length


class Seen(NamedTuple):
    """A first call, as a codec sees it.

    Attributes:
        q: [B, Hq, N, D], the queries, as multiplied with the keys.
        k, v: [B, H, S, D] and [B, H, S, Dv], all rows in the order of their positions.
        key_valid: [B, S] bool, false for padding; None: all rows are tokens.
        query_valid: [B, N] bool; None: all queries are.
        scale: of the logits; None is 1 / sqrt(D).
        query_start: the position of the first query; None: the queries are at the last rows.
        key_positions: [B, H, S], the positions of the rows; None: they are in order.
        written: this many of the first rows hold tokens; None: all.
        lse: [B, Hq, N], the log-sum-exp of each query's logits with the valid keys up to its own row; NaN if the
            attention had other ones; None if unknown.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_valid: Tensor | None = None
    query_valid: Tensor | None = None
    scale: float | None = None
    query_start: Length | None = None
    key_positions: Tensor | None = None
    written: Any = None
    lse: Tensor | None = None

    @property
    def tokens(self) -> Any:
        """Number of tokens with rows, padding included."""
        return self.k.shape[2] if self.written is None else self.written

    def only(self, rows: Tensor) -> Seen:
        """The same with the ``rows`` [B, H, K] alone, padding first."""
        k, v = (x.gather(2, rows[..., None].expand(-1, -1, -1, x.shape[3])) for x in (self.k, self.v))
        count, valid = rows.shape[2], self.key_valid
        if valid is not None:
            padding = (count - valid.sum(1, keepdim=True)).clamp(min=0)
            valid = torch.arange(count, device=k.device) >= padding
        first = self.k.shape[2] - self.q.shape[2] if self.query_start is None else self.query_start
        return self._replace(k=k, v=v, key_valid=valid, query_start=first, key_positions=rows, lse=None)

    @property
    def first_valid(self) -> Tensor:
        """[B] int64: the row of each sequence's first token; rows below it are padding on the left."""
        if self.key_valid is None:
            return torch.zeros(self.k.shape[0], dtype=torch.int64, device=self.k.device)
        return (self.key_valid.to(torch.int64).cumsum(1) == 0).sum(1)


def seen(call: Call, start: Length | None, length: Length) -> Seen:
    """A first call with queries at rows from ``start`` on (None: the last rows); ``length`` rows hold tokens."""
    if call.mask is None and start is None:
        return Seen(call.q, call.k, call.v, scale=call.scale, lse=call.lse)
    begin = call.k.shape[2] - call.q.shape[2] if start is None else start
    valid = _validity(call.mask, call.k, length, begin, call.q.shape[2])
    lse = None if call.lse is None else _if_causal(call.lse, call.mask, *valid, begin)
    return Seen(call.q, call.k, call.v, *valid, call.scale, start, lse=lse)


def seen_again(call: Call, start: Length, columns: int) -> Seen:
    """A call that restarts a cache of fixed size, with a mask of ``columns`` over its rows."""
    if call.mask is None or call.q.shape[2] == 1:  # a single token is never padding: it is all there is to choose by
        return Seen(call.q, call.k, call.v, scale=call.scale)
    positions = start + torch.arange(call.q.shape[2], device=call.q.device)
    valid = valid_keys(call.mask, call.q.shape[0], columns).index_select(1, positions)
    return Seen(call.q, call.k, call.v, valid, valid, call.scale)


def valid_keys(mask: Tensor, batch: int, columns: int) -> Tensor:
    """[B, columns] bool: whether some query may attend to the key.

    ``mask`` broadcasts to [B, Hq, N, S]; bool: true attends; float: added, a key counts when its bias is above half its
    dtype's minimum.
    """
    mask = mask[(None,) * (4 - mask.dim())]
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    attended = allowed.to(torch.int32).amax(dim=(1, 2)) > 0  # not any(): Inductor's C++ fails on some bool reductions
    return attended.expand(batch, columns if attended.shape[-1] == 1 else -1)


def observed_queries(query_valid: Tensor, observe: int) -> Tensor:
    """[B, N] bool: the last ``observe`` valid queries of each sequence; ``query_valid`` [B, N]."""
    later_valid = query_valid.flip(1).to(torch.int64).cumsum(1).flip(1)
    return query_valid & (later_valid <= observe)


def _validity(mask: Tensor | None, k: Tensor, length: Length, start: Length, n_new: int) -> tuple[Tensor, Tensor]:
    columns = torch.arange(k.shape[2], device=k.device)
    key_valid = (columns < length).expand(k.shape[0], -1)
    if mask is not None:  # a mask over a prefix of the cache has fewer columns; the rows after it hold no token
        key_valid = key_valid & _widened(valid_keys(mask, k.shape[0], k.shape[2]), columns)
    positions = start + torch.arange(n_new, device=k.device)
    return key_valid, key_valid.index_select(1, positions)


def _widened(allowed: Tensor, columns: Tensor) -> Tensor:
    """[B, len(columns)]: ``allowed`` [B, E], false from E on."""
    extent = allowed.shape[1]
    return allowed.index_select(1, columns.clamp(max=extent - 1)) & (columns < extent)


def _if_causal(lse: Tensor, mask: Tensor | None, key_valid: Tensor, query_valid: Tensor, start: Length) -> Tensor:
    """``lse``, or NaN if a valid query has another mask than the valid keys up to its own row."""
    if mask is None:
        return lse
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[-1] == 1:  # the same for all keys
        mask = mask.expand(-1, -1, -1, key_valid.shape[1])
    columns = torch.arange(mask.shape[-1], device=mask.device)
    rows = start + torch.arange(query_valid.shape[1], device=mask.device)[:, None]
    visible = key_valid[:, None, None, : mask.shape[-1]] & (columns <= rows)
    if mask.dtype == torch.bool:
        as_visible = mask == visible
    else:
        as_visible = torch.where(visible, mask == 0, mask < torch.finfo(mask.dtype).min / 2)
    same = (as_visible | ~query_valid[:, None, :, None]).to(torch.int32).amin(dim=(0, 1, 2, 3))
    return torch.where(same > 0, lse, float("nan"))
