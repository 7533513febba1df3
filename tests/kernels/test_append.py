"""The Triton kernels that store a step's token in a fixed cache, against the ATen operations that they stand for."""

import math

import pytest
import torch
from oracle import assert_close_to

from think_compile.kernels import steps

append = pytest.importorskip("think_compile.kernels.append", reason="needs triton", exc_type=ModuleNotFoundError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAPACITY, WINDOW = 50, 5


def drawn(batch, query_heads, heads, d, keep, ring_rows, dtype=torch.float32):
    """(q, k_new) and what a fixed cache stores but its values."""
    channels = torch.rand(batch, heads, d).topk(keep).indices.sort().values
    rows, ring = torch.randn(batch, heads, CAPACITY, keep), torch.randn(batch, heads, ring_rows, d)
    q, k = torch.randn(batch, query_heads, 1, d), torch.randn(batch, heads, 1, d)
    return (q.to(dtype), k.to(dtype)), (rows.to(dtype), channels, ring.to(dtype), torch.tensor([17, 20]))


def both(new, stored, start, spec):
    """What is stored afterwards, by the kernel and by ATen."""
    by_kernel = [x.clone().to(DEVICE) for x in stored]
    whole = spec.whole_tokens(stored[2].shape[2])
    begin = torch.tensor(start, device=DEVICE)
    append.append_token(*(x.to(DEVICE) for x in new), *by_kernel, begin, spec.recent, whole)
    by_aten = [x.clone() for x in stored]
    steps.append_keys_fixed(*new, None, *by_aten, torch.tensor(start), CAPACITY, spec)
    return [x.cpu() for x in by_kernel], by_aten


def assert_same(by_kernel, by_aten):
    for kernel, aten in zip(by_kernel, by_aten, strict=True):
        assert kernel.dtype == aten.dtype
        assert torch.equal(kernel, aten)


@pytest.mark.parametrize("start", [0, 1, 20, 40, CAPACITY - 1])
@pytest.mark.parametrize("prune_generated", [True, False])
@pytest.mark.parametrize(
    ("batch", "query_heads", "heads", "d", "keep"),
    [(2, 4, 2, 32, 16), (1, 7, 1, 80, 50), (3, 2, 2, 16, 16), (1, 9, 3, 96, 1)],
)
def test_like_the_operations_in_aten(batch, query_heads, heads, d, keep, prune_generated, start):
    spec = steps.LayerSpec(keep, d, WINDOW, 8, prune_generated)
    assert_same(*both(*drawn(batch, query_heads, heads, d, keep, spec.ring_rows(30)), start, spec))


@pytest.mark.parametrize("window", [0, 1])
def test_small_windows_in_half_precision(window):
    spec = steps.LayerSpec(16, 32, window, 8, True)
    assert_same(*both(*drawn(1, 2, 2, 32, 16, spec.ring_rows(0), torch.float16), 33, spec))


def test_ties_and_what_is_no_number():
    spec = steps.LayerSpec(4, 16, WINDOW, 8, True)
    (q, k), stored = drawn(1, 1, 1, 16, 4, spec.ring_rows(0))
    q.fill_(1), k.fill_(1)
    k[..., 9], q[..., 12] = math.nan, math.inf
    by_kernel, by_aten = both((q, k), stored, 0, spec)
    assert by_kernel[1].flatten().tolist() == [0, 1, 9, 12]
    assert_same(*([x.nan_to_num(7) for x in side] for side in (by_kernel, by_aten)))


@pytest.mark.parametrize("start", [CAPACITY, CAPACITY + 3])
def test_nothing_is_written_behind_the_end(start):
    spec = steps.LayerSpec(16, 32, WINDOW, 8, True)
    new, stored = drawn(2, 2, 2, 32, 16, spec.ring_rows(0))
    given = [x.clone().to(DEVICE) for x in stored]
    append.append_token(*(x.to(DEVICE) for x in new), *given, torch.tensor(start, device=DEVICE), WINDOW, WINDOW)
    assert_same([x.cpu() for x in given], stored)


@pytest.mark.host
@pytest.mark.parametrize("length", [1, 2])
def test_aten_refuses_to_write_behind_the_end(length):
    """An index out of range ends a process on a GPU."""
    spec = steps.LayerSpec(16, 32, WINDOW, 8, True)
    (q, k), stored = drawn(2, 2, 2, 32, 16, spec.ring_rows(0))
    values, start = torch.randn(2, 2, CAPACITY, 32), torch.tensor(CAPACITY)
    q, k, v = (x.expand(-1, -1, length, -1) for x in (q, k, torch.randn(2, 2, 1, 32)))
    before = [x.clone() for x in (*stored, values)]
    with pytest.raises(IndexError, match="out of"):
        steps.append_keys_fixed(q, k, None, *stored, start, CAPACITY, spec)
    with pytest.raises(IndexError, match="out of"):
        steps.step_fixed(q, k, v, None, *stored, values, start, CAPACITY, None, False, None, spec)
    assert_same((*stored, values), before)


STEPS = {
    "grouped": ((2, 4, 2, 32, 16), 32, torch.float32),
    "odd": ((1, 7, 1, 80, 50), 48, torch.float32),
    "many heads": ((3, 2, 2, 16, 16), 16, torch.float32),
    "half": ((2, 6, 2, 32, 16), 20, torch.float16),
}


def in_double(x):
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("start", [0, 3, 20, CAPACITY - 1])
@pytest.mark.parametrize(("sizes", "dv", "dtype"), STEPS.values(), ids=STEPS)
def test_a_step_attends_and_then_stores_its_token(sizes, dv, dtype, start, mask):
    batch, query_heads, heads, d, keep = sizes
    spec = steps.LayerSpec(keep, d, WINDOW, 8, True)
    (q, k), stored = drawn(*sizes, spec.ring_rows(0), dtype)
    stored[3].copy_(torch.tensor([max(start, 20) - 3, max(start, 20)]))  # a step may begin at an earlier token again
    v, values = torch.randn(batch, heads, 1, dv).to(dtype), torch.randn(batch, heads, CAPACITY, dv).to(dtype)
    shown = (torch.arange(CAPACITY) <= start) & (torch.rand(batch, 1, 1, CAPACITY) < 0.7)
    shown[..., start] = True
    bias = torch.randn(batch, query_heads, 1, CAPACITY).masked_fill(~shown, torch.finfo(dtype).min).to(dtype)
    mask = {"none": None, "bool": shown, "float": bias}[mask]
    extent = start + 1 if mask is None else CAPACITY

    def by_aten(change):
        own = [change(x.clone()) for x in (*stored, values)]
        given = [change(x) for x in (q, k, v)]
        shaped = change(mask) if mask is not None else None
        begin = torch.tensor(start)
        return steps.step_fixed(*given, shaped, *own, begin, extent, None, False, shaped, spec), own

    (same, expected), (exact, _) = by_aten(lambda x: x), by_aten(in_double)
    values[:, :, start] = torch.nan  # the attention takes the token's own value from where it was made
    own = [x.to(DEVICE) for x in (*stored, values)]
    given = [x.to(DEVICE) for x in (q, k, v)]
    mask = None if mask is None else mask.to(DEVICE)
    begin = torch.tensor(start, device=DEVICE)
    out = append.decode_step(
        *given, *own, begin, extent, mask, d**-0.5, False, WINDOW, WINDOW, launch=append.Launch(16, 16, 4, 1, 3)
    )
    assert_close_to(same, out.cpu(), exact)
    assert_same([x.cpu() for x in own], expected)


@pytest.mark.parametrize("start", [CAPACITY, CAPACITY + 3])
def test_a_step_behind_the_end_changes_nothing(start):
    spec = steps.LayerSpec(16, 32, WINDOW, 8, True)
    (q, k), stored = drawn(2, 2, 2, 32, 16, spec.ring_rows(0))
    kept = [*stored, torch.randn(2, 2, CAPACITY, 32)]
    given = [x.to(DEVICE) for x in (q, k, torch.randn(2, 2, 1, 32))]
    own = [x.clone().to(DEVICE) for x in kept]
    append.decode_step(*given, *own, torch.tensor(start, device=DEVICE), CAPACITY, None, 1.0, False, WINDOW, WINDOW)
    assert_same([x.cpu() for x in own], kept)
