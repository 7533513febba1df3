"""The calls that the Triton kernels of a pair of codecs accept, and the launch on stored sides."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._triton import has_triton

from think_compile.cache.state import COUNTERS, Call, Length, Span, Stored
from think_compile.formats.sinks import BEGIN, SINKS
from think_compile.formats.think import narrow_rows
from think_compile.kernels.codecs import CODED_PARTS, PRUNED_PARTS
from think_compile.kernels.launch import LEAST, LONG, Launch, device_of, launch_for, launch_for_codes

log = logging.getLogger(__name__)

MAX_QUERIES = 64
MAX_WIDTH = 256


@dataclass(frozen=True)
class PairKernels:
    """The kernels for keys and values of two codecs.

    Attributes:
        keys, values: names of the codecs.
        key_parts, value_parts: names of the stored tensors, in the kernels' order.
        codecs: the codecs themselves, if their constants depend on more than the tensors' sizes.
        sinks: number of first tokens that stay whole.
        one_window: whether both sides have one window, or only one side has any.
        by_side: whether the kernel that ends a step stores each side by itself, also without codes.
    """

    keys: str
    values: str
    key_parts: tuple[str, ...]
    value_parts: tuple[str, ...]
    codecs: tuple[Any, Any] = (None, None)
    sinks: int = 0
    one_window: bool = True
    by_side: bool = False

    @property
    def has_codes(self) -> bool:
        """Whether a side is stored in integer codes."""
        return self.codecs != (None, None)

    @property
    def _ends_by_side(self) -> bool:
        return self.by_side or self.has_codes

    @property
    def _records(self) -> int:
        """Tokens of a record."""
        return max((codec.group for codec in self.codecs if codec is not None), default=1)

    @property
    def _tile(self) -> int:
        """Tokens in codes that a program reads at once."""
        from think_compile.kernels.codes import LEAST_TILE

        return max(self._records, LEAST_TILE)

    def _tile_bytes(self, keys: Stored, values: Stored) -> int:
        """Bytes of the keys and values of a tile."""
        both = zip((keys, values), (self.key_parts, self.value_parts), self.codecs, strict=True)
        return sum(
            _bytes_of(side.state[name], self._tile // (1 if codec is None else self._records))
            for side, names, codec in both
            for name in names
            if name != "channels"
        )

    def attend_fits(self, call: Call, keys: Stored, values: Stored, span: Span) -> bool:
        """Whether a call runs on the decode kernel; a refusal is logged once for each reason and shape."""
        if not call.q.is_cuda or call.q.shape[2] > MAX_QUERIES:
            return False
        why = self._obstacle(call, keys, values, span)
        if why:
            _tell_once(f"{why} (queries {list(call.q.shape)}, values {list(call.v.shape)}, {call.q.dtype})")
        return not why

    def _obstacle(self, call: Call, keys: Stored, values: Stored, span: Span) -> str:
        q, mask = call.q, call.mask
        parts = (*keys.state.items(), *values.state.items())
        stored = [x for name, x in parts if x.is_floating_point() and name not in ("ranges", "row_scales")]
        if not has_triton():
            return "Triton is not there"
        narrow = self.has_codes or any(x.dtype == torch.int8 for _, x in parts)
        if q.dtype not in (torch.float16, torch.bfloat16, *(() if narrow else (torch.float32,))):
            return "it computes in 16 bits" if narrow else "it computes in 16 or 32 bits"
        if self.has_codes and (why := self._obstacle_of_codes(span)):
            return why
        if not self.one_window or not _is_one(keys.window_start, values.window_start):
            return "keys and values have different windows"
        if any(x.dtype != q.dtype for x in (call.k, *stored)):
            return "keys, values and queries differ in their types"
        if max(q.shape[3], call.v.shape[3]) > MAX_WIDTH:
            return f"it takes {MAX_WIDTH} channels"
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            return "the mask is neither bool nor floating-point"
        return "the scale is a tensor" if isinstance(call.scale, Tensor) else ""

    def _obstacle_of_codes(self, span: Span) -> str:
        from think_compile.kernels.codes import fits

        why = next((why for codec in self.codecs if codec is not None and (why := fits(codec))), "")
        return why or ("codes have no rolling buffer" if span.rolling else "")

    def _parts(self, keys: Stored, values: Stored, q: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The encoded tensors that the attention reads."""
        ours = [keys.state[name].contiguous() for name in self.key_parts if name in keys.state]
        if q is not None and self.codecs[0] is not None:  # the queries, in the order of the plan
            grouped = q.unflatten(1, (ours[0].shape[1], -1)).flatten(2, 3)
            if "channels" in keys.state:
                grouped = narrow_rows(grouped, ours.pop()[..., : self.codecs[0].kept])
            ours.append(grouped.contiguous())
        return ours, [values.state[name] for name in self.value_parts if name in values.state]

    def _whole(self, keys: Stored, values: Stored) -> list[Tensor | None]:
        """The keys' ring and sinks, the values', and the first token of each sequence; None: there is none."""
        k, v = keys.state, values.state
        first = k.get(BEGIN, v.get(BEGIN)) if self.sinks else None
        return [k.get("ring"), k.get(SINKS), v.get("ring"), v.get(SINKS), first]

    def _parts_of_record(self, call: Call) -> int:
        """2 if the queries fill only half of a tile's rows; its other rows are then the other half of a record."""
        mask = _four_axes(call.mask)
        shared = mask is None or (mask.shape[1] in (1, call.k.shape[1]) and statically_known_true(mask.shape[2] == 1))
        few = statically_known_true(call.q.shape[1] // call.k.shape[1] * call.q.shape[2] <= 4)
        return 2 if None not in self.codecs and self._records == 128 and shared and not call.causal and few else 1

    def _sizes(self, call: Call, parts: tuple[list[Tensor], list[Tensor]]) -> list[int]:
        from think_compile.kernels.pair import CODECS

        asm, widths = call.q.is_cuda and torch.version.hip is None, (call.q.shape[3], call.v.shape[3])
        parts_of_record = self._parts_of_record(call)
        found = [self.sinks, self._records, parts_of_record]
        for name, codec, part, width in zip((self.keys, self.values), self.codecs, parts, widths, strict=True):
            found += CODECS[name].sizes(codec, part[0], width, asm, parts_of_record)
        return found

    def attend(self, call: Call, keys: Stored, values: Stored, span: Span, launch: Launch | None = None) -> Tensor:
        """:func:`think_compile.formats.attention.narrow` by the kernel, [B, Hq, N, Dv] in q's dtype.

        The start and the window's start are both numbers or both 0-d int64 tensors; a window that begins above the
        start counts as empty.
        """
        from think_compile.kernels.pair import attend_operation

        window_start = values.window_start if keys.window_start is None else keys.window_start
        assert window_start is not None
        lengths, at = _lengths(window_start, span.start)
        numbers = [*lengths, *_bounds(call, span), int(span.rolling), int(call.causal)]
        launch = launch or self.launch(call, keys, values, span)
        past, own, mask = self._parts(keys, values, call.q), _own(call), _four_axes(call.mask)
        operation, sizes = attend_operation(self.keys, self.values), self._sizes(call, past)
        whole = self._whole(keys, values)
        result: Tensor = operation(own, *past, whole, mask, at, numbers, sizes, scale_of(call), list(launch))
        return result

    def append_fits(self, call: Call, keys: Stored, span: Span) -> bool:
        """Whether Triton stores a call's keys: of a single token on a GPU, in a cache of fixed size, not rolling.

        Codes and sinks are stored by PyTorch operations.
        """
        if self._ends_by_side or self.sinks:
            return False
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
        if self._ends_by_side:
            stores = self._coded_fits(call, keys, values, span)
        else:
            stores = self.append_fits(call, keys, span)
        return stores and self.attend_fits(call, keys, values, span)

    def _coded_fits(self, call: Call, keys: Stored, values: Stored, span: Span) -> bool:
        fixed = all(COUNTERS in side.state for side in (keys, values) if "ring" in side.state)
        one_token = call.q.is_cuda and call.k.shape[2] == 1 and has_triton()
        return one_token and fixed and not span.rolling

    def _coded_step(
        self, call: Call, keys: Stored, values: Stored, span: Span, windows: tuple[int, int], launch: Launch
    ) -> Tensor:
        from think_compile.kernels.pair import coded_step_operation

        past, own = self._parts(keys, values, call.q), _own(call)
        own += past[0][2:]  # the ordered queries, if the keys are codes
        sides = ((keys, self.key_parts), (values, self.value_parts))
        counts = [sum(name in side.state for name in names) for side, names in sides]
        sizes, numbers = self._sizes(call, past), [_bounds(call, span)[1], int(call.causal), *windows, *counts]
        stored = [_coded_tensors(side, names) for side, names in sides]
        operation, mask = coded_step_operation(self.keys, self.values), _four_axes(call.mask)
        result: Tensor = operation(own, *stored, mask, span.start, numbers, sizes, scale_of(call), list(launch))
        return result

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
        if self._ends_by_side:
            return self._coded_step(call, keys, values, span, windows, launch)
        written = [values.state[name] for name in self.value_parts]
        numbers = [_bounds(call, span)[1], int(call.causal), *windows]
        own, mask = _own(call), _four_axes(call.mask)
        operation, sizes = step_operation(self.keys, self.values), self._sizes(call, self._parts(keys, values))
        past = self._written(keys), written
        result: Tensor = operation(own, *past, mask, span.start, numbers, sizes, scale_of(call), list(launch))
        return result

    def launch(self, call: Call, keys: Stored, values: Stored, span: Span) -> Launch:
        """The launch for a call; for symbolic sizes, from their values when the graph is made."""
        from think_compile.kernels.shares import hint

        d, dv = call.q.shape[3], call.v.shape[3]
        (batch, query_heads, queries, _), heads = (hint(size) for size in call.q.shape), hint(call.k.shape[1])
        extent = _bounds(call, span)[1]
        least = LEAST if isinstance(span.start, Tensor) else LONG
        tokens = extent if isinstance(extent, int) else max(least, hint(extent))
        rows, device = query_heads // heads * queries, device_of(call.q.device)
        if self.has_codes:
            ring = max(hint(side.state["ring"].shape[2]) for side in (keys, values) if "ring" in side.state)
            sizes = tokens, ring + queries, self._tile
            return launch_for_codes(rows, batch * heads, sizes, self._tile_bytes(keys, values), device)
        both = ((keys, self.key_parts), (values, self.value_parts))
        of_rows = [side.state[name] for side, names in both for name in names if name in side.state]
        narrow = sum(_bytes_of(x, 1) for x in of_rows if x.dim() > 3)
        whole = (d + dv) * call.q.dtype.itemsize
        return launch_for(f"{self.keys}+{self.values}", (rows, narrow, whole, batch * heads), tokens, device)


def _bytes_of(part: Tensor, times: int) -> int:
    return times * math.prod(part.shape[3:]) * part.dtype.itemsize


def _coded_tensors(side: Stored, parts: tuple[str, ...]) -> list[Tensor]:
    """A side's tensors, as :class:`.pair.Coded` has them."""
    names = *parts, "ring", SINKS, BEGIN, COUNTERS
    return [side.state[name] for name in names if name in side.state]


def _is_one(begin: Length | None, other: Length | None) -> bool:
    """Whether the windows of two sides begin at the same position; on the device, sides of one rule do."""
    if begin is None or other is None or isinstance(begin, Tensor):
        return True
    return statically_known_true(begin == other)


def scale_of(call: Call) -> float:
    """The scale of the logits, by default from the full channel count of the queries."""
    return 1 / math.sqrt(call.q.shape[-1]) if call.scale is None else call.scale


def _own(call: Call) -> list[Tensor]:
    return [call.q.contiguous(), call.k.contiguous(), call.v.to(call.q.dtype).contiguous()]


def _four_axes(mask: Tensor | None) -> Tensor | None:
    """A mask with four axes, of which those of :class:`Call` may be 1."""
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


PAIRS = {
    (pair.keys, pair.values): pair
    for pair in (
        PairKernels("channels", "whole", ("rows", "channels"), ("rows",)),
        PairKernels("channels", "value_bits", ("rows", "channels"), CODED_PARTS),
        PairKernels("key_bits", "value_bits", CODED_PARTS, CODED_PARTS),
        PairKernels("key_bits", "whole", CODED_PARTS, ("rows",)),
        PairKernels("whole", "value_bits", ("rows",), CODED_PARTS),
        PairKernels("mustafar", "mustafar", PRUNED_PARTS, PRUNED_PARTS, by_side=True),
        PairKernels("mustafar", "whole", PRUNED_PARTS, ("rows",), by_side=True),
        PairKernels("whole", "mustafar", ("rows",), PRUNED_PARTS, by_side=True),
        PairKernels("channels", "mustafar", ("rows", "channels"), PRUNED_PARTS, by_side=True),
    )
}


@functools.cache
def kernels_for(keys: Any, values: Any) -> PairKernels | None:
    """The kernels for two sides of a format, or None."""
    pair = PAIRS.get((keys.codec.name, values.codec.name))
    codecs = keys.codec if keys.flushes else None, values.codec if values.flushes else None
    if pair is None or (codecs == (None, None) and CODED_PARTS in (pair.key_parts, pair.value_parts)):
        return None  # the latter: rows of 16 bits in records
    sinks = {side.sinks for side in (keys, values) if side.has_ring}
    windows = {side.window_rule for side in (keys, values) if side.has_ring}
    return replace(pair, codecs=codecs, sinks=max(sinks), one_window=len(sinks) == len(windows) == 1)
