"""One layer's attention of a decode step on bit plans: the Triton kernel and the dense backends.

The caches come from first calls on random keys and values. Every plan is checked before it is timed: the error of the
kernel against the reference in fp64 is to be that of bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.kernel import dense_us
from benchmarks.measure import captured_ms, copies_for
from benchmarks.tune import Shape
from think_compile import ThinkConfig
from think_compile.cache.packed import Packed
from think_compile.cache.state import COUNTERS, Call, Prompt, Span, Stored
from think_compile.formats.attention import kernels_for, narrow
from think_compile.formats.base import CacheFormat

SHAPES = (Shape(8, 32768), Shape(32, 32768), Shape(1, 32768), Shape(1, 131072))
PLANS: tuple[tuple[Any, Any], ...] = (
    ({4: 0.5}, 4),
    (4, 4),
    ({8: 0.25, 4: 0.75}, 4),
    (8, 8),
    ({4: 0.5, 2: 0.5}, 4),
    (2, 2),
    ({16: 0.5}, 4),
    (4, None),
    *((f"mustafar:{numbers}", f"mustafar:{numbers}") for numbers in ("0.7", "0.7:8", "0.5", "0.5:8")),
)
SPARE = 64
DRAWN = 2  # sequences; larger batches repeat them
OBSERVED = 64


def stored(form: CacheFormat, shape: Shape) -> tuple[Stored, Stored]:
    """Both sides of a cache of fixed size with ``shape.tokens`` tokens."""
    batch, size = min(shape.batch, DRAWN), shape.tokens + SPARE
    k, v = (_drawn(batch, shape.heads, size, width, shape) for width in (shape.d, shape.dv))
    q = _drawn(batch, shape.query_heads, OBSERVED, shape.d, shape)
    with torch.no_grad():
        states = form.first_call(Call(q, k, v), Prompt(shape.tokens - OBSERVED, capacity=size))
    stores = []
    for of, state in zip(("keys", "values"), states, strict=True):
        parts = {
            name: (x if name == COUNTERS else x.repeat_interleave(shape.batch // batch, 0)).contiguous()
            for name, x in state.items()
        }
        stores.append(Packed.made(of, form.side(of), parts, shape.dtype, size, fixed=True).stored())
    return stores[0], stores[1]


def _drawn(batch: int, heads: int, tokens: int, width: int, shape: Shape) -> torch.Tensor:
    return torch.randn(batch, heads, tokens, width, device="cuda", dtype=shape.dtype)


def arguments(form: CacheFormat, shape: Shape) -> tuple[Call, Stored, Stored, Span]:
    """Fresh random arguments of the kernel, with a mask as caches of fixed size have it."""
    sizes = ((shape.query_heads, shape.d), (shape.heads, shape.d), (shape.heads, shape.dv))
    q, k, v = (_drawn(shape.batch, heads, shape.queries, width, shape) for heads, width in sizes)
    size, start = shape.tokens + SPARE, torch.tensor(shape.tokens, device="cuda")
    mask = (torch.arange(size, device="cuda") <= start)[None, None, None]
    return Call(q, k, v, mask), *stored(form, shape), Span(start, 0, size)


def check(form: CacheFormat, shape: Shape) -> float:
    """The kernel's error relative to fp64; raises if it is more than that of the reference in bf16 and a little."""
    call, keys, values, span = arguments(form, replace(shape, batch=1, tokens=4000))
    kernels = kernels_for(form.keys, form.values)
    assert kernels is not None
    got = kernels.attend(call, keys, values, span)
    sides = form.keys, form.values
    same = narrow(call, keys, values, span, sides)
    wide = call._replace(q=call.q.double(), k=call.k.double(), v=call.v.double())
    exact = narrow(wide, _double(keys), _double(values), span, sides)
    error, natural = (((x.double() - exact).norm() / exact.norm()).item() for x in (got, same))
    if not error <= 1.5 * natural:
        raise RuntimeError(f"{form.describe()}: the kernel is off by {error:.1e}, the reference by {natural:.1e}")
    return error


def _double(side: Stored) -> Stored:
    """The side with its rows in fp64; scales and zeros stay as they are stored."""
    kept = {torch.float16}
    state = {n: x.double() if x.is_floating_point() and x.dtype not in kept else x for n, x in side.state.items()}
    return side._replace(state=state)


def order_us(form: CacheFormat, call: Call, keys: Stored) -> float:
    """Microseconds to bring the queries into the order of the keys' plan; in a compiled step it is fused."""
    if not form.keys.flushes or "channels" not in keys.state:
        return 0.0
    order = keys.state["channels"][:, :, None, : form.keys.kept].long()
    grouped = call.q.unflatten(1, (order.shape[1], -1)).flatten(2, 3)
    return captured_ms([lambda: grouped.gather(3, order.expand(-1, -1, grouped.shape[2], -1))]) * 1e3


def run(shapes: Sequence[Shape] = SHAPES, plans: Sequence[tuple[Any, Any]] = PLANS) -> Iterator[dict[str, Any]]:
    """A row for each shape and plan."""
    for shape in shapes:
        dense = dense_us(shape)
        for keys, values in plans:
            form = ThinkConfig(keys=keys, values=values).format_for(shape.d, shape.dv)
            error, given = check(form, shape), arguments(form, shape)
            n_bytes = sum(x.nbytes for side in given[1:3] for x in side.state.values())
            inputs = [given, *(arguments(form, shape) for _ in range(copies_for(n_bytes) - 1))]
            kernels = kernels_for(form.keys, form.values)
            assert kernels is not None
            how = kernels.launch(*given)
            us = captured_ms([functools.partial(kernels.attend, *one, how) for one in inputs]) * 1e3
            yield {
                **{name: getattr(shape, name) for name in ("batch", "tokens", "query_heads", "heads", "d", "dv")},
                **{"keys": str(keys), "values": str(values), "us": round(us, 1), "dense_us": dense},
                **{
                    "of_best_dense": round(us / min(dense.values()), 3),
                    "of_dense_bytes": round(n_bytes / shape.dense_bytes, 3),
                },
                **{"of_it_order_us": round(order_us(form, given[0], given[1]), 1)},
                **{"launch": list(how), "error": round(error, 6)},
            }
