"""One layer's attention of a decode step: the Triton kernel and the dense backends, microseconds and bandwidth."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.measure import captured_ms, copies_for, read_bandwidth
from benchmarks.tune import KERNELS, RECENT, Shape, arguments
from think_compile.formats.attention import narrow
from think_compile.formats.base import Side
from think_compile.formats.think import Channels
from think_compile.formats.whole import Whole

SHAPES = (
    Shape(16, 32768),
    Shape(1, 32768),
    Shape(8, 32768),
    Shape(1, 131072),
    Shape(1, 32768, mask="bool"),
    Shape(8, 8192, kept=80),
    Shape(8, 8192, kept=80, mask="float"),
    Shape(8, 8192, query_heads=28, heads=4, d=256, kept=128, dv=256, mask="float"),
    *(Shape(b, s, kept=kept) for b, s in ((8, 8192), (1, 1024), (8, 1024)) for kept in (128, 64)),  # ratio 0, ratio 0.5
)


def check(shape: Shape) -> None:
    """Raise if the kernel's error against fp64 is more than a few times that of the reference in the same dtype."""
    given = arguments(replace(shape, batch=1, tokens=3000))
    sides = Side(Channels(shape.kept, 32), shape.d, RECENT), Side(Whole(), shape.dv)
    got, same = KERNELS.attend(*given), narrow(*given, sides)
    call, keys, values, span = _double(given)
    exact = narrow(call, keys, values, span, sides)
    error, natural = ((x.double() - exact).abs().max().item() for x in (got, same))
    if not error <= 4 * natural + 1e-3:
        raise RuntimeError(f"{shape}: the kernel is off by {error:.1e}, the reference by {natural:.1e}: not timed")


def _double(x: Any) -> Any:
    """The tensors in ``x`` that are floating-point, in fp64."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, x)


def pruned_us(shape: Shape) -> float:
    """Microseconds of the kernel."""
    inputs = [arguments(shape) for _ in range(copies_for(shape.n_bytes))]
    return captured_ms([functools.partial(KERNELS.attend, *given) for given in inputs]) * 1e3


Attention = Callable[[Any, Any, Any], Any]


def _stock(backend: SDPBackend) -> Attention:
    def attention(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return attention


@functools.cache
def _flex() -> Attention:
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: Any, k: Any, v: Any) -> Any:
        return compiled(q, k, v, block_mask=_all_blocks(q.shape[2], k.shape[2], q.device.type), enable_gqa=True)

    return attention


@functools.cache
def _all_blocks(queries: int, tokens: int, device: str) -> BlockMask:
    """A mask that hides nothing. Without one, all keys are a single block, which programs cannot share."""
    return create_block_mask(lambda b, h, q, kv: kv >= 0, None, None, queries, tokens, device)


DENSE: dict[str, Callable[[], Attention]] = {
    "flash": lambda: _stock(SDPBackend.FLASH_ATTENTION),
    "cudnn": lambda: _stock(SDPBackend.CUDNN_ATTENTION),
    "flex": _flex,
}


def dense_us(shape: Shape) -> dict[str, float]:
    """Microseconds of each dense attention over whole keys, without the shapes' masks."""

    def make(tokens: int, width: int) -> Any:
        return torch.randn(shape.batch, shape.heads, tokens, width, device="cuda", dtype=shape.dtype)

    q = torch.randn(shape.batch, shape.query_heads, shape.queries, shape.d, device="cuda", dtype=shape.dtype)
    caches = [(make(shape.tokens, shape.d), make(shape.tokens, shape.dv)) for _ in range(copies_for(shape.dense_bytes))]
    found = {}
    for name, attention in DENSE.items():
        try:
            calls = [functools.partial(attention(), q, k, v) for k, v in caches]
            found[name] = round(captured_ms(calls) * 1e3, 1)
        except RuntimeError as error:
            warnings.warn(f"{shape}: {name} cannot: {error}", stacklevel=2)
    return found


def run(shapes: tuple[Shape, ...] = SHAPES) -> Iterator[dict[str, Any]]:
    """A row for each shape."""
    bandwidth = read_bandwidth()
    for shape in shapes:
        check(shape)
        torch._dynamo.reset()  # flex_attention compiles once per shape, and Dynamo's limit counts these compilations
        dense, us = dense_us(shape), pruned_us(shape)
        row = {name: value for name, value in vars(shape).items() if name != "dtype"}
        row |= {"us": round(us, 1), "dense_us": dense, "of_best_dense": round(us / min(dense.values()), 3)}
        row |= {
            "tb_per_s": round(shape.n_bytes / us / 1e6, 2),
            "of_read_bandwidth": round(shape.n_bytes / us / 1e-6 / bandwidth, 3),
        }
        yield row
