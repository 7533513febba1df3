"""The Triton kernels that store a step's token in a fixed cache, against the ATen operations that they stand for."""

import math

import pytest
import torch
from oracle import assert_close_to

from think_compile.cache.state import Call, Span, Stored
from think_compile.formats.base import CacheFormat, Side
from think_compile.formats.think import CHANNEL, Channels
from think_compile.formats.whole import Whole
from think_compile.kernels.calls import PAIRS
from think_compile.kernels.launch import Launch

pytest.importorskip("triton", reason="the kernels need it")
KERNELS = PAIRS["channels", "whole"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAPACITY, WINDOW = 50, 5


def format_of(keep, d, window=WINDOW, encodes_later=True, dv=32):
    return CacheFormat(Side(Channels(keep, 8), d, window, encodes_later), Side(Whole(), dv))


def drawn(batch, query_heads, heads, d, keep, ring_rows, dtype=torch.float32):
    """A call without values, and its keys as stored in a cache of fixed size."""
    channels = torch.rand(batch, heads, d).topk(keep).indices.sort().values.to(CHANNEL)
    rows, ring = torch.randn(batch, heads, CAPACITY, keep), torch.randn(batch, heads, ring_rows, d)
    q, k = torch.randn(batch, query_heads, 1, d), torch.randn(batch, heads, 1, d)
    state = {"rows": rows.to(dtype), "channels": channels, "ring": ring.to(dtype)}
    return Call(q.to(dtype), k.to(dtype), None), state | {"counters": torch.tensor([17, 20, 0])}


def copied(state, device="cpu"):
    return {name: x.clone().to(device) for name, x in state.items()}


def stored(state):
    return Stored(state, state["counters"][0] if "counters" in state else None)


def on(device, call):
    return Call(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in call))


def span_of(start, device="cpu", columns=CAPACITY):
    return Span(torch.tensor(start, device=device), 0, columns)


def both(call, state, start, form):
    """The stored tensors after the call, by the kernel and by ATen."""
    by_kernel, by_aten = copied(state, DEVICE), copied(state)
    windows = form.keys.windows(state)
    KERNELS.append(on(DEVICE, call), stored(by_kernel), span_of(start, DEVICE), windows)
    form.append(call, stored(by_aten), None, span_of(start))
    return copied(by_kernel, "cpu"), by_aten


def assert_same(by_kernel, by_aten):
    assert by_kernel.keys() == by_aten.keys()
    for name in by_kernel:
        assert by_kernel[name].dtype == by_aten[name].dtype
        assert torch.equal(by_kernel[name], by_aten[name]), name


@pytest.mark.parametrize("start", [0, 1, 20, 40, CAPACITY - 1])
@pytest.mark.parametrize("prune_generated", [True, False])
@pytest.mark.parametrize(
    ("batch", "query_heads", "heads", "d", "keep"),
    [(2, 4, 2, 32, 16), (1, 7, 1, 80, 50), (3, 2, 2, 16, 16), (1, 9, 3, 96, 1)],
)
def test_like_the_operations_in_aten(batch, query_heads, heads, d, keep, prune_generated, start):
    form = format_of(keep, d, encodes_later=prune_generated)
    assert_same(*both(*drawn(batch, query_heads, heads, d, keep, form.keys.ring_rows(30)), start, form))


@pytest.mark.parametrize("window", [0, 1])
def test_small_windows_in_half_precision(window):
    form = format_of(16, 32, window)
    assert_same(*both(*drawn(1, 2, 2, 32, 16, window + 1, torch.float16), 33, form))


def test_ties_and_what_is_no_number():
    form = format_of(4, 16)
    call, state = drawn(1, 1, 1, 16, 4, WINDOW + 1)
    call.q.fill_(1), call.k.fill_(1)
    call.k[..., 9], call.q[..., 12] = math.nan, math.inf
    by_kernel, by_aten = both(call, state, 0, form)
    assert by_kernel["channels"].flatten().tolist() == [0, 1, 9, 12]
    assert_same(*({name: x.nan_to_num(7) for name, x in side.items()} for side in (by_kernel, by_aten)))


@pytest.mark.parametrize("start", [CAPACITY, CAPACITY + 3])
def test_nothing_is_written_beyond_the_end(start):
    call, state = drawn(2, 2, 2, 32, 16, WINDOW + 1)
    given = copied(state, DEVICE)
    KERNELS.append(on(DEVICE, call), stored(given), span_of(start, DEVICE), (WINDOW, WINDOW))
    assert_same(copied(given, "cpu"), state)


