"""The interface of cache formats to the passes and the runtime: :class:`CacheFormat`, its two sides, and their parts.

A format is made for one layer. Its methods are targets of the rewritten graph: functions of tensors only, which the
lowering traces. They append to growing caches in place up to their capacity (the caller has made room), and return new
rings, so that older handles keep their own. They write caches of fixed size entirely in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from think_compile.cache.state import (
    EVICTED,
    OLDEST,
    POSITIONS,
    WINDOW_START,
    Call,
    Length,
    Prompt,
    Span,
    State,
    Stored,
)
from think_compile.formats import attention, evicted
from think_compile.formats.seen import seen, seen_again
from think_compile.formats.side import Codec, FormatError, Side
from think_compile.formats.sinks import BEGIN
from think_compile.formats.tokens.rule import RuleError, TokenRule, check, selected
from think_compile.kernels.calls import MAX_QUERIES, PairKernels

__all__ = [
    "CacheFormat",
    "Codec",
    "EveryPage",
    "FormatError",
    "RuleError",
    "Side",
    "TokenRule",
    "rolled",
    "window_start_of",
]

MAX_STEP_QUERIES = MAX_QUERIES  # a call of more tokens is a chunk of a prompt


class PageRule(Protocol):
    """Selects the pages of a stored cache that a layer reads in a later call."""

    @property
    def reads_all(self) -> bool:
        """Whether a layer reads all pages."""


@dataclass(frozen=True)
class EveryPage:
    """Every layer reads every page."""

    reads_all: bool = field(default=True, init=False)


def window_start_of(counters: Tensor) -> Tensor:
    """0-d: the window's start, from the counters of a cache of fixed size."""
    return counters[WINDOW_START]


def rolled(counters: Tensor, row: int) -> Tensor:
    """0-d: the position of the ``row``-th oldest token in a rolling buffer."""
    return counters[OLDEST] + row


