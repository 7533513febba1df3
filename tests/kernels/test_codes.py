"""The attention kernel for bit plans: within the error of its precision, for all widths, groups, sinks and masks."""

import pytest
import torch

from think_compile.cache.packed import Packed
from think_compile.cache.state import Call, Prompt, Span
from think_compile.formats import attention
from think_compile.formats.base import CacheFormat, Side
from think_compile.formats.bits import KeyBits, ValueBits
from think_compile.formats.think import Channels
from think_compile.formats.whole import Whole
from think_compile.kernels import calls
from think_compile.kernels.calls import kernels_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where kernels are not interpreted
B, H = 2, 2
MIXED = ((8, 8), (4, 8), (2, 16))
UNEVEN = ((8, 3), (4, 9), (2, 13))  # and 7 dropped


@pytest.fixture(autouse=True)
def no_kernel_is_missing(monkeypatch):
    monkeypatch.setattr(calls, "has_triton", lambda: True)


def side(tiers, width, group, sinks, of=KeyBits):
    """A side of bits; 16: chosen channels; None: whole rows."""
    codec = Whole() if tiers is None else Channels(tiers, 4) if isinstance(tiers, int) else of(tiers, 4, group)
    return Side(codec, width, 40, window_group=group, sinks=sinks)


def drawn(heads, n, width, dtype):
    return torch.randn(B, heads, n, width).to(DEVICE, dtype)


def begun(form, group_size, length, size, dtype, pad):
    """Both sides after a first call with padding on the left."""
    d, dv = form.keys.width, form.values.width
    q, k, v = drawn(H * group_size, length, d, dtype), drawn(H, length, d, dtype) + 0.5, drawn(H, length, dv, dtype)
    mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril() & shown(length, pad)
    states = form.first_call(Call(q, k, v, mask), Prompt(capacity=size))
    return [
        Packed.made(of, form.side(of), state, dtype, size or length, fixed=size is not None)
        for of, state in zip(("keys", "values"), states, strict=True)
    ]


def shown(columns, pad):
    """[B, 1, 1, columns]: tokens, no padding."""
    return (torch.arange(columns, device=DEVICE) >= pad[:, None])[:, None, None]


def _kernels(form):
    return kernels_for(form.keys, form.values)


def check(form, *, n=1, size=300, mask="bool", group_size=4, length=150, dtype=torch.float16, launch=None):
    torch.manual_seed(0)
    pad = torch.tensor([0, 5], device=DEVICE)
    stores = begun(form, group_size, length, size, dtype, pad)
    if size is None:
        stores = [store.reserve(n) for store in stores]
    columns = size or length + n
    last = torch.arange(length, length + n, device=DEVICE)[:, None]
    allowed = (torch.arange(columns, device=DEVICE) <= last) & shown(columns, pad)
    if mask == "of KV heads":
        allowed = (allowed & (torch.rand(B, H, n, columns, device=DEVICE) < 0.5)).contiguous()
    if mask == "float":
        hidden = torch.finfo(dtype).min
        allowed = torch.zeros(allowed.shape, dtype=dtype, device=DEVICE).masked_fill(~allowed, hidden)
    d, dv = form.keys.width, form.values.width
    call = Call(*(drawn(heads, n, w, dtype) for heads, w in ((H * group_size, d), (H, d), (H, dv))), allowed)
    span = Span(length if size is None else torch.tensor(length, device=DEVICE), 0, columns)
    stored, kernels = [store.stored() for store in stores], _kernels(form)
    assert not kernels._obstacle(call, *stored, span)
    got = kernels.attend(call, *stored, span, launch)
    sides = form.keys, form.values
    same = attention.narrow(call, *stored, span, sides)
    wide = [store.to(store.device, torch.float64).stored() for store in stores]
    exact_mask = allowed.double() if mask == "float" else allowed
    exact = attention.narrow(Call(*(x.double() for x in call[:3]), exact_mask), *wide, span, sides)
    error, natural = ((x.double() - exact).norm() / exact.norm() for x in (got, same))
    assert error <= 1.5 * natural, f"{error:.1e}; {natural:.1e} is natural"


def bits(keys, values, group=64, sinks=3, d=32, dv=32):
    return CacheFormat(side(keys, d, group, sinks), side(values, dv, group, sinks, ValueBits))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    ("keys", "values"),
    [(((4, 32),), ((4, 32),)), (((8, 32),), ((8, 32),)), (((2, 32),), ((2, 32),)), (MIXED, UNEVEN)],
    ids=["4-4", "8-8", "2-2", "mixed"],
)
def test_plans(keys, values, group):
    check(bits(keys, values, group), size=None)
    check(bits(keys, values, group), mask="float")
    check(bits(keys, values, group), mask="of KV heads")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("of", [0, 1])