@pytest.mark.host
@pytest.mark.parametrize("length", [1, 2])
def test_aten_refuses_to_write_beyond_the_end(length):
    """An index out of range ends a process on a GPU."""
    form = format_of(16, 32)
    (q, k, _, *_), state = drawn(2, 2, 2, 32, 16, WINDOW + 1)
    values, span = {"rows": torch.randn(2, 2, CAPACITY, 32)}, span_of(CAPACITY)
    call = Call(*(x.expand(-1, -1, length, -1) for x in (q, k, torch.randn(2, 2, 1, 32))))
    before = copied(state), copied(values)
    with pytest.raises(IndexError, match="out of"):
        form.append(call, stored(state), None, span)
    with pytest.raises(IndexError, match="out of"):
        form.step(call, stored(state), Stored(values), span)
    assert_same(state, before[0])
    assert_same(values, before[1])


STEPS = {
    "grouped": ((2, 4, 2, 32, 16), 32, torch.float32),
    "odd": ((1, 7, 1, 80, 50), 48, torch.float32),
    "many heads": ((3, 2, 2, 16, 16), 16, torch.float32),
    "half": ((2, 6, 2, 32, 16), 20, torch.float16),
}


def in_double(x):
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("start", [0, 3, CAPACITY - 1])
@pytest.mark.parametrize(("sizes", "dv", "dtype"), STEPS.values(), ids=STEPS)
def test_a_step_attends_and_then_stores_its_token(sizes, dv, dtype, start, mask):
    batch, query_heads, heads, d, keep = sizes
    form = format_of(keep, d, dv=dv)
    call, state = drawn(*sizes, WINDOW + 1, dtype)
    state["counters"][:2] = torch.tensor([max(start, 20) - 3, max(start, 20)])  # a step may begin at an earlier token
    v, values = torch.randn(batch, heads, 1, dv).to(dtype), torch.randn(batch, heads, CAPACITY, dv).to(dtype)
    shown = (torch.arange(CAPACITY) <= start) & (torch.rand(batch, 1, 1, CAPACITY) < 0.7)
    shown[..., start] = True
    bias = torch.randn(batch, query_heads, 1, CAPACITY).masked_fill(~shown, torch.finfo(dtype).min).to(dtype)
    call = call._replace(v=v, mask={"none": None, "bool": shown, "float": bias}[mask])
    span = span_of(start, columns=start + 1 if mask == "none" else CAPACITY)

    def by_aten(change):
        own = {name: change(x.clone()) for name, x in state.items()}, {"rows": change(values.clone())}
        given = Call(*(change(x) if isinstance(x, torch.Tensor) else x for x in call))
        out, _ = form.step(given, stored(own[0]), Stored(own[1]), span)
        return out, own

    (same, expected), (exact, _) = by_aten(lambda x: x), by_aten(in_double)
    values[:, :, start] = torch.nan  # the attention reads the token's own value from the call
    own = copied(state, DEVICE), {"rows": values.to(DEVICE)}
    given = on(DEVICE, call)
    at = span._replace(start=span.start.to(DEVICE))
    launch = Launch(16, 16, 4, 1, 3)
    out = KERNELS.step(given, stored(own[0]), Stored(own[1]), at, (WINDOW, WINDOW), launch)
    assert_close_to(same, out.cpu(), exact)
    for mine, wanted in zip(own, expected, strict=True):
        assert_same(copied(mine, "cpu"), wanted)


@pytest.mark.parametrize("start", [CAPACITY, CAPACITY + 3])
def test_a_step_beyond_the_end_changes_nothing(start):
    call, state = drawn(2, 2, 2, 32, 16, WINDOW + 1)
    call, values = call._replace(v=torch.randn(2, 2, 1, 32)), {"rows": torch.randn(2, 2, CAPACITY, 32)}
    own = copied(state, DEVICE), copied(values, DEVICE)
    KERNELS.step(on(DEVICE, call), stored(own[0]), Stored(own[1]), span_of(start, DEVICE), (WINDOW, WINDOW))
    assert_same(copied(own[0], "cpu"), state)
    assert_same(copied(own[1], "cpu"), values)
