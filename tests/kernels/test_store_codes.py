"""The Triton kernel that ends a step on codes, against the PyTorch operations that it stands for."""

import pytest
import torch

from think_compile.cache.state import COUNTERS, Call, Prompt, Span, Stored
from think_compile.formats import attention
from think_compile.formats.base import CacheFormat, Side
from think_compile.formats.bits import KeyBits, ValueBits
from think_compile.formats.mustafar import Mustafar
from think_compile.formats.think import Channels
from think_compile.formats.whole import Whole
from think_compile.kernels import calls
from think_compile.kernels.calls import kernels_for

pytest.importorskip("triton", reason="the kernels need it")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where kernels are not interpreted
B, H, GROUP, D, SIZE = 2, 1, 3, 48, 320
MIXED = ((8, 8), (4, 9), (2, 19))  # and 12 dropped
EVEN = ((4, D),)


@pytest.fixture(autouse=True)
def no_kernel_is_missing(monkeypatch):
    monkeypatch.setattr(calls, "has_triton", lambda: True)


def drawn(heads, n):
    return torch.randn(B, heads, n, D).to(DEVICE, torch.float16)


def side(codec, tiers, group=64, recent=40, sinks=3, **options):
    return Side(codec(tiers, 4, group), D, recent, window_group=group, sinks=sinks, **options)


def form_of(keys=MIXED, values=MIXED, **options):
    """16: half of the channels; None: whole rows; or a codec that stores rows on arrival."""
    recent, group = options.get("recent", 40), options.get("group", 64)
    whole = Side(Whole(), D, recent, window_group=group)
    if isinstance(keys, Mustafar) or isinstance(values, Mustafar):
        kept = {name: x for name, x in options.items() if name not in ("group", "recent")}
        sides = (Side(Whole(), D, recent) if x is None else Side(x, D, recent, **kept) for x in (keys, values))
        return CacheFormat(*sides)
    chosen = Side(Channels(D // 2, 4), D, recent, window_group=group, sinks=options.get("sinks", 3))
    return CacheFormat(
        whole if keys is None else chosen if keys == 16 else side(KeyBits, keys, **options),
        whole if values is None else side(ValueBits, values, **options),
    )


def length_of(form):
    """Tokens after which the second step encodes a group."""
    side = form.keys if form.keys.has_ring else form.values
    return ((200 - side.recent) // side.window_group + 1) * side.window_group + side.recent - 2


def begun(form, pad, bad=0.0):
    """The state of both sides after a first call, padded on the left; ``bad``: a number in the next group."""
    length = length_of(form)
    q, k, v = drawn(H * GROUP, length), drawn(H, length) + 0.5, drawn(H, length)
    k[0, 0, length - 60, 7] = v[0, 0, length - 60, 9] = bad
    shown = (torch.arange(length, device=DEVICE) >= pad[:, None])[:, None, None]
    mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril() & shown
    states = [dict(state) for state in form.first_call(Call(q, k, v, mask), Prompt(capacity=SIZE))]
    for side, state in zip((form.keys, form.values), states, strict=True):
        if "codes" in state:  # no record of the window may count, before a step encodes it
            begin = int(state[COUNTERS][0]) // side.codec.group
            state["codes"][:, :, begin:], state["ranges"][:, :, begin:] = 0xA5, 1000.0
    return states


def stored(state):
    return Stored(state, state[COUNTERS][0] if COUNTERS in state else None)


def step(form, states, call, start, by_kernel):
    """The output of a step; ``states`` store its token."""
    keys, values = (stored(state) for state in states)
    span = Span(torch.tensor(start, device=DEVICE), 0, SIZE)
    if not by_kernel:
        out = attention.narrow(call, keys, values, span, (form.keys, form.values))
        form.append(call, keys, values, span)
        return out
    kernels = kernels_for(form.keys, form.values)
    given = form.keys if form.keys.has_ring else form.values
    return kernels.step(call, keys, values, span, given.windows(states[0 if form.keys.has_ring else 1]))


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name].nan_to_num(7), other[name].nan_to_num(7)), name


def check(form, steps, bad=0.0):
    """Steps at these positions, relative to the length after the first call (but not below 0)."""
    torch.manual_seed(0)
    pad = torch.tensor([0, 5], device=DEVICE)
    by_kernel = begun(form, pad, bad)
    by_aten = [{name: x.clone() for name, x in state.items()} for state in by_kernel]
    columns = torch.arange(SIZE, device=DEVICE)
    for start in (max(0, length_of(form) + ahead) for ahead in steps):
        mask = ((columns >= pad[:, None]) & (columns <= start))[:, None, None]
        call = Call(drawn(H * GROUP, 1), drawn(H, 1) + 0.5, drawn(H, 1), mask)
        out = step(form, by_kernel, call, start, True)
        expected = step(form, by_aten, call, start, False)
        torch.testing.assert_close(out, expected, rtol=0.01, atol=0.01, equal_nan=True)
        if not bad:
            assert_same(by_kernel, by_aten)
        for side, got, expected in zip((form.keys, form.values), by_kernel, by_aten, strict=True):
            if COUNTERS in got:
                begin = int(got[COUNTERS][0])
                rows = [side.decoded(state)[:, :, :begin] for state in (got, expected)]
                assert torch.equal(*(x.nan_to_num(7) for x in rows))
                assert rows[0].isnan().any() == (bool(bad) and begin > length_of(form) - 60)


AHEAD = (0, 1, 2)  # the second step encodes a group
BACK = (0, -1, -90, -89, -180, -226, -225)  # into groups, then into the sinks


@pytest.mark.parametrize(
    ("keys", "values"), [(MIXED, MIXED), (EVEN, ((8, D),)), (((2, D),), None), (None, MIXED), (16, EVEN)], ids=str
)
def test_steps(keys, values):
    check(form_of(keys, values), [*AHEAD, *BACK])


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (Mustafar(0.5), Mustafar(0.7, 8)),
        (Mustafar(0.6, 8, multiple=1), None),
        (None, Mustafar(0.5)),
        (Mustafar(0.0), Mustafar(0.0)),
    ],
    ids=str,
)
def test_the_largest_numbers(keys, values):
    check(form_of(keys, values), [*AHEAD, -1, -50, -49])
    check(form_of(keys, values, sinks=3), [1, -1000, -999, -998, -997, -996])


