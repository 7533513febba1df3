"""First and later calls against a simulation that keeps whole keys in Python lists, by the rules."""

import pytest
import torch
import torch.nn.functional as F

from think_compile.kernels import answers, steps
from think_compile.kernels import reference as ref

B, HQ, H, D, DV, KEEP, SIZE = 2, 4, 2, 8, 6, 3, 40


class Simulation:
    """One layer: a list of dense key rows [B, H, D] and value rows, pruned by the rules after every call."""

    def __init__(self, recent: int, prune_generated: bool = True, observe: int = 4) -> None:
        self.recent, self.prune_generated, self.observe = recent, prune_generated, observe
        self.keys: list = []
        self.values: list = []
        self.whole: list = []  # whether the row still has all of its channels
        self.kept = None

    def call(self, q, k, v, start: int, mask=None):
        """The exact attention output of a call that writes at ``start``; rows from there on are forgotten first."""
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


def spec_of(recent, prune_generated=True, keep=KEEP):
    return steps.LayerSpec(keep, D, recent, 4, prune_generated)


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
    simulation, spec = Simulation(recent), spec_of(recent)
    marks = None
    if padding:
        marks = torch.ones(B, SIZE, dtype=torch.bool)
        marks[1, : calls[0] // 2] = False
    length, floor = 0, 0
    for n in calls:
        q, k, v = draw(n)
        expected = simulation.call(q, k, v, length, marks)
        mask = causal(n, length + n, length, marks)
        if length == 0:
            pruned, channels, ring, values = steps.first_call_growing(q, k, v, mask, spec)
            pruned, values = (F.pad(t, (0, 0, 0, SIZE)) for t in (pruned, values))
        else:
            out = steps.attend_growing(q, k, v, mask, pruned, channels, ring, values, length, floor, None, False)
            ring = steps.append_keys_growing(k, pruned, channels, ring, length)
            torch.testing.assert_close(out, expected)
        length += n
        floor = max(floor, length - spec.whole_tokens(ring.shape[2]))
        packed = ref.Packed(pruned, channels, ring)
        torch.testing.assert_close(ref.dense_keys(packed, floor, length, length), simulation.dense())
        assert floor == length - sum(simulation.whole)


class Fixed:
    """The stored tensors of a fixed cache, called as the rewritten graphs do."""

    def __init__(self, recent, prune_generated=True, size=SIZE, masked=True) -> None:
        self.spec, self.size, self.masked, self.stored = spec_of(recent, prune_generated), size, masked, None

    def call(self, q, k, v, start, marks=None):
        n = q.shape[2]
        extent = self.size if self.masked else start + n
        mask = causal(n, extent, start, marks)
        if self.stored is None:
            keys, values = torch.zeros(B, H, self.size, D).double(), torch.zeros(B, H, self.size, DV).double()
            keys[:, :, start : start + n], values[:, :, start : start + n] = k, v
            self.stored = steps.first_call_fixed(q, keys, values, mask, torch.tensor(start), self.spec)
            return None
        begin = torch.tensor(start)
        return steps.step_fixed(q, k, v, mask, *self.stored, begin, extent, None, False, mask, self.spec)

    def dense(self, length):
        pruned, channels, recent, progress, _ = self.stored
        packed = ref.Packed(pruned, channels, recent)
        return ref.dense_keys(packed, progress[0], progress[1], self.size)[:, :, :length]


def follow(fixed, simulation, calls, marks=None):
    """Calls [(start, n)], each compared."""
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
        assert fixed.stored[3].tolist() == [length - sum(simulation.whole), length]


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
    """Positions before the start hold no token and are never attended to."""
    fixed, n, start = Fixed(3), 9, 4
    q, k, v = draw(n)
    marks = torch.ones(B, SIZE, dtype=torch.bool)
    marks[:, :start] = False
    fixed.call(q, k, v, start, marks)
    alone = steps.first_call_growing(q, k, v, causal(n, n, 0), fixed.spec)
    assert torch.equal(fixed.stored[1], alone[1])
    assert fixed.stored[3].tolist() == [10, 13]


@pytest.mark.parametrize("recent", [0, 3, 30])
@pytest.mark.parametrize("prune_generated", [True, False])
@pytest.mark.parametrize("n", [1, 11])
def test_first_call_of_own_rows_stores_what_a_written_buffer_does(n, recent, prune_generated):
    spec, mask = spec_of(recent, prune_generated), causal(n, SIZE, 0)
    q, k, v = draw(n)
    buffers = (F.pad(t, (0, 0, 0, SIZE - n)) for t in (k, v))
    expected = steps.first_call_fixed(q, *buffers, mask, 0, spec)
    for got, want in zip(steps.first_call_own_rows(q, k, v, mask, spec, SIZE), expected, strict=True):
        assert torch.equal(got, want)
        assert got.dtype == want.dtype


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attend_own_rows(grouped, masked):
    q, k, v = draw(7)
    mask = causal(7, SIZE, 0) if masked else None
    got = steps.attend_own_rows(q, k, v, mask, 0.3, not masked, grouped)
    buffers = [F.pad(t, (0, 0, 0, SIZE - 7)).repeat_interleave(HQ // H, 1) for t in (k, v)]
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, *buffers, causal(7, SIZE, 0), scale=0.3))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_hides_other_rows(dtype):
    def mask(allowed):
        return allowed if dtype == torch.bool else torch.where(allowed, 0, torch.finfo(dtype).min).to(dtype)

    allowed = causal(5, 12, 0)
    assert answers.hides_other_rows(mask(allowed))
    assert answers.hides_other_rows(mask(allowed[..., :5]))
    for row, column in [(0, 5), (4, 11)]:
        more = allowed.clone()
        more[..., row, column] = True
        assert not answers.hides_other_rows(mask(more))
    blind = allowed.clone()
    blind[..., 2, :] = False
    assert answers.hides_other_rows(mask(blind)) == (dtype == torch.bool)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_sees_later_rows(dtype):
    def sees(allowed, start, n_new):
        mask = allowed if dtype == torch.bool else torch.where(allowed, 0.0, torch.finfo(dtype).min)
        return {bool(answers.sees_later_rows(mask, at, n_new)) for at in (start, torch.tensor(start), first + start)}

    first, allowed = torch.arange(3), causal(3, 12, 4)
    assert sees(allowed, 4, 3) == {False}
    assert sees(allowed, 4, 2) == sees(allowed, 3, 3) == {True}
    allowed[..., 1, 11] = True
    assert sees(allowed, 4, 3) == {True} and sees(allowed, 9, 3) == {False}


def test_reads_later_rows():
    for start in (4, torch.tensor(4), torch.arange(4, 7)):
        assert answers.reads_later_rows(8, start, 3)
        assert not answers.reads_later_rows(7, start, 3)


def test_begins_at_first_row():
    for start in (0, torch.tensor(0), torch.arange(4)):
        assert answers.begins_at_first_row(start, True)
        assert answers.begins_at_first_row(start, False)
    for start in (2, torch.tensor(2), torch.arange(1, 4)):
        assert not answers.begins_at_first_row(start, True)
        assert not answers.begins_at_first_row(start, False)
    assert not answers.begins_at_first_row(torch.tensor([0, 1, 3]), False)


def test_all_hold():
    yes, no = torch.tensor(True), torch.tensor(False)
    assert answers.all_hold([yes, True]) and answers.all_hold([True]) and answers.all_hold([yes, yes])
    assert not answers.all_hold([yes, no]) and not answers.all_hold([yes, False]) and not answers.all_hold([False, no])


def test_answers_of_layers_on_different_devices():
    given = [torch.tensor(True, device="meta"), torch.tensor(True)]
    assert all(together(given).device.type == "meta" for together in (answers.all_hold, answers.any_holds))


def test_values_are_a_copy():
    v = torch.zeros(B, H, SIZE, DV)
    q, k = torch.randn(B, HQ, 3, D), torch.randn(B, H, SIZE, D)
    values = steps.first_call_fixed(q, k, v, causal(3, SIZE, 0), 0, spec_of(2))[-1]
    assert values.data_ptr() != v.data_ptr()


def test_scale_is_pinned_to_all_channels():
    q = torch.randn(1, 1, 1, 64)
    assert steps.default_scale(q, None) == 0.125
    assert steps.default_scale(q, 0.3) == 0.3
    assert steps.default_scale(q, 0.0) == 0.0


@pytest.mark.parametrize("prune_generated", [True, False])
def test_ring_rows(prune_generated):
    spec = spec_of(5, prune_generated)
    assert spec.ring_rows(16) == (6 if prune_generated else 22)


def test_start_of():
    assert steps.start_of(torch.tensor([4, 5, 6]), False) == 4
    assert steps.start_of(torch.tensor([9]), False) == 9


@pytest.mark.host
def test_start_of_positions_with_gaps_raises():
    for gaps in ([1, 3], [3, 2], [1, 1], [0, 1, 2, 0]):
        with pytest.raises(RuntimeError, match="gaps"):
            steps.start_of(torch.tensor(gaps), False)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3], [3, 1, 0, 2]])
def test_laid_out(order):
    x = torch.randn(2, 3, 4, 5)
    got = steps.laid_out(x, order)
    assert torch.equal(got, x)
    assert got.permute(order).is_contiguous()