@dataclass(frozen=True)
class CacheFormat:
    """How a layer's cache is stored: the stored tokens, the form of keys and values, and the pages that a call reads.

    ``keys`` and ``values`` of a later call are the sides' stored tensors; see :mod:`think_compile.cache.state`.
    """

    keys: Side
    values: Side
    tokens: TokenRule | None = None  # all tokens are stored
    pages: PageRule = EveryPage()

    def __post_init__(self) -> None:
        for of in ("keys", "values"):
            object.__setattr__(self, of, replace(self.side(of), evicts=self.evicts))

    @property
    def evicts(self) -> bool:
        """Whether a rule selects the tokens of a first call that are stored: then there is no dense form."""
        return self.tokens is not None

    @property
    def wants_lse(self) -> bool:
        """Whether a first call needs the log-sum-exp of the model's attention, if this gives one."""
        return bool(getattr(self.tokens, "wants_lse", False))

    def side(self, of: str) -> Side:
        """The side called "keys" or "values"."""
        return self.keys if of == "keys" else self.values

    @property
    def is_lossy(self) -> bool:
        """Whether the keys or the values lose information."""
        return self.keys.is_lossy or self.values.is_lossy

    def describe(self) -> str:
        """A phrase for the report."""
        keys, values = (side.codec.describe(side.width) for side in (self.keys, self.values))
        sides = f"{keys}; values: {values}" if self.values.is_lossy else keys
        return sides if self.tokens is None else f"{self.tokens.describe()}; {sides}"

    # ------------------------------------------------------------------------------------------- first calls

    def choose(self, call: Call, prompt: Prompt) -> tuple[State, State]:
        """The first call's choices for all rows of keys and values, from the tokens that its attention reads."""
        if prompt.read is not None:
            q, k, v = (_last(x, prompt.read) for x in (call.q, call.k, call.v))
            call = call._replace(q=q, k=k, v=v)
        shown = seen(call, prompt.start, self._length(call, prompt))
        return self.keys.choose(shown), self.values.choose(shown)

    def first_call(self, call: Call, prompt: Prompt) -> tuple[State, State]:
        """The stored form of a first call's keys and values, ``call.k`` and ``call.v`` [B, H, S, *]."""
        if self.tokens is not None:
            return self._first_call_of_some(call, prompt, self.tokens)
        chosen = self.choose(call, prompt)
        if prompt.kept is not None:
            read = call.k.shape[2] if prompt.read is None else prompt.read
            call = call._replace(k=_last(call.k, prompt.kept), v=_last(call.v, prompt.kept))
            chosen = _without_first(chosen[0], read - prompt.kept), _without_first(chosen[1], read - prompt.kept)
        length, fixed = self._length(call, prompt), prompt.capacity is not None
        if fixed:
            length = torch.full((), length, device=call.q.device) if not isinstance(length, Tensor) else length
        keys, values = ((self.keys, call.k, chosen[0]), (self.values, call.v, chosen[1]))
        return _packed(*keys, length, prompt), _packed(*values, length, prompt)

    def _first_call_of_some(self, call: Call, prompt: Prompt, rule: TokenRule) -> tuple[State, State]:
        """As :meth:`first_call`, of the tokens that the rule selects. Channels are scored on these."""
        length, n_new = self._length(call, prompt), call.q.shape[2]
        shown = seen(call, prompt.start, length)
        capacity, fixed = prompt.capacity, prompt.capacity is not None
        rows = selected(rule, shown._replace(written=n_new) if fixed else shown)
        kept = shown.only(rows.clamp(min=0, max=call.k.shape[2] - 1))  # checked when the call is over
        count, extra = rows.shape[2], {POSITIONS: rows.to(torch.int32)}
        stored: Length = count
        if capacity is not None:
            prompt = prompt._replace(capacity=capacity - n_new + count)
            stored = torch.full((), count, device=rows.device)
            extra[EVICTED] = (length - stored)[None]
        sides = ((self.keys, kept.k), (self.values, kept.v))
        keys, values = (_packed(side, x, side.choose(kept) | extra, stored, prompt) for side, x in sides)
        return keys, values

    def check(self, parts: State, tokens: int) -> None:
        """Raise if the rule has selected what is not among the ``tokens`` of a first call, or of a fixed cache."""
        if self.tokens is not None:
            written = int(parts[EVICTED]) + parts[POSITIONS].shape[2] if EVICTED in parts else tokens
            check(self.tokens, parts[POSITIONS], written)

    def keep(self, of: str, new: Tensor, rows: Tensor, mask: Tensor | None, prompt: Prompt) -> State:
        """The stored form of one tensor [B, H, S, W] that is decoded on read; ``new`` [B, H, N, W] are the last rows.

        ``mask`` tells padding, as in a first call. No query scores the channels.
        """
        length = self._length(Call(new, rows, rows), prompt)
        chosen = self.side(of).choose(seen(Call(new, rows, rows, mask), prompt.start, length))
        if prompt.capacity is not None and not isinstance(length, Tensor):
            length = torch.full((), length, device=rows.device)
        return _packed(self.side(of), rows, chosen, length, prompt)

    @staticmethod
    def _length(call: Call, prompt: Prompt) -> Length:
        return call.k.shape[2] if prompt.start is None else prompt.start + call.q.shape[2]

    # ------------------------------------------------------------------------------------------- later calls

    def step(self, call: Call, keys: Stored, values: Stored, span: Span) -> tuple[Tensor, tuple[State, State]]:
        """:meth:`attend`, then :meth:`append`."""
        call, span = evicted.in_rows(call, keys, span, self.keys)
        kernels = self._kernels()
        if kernels is not None and kernels.step_fits(call, keys, values, span):
            side, stored = (self.keys, keys) if self.keys.has_ring else (self.values, values)
            return kernels.step(call, keys, values, span, side.windows(stored.state)), ({}, {})
        out = self._attend(call, keys, values, span)
        return out, self._append(call, keys, values, span)

    def attend(self, call: Call, keys: Stored, values: Stored, span: Span) -> Tensor:
        """Attention of the new tokens to past and new ones, [B, Hq, N, Dv] in q's dtype.

        Uses the Triton kernel if one fits. Otherwise, calls of up to :data:`.attention.MAX_NARROW_QUERIES` tokens
        multiply with the stored rows. Longer calls are bound by arithmetic, and use stock attention over decoded rows.
        """
        call, span = evicted.in_rows(call, keys, span, self.keys)
        return self._attend(call, keys, values, span)

    def _attend(self, call: Call, keys: Stored, values: Stored, span: Span) -> Tensor:
        kernels = self._kernels()
        if kernels is not None and kernels.attend_fits(call, keys, values, span):
            return kernels.attend(call, keys, values, span)
        way = attention.narrow if call.q.shape[2] <= attention.MAX_NARROW_QUERIES else attention.decoded
        return way(call, keys, values, span, (self.keys, self.values))

    def append(self, call: Call, keys: Stored, values: Stored | None, span: Span) -> tuple[State, State]:
        """Store the call's own rows; ``values`` is None if :meth:`join` has stored them.

        Returns the tensors that replace older ones; none for caches of fixed size.
        """
        call, span = evicted.in_rows(call, keys, span, self.keys)
        return self._append(call, keys, values, span)

    def _append(self, call: Call, keys: Stored, values: Stored | None, span: Span) -> tuple[State, State]:
        kernels = self._kernels()
        if kernels is not None and kernels.append_fits(call, keys, span):
            kernels.append(call, keys, span, self.keys.windows(keys.state))
            return {}, {} if values is None else self.values.append(call.v, {}, values, span)
        fresh: tuple[State, State] = ({}, {})
        if isinstance(span.start, Tensor) and not span.rolling and not self.evicts:
            shown = seen_again(call, span.start, span.columns)
            fresh = self.keys.choose(shown), self.values.choose(shown)
        left = self.keys.append(call.k, fresh[0], keys, span)
        return left, {} if values is None else self.values.append(call.v, fresh[1], values, span)

    def join(self, of: str, new: Tensor, stored: Stored, span: Span) -> tuple[Tensor, State]:
        """Append the call's keys or values; returns past and new rows by position, [B, H, columns, W], and new tensors.

        For attention written out as separate operations, and for caches decoded on read.
        """
        side = self.side(of)
        if side.has_ring or span.rolling:
            joined = attention.in_order(side, stored, new, span)
            return joined, side.append(new, {}, stored, span)
        left = side.append(new, {}, stored, span)
        rows = side.decoded(stored.state).to(new.dtype)
        return rows[:, :, span.oldest : span.oldest + span.columns], left

    def logits(self, q: Tensor, k: Tensor, keys: Stored, span: Span) -> Tensor:
        """Unscaled Q K^T of a later call, in order of position: [B, Hq, N, columns], fp32 or wider."""
        return attention.logits_in_order(self.keys, q, k, keys, span)

    def _kernels(self) -> PairKernels | None:
        """The Triton kernels of this pair of codecs, or None."""
        return attention.kernels_for(self.keys, self.values)


def _packed(side: Side, rows: Tensor, chosen: State, length: Length, prompt: Prompt) -> State:
    """The stored form of rows [B, H, S, W] of a first call."""
    capacity = side.capacity_for(rows.shape[2]) if prompt.capacity is None else prompt.capacity
    return side.pack(rows, chosen, length, capacity, fixed=prompt.capacity is not None)


def _without_first(chosen: State, tokens: int) -> State:
    """The choice for rows without the first ``tokens``."""
    if BEGIN not in chosen:
        return chosen
    return chosen | {BEGIN: (chosen[BEGIN] - tokens).clamp(min=0)}


def _last(x: Tensor, tokens: int) -> Tensor:
    return x[:, :, -tokens:]