def test_the_largest_numbers_of_a_prompt_alone():
    check(form_of(Mustafar(0.5), Mustafar(0.7, 8), encodes_later=False), [*AHEAD, -1, -50, -1000, -999])


def test_channels_without_sinks():
    check(form_of(16, EVEN, sinks=0), [*AHEAD, -70, -69])


@pytest.mark.parametrize(
    "options", [{"recent": 0}, {"sinks": 0}, {"group": 128}, {"group": 32}, {"encodes_later": False}], ids=str
)
def test_windows_and_sinks(options):
    check(form_of(**options), [*AHEAD, -70, -69])


@pytest.mark.parametrize("keys", [MIXED, EVEN, 16], ids=str)
def test_a_restart_chooses_again(keys):
    form = form_of(keys)
    check(form, [0, *(at - length_of(form) for at in range(5))])


def test_nothing_is_written_beyond_the_end():
    form = form_of()
    states = begun(form, torch.tensor([0, 5], device=DEVICE))
    before = [{name: x.clone() for name, x in state.items()} for state in states]
    call = Call(
        drawn(H * GROUP, 1), drawn(H, 1), drawn(H, 1), torch.ones(1, 1, 1, SIZE, dtype=torch.bool, device=DEVICE)
    )
    step(form, states, call, SIZE, True)
    assert_same(states, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_group(bad):
    check(form_of(), AHEAD, bad)


def test_which_steps_run():
    keys, values = (stored(state) for state in begun(form_of(), torch.tensor([0, 5], device=DEVICE)))
    fits = kernels_for(form_of().keys, form_of().values)._coded_fits
    call, span = Call(drawn(H * GROUP, 1), drawn(H, 1), drawn(H, 1)), Span(torch.tensor(200), 0, SIZE)
    assert fits(call, keys, values, span) == (DEVICE.type == "cuda")
    two = Call(*(x.expand(-1, -1, 2, -1) for x in call[:3]))
    assert not fits(two, keys, values, span)
