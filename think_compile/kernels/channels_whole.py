"""The Triton kernels for keys of chosen channels beside whole values: which calls they take, and how."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from think_compile.cache.state import COUNTERS, Call, Span, Stored

log = logging.getLogger(__name__)

MAX_QUERIES = 64
MAX_WIDTH = 256


def attend_fits(call: Call, keys: Stored, values: Stored, span: Span) -> bool:
    """Whether the decode kernel takes a call on a GPU; why it does not is logged, once for each shape."""
    if not call.q.is_cuda or call.q.shape[2] > MAX_QUERIES:
        return False
    why = _obstacle(call, keys, values)
    if why:
        _tell_once(f"{why} (queries {list(call.q.shape)}, values {list(call.v.shape)}, {call.q.dtype})")
    return not why


def attend(call: Call, keys: Stored, values: Stored, span: Span) -> Tensor:
    """[B, Hq, N, Dv] in q's dtype."""
    from think_compile.kernels.decode import decode_attention

    return decode_attention(call, keys, values, span)


def append_fits(call: Call, keys: Stored, span: Span) -> bool:
    """Whether Triton writes a call's keys into a cache of fixed size: those of a single token on a GPU."""
    one_token = call.q.is_cuda and call.k.shape[2] == 1 and has_triton() and call.q.dtype != torch.float64
    return one_token and COUNTERS in keys.state and not span.rolling


def append(call: Call, keys: Stored, span: Span, windows: tuple[int, int]) -> None:
    """Store the key of one token; ``windows`` as of :meth:`.formats.base.Side.windows`."""
    from think_compile.kernels.append import append_token

    append_token(call, keys, span, windows)


def step_fits(call: Call, keys: Stored, values: Stored, span: Span) -> bool:
    """Whether one kernel merges the attention's shares and stores the token."""
    return append_fits(call, keys, span) and attend_fits(call, keys, values, span)


def step(call: Call, keys: Stored, values: Stored, span: Span, windows: tuple[int, int]) -> Tensor:
    """Attend, then store key and value of one token; [B, Hq, 1, Dv]."""
    from think_compile.kernels.append import decode_step

    return decode_step(call, keys, values, span, windows)


def _obstacle(call: Call, keys: Stored, values: Stored) -> str:
    q, mask = call.q, call.mask
    stored = keys.state["rows"], keys.state["ring"], values.state["rows"]
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
    if isinstance(call.scale, Tensor):
        return "the scale is a tensor"
    return ""


@functools.cache
def _tell_once(text: str) -> None:
    log.warning("the decode kernel is not used, the reference is: %s", text)