def test_what_is_no_number_stays_in_its_group(of, bad):
    """In one key or value of the first sequence's first head; the other heads' attentions stay as they are."""
    torch.manual_seed(0)
    form, pad = bits(((4, 16), (2, 16)), ((4, 32),)), torch.zeros(B, dtype=torch.int64, device=DEVICE)
    drawn_ = drawn(4 * H, 150, 32, torch.float16), drawn(H, 150, 32, torch.float16), drawn(H, 150, 32, torch.float16)
    drawn_[1 + of][0, 0, 20, 7] = bad
    states = form.first_call(Call(*drawn_), Prompt(capacity=300))
    keys, values = (
        Packed.made(name, form.side(name), state, torch.float16, 300, fixed=True).stored()
        for name, state in zip(("keys", "values"), states, strict=True)
    )
    mask = shown(300, pad) & (torch.arange(300, device=DEVICE) <= 150)
    call = Call(*(drawn(heads, 1, 32, torch.float16) for heads in (4 * H, H, H)), mask)
    span = Span(torch.tensor(150, device=DEVICE), 0, 300)
    got = _kernels(form).attend(call, keys, values, span)
    expected = attention.narrow(call, keys, values, span, (form.keys, form.values))
    assert got[0, :4].isnan().all() and expected[0, :4].isnan().all()
    rest = [x.flatten(0, 1)[4:] for x in (got, expected)]
    torch.testing.assert_close(*rest, rtol=0.01, atol=0.01)


def test_several_queries_and_no_sinks():
    check(bits(((4, 32),), ((4, 32),), sinks=0), n=3)


def test_large_groups_of_heads():
    check(bits(((4, 32),), ((4, 32),)), group_size=12, n=2)


def test_wide_heads_and_dropped_channels():
    check(bits(((4, 160),), ((4, 96),), d=160, dv=96), group_size=2)
    check(bits(((4, 16),), ((4, 16),)), n=2)


@pytest.mark.parametrize(("keys", "values"), [(16, ((4, 32),)), (((4, 32),), None), (None, ((4, 32),))])
def test_beside_other_codecs(keys, values):
    check(bits(keys, values), n=2)


@pytest.mark.parametrize("size", [None, 300])
def test_sinks_beside_chosen_channels_only(size):
    """No codes: the kernels of ThinK, with sinks; PyTorch stores the tokens."""
    form = CacheFormat(side(16, 32, 1, 3), side(None, 32, 1, 3))
    check(form, size=size)
    assert _kernels(form).sinks == 3
    assert not _kernels(form).append_fits(None, None, None)


def test_windows_of_different_histories_are_not_taken():
    form, pad = bits(((4, 32),), ((4, 32),)), torch.zeros(B, dtype=torch.int64, device=DEVICE)
    keys, values = (store.stored() for store in begun(form, 4, 150, None, torch.float16, pad))
    call = Call(*(drawn(heads, 1, 32, torch.float16) for heads in (8, H, H)))
    assert not _kernels(form)._obstacle(call, keys, values, Span(150, 0, 151))
    assert "different windows" in _kernels(form)._obstacle(
        call, keys, values._replace(window_start=0), Span(150, 0, 151)
    )


def test_what_kernels_do_not_take():
    """Such plans run as PyTorch operations."""
    for form, why in (
        (bits(((16, 8), (4, 24)), ((4, 32),)), "16 bits"),
        (bits(((4, 32),), ((4, 32),), group=16), "groups have 16 tokens"),
    ):
        assert why in _kernels(form)._obstacle_of_codes(Span(0, 0, 1))
    pruned = CacheFormat(Side(Channels(16, 4), 32, 4), Side(ValueBits(((16, 16),), 4, 1), 32, 4))
    assert kernels_for(pruned.keys, pruned.values) is None
    form, pad = bits(((4, 32),), ((4, 32),)), torch.zeros(B, dtype=torch.int64, device=DEVICE)
    stored = [store.stored() for store in begun(form, 4, 80, 100, torch.float32, pad)]
    call = Call(*(drawn(heads, 1, 32, torch.float32) for heads in (8, H, H)))
    assert _kernels(form)._obstacle(call, *stored, Span(0, 0, 1)) == "it computes in 16 bits"
