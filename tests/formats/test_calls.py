"""First and later calls of a format against a simulation that keeps whole keys in Python lists, by the rules."""

import pytest
import torch
import torch.nn.functional as F

from think_compile.cache.state import COUNTERS, Call, Prompt, Span, Stored
from think_compile.formats import attention
from think_compile.formats.base import CacheFormat, Side, window_start_of
from think_compile.formats.think import Channels
from think_compile.formats.whole import Whole

B, HQ, H, D, DV, KEEP, SIZE = 2, 4, 2, 8, 6, 3, 40


class Simulation:
    """One layer: a list of dense key rows [B, H, D] and value rows, pruned by the rules after every call."""

    def __init__(self, recent: int, prune_generated: bool = True, observe: int = 4) -> None:
        self.recent, self.prune_generated, self.observe = recent, prune_generated, observe
        self.keys: list = []
        self.values: list = []
        self.whole: list = []  # whether the row still has all its channels
        self.kept = None

    def call(self, q, k, v, start: int, mask=None):
        """The exact attention output of a call that writes at ``start``; later rows are dropped first."""
        del self.keys[start:], self.values[start:], self.whole[start:]
        first = start == 0
        self.keys += list(k.unbind(2))
        self.values += list(v.unbind(2))
        self.whole += [True] * k.shape[2]
        out = self._attend(q, mask)
        if first:
            self.kept = self._choose(q, mask)
        self._prune(first)
        return out

    def _attend(self, q, mask):
        keys = torch.stack(self.keys, 2).repeat_interleave(HQ // H, 1)
        values = torch.stack(self.values, 2).repeat_interleave(HQ // H, 1)
        return F.scaled_dot_product_attention(q, keys, values, self._mask(q, mask))

    def _mask(self, q, mask):
        length = len(self.keys)
        rows = torch.arange(length - q.shape[2], length)
        causal = (torch.arange(length) <= rows[:, None])[None, None]
        return causal if mask is None else causal & mask[:, None, None, :length]

    def _choose(self, q, mask):
        valid = torch.ones(B, len(self.keys), dtype=torch.bool) if mask is None else mask[:, : len(self.keys)]
        scores = torch.zeros(B, H, D)
        for b in range(B):
            at = [i for i in range(len(self.keys)) if valid[b, i]]
            for h in range(H):
                heard = q[b, h * (HQ // H) : (h + 1) * (HQ // H)][:, at[-self.observe :]]
                stored = torch.stack([self.keys[i][b, h] for i in at])
                scores[b, h] = heard.square().mean((0, 1)) * stored.square().mean(0)
        order = scores.neg().argsort(dim=-1, stable=True)[..., :KEEP]
        return torch.zeros(B, H, D, dtype=torch.bool).scatter_(-1, order, True)

    def _prune(self, first: bool) -> None:
        if not first and not self.prune_generated:
            return
        for i in range(len(self.keys) - self.recent):
            self.keys[i] = self.keys[i].masked_fill(~self.kept, 0)
            self.whole[i] = False

    def dense(self):
        return torch.stack(self.keys, 2)


def draw(n):
    return (
        torch.randn(B, HQ, n, D).double(),
        torch.randn(B, H, n, D).double(),
        torch.randn(B, H, n, DV).double(),
    )


def format_of(recent, encodes_later=True, keep=KEEP):
    return CacheFormat(Side(Channels(keep, 4), D, recent, encodes_later), Side(Whole(), DV))


def causal(n, extent, start, marks=None):
    mask = (torch.arange(extent) <= torch.arange(start, start + n)[:, None])[None, None]
    if marks is None:
        return mask
    return mask & F.pad(marks, (0, max(0, extent - marks.shape[1])), value=True)[:, None, None, :extent]


CALLS = [[9, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [5, 3, 1, 20, 1, 2], [3, 17, 1], [2, 2, 2, 2, 2]]


@pytest.mark.parametrize("calls", CALLS, ids=str)
@pytest.mark.parametrize("recent", [0, 1, 4, 30])
@pytest.mark.parametrize("padding", [False, True], ids=["plain", "padded"])
def test_growing(calls, recent, padding):
    torch.manual_seed(1)
    simulation, form = Simulation(recent), format_of(recent)
    marks = None
    if padding:
        marks = torch.ones(B, SIZE, dtype=torch.bool)
        marks[1, : calls[0] // 2] = False
    length, window_start = 0, 0
    for n in calls:
        q, k, v = draw(n)
        expected = simulation.call(q, k, v, length, marks)
        mask = causal(n, length + n, length, marks)
        if length == 0:
            keys, values = form.first_call(Call(q, k, v, mask), Prompt())
            for state in (keys, values):
                state["rows"] = F.pad(state["rows"], (0, 0, 0, SIZE))
        else:
            stored, span = (Stored(keys, window_start), Stored(values)), Span(length, 0, length + n)
            out, (left, none) = form.step(Call(q, k, v, mask), *stored, span)
            assert list(left) == ["ring"] and none == {}
            torch.testing.assert_close(out, expected)
            keys |= left
        length += n
        window_start = max(window_start, form.keys.window_start(length))
        dense = attention.dense(form.keys, Stored(keys, window_start), 0, length, length)
        torch.testing.assert_close(dense, simulation.dense())
        assert window_start == length - sum(simulation.whole)


class Fixed:
    """The stored tensors of a fixed cache, called as the rewritten graphs do."""

    def __init__(self, recent, prune_generated=True, size=SIZE, masked=True) -> None:
        self.format, self.size, self.masked, self.stored = format_of(recent, prune_generated), size, masked, None

    def call(self, q, k, v, start, marks=None):
        n = q.shape[2]
        columns = self.size if self.masked else start + n
        mask = causal(n, columns, start, marks)
        if self.stored is None:
            keys, values = torch.zeros(B, H, self.size, D).double(), torch.zeros(B, H, self.size, DV).double()
            keys[:, :, start : start + n], values[:, :, start : start + n] = k, v
            call, prompt = Call(q, keys, values, mask), Prompt(torch.tensor(start), capacity=self.size)
            self.stored = self.format.first_call(call, prompt)
            return None
        out, left = self.format.step(Call(q, k, v, mask), *self.sides(), Span(torch.tensor(start), 0, columns))
        assert left == ({}, {})
        return out

    def sides(self):
        keys, values = self.stored
        return Stored(keys, window_start_of(keys[COUNTERS])), Stored(values)

    @property
    def counters(self):
        return self.stored[0][COUNTERS].tolist()

    def dense(self, length):
        return attention.dense(self.format.keys, self.sides()[0], 0, self.stored[0][COUNTERS][1], self.size)[
            :, :, :length
        ]


def follow(fixed, simulation, calls, marks=None):
    """Makes the calls [(start, n)], and compares each."""
    for start, n in calls:
        q, k, v = draw(n)
        expected = simulation.call(q, k, v, start, marks)
        out = fixed.call(q, k, v, start, marks)
        if out is not None:
            torch.testing.assert_close(out, expected, msg=lambda m: f"call at {start}: {m}")  # noqa: B023
        got, length = fixed.dense(start + n), start + n
        torch.testing.assert_close(
            got,
            simulation.dense(),
            msg=lambda m: f"cache after {length}: {m}",  # noqa: B023
        )
        assert fixed.counters == [length - sum(simulation.whole), length, 0]


def in_a_row(calls):
    starts = [sum(calls[:i]) for i in range(len(calls))]
    return list(zip(starts, calls, strict=True))


@pytest.mark.parametrize("calls", CALLS, ids=str)
@pytest.mark.parametrize("recent", [0, 1, 4, 30])
@pytest.mark.parametrize("masked", [True, False], ids=["whole", "prefix"])
def test_fixed(calls, recent, masked):
    torch.manual_seed(1)
    follow(Fixed(recent, masked=masked), Simulation(recent), in_a_row(calls))


def test_fixed_padded():
    marks = torch.ones(B, SIZE, dtype=torch.bool)
    marks[1, :4] = False
    follow(Fixed(3), Simulation(3), in_a_row([9, 1, 1, 4, 1]), marks)


REWINDS = {
    "a little": [(0, 12), (12, 1), (11, 1), (12, 1), (13, 1)],
    "into the window": [(0, 12), (10, 3), (13, 1)],
    "before the window": [(0, 12), (12, 1), (5, 1), (6, 1), (7, 1), (8, 1), (9, 1), (10, 1)],
    "before the window, many": [(0, 12), (5, 20), (25, 1)],
    "twice": [(0, 12), (8, 2), (3, 2), (5, 9), (14, 1)],
    "same again": [(0, 12), (12, 1), (12, 1), (12, 1)],
    "to the beginning": [(0, 12), (12, 1), (0, 7), (7, 1), (8, 1), (9, 1), (10, 1)],
    "to the beginning, longer": [(0, 5), (5, 1), (0, 20), (20, 1), (21, 1)],
    "to the beginning, within the window": [(0, 12), (0, 2), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1)],
    "to the beginning by one token": [(0, 12), (12, 1), (0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1)],
}


@pytest.mark.parametrize("name", REWINDS)
@pytest.mark.parametrize("recent", [0, 3, 8])
@pytest.mark.parametrize("masked", [True, False], ids=["whole", "prefix"])
def test_rewinds(name, recent, masked):
    torch.manual_seed(2)
    follow(Fixed(recent, masked=masked), Simulation(recent), REWINDS[name])


@pytest.mark.parametrize("calls", [*CALLS, [4, 1, 30]], ids=str)
def test_fixed_without_prune_generated(calls):
    follow(Fixed(3, prune_generated=False), Simulation(3, prune_generated=False), in_a_row(calls))


def test_fixed_to_the_last_row():
    follow(Fixed(3, size=12), Simulation(3), in_a_row([8, 1, 2, 1]))


def test_restart_without_prune_generated_prunes_the_new_prompt():
    calls = [(0, 12), (12, 1), (0, 9), (9, 1), (10, 1)]
    follow(Fixed(3, prune_generated=False), Simulation(3, prune_generated=False), calls)


def test_first_call_that_does_not_begin_at_zero():
    """Positions before the start have no token and are never attended to."""
    fixed, n, start = Fixed(3), 9, 4
    q, k, v = draw(n)
    marks = torch.ones(B, SIZE, dtype=torch.bool)
    marks[:, :start] = False
    fixed.call(q, k, v, start, marks)
    alone, _ = fixed.format.first_call(Call(q, k, v, causal(n, n, 0)), Prompt())
    assert torch.equal(fixed.stored[0]["channels"], alone["channels"])
    assert fixed.counters == [10, 13, 0]


@pytest.mark.parametrize("recent", [0, 3, 30])
@pytest.mark.parametrize("prune_generated", [True, False])
@pytest.mark.parametrize("n", [1, 11])
def test_first_call_of_the_prompt_alone_stores_what_a_written_buffer_does(n, recent, prune_generated):
    form, mask = format_of(recent, prune_generated), causal(n, SIZE, 0)
    q, k, v = draw(n)
    buffers = (F.pad(t, (0, 0, 0, SIZE - n)) for t in (k, v))
    expected = form.first_call(Call(q, *buffers, mask), Prompt(0, capacity=SIZE))
    got = form.first_call(Call(q, k, v, mask[..., :n]), Prompt(capacity=SIZE))
    for mine, want in zip(got, expected, strict=True):
        assert mine.keys() == want.keys()
        for name in mine:
            assert torch.equal(mine[name], want[name]) and mine[name].dtype == want[name].dtype


def test_values_are_a_copy():
    v = torch.zeros(B, H, SIZE, DV)
    q, k = torch.randn(B, HQ, 3, D), torch.randn(B, H, SIZE, D)
    _, values = format_of(2).first_call(Call(q, k, v, causal(3, SIZE, 0)), Prompt(0, capacity=SIZE))
    assert values["rows"].data_ptr() != v.data_ptr()


def test_scale_is_pinned_to_all_channels():
    q = torch.randn(1, 1, 1, 64)
    assert attention.scale_of(Call(q, q, q)) == 0.125
    assert attention.scale_of(Call(q, q, q, None, 0.3)) == 0.3
    assert attention.scale_of(Call(q, q, q, None, 0.0)) == 0.0


@pytest.mark.parametrize("prune_generated", [True, False])
def test_ring_rows(prune_generated):
    assert format_of(5, prune_generated).keys.ring_rows(16) == (6 if prune_generated else 22)
