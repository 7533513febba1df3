"""The attention kernel for rows of the largest numbers: within the error of its precision."""

import pytest
import test_codes
import torch
import triton
import triton.language as tl
from test_codes import B, H, begun, drawn

from think_compile.cache.state import Call, Span
from think_compile.formats import mustafar as mustafar_format
from think_compile.formats.base import CacheFormat, Side
from think_compile.formats.mustafar import Mustafar
from think_compile.formats.think import Channels
from think_compile.formats.whole import Whole
from think_compile.kernels import calls, mustafar
from think_compile.kernels.calls import kernels_for
from think_compile.kernels.launch import Launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where kernels are not interpreted


@pytest.fixture(autouse=True)
def no_kernel_is_missing(monkeypatch):
    monkeypatch.setattr(calls, "has_triton", lambda: True)


def check(form, *, group=4, **options):
    """With tiles smaller than the cache, and several shares."""
    test_codes.check(form, group_size=group, launch=Launch(16, 32, 4, 2, 3), **options)


def side(codec, width, recent=40):
    return Side(codec, width, recent)


FORMS = {
    "both": CacheFormat(side(Mustafar(0.5), 64), side(Mustafar(0.7), 64)),
    "8 bits": CacheFormat(side(Mustafar(0.5, 8), 64), side(Mustafar(0.7, 8), 64)),
    "8 and 16 bits": CacheFormat(side(Mustafar(0.3, 8), 64), side(Mustafar(0.5), 32)),
    "keys": CacheFormat(side(Mustafar(0.5), 64), side(Whole(), 32)),
    "values": CacheFormat(side(Whole(), 32), side(Mustafar(0.5, 8), 64)),
    "ThinK keys": CacheFormat(side(Channels(24, 4), 64), side(Mustafar(0.5), 64)),
    "no full words": CacheFormat(side(Mustafar(0.5, multiple=1), 80), side(Mustafar(0.6, 8, 1), 48)),
    "all numbers": CacheFormat(side(Mustafar(0.0), 32), side(Mustafar(0.0), 32)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms(form):
    check(form)
    check(form, size=None, mask="float", group=1)


def test_several_queries_and_large_groups():
    check(FORMS["both"], n=5, size=None)
    check(FORMS["8 bits"], group=20)


@pytest.mark.parametrize("form", [FORMS["both"], FORMS["keys"]], ids=["both", "keys"])
def test_wide_numbers(form):
    check(form, dtype=torch.float32)


def test_what_has_no_kernel():
    """Two windows, also where only the device knows their starts; 8 bits in fp32."""
    for sides, dtype, why in (
        ((side(Mustafar(0.5), 64, 40), side(Mustafar(0.5), 64, 8)), torch.float16, "different windows"),
        ((side(Mustafar(0.5, 8), 64), side(Whole(), 64)), torch.float32, "16 bits"),
    ):
        form = CacheFormat(*sides)
        stores = begun(form, 4, 60, 100, dtype, torch.zeros(B, dtype=torch.int64, device=DEVICE))
        call = Call(*(drawn(heads, 1, 64, dtype) for heads in (4 * H, H, H)))
        span = Span(torch.tensor(60, device=DEVICE), 0, 100)
        assert why in kernels_for(*sides)._obstacle(call, *(store.stored() for store in stores), span)


def test_a_step_stores_the_token():
    """On a cache of fixed size, by the kernel and by PyTorch operations."""
    torch.manual_seed(0)
    form, pad = FORMS["8 bits"], torch.zeros(B, dtype=torch.int64, device=DEVICE)
    stores = begun(form, 4, 60, 100, torch.float16, pad)
    twins = [store.to(store.device, None) for store in stores]
    for at in range(60, 64):
        mask = torch.arange(100, device=DEVICE)[None, None, None] <= at
        call = Call(*(drawn(heads, 1, 64, torch.float16) for heads in (4 * H, H, H)), mask)
        span = Span(torch.tensor(at, device=DEVICE), 0, 100)
        kernels = kernels_for(form.keys, form.values)
        out = kernels.attend(call, *(store.stored() for store in stores), span)
        form.append(call, *(store.stored() for store in stores), span)
        want, _ = form.step(call, *(store.stored() for store in twins), span)
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-3)
    for store, twin in zip(stores, twins, strict=True):
        for name, x in store.state.items():
            assert torch.equal(x, twin.state[name]), name


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_prompt(dtype, bits):
    """Every part as PyTorch operations make it, also of ties, zeros and what is no number."""
    torch.manual_seed(0)
    for width, count in ((64, 24), (80, 33), (48, 48)):
        rows = torch.randn(2, 1, 9, width).to(dtype)
        rows[0, 0, 0], rows[0, 0, 1, ::2] = 0, -1.5
        rows[0, 0, 2, 5], rows[0, 0, 2, 7], rows[0, 0, 3, 3] = torch.nan, -torch.inf, torch.inf
        want = mustafar_format.largest_numbers(rows, count, bits)
        got = mustafar.largest_numbers(rows.to(DEVICE), count, bits)
        for one, other in zip(got, want, strict=True):
            assert one.dtype == other.dtype and torch.equal(one.cpu().nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize(
    "asm", [0, pytest.param(1, marks=pytest.mark.skipif(DEVICE.type != "cuda", reason="PTX runs on a GPU"))]
)
def test_set_bits_are_counted(asm):
    words = torch.randint(-(2**31), 2**31, (256,), dtype=torch.int64).to(torch.int32)
    words[:4] = torch.tensor([0, -1, 1, -(2**31)])
    got = torch.empty_like(words, device=DEVICE)
    count_all[(1,)](words.to(DEVICE), got, ASM=asm)
    assert got.tolist() == [bin(x & 0xFFFFFFFF).count("1") for x in words.tolist()]


@triton.jit
def count_all(X, OUT, ASM: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(OUT + at, mustafar.count_ones(tl.load(X + at), ASM))
