"""Attention over stored rows against the stock attention over zero-filled ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from think_compile.cache.state import Call, Span, Stored
from think_compile.formats import attention
from think_compile.formats.base import CacheFormat, Side
from think_compile.formats.ring import ring_of
from think_compile.formats.side import append_rows
from think_compile.formats.think import Channels, narrow_rows
from think_compile.formats.whole import Whole


class Past:
    """The stored form of ``length`` random tokens, with poisoned rows after them, and the equivalent keys."""

    def __init__(self, batch, heads, length, dim, keep, recent, window_start=None, dtype=torch.float64):
        self.capacity, self.length = length + 25, length
        self.format = CacheFormat(Side(Channels(keep, 4), dim, recent), Side(Whole(), dim))
        self.k = torch.randn(batch, heads, length, dim).to(dtype)
        self.v = torch.randn(batch, heads, length + 25, dim).to(dtype)
        channels = torch.stack([torch.randperm(dim)[:keep].sort().values for _ in range(batch * heads)])
        channels = channels.view(batch, heads, keep)
        self.start = max(0, length - recent) if window_start is None else window_start
        rows = torch.randn(batch, heads, self.capacity, keep).to(dtype)
        rows[:, :, :length] = narrow_rows(self.k, channels)
        stays = torch.zeros(batch, heads, dim, dtype=torch.bool).scatter_(-1, channels, True)
        self.dense = self.k.clone()
        self.dense[:, :, : self.start] = self.k[:, :, : self.start].masked_fill(~stays[:, :, None], 0)
        self.behind = torch.zeros(*rows.shape[:3], dim).to(dtype).scatter(3, _spread(channels, self.capacity), rows)
        self.keys = {"rows": rows, "channels": channels, "ring": ring_of(self.k, length, recent + 1)}
        self.values = {"rows": self.v.clone()}

    def stored(self, tensors):
        start = torch.tensor(self.start) if tensors else self.start
        return Stored(self.keys, start), Stored(self.values)

    def expected(self, call, columns, scale, oldest=0):
        """The stock attention over the stored rows, the call's own rows, and rows after them."""
        end = self.length + call.k.shape[2]
        keys = torch.cat([self.dense, call.k, self.behind[:, :, end:]], 2)[:, :, oldest : oldest + columns]
        values = torch.cat([self.v[:, :, : self.length], call.v, self.v[:, :, end:]], 2)
        values = values[:, :, oldest : oldest + columns]
        group = call.q.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        return F.scaled_dot_product_attention(call.q, keys, values, call.mask, 0.0, call.causal, scale=scale)


def _spread(channels, rows):
    return channels[:, :, None].expand(-1, -1, rows, -1)


def ways(past):
    """Every way to attend."""
    sides = past.format.keys, past.format.values
    return {
        "narrow": lambda *given: attention.narrow(*given, sides),
        "decoded": lambda *given: attention.decoded(*given, sides),
        "chosen": past.format.attend,
    }


CASES = [  # B Hq H N D T W S window_start
    (1, 1, 1, 1, 8, 4, 3, 9, None),
    (2, 4, 2, 1, 8, 8, 3, 9, None),
    (2, 7, 1, 3, 16, 1, 4, 12, None),
    (3, 2, 2, 16, 8, 5, 0, 6, None),
    (1, 14, 2, 17, 8, 3, 2, 5, None),
    (2, 4, 2, 20, 8, 4, 32, 7, None),
    (1, 2, 1, 2, 8, 4, 4, 10, 10),
    (1, 2, 1, 2, 8, 4, 4, 10, 8),
    (2, 2, 1, 5, 8, 4, 4, 2, None),
    (1, 4, 4, 1, 6, 2, 1, 1, None),
]


def masks(batch, q_heads, n_new, start, columns):
    causal_mask = torch.arange(columns) <= torch.arange(start, start + n_new)[:, None]
    holes = causal_mask & (torch.rand(batch, 1, n_new, columns) > 0.3)
    holes[..., -1, :] = False  # a query that attends to nothing
    return {
        "bool": causal_mask,
        "holes": holes,
        "float": torch.where(causal_mask, torch.randn(batch, q_heads, n_new, columns).double(), -math.inf),
        "lowest": torch.zeros(holes.shape).double().masked_fill(~holes, torch.finfo(torch.float64).min),
        "bias": torch.randn(1, q_heads, 1, columns).double(),
        "one": torch.randn(batch, 1, n_new, 1).double(),
        "none": None,
    }


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "holes", "float", "lowest", "bias", "one", "none", "is_causal"])
@pytest.mark.parametrize("tensors", [False, True], ids=["ints", "tensors"])
def test_attention(case, kind, tensors):
    batch, q_heads, heads, n_new, dim, keep, recent, start, window_start = case
    past = Past(batch, heads, start, dim, keep, recent, window_start)
    q, k, v = (torch.randn(batch, h, n_new, dim).double() for h in (q_heads, heads, heads))
    for columns in [start + n_new, start + n_new + 3] if tensors and kind != "none" else [start + n_new]:
        mask = masks(batch, q_heads, n_new, start, columns).get(kind)
        call = Call(q, k, v, mask, 0.3, kind == "is_causal")
        span = Span(torch.tensor(start) if tensors else start, 0, columns)
        for name, way in ways(past).items():
            got = way(call, *past.stored(tensors), span)
            torch.testing.assert_close(
                got,
                past.expected(call, columns, 0.3),
                msg=lambda m: f"{name}, {columns}: {m}",  # noqa: B023
            )


