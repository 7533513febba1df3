"""The calls that the Triton kernels of a pair of codecs accept, and the launch on stored sides."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from think_compile.cache.state import COUNTERS, Call, Length, Span, Stored
from think_compile.kernels.launch import LONG, Launch, device_of, launch_for

log = logging.getLogger(__name__)

MAX_QUERIES = 64
MAX_WIDTH = 256


@dataclass(frozen=True)
class PairKernels:
    """The kernels for keys and values of two codecs, by name.

    Attributes:
        keys, values: names of the codecs.
        key_parts, value_parts: names of the stored tensors, in the kernels' order.
    """

    keys: str
    values: str
    key_parts: tuple[str, ...]
    value_parts: tuple[str, ...]

    def attend_fits(self, call: Call, keys: Stored, values: Stored, span: Span) -> bool:
        """Whether a call runs on the decode kernel; a refusal is logged once for each reason and shape."""
        if not call.q.is_cuda or call.q.shape[2] > MAX_QUERIES:
            return False
        why = self._obstacle(call, keys, values)
        if why:
            _tell_once(f"{why} (queries {list(call.q.shape)}, values {list(call.v.shape)}, {call.q.dtype})")
        return not why

    def _obstacle(self, call: Call, keys: Stored, values: Stored) -> str:
        q, mask = call.q, call.mask
        stored = [x for x in (*self._tensors(keys), *self._tensors(values)) if x.is_floating_point()]
        if not has_triton():
            return "Triton is not there"
        if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return "it computes in 16 or 32 bits"
        if any(x.dtype != q.dtype for x in (call.k, *stored)):
            return "keys, values and queries differ in their types"
        if max(q.shape[3], call.v.shape[3]) > MAX_WIDTH:
            return f"it takes {MAX_WIDTH} channels"
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            return "the mask is neither bool nor floating-point"
        return "the scale is a tensor" if isinstance(call.scale, Tensor) else ""

    def _tensors(self, stored: Stored) -> list[Tensor]:
        """The tensors of a side that the attention reads, the ring last."""
        state = stored.state
        if "ring" in state:
            return [state[name].contiguous() for name in self.key_parts] + [state["ring"]]
        return [state[name] for name in self.value_parts]

    def attend(self, call: Call, keys: Stored, values: Stored, span: Span, launch: Launch | None = None) -> Tensor:
        """:func:`think_compile.formats.attention.narrow` by the kernel, [B, Hq, N, Dv] in q's dtype.

        The start and the window's start are both numbers or both 0-d int64 tensors; a window that begins above the
        start counts as empty.
        """
        from think_compile.kernels.pair import attend_operation

        assert keys.window_start is not None
        lengths, at = _lengths(keys.window_start, span.start)
        numbers = [*lengths, *_bounds(call, span), int(span.rolling), int(call.causal)]
        launch = launch or self.launch(call, keys, values, span)
        past = self._tensors(keys), self._tensors(values)
        own, mask = _own(call, past[1][0].dtype), _four_axes(call.mask)
        operation = attend_operation(self.keys, self.values)
        result: Tensor = operation(own, *past, mask, at, numbers, scale_of(call), list(launch))
        return result

    def append_fits(self, call: Call, keys: Stored, span: Span) -> bool:
        """Whether Triton stores a call's keys: of a single token on a GPU, in a cache of fixed size, not rolling."""
        one_token = call.q.is_cuda and call.k.shape[2] == 1 and has_triton() and call.q.dtype != torch.float64
        return one_token and COUNTERS in keys.state and not span.rolling

    def append(self, call: Call, keys: Stored, span: Span, windows: tuple[int, int]) -> None:
        """Store the key [B, H, 1, D] of one token at the span's start (0-d, int64), and count it.

        At start 0 the codec first chooses again, from this token's q [B, Hq, 1, D] and key. ``windows``: how many
        tokens have whole keys after a first call and after a later one.
        """
        from think_compile.kernels.pair import append_operation

        q, k = call.q.contiguous(), call.k.contiguous()
        append_operation(self.keys, self.values)(q, k, self._written(keys), span.start, list(windows))

    def _written(self, keys: Stored) -> list[Tensor]:
        return [keys.state[name] for name in (*self.key_parts, "ring", COUNTERS)]

    def step_fits(self, call: Call, keys: Stored, values: Stored, span: Span) -> bool:
        """Whether one kernel merges the attention's shares and stores the token."""
        return self.append_fits(call, keys, span) and self.attend_fits(call, keys, values, span)

    def step(
        self,
        call: Call,
        keys: Stored,
        values: Stored,
        span: Span,
        windows: tuple[int, int],
        launch: Launch | None = None,
    ) -> Tensor:
        """:meth:`attend`, then :meth:`append` with the token's value [B, H, 1, Dv]; [B, Hq, 1, Dv]."""
        from think_compile.kernels.pair import step_operation

        launch = launch or self.launch(call, keys, values, span)
        written = [values.state[name] for name in self.value_parts]
        numbers = [_bounds(call, span)[1], int(call.causal), *windows]
        own, mask = _own(call, written[0].dtype), _four_axes(call.mask)
        operation = step_operation(self.keys, self.values)
        past = self._written(keys), written
        result: Tensor = operation(own, *past, mask, span.start, numbers, scale_of(call), list(launch))
        return result

    def launch(self, call: Call, keys: Stored, values: Stored, span: Span) -> Launch:
        """The launch for a call; for symbolic sizes, from their values when the graph is made."""
        from think_compile.kernels.shares import hint

        past = self._tensors(keys), self._tensors(values)
        encoded, (d, dv) = past[0][0].shape[-1], (call.q.shape[3], call.v.shape[3])
        (batch, query_heads, queries, _), heads = (hint(size) for size in call.q.shape), hint(call.k.shape[1])
        extent = _bounds(call, span)[1]
        tokens = extent if isinstance(extent, int) else max(LONG, hint(extent))
        narrow, whole = ((width + dv) * call.q.dtype.itemsize for width in (encoded, d))
        shape = query_heads // heads * queries, narrow, whole, batch * heads
        return launch_for(f"{self.keys}+{self.values}", shape, tokens, device_of(call.q.device))


def scale_of(call: Call) -> float:
    """The scale of the logits, by default from the full channel count of the queries."""
    return 1 / math.sqrt(call.q.shape[-1]) if call.scale is None else call.scale


def _own(call: Call, values_dtype: torch.dtype) -> list[Tensor]:
    return [call.q.contiguous(), call.k.contiguous(), call.v.to(values_dtype).contiguous()]


def _four_axes(mask: Tensor | None) -> Tensor | None:
    """A mask as [B or 1, Hq or 1, N or 1, S]."""
    return None if mask is None else mask[(None,) * (4 - mask.dim())]


def _lengths(*lengths: Length) -> tuple[list[int], list[Tensor]]:
    """(numbers, device tensors) of ``lengths``; a length on the device counts as 0 among the numbers."""
    at = [length for length in lengths if isinstance(length, Tensor)]
    return [0 if isinstance(length, Tensor) else length for length in lengths], at


def _bounds(call: Call, span: Span) -> tuple[int, int]:
    """(lowest position read, end of the positions); for a rolling buffer (past positions read, columns)."""
    if span.rolling:
        return span.columns - call.q.shape[2], span.columns
    assert not isinstance(span.oldest, Tensor)
    return span.oldest, span.oldest + span.columns


@functools.cache
def _tell_once(text: str) -> None:
    log.warning("the decode kernel is not used, the reference is: %s", text)


PAIRS = {("channels", "whole"): PairKernels("channels", "whole", ("rows", "channels"), ("rows",))}
