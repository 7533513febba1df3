"""The launch of the attention kernel: each program takes a share of the positions for some rows of one KV head."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from think_compile.kernels.codecs import DeviceCodec, parts_of
from think_compile.kernels.launch import WHOLE_TILE, Launch
from think_compile.kernels.merge import COLUMNS
from think_compile.kernels.whole import WHOLE

_LOG2E = 1.4426950408889634


class Kernels(NamedTuple):
    """The compiled kernels of a pair of codecs."""

    keys: DeviceCodec
    values: DeviceCodec
    attend_share: Any
    append_key: Any
    finish_step: Any


class Given(NamedTuple):
    """The arguments of the attention, flat as a torch operation takes them.

    Attributes:
        own: q [B, Hq, N, D], k [B, H, N, D] and v [B, H, N, Dv] of the call, contiguous.
        keys, values: the stored tensors in the codec's order; None for those that it does not store.
        whole: the rings and the sinks, or None: the keys' ring and sinks, the values', and the first token of each
            sequence.
        mask: [B or 1, Hq or 1, N or 1, columns], or None.
        at: the window's start and the call's start as device tensors, 0-d int64; empty: both are in ``numbers``.
        numbers: these two, the lowest position read, the end of the positions, whether the buffer is rolling, and
            whether the attention is causal. For a rolling buffer the third is the number of past positions read.
        sizes: number of sinks, tokens of a record, parts of a record in a tile, and the constants of the keys' and of
            the values' codec.
        scale: of the logits.
        launch: see :class:`.launch.Launch`.
        before: gets the window's start, 0-d int64: a later kernel changes the counters while its programs need it.
    """

    own: list[Tensor]
    keys: Sequence[Any]
    values: Sequence[Any]
    whole: list[Tensor | None]
    mask: Tensor | None
    at: list[Tensor]
    numbers: list[int]
    sizes: list[int]
    scale: float
    launch: list[int]
    before: Tensor | None = None


class Shares(NamedTuple):
    """The results of the first kernel, fp32, by row: each share's attention, largest logit and softmax sum."""

    out: Tensor
    most: Tensor
    total: Tensor

    @property
    def parts(self) -> int:
        """Programs of the merge kernel for each KV head."""
        return self.out.shape[2] * triton.cdiv(self.out.shape[3], COLUMNS)

    def sizes(self) -> dict[str, int]:
        """The constants of the merge kernel."""
        splits, dv = self.out.shape[1], self.out.shape[3]
        return {
            "DV": dv,
            "COLUMNS": COLUMNS,
            "SPLITS": splits,
            "BLOCK_S": triton.next_power_of_2(splits),
        }


def traced(kernel: Any) -> Any:
    """The kernel, wrapped for Inductor; kernels of Triton's interpreter (on a CPU) stay as they are."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def device_of_launch(x: Tensor) -> AbstractContextManager[Any]:
    """Make ``x``'s device current, since Triton launches there; in Inductor's code it already is."""
    elsewhere = x.is_cuda and x.device.index not in (None, torch.cuda.current_device())
    return torch.cuda.device(x.device) if elsewhere else nullcontext()


def hint(size: int | torch.SymInt) -> int:
    """A typical value of a size, without a guard on it."""
    return size if isinstance(size, int) else int(size.node.hint)


def _strides(mask: Tensor | None, heads: int, group: int) -> tuple[int, ...]:
    """A mask's strides: sequence, KV head, query head of a group, query, key; 0 along axes of size 1, which broadcast.

    ``mask``: see :class:`think_compile.cache.state.Call`.
    """
    if mask is None:
        return 0, 0, 0, 0, 0
    batch, head, *rest = (0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))
    if mask.shape[1] == heads:
        return batch, head, 0, *rest
    return batch, head * group, head, *rest


def launch_shares(kernels: Kernels, given: Given) -> Shares:
    """Launch the attention in shares."""
    (q, k, v), mask, how = given.own, given.mask, Launch(*given.launch)
    (batch, query_heads, queries, d), heads, dv = q.shape, k.shape[1], v.shape[3]
    rows, all_heads = query_heads // heads * queries, batch * heads
    sinks, records, parts, *sizes = given.sizes
    k_ring, k_sinks, v_ring, v_sinks, first_token = given.whole
    ring = v_ring if k_ring is None else k_ring
    assert ring is not None
    block_w = how.block_n if records == 1 else min(how.block_n, WHOLE_TILE)
    whole_splits = how.shares_of(hint(ring.shape[2]) + hint(queries))
    splits = parts * how.splits + whole_splits
    out = q.new_empty((all_heads, splits, rows, dv), dtype=torch.float32)
    most, total = (q.new_empty((all_heads, splits, rows), dtype=torch.float32) for _ in range(2))
    window_start_at, start_at = given.at or (None, None)
    *lengths, rolling, causal = given.numbers
    strides = _strides(mask, heads, query_heads // heads)
    traced(kernels.attend_share)[(all_heads, triton.cdiv(rows, how.block_m), how.splits + whole_splits)](
        q, k, v, *given.keys, k_ring, k_sinks, *given.values, v_ring, v_sinks, first_token,
        mask, window_start_at, start_at, given.before, out, most, total,
        *lengths, given.scale * _LOG2E, queries, heads,
        given.keys[0].shape[2], given.values[0].shape[2], _room(kernels, given, records), ring.shape[2],
        how.splits, whole_splits, *strides,
        **_constants(kernels, d, dv, sizes), SINKS=sinks, GROUP_N=records, PARTS=parts,
        GROUP=query_heads // heads, ON_DEVICE=start_at is not None, ROLLING=bool(rolling), CAUSAL=bool(causal),
        KIND=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        ALIKE=strides[2] == 0 and strides[3] == 0, HALF_MASK=mask is not None and mask.dtype == torch.float16,
        BLOCK_M=how.block_m, BLOCK_N=how.block_n, BLOCK_W=block_w, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return Shares(out, most, total)


def _room(kernels: Kernels, given: Given, group: int) -> int:
    """Positions that both sides have rows or records for."""
    sides = ((kernels.keys, given.keys[0]), (kernels.values, given.values[0]))
    rooms = [x.shape[2] * (group if codec.parts[0] == "codes" else 1) for codec, x in sides]
    return torch.sym_min(*rooms)


def _constants(kernels: Kernels, d: int, dv: int, sizes: list[int]) -> dict[str, int]:
    """The codecs' constants by name, and those of whole keys and values."""
    names = *WHOLE.constants("D"), *WHOLE.constants("DV")
    return dict(zip(names, (*parts_of(d), *parts_of(dv)), strict=True)) | code_constants(kernels, sizes)


def code_constants(kernels: Kernels, sizes: list[int]) -> dict[str, int]:
    """The codecs' constants by name."""
    return dict(zip((*kernels.keys.constants("K"), *kernels.values.constants("V")), sizes, strict=True))
