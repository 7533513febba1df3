"""How the kernels of later calls are called: as one operation of torch that Inductor traces through."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from think_compile.cache.state import Call, Length, Span, Stored
from think_compile.kernels.decode_kernel import attend_share, merge_shares
from think_compile.kernels.launch import LONG, Launch, device_of, launch_for

_LOG2E = 1.4426950408889634
WHOLE_SHARE = 128  # about as many positions with whole keys does a program take


def traced(kernel: Any) -> Any:
    """The kernel as Inductor sees it; what Triton's interpreter runs on a CPU is called as it is."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def device_of_launch(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of ``x``; in Inductor's code it always is."""
    elsewhere = x.is_cuda and x.device.index not in (None, torch.cuda.current_device())
    return torch.cuda.device(x.device) if elsewhere else nullcontext()


def four_axes(mask: Tensor | None) -> Tensor | None:
    """A mask as [B or 1, Hq or 1, N or 1, S]."""
    return None if mask is None else mask[(None,) * (4 - mask.dim())]


def _strides(mask: Tensor | None) -> tuple[int, ...]:
    """A mask's strides, 0 along the axes of size 1, which stand for all batches, heads, queries or keys."""
    if mask is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))


def _parts(width: int) -> tuple[int, int]:
    """Two powers of two, of 16 at least, that hold a row of ``width`` columns: 80 is 64 + 16."""
    most = max(16, 2 ** (width.bit_length() - 1))
    return most, max(16, 2 ** max(0, width - most - 1).bit_length())


def _on_device(length: Length) -> tuple[Tensor | None, int]:
    """A length as (where it lies, what it is): one of the two counts."""
    return (length, 0) if isinstance(length, Tensor) else (None, length)


def decode_attention(call: Call, keys: Stored, values: Stored, span: Span, launch: Launch | None = None) -> Tensor:
    """:func:`think_compile.formats.attention.narrow` by the kernel; [B, Hq, N, Dv] in q's dtype.

    The stored tensors are contiguous. The start and the window's start are both numbers or both 0-d int64 tensors; a
    window that begins above the start counts as empty.
    """
    assert keys.window_start is not None
    state, rows = keys.state, values.state["rows"]
    launch = launch or launch_of(call, keys, values, span)
    return _decode(
        call.q.contiguous(), call.k.contiguous(), call.v.to(rows.dtype).contiguous(),
        state["rows"], state["channels"].contiguous(), state["ring"], rows, four_axes(call.mask),
        *_on_device(keys.window_start), *_on_device(span.start), *bounds(call, span), span.rolling,
        scale_of(call), call.causal, list(launch),
    )  # fmt: skip


def scale_of(call: Call) -> float:
    """The scale of the logits."""
    return 1 / math.sqrt(call.q.shape[-1]) if call.scale is None else call.scale


def bounds(call: Call, span: Span) -> tuple[int, int]:
    """The lowest position that is read and the end of all; of a buffer in a circle how many of the past are read."""
    if span.rolling:
        return span.columns - call.q.shape[2], span.columns
    assert not isinstance(span.oldest, Tensor)
    return span.oldest, span.oldest + span.columns


def launch_of(call: Call, keys: Stored, values: Stored, span: Span) -> Launch:
    """The launch for a call; of sizes that vary, for those that a graph is made with."""
    kept, dv, extent = keys.state["rows"].shape[-1], values.state["rows"].shape[-1], bounds(call, span)[1]
    (batch, query_heads, queries, d), heads = (_hint(size) for size in call.q.shape), _hint(call.k.shape[1])
    tokens = extent if isinstance(extent, int) else max(LONG, _hint(extent))
    narrow, whole = ((width + dv) * call.q.dtype.itemsize for width in (kept, d))
    shape = query_heads // heads * queries, narrow, whole, batch * heads
    return launch_for(*shape, tokens, device_of(call.q.device))


def _hint(size: int | torch.SymInt) -> int:
    """A number that is typical of a size, with no guard on it."""
    return size if isinstance(size, int) else int(size.node.hint)


class Shares(NamedTuple):
    """What the first kernel leaves, fp32: the attention of each share, its largest logit and its sum, by row."""

    out: Tensor
    most: Tensor
    total: Tensor

    def sizes(self) -> dict[str, int]:
        """The merge's constants."""
        splits, dv = self.out.shape[1], self.out.shape[3]
        return {
            "DV": dv,
            "BLOCK_V": triton.next_power_of_2(dv),
            "SPLITS": splits,
            "BLOCK_S": triton.next_power_of_2(splits),
        }


def launch_shares(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    pruned: Tensor,
    channels: Tensor,
    recent: Tensor,
    values: Tensor,
    mask: Tensor | None,
    floor_at: Tensor | None,
    floor: int,
    start_at: Tensor | None,
    start: int,
    first: int,
    extent: int,
    rolling: bool,
    scale: float,
    is_causal: bool,
    how: Launch,
) -> Shares:
    """Attend in shares."""
    (batch, query_heads, queries, d), heads, width, dv = q.shape, k_new.shape[1], pruned.shape[-1], values.shape[-1]
    rows, all_heads = query_heads // heads * queries, batch * heads
    whole_splits = min(how.splits, -(-(_hint(recent.shape[2]) + _hint(queries)) // WHOLE_SHARE))
    splits = how.splits + whole_splits
    out = q.new_empty((all_heads, splits, rows, dv), dtype=torch.float32)
    most, total = (q.new_empty((all_heads, splits, rows), dtype=torch.float32) for _ in range(2))
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    strides = _strides(mask)
    traced(attend_share)[(all_heads, triton.cdiv(rows, how.block_m), splits)](
        q, k_new, v_new, pruned, channels, recent, values, mask, floor_at, start_at, out, most, total,
        floor, start, first, extent, scale * _LOG2E, queries, heads,
        pruned.shape[2], values.shape[2], recent.shape[2], how.splits, whole_splits, *strides,
        GROUP=query_heads // heads, D=d, D0=_parts(d)[0], D1=_parts(d)[1],
        T=width, T0=_parts(width)[0], T1=_parts(width)[1], DV=dv, DV0=_parts(dv)[0], DV1=_parts(dv)[1],
        ON_DEVICE=start_at is not None, ROLLING=rolling, KIND=kind, CAUSAL=is_causal,
        ALIKE=strides[1] == 0 and strides[2] == 0, HALF_MASK=mask is not None and mask.dtype == torch.float16,
        BLOCK_M=how.block_m, BLOCK_N=how.block_n, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return Shares(out, most, total)


@triton_op("think_compile::decode_attention", mutates_args={})
def _decode(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    pruned: Tensor,
    channels: Tensor,
    recent: Tensor,
    values: Tensor,
    mask: Tensor | None,
    floor_at: Tensor | None,
    floor: int,
    start_at: Tensor | None,
    start: int,
    first: int,
    extent: int,
    rolling: bool,
    scale: float,
    is_causal: bool,
    launch: list[int],
) -> Tensor:
    result = q.new_empty((*q.shape[:3], values.shape[-1]))
    with device_of_launch(q):
        shares = launch_shares(
            q, k_new, v_new, pruned, channels, recent, values, mask, floor_at, floor, start_at, start, first, extent,
            rolling, scale, is_causal, Launch(*launch),
        )  # fmt: skip
        all_heads, _, rows, _ = shares.out.shape
        traced(merge_shares)[(all_heads, rows)](*shares, result, rows, **shares.sizes())
    return result
