"""Which way a later call attends: the Triton kernel, the narrow products, or the stock attention on zero-filled keys.

All three compute :func:`.reference.pruned_attention`. The choice is made while a graph is made, of what is fixed in it.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from think_compile.kernels import reference as ref
from think_compile.kernels.reference import Length

log = logging.getLogger(__name__)

# Up to this many new tokens a call multiplies with the narrow keys; a longer one is bound by arithmetic, not by
# reading the cache, and attends to the zero-filled keys with the stock attention instead.
MAX_NARROW_QUERIES = 16
MAX_KERNEL_QUERIES = 64
MAX_KERNEL_CHANNELS = 256


def attend(
    q: Tensor,
    k_new: Tensor,
    packed: ref.Packed,
    values: Tensor,
    start: Length,
    floor: Length,
    extent: int,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    first: int = 0,
) -> Tensor:
    """Attention over pruned keys by whichever way suits, arguments as of :func:`.reference.pruned_attention`.

    A ``floor`` on the device may lie above ``start``, of a cache that is written from an earlier row again.
    """
    if q.is_cuda and q.shape[2] <= MAX_KERNEL_QUERIES and kernel_takes(q, k_new, packed, values, mask, scale):
        from think_compile.kernels.decode import decode_attention

        return decode_attention(q, k_new, *packed, values, start, floor, extent, mask, scale, is_causal, first)
    if isinstance(floor, Tensor):
        floor = torch.minimum(floor, torch.as_tensor(start, device=q.device))
    way = ref.pruned_attention if q.shape[2] <= MAX_NARROW_QUERIES else ref.dense_attention
    return way(q, k_new, packed, values, start, floor, extent, mask, scale, is_causal, first)


def kernel_takes(
    q: Tensor, k_new: Tensor, packed: ref.Packed, values: Tensor, mask: Tensor | None, scale: float | Tensor
) -> bool:
    """Whether the Triton kernel takes a call; that it does not is logged, once for each shape."""
    why = _obstacle(q, k_new, packed, values, mask, scale)
    if why:
        _tell_once(f"{why} (queries {list(q.shape)}, values {list(values.shape)}, {q.dtype})")
    return not why


def _obstacle(
    q: Tensor, k_new: Tensor, packed: ref.Packed, values: Tensor, mask: Tensor | None, scale: float | Tensor
) -> str:
    if not has_triton():
        return "Triton is not there"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return "it computes in 16 or 32 bits"
    if any(x.dtype != q.dtype for x in (k_new, packed.pruned, packed.recent, values)):
        return "keys, values and queries differ in their types"
    if max(q.shape[3], values.shape[3]) > MAX_KERNEL_CHANNELS:
        return f"it takes {MAX_KERNEL_CHANNELS} channels"
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        return "the mask is neither bool nor floating-point"
    if isinstance(scale, Tensor):
        return "the scale is a tensor"
    return ""


@functools.cache
def _tell_once(text: str) -> None:
    log.warning("the decode kernel is not used, the reference is: %s", text)