@pytest.mark.parametrize(("oldest", "n_new"), [(1, 1), (5, 1), (9, 1), (1, 3), (5, 3), (9, 3), (10, 3)])
def test_the_oldest_positions_are_not_read(oldest, n_new):
    """A bounded window may exclude stored tokens, and even the call's own first ones."""
    past = Past(2, 2, 9, 8, 3, 4)
    call = Call(*(torch.randn(2, h, n_new, 8).double() for h in (4, 2, 2)), None, 0.3)
    columns = 9 + n_new - oldest
    for name, way in ways(past).items():
        got = way(call, *past.stored(False), Span(9, oldest, columns))
        expected = past.expected(call, columns, 0.3, oldest)
        torch.testing.assert_close(got, expected, msg=lambda m: f"{name}: {m}")  # noqa: B023


def rolled(past, capacity):
    """The last ``capacity`` tokens of a past, position p in row p % capacity."""
    positions = torch.arange(past.length - capacity, past.length)
    out = {}
    for name, rows in (("keys", past.keys["rows"]), ("values", past.values["rows"])):
        out[name] = torch.empty_like(rows[:, :, :capacity])
        out[name][:, :, positions % capacity] = rows[:, :, positions]
    keys = past.keys | {"rows": out["keys"]}
    return Stored(keys, torch.tensor(past.start)), Stored({"rows": out["values"]})


@pytest.mark.parametrize("recent", [0, 3, 30])
@pytest.mark.parametrize("n_new", [1, 4, 20])
@pytest.mark.parametrize("joined", [7, 8])
def test_a_buffer_in_a_circle(recent, n_new, joined):
    past, capacity = Past(2, 2, 21, 8, 3, recent), 8
    call = Call(*(torch.randn(2, h, n_new, 8).double() for h in (4, 2, 2)), None, 0.3)
    columns, oldest = joined + n_new, 21 - joined
    mask = torch.rand(2, 1, n_new, columns) < 0.8
    call = call._replace(mask=mask)
    span = Span(torch.tensor(21), torch.tensor(oldest), columns, rolling=True)
    for name, way in ways(past).items():
        got = way(call, *rolled(past, capacity), span)
        expected = past.expected(call, columns, 0.3, oldest)
        torch.testing.assert_close(got, expected, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("name", ["narrow", "decoded"])
def test_poison_in_unused_rows_stays_there(name):
    """Rows after the tokens may hold any finite value; ring rows below the window any value at all."""
    past = Past(1, 1, 9, 8, 4, 3, window_start=9)
    past.keys["ring"].fill_(math.nan)
    call = Call(*(torch.randn(1, h, 1, 8).double() for h in (2, 1, 1)), None, 0.3)
    got = ways(past)[name](call, *past.stored(False), Span(9, 0, 10))
    torch.testing.assert_close(got, past.expected(call, 10, 0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_new", [1, 20])
def test_dtypes(dtype, n_new):
    past = Past(2, 2, 9, 16, 8, 3, dtype=dtype)
    call = Call(*(torch.randn(2, h, n_new, 16).to(dtype) for h in (4, 2, 2)))
    got = past.format.attend(call, *past.stored(False), Span(9, 0, 9 + n_new))
    assert got.dtype == dtype
    past.dense, past.behind, past.v = past.dense.double(), past.behind.double(), past.v.double()
    exact = past.expected(Call(*(x.double() for x in call[:3])), 9 + n_new, 0.25)
    torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("recent", [0, 2, 5, 40])
def test_dense(recent):
    past = Past(2, 3, 11, 8, 3, recent)
    past.keys["rows"][:, :, 11:] = 0
    for columns in (11, 14):
        expected = F.pad(past.dense, (0, 0, 0, columns - 11))
        for length in (11, torch.tensor(11)):
            got = attention.dense(
                past.format.keys, past.stored(isinstance(length, torch.Tensor))[0], 0, length, columns
            )
            assert torch.equal(got, expected)


@pytest.mark.parametrize("tensors", [False, True], ids=["ints", "tensors"])
def test_logits_in_order(tensors):
    past, n_new = Past(2, 2, 9, 8, 3, 4), 3
    q, k = torch.randn(2, 4, n_new, 8).double(), torch.randn(2, 2, n_new, 8).double()
    columns = 14 if tensors else 12
    span = Span(torch.tensor(9) if tensors else 9, 0, columns)
    got = past.format.logits(q, k, past.stored(tensors)[0], span)
    keys = torch.cat([past.dense, k, past.behind[:, :, 12:]], 2)[:, :, :columns].repeat_interleave(2, 1)
    torch.testing.assert_close(got, q @ keys.mT)


def test_append_rows_writes_only_its_rows():
    rows = torch.randn(2, 2, 3, 4)
    for start in (4, torch.tensor(4)):
        buffer = torch.zeros(2, 2, 9, 4)
        append_rows(buffer, rows, Span(start, 0, 9))
        assert torch.equal(buffer[:, :, 4:7], rows)
        assert buffer.count_nonzero() == rows.count_nonzero()


@pytest.mark.parametrize("n_new", [1, 4, 5, 12])
def test_append_rows_in_a_circle(n_new):
    buffer, rows = torch.zeros(1, 1, 5, 1), torch.arange(1.0, n_new + 1)[None, None, :, None]
    append_rows(buffer, rows, Span(torch.tensor(13), 0, 5, rolling=True))
    for i in range(max(0, n_new - 5), n_new):
        assert buffer[0, 0, (13 + i) % 5, 0] == i + 1


@pytest.mark.host
def test_append_rows_past_the_end_raises():
    with pytest.raises(IndexError):
        append_rows(torch.zeros(2, 2, 9, 4), torch.randn(2, 2, 3, 4), Span(7, 0, 9))
